"""The callback for transformers' Trainer: precisions, optimizers, models and data of several kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from recalibrated import X, expected, norms, statistics
from trainers import MARKS, Images, Spy, Stream, arguments, net, one_shot, saved, trained
from transformers import ResNetForImageClassification, Trainer, TrainerCallback

from runningbn.integrations.transformers import RecalibrateBatchNorm

pytestmark = MARKS


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
