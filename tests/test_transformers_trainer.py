"""The callback for transformers' Trainer: what is evaluated is what is saved, and training does not notice."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from recalibrated import STEPS, OneShot, X, Y, assert_same_training, expected, norms, noting, statistics
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from runningbn import batchnormify
from runningbn.integrations.transformers import RecalibrateBatchNorm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),  # accelerate asks for it without a GPU
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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


def eval_losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_statistics_are_those_of_update_bn_stats_and_evaluation_uses_and_saves_them(tmp_path):
    callback, spy = RecalibrateBatchNorm(), Spy()
    model, trainer = trained(tmp_path, callback, spy, save_strategy="epoch")
    assert torch.equal(statistics(model), expected(model))
    assert callback.report.batches == 3
    assert len(callback.report.layers) == len(norms(model)) > 4
    assert torch.equal(spy.evaluated[-1], statistics(model))
    for epoch in (1, 2):
        assert torch.equal(saved(tmp_path / f"checkpoint-{STEPS * epoch}"), spy.evaluated[epoch - 1])
    # The metric that was logged is that of the final model, and not that of the statistics of training.
    with torch.no_grad():
        loss = model.eval()(X, labels=Y).loss.item()
    assert eval_losses(trainer)[-1] == pytest.approx(loss, rel=1e-5)
    _, plain = trained(tmp_path / "plain")
    assert eval_losses(plain)[-1] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("to", ["torch", "running"])
@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "random"},
        {"train_sampling_strategy": "random", "accelerator_config": {"use_seedable_sampler": False}},
        {"train_sampling_strategy": "random", "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
        {"data": "noisy"},
        {"data": "stream", "max_steps": 8},
    ],
    ids=["seedable sampler", "sampler", "workers", "accumulation", "data set", "stream"],
)
def test_training_goes_on_bit_for_bit_as_without(tmp_path, to, options):
    options = {"num_train_epochs": 3} | options
    kind = options.pop("data", "images")

    def run(*callbacks):
        random.seed(3)
        data = {"images": Images, "noisy": Noisy, "stream": Stream}[kind]()
        return trained(tmp_path, *callbacks, model=net(to), data=data, **options)[0]

    own = Own()
    plain, model = run(), run(own, RecalibrateBatchNorm(), Spy())
    assert len(plain.drawn) >= 8
    assert_same_training(plain, model)
    assert torch.equal(own.own[-1], statistics(plain))
    assert not torch.equal(statistics(model), statistics(plain))


def test_keep_trains_on_with_the_new_statistics(tmp_path):
    for keep in (True, False):
        spy = Spy()
        trained(tmp_path, RecalibrateBatchNorm(keep=keep), spy)
        assert torch.equal(spy.started[STEPS], spy.evaluated[0]) == keep


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, [("evaluation", 3), ("evaluation", 6)]),
        ({"eval_on_start": True}, [("evaluation", 3), ("evaluation", 6)]),
        ({"eval_strategy": "steps", "eval_steps": 2}, [("evaluation", 2), ("evaluation", 4), ("evaluation", 6)]),
        ({"eval_strategy": "no", "save_strategy": "steps", "save_steps": 4}, [("save", 4), ("save", 6)]),
        ({"eval_strategy": "no"}, [("end", 6)]),
        ({"eval_delay": 2, "num_train_epochs": 3}, [("evaluation", 6), ("evaluation", 9)]),
        ({"every": 2, "num_train_epochs": 5}, [("evaluation", 6), ("evaluation", 12)]),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, [("evaluation", 3), ("evaluation", 6)]),
    ],
    ids=["epochs", "before training", "steps", "checkpoints", "neither", "delay", "every 2nd epoch", "best"],
)
def test_when(tmp_path, options, seen):
    options = dict(options)
    callback = RecalibrateBatchNorm(every_n_epochs=options.pop("every", 1))
    spy = Spy(callback)
    _, trainer = trained(tmp_path, callback, spy, **options)
    assert spy.seen == seen
    report = callback.report
    if options.get("eval_strategy") != "no":
        trainer.evaluate()
    assert callback.report is report


def test_the_best_model_keeps_the_statistics_that_it_was_evaluated_with(tmp_path):
    class First(TrainerCallback):
        """The first evaluation is the best, and training stops in an epoch without one."""

        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_save = state.global_step == STEPS

    spy = Spy()
    callbacks = First(), RecalibrateBatchNorm(), spy
    # In another order, the statistics of the same weights would differ.
    options = {"load_best_model_at_end": True, "save_strategy": "epoch", "train_sampling_strategy": "random"}
    model, trainer = trained(tmp_path, *callbacks, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert torch.equal(statistics(model), spy.evaluated[0])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {"save_strategy": "epoch", "train_sampling_strategy": "random", "num_train_epochs": 3}
    whole, _ = trained(tmp_path / "a", RecalibrateBatchNorm(), model=net("running"), **options)
    trained(tmp_path / "b", RecalibrateBatchNorm(), model=net("running"), **options)
    moved = (tmp_path / "b" / "checkpoint-6").rename(tmp_path / "moved")  # the directory is not the output's
    resumed, _ = trained(tmp_path / "c", RecalibrateBatchNorm(), model=net("running"), resume=str(moved), **options)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    # Without the callback, the statistics of the checkpoint would be those of training.
    other, _ = trained(tmp_path / "d", model=net("running"), resume=str(moved), **options)
    assert not all(map(torch.equal, whole.parameters(), other.parameters()))


def test_options_survive_when_the_trainer_restores_callbacks(tmp_path, caplog):
    trained(tmp_path, RecalibrateBatchNorm(num_iters=2), save_strategy="epoch", num_train_epochs=1)
    callback = RecalibrateBatchNorm(num_iters=2)
    resume = str(tmp_path / "checkpoint-3")
    trained(tmp_path, callback, resume=resume, restore_callback_states_from_checkpoint=True, num_train_epochs=2)
    assert callback.report.batches == 2


@pytest.mark.filterwarnings("ignore:.*bfloat16:UserWarning")
def test_mixed_precision(tmp_path):
    model, _ = trained(tmp_path, RecalibrateBatchNorm(), bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        with_autocast = expected(model)
    assert torch.equal(statistics(model), with_autocast)
    assert not torch.equal(with_autocast, expected_without_autocast(model))


def expected_without_autocast(model):
    plain = net()
    plain.load_state_dict(model.state_dict())
    return expected(plain)


def test_optimizers_with_averaged_weights(tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "num_train_epochs": 3}
    plain, _ = trained(tmp_path, model=net("running"), **options)
    spy = Spy()
    model, _ = trained(tmp_path, RecalibrateBatchNorm(), spy, model=net("running"), **options)
    # The evaluation left the averaged weights in the model.
    torch.testing.assert_close(spy.evaluated[-1], expected(model))
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


def test_optimizers_with_averaged_weights_stay_in_training_before_a_checkpoint(tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "eval_strategy": "no"}
    plain, _ = trained(tmp_path / "a", save_strategy="epoch", **options)
    model, _ = trained(tmp_path / "b", RecalibrateBatchNorm(), save_strategy="epoch", **options)
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert torch.equal(saved(tmp_path / "b" / "checkpoint-6"), expected(model))


class Plain(nn.Module):
    """A model that is not of transformers, and does not know labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, pixel_values):
        return {"logits": self.layers(pixel_values)}


def loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


def test_labels_that_the_model_does_not_accept(tmp_path):
    keywords = {"compute_loss_func": loss}
    model, _ = trained(tmp_path, RecalibrateBatchNorm(), model=Plain(), keywords=keywords, label_names=["labels"])
    assert torch.equal(statistics(model), expected(model))


class Weighted(Trainer):
    """Its batches have a part that is no argument of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixel_values"])
        found = loss(outputs, inputs["labels"]) * inputs["weight"].mean()
        return (found, outputs) if return_outputs else found


class WeightedImages(Images):
    def __getitem__(self, i):
        return super().__getitem__(i) | {"weight": 2.0}


def test_a_loss_of_its_own_needs_forward(tmp_path):
    options = {"model": Plain(), "data": WeightedImages(), "kind": Weighted, "eval_strategy": "no"}
    with pytest.raises(TypeError, match=r"here pixel_values, weight, and .*'weight'; give forward="):
        trained(tmp_path, RecalibrateBatchNorm(), remove_unused_columns=False, **options)
    callback = RecalibrateBatchNorm(forward=lambda model, batch: model(batch["pixel_values"]))
    model, _ = trained(tmp_path, callback, remove_unused_columns=False, **options)
    assert torch.equal(statistics(model), expected(model))


def test_a_loader_of_its_own_and_options(tmp_path):
    callback = RecalibrateBatchNorm(1, dataloader=X.split(6), normalize="population", prior=8)
    trained(tmp_path, callback)
    assert (callback.report.batches, callback.report.layers[0].samples) == (1, 6)
    assert callback.report.layers[0].residual < 1e-4


def test_data_that_can_be_read_again(tmp_path):
    callback = RecalibrateBatchNorm()
    model, _ = trained(tmp_path, callback, data=Stream(), max_steps=6)
    assert torch.equal(statistics(model), expected(model))


def test_data_that_can_be_read_only_once(tmp_path):
    with pytest.raises(ValueError, match=r"OneShot can be read only once.*separate dataloader="):
        trained(tmp_path, RecalibrateBatchNorm(), data=one_shot(), max_steps=3)
    model, _ = trained(tmp_path, RecalibrateBatchNorm(dataloader=X.split(8)), data=one_shot(), max_steps=3)
    assert len(model.drawn) == 3
    assert torch.equal(statistics(model), expected(model))


def test_no_training_loader(tmp_path):
    class Loses(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.callback_handler.train_dataloader = None

    trainer = Trainer(
        net(), arguments(tmp_path, eval_strategy="no"), train_dataset=Images(),
        callbacks=[Loses(), RecalibrateBatchNorm()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="no training loader; pass dataloader="):
        trainer.train()


def test_frozen_layers_stay_frozen(tmp_path):
    class Frozen(ResNetForImageClassification):
        def train(self, mode=True):
            super().train(mode)
            norms(self)[0].eval()
            return self

    model = net()
    model.__class__ = Frozen
    before = norms(model)[0].running_mean.clone()
    callback = RecalibrateBatchNorm()
    trained(tmp_path, callback, model=model)
    assert torch.equal(norms(model)[0].running_mean, before)
    assert len(callback.report.layers) == len(norms(model)) - 1
    assert torch.equal(statistics(model), expected(model.train()))


def test_a_failure_leaves_the_model_as_it_was(tmp_path):
    at = []

    def forward(model, batch):
        if at:
            raise RuntimeError("no")
        at.append({name: value.clone() for name, value in model.state_dict().items()})
        model(batch["pixel_values"])

    model = net()
    with pytest.raises(RuntimeError, match="no"):
        trained(tmp_path, RecalibrateBatchNorm(forward=forward), model=model)
    assert all(torch.equal(value, at[0][name]) for name, value in model.state_dict().items())


def test_gradients_stay(tmp_path):
    model, gradients = net(), []

    class Sets(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 2.0)

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            gradients.extend(parameter.grad.clone() for parameter in model.parameters())

    trained(tmp_path, Sets(), RecalibrateBatchNorm(), model=model)
    assert len(gradients) == 2 * len(list(model.parameters()))
    assert all((gradient == 2).all() for gradient in gradients)


@pytest.mark.parametrize("what", ["evaluation", "checkpoint"])
def test_being_listed_too_early_is_told(tmp_path, caplog, what):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                setattr(control, {"evaluation": "should_evaluate", "checkpoint": "should_save"}[what], True)

    with caplog.at_level(logging.WARNING, "runningbn"):
        trained(tmp_path, Asks(), RecalibrateBatchNorm())
        assert caplog.records == []
        trained(tmp_path, RecalibrateBatchNorm(), Asks())
    (record,) = caplog.records
    assert f"{what} used the statistics of training: list RecalibrateBatchNorm after" in record.getMessage()


def test_the_report_is_logged(tmp_path, caplog):
    callback = RecalibrateBatchNorm()
    with caplog.at_level(logging.INFO, "runningbn"):
        trained(tmp_path, callback)
    told = [record for record in caplog.records if record.getMessage().startswith("epoch")]
    assert [record.levelno for record in told] == [logging.INFO] * 2
    assert "epoch 1, step 6" in told[1].getMessage()
    assert str(callback.report) in told[1].getMessage()


def check_one_process(tmp_path, kind):
    """Run by torchrun in each of two processes: all end with the statistics of all data, and train as without."""
    data = {"images": Images, "stream": Stream}[kind]
    options = {"per_device_train_batch_size": 4, "max_steps": 6, "ddp_backend": "gloo", "save_strategy": "steps"}
    options |= {"save_steps": 6, "eval_strategy": "no", "ddp_find_unused_parameters": False}
    plain, _ = trained(tmp_path / "a", data=data(), **options)
    callback = RecalibrateBatchNorm()
    model, trainer = trained(tmp_path / "b", callback, data=data(), **options)
    assert trainer.args.world_size == 2
    assert_same_training(plain, model)
    assert callback.report.batches == 6
    assert callback.report.layers[0].samples == 24
    assert torch.equal(norms(model)[0].num_batches_tracked, norms(plain)[0].num_batches_tracked)
    torch.testing.assert_close(statistics(model), expected(model, X.split(4), process_group=False))
    torch.distributed.barrier()
    assert torch.equal(saved(tmp_path / "b" / "checkpoint-6"), statistics(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "stream"])
def test_two_processes(tmp_path, kind):
    here = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, pathlib, torch, test_transformers_trainer as t\n"
        f"t.check_one_process(pathlib.Path(sys.argv[1]), {kind!r})\n"
        "print('right', flush=True)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2
