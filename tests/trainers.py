"""What the tests of the callback for transformers' Trainer share: data, a net, a training, and what it notes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from recalibrated import OneShot, X, Y, noting, statistics
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from runningbn import batchnormify

MARKS = [
    pytest.mark.usefixtures("accelerate_forgets"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),  # accelerate asks for it without a GPU
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


class Images(Dataset):
    def __init__(self, images=X):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": Y[i]}


class Noisy(Images):
    """Augments with generators of its own."""

    def __init__(self):
        super().__init__()
        self.torch, self.python = torch.Generator().manual_seed(5), random.Random(6)

    def __getitem__(self, i):
        item = super().__getitem__(i)
        noise = torch.randn(3, 8, 8, generator=self.torch) + self.python.random() + random.random()
        return item | {"pixel_values": item["pixel_values"] + noise}


class Stream(IterableDataset):
    """Can be read again."""

    def __iter__(self):
        return (Images()[i] for i in range(24))


def one_shot():
    return OneShot(map(Images().__getitem__, range(24)))


def net(to="torch"):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return noting(batchnormify(ResNetForImageClassification(config), to))


def saved(path):
    """The statistics in a checkpoint."""
    model = net()
    state = load_file(Path(path) / "model.safetensors")
    model.load_state_dict(state)
    return statistics(model)


class Spy(TrainerCallback):
    """Notes when there are new statistics, and what the model has after a step, before and in evaluation."""

    def __init__(self, watched=None):
        self.watched, self.seen, self.reports, self.own, self.started, self.evaluated = watched, [], [], [], [], []

    def look(self, state, hook):
        report = getattr(self.watched, "report", None)
        if report is not None and all(report is not other for other in self.reports):
            self.reports.append(report)
            self.seen.append((hook, state.global_step))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.look(state, "step")
        self.started.append(statistics(model))

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.look(state, "evaluation")
        self.evaluated.append(statistics(model))

    def on_save(self, args, state, control, **kwargs):
        self.look(state, "save")

    def on_train_end(self, args, state, control, **kwargs):
        self.look(state, "end")


class Own(TrainerCallback):
    """Notes the statistics of training after a step; listed before the callback that replaces them."""

    def __init__(self):
        self.own = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.own.append(statistics(model))


def arguments(tmp_path, **options):
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    small = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    defaults = {
        "eval_strategy": "epoch",
        "learning_rate": 0.05,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(tmp_path), **(quiet | small | defaults | options))


def trained(tmp_path, *callbacks, model=None, data=None, kind=Trainer, resume=None, keywords=(), **options):
    model = model or net()
    evaluation = None if options.get("eval_strategy") == "no" else Images()
    trainer = kind(
        model, arguments(tmp_path, **options), train_dataset=Images() if data is None else data,
        eval_dataset=evaluation, callbacks=list(callbacks), **dict(keywords),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer
