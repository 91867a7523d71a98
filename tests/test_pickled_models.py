"""Models that version 0.1 pickled whole load, and are what they were.

tests/data/models_0.1.pt was written by that version: ``torch.save`` of three models, converted and trained for a step,
their input, and their outputs in evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runningbn import Horizon, PreciseBatchNorm2d, RunningBatchNorm, batchnormify

PATH = Path(__file__).parent / "data" / "models_0.1.pt"


@pytest.fixture
def saved() -> dict[str, Any]:
    contents: dict[str, Any] = torch.load(PATH, weights_only=False)
    return contents


def test_they_evaluate_as_they_did(saved):
    for model, expected in zip(saved["models"], saved["outputs"], strict=True):
        # Convolutions round by the number of threads.
        torch.testing.assert_close(model.eval()(saved["input"]), expected)


def test_their_layers_are_those_of_today(saved):
    mixed, centred, precise = saved["models"]
    assert type(mixed[1]) is RunningBatchNorm
    assert mixed[3].momentum == Horizon(samples=128)  # the default of 0.1
    assert mixed[10].gradient == "exact"
    assert type(precise[1]) is PreciseBatchNorm2d
    assert centred[0].weight_offset.shape == (4,)


def test_they_train_on_and_go_back(saved):
    for model in saved["models"]:
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("running_mean")}
        model.train()(2 * saved["input"] + 1).square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert all(not torch.equal(model.get_buffer(name), value) for name, value in before.items())
        expected = model.eval()(saved["input"])
        batchnormify(model, "torch", where=lambda name, layer: getattr(layer, "input_dim", 4) is not None)
        assert torch.allclose(model(saved["input"]), expected, atol=1e-5)
        assert not any(isinstance(layer, RunningBatchNorm) for layer in model)


def test_a_converted_layer_is_now_an_instance_of_what_it_was(saved):
    mixed = saved["models"][0]
    assert not isinstance(mixed[3], nn.BatchNorm2d)
    assert isinstance(batchnormify(mixed)[3], nn.BatchNorm2d)
