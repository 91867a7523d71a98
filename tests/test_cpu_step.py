"""Steps that the extension for the CPU does at once: bit for bit, they are what Python does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import channels_last, each_dtype, each_rule, noise
from step_extension import counted, in_python
from steps import assert_identical, buffers_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runningbn import (
    Horizon,
    PreciseBatchNorm1d,
    PreciseBatchNorm2d,
    PreciseBatchNorm3d,
    RunningBatchNorm,
    batchnormify,
)
from runningbn.kernels import cpu_step

if cpu_step.unavailable() is not None:
    pytest.skip(f"the extension for steps: {cpu_step.unavailable()}", allow_module_level=True)


def step(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """One step; all that it gives and leaves, the versions of the buffers and the layout of what comes out included."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(noise(tuple(y.shape), 7, y.dtype).as_strided(y.shape, y.stride()) if dy is None else dy)
    found = {"y": y.detach(), "x.grad": x.grad, "strides": torch.tensor([*y.stride(), *x.grad.stride()])}
    found |= {f"{name}.grad": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return found | {f"{name} version": torch.tensor(buffer._version) for name, buffer in layer.named_buffers()}


def assert_same(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert_identical(one, other)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "running": RunningBatchNorm,
    "limited lag": lambda c, **k: RunningBatchNorm(c, max_lag=0.05, **k),
    "exact": lambda c, **k: RunningBatchNorm(c, gradient="exact", **k),
    "precise": PreciseBatchNorm2d,
}
SHAPES = {
    "(1, 8, 2, 2)": (1, 8, 2, 2), "(3, 1, 4, 4)": (3, 1, 4, 4), "(1, 1, 3, 3)": (1, 1, 3, 3),
    "(6, 70, 1, 1)": (6, 70, 1, 1), "(2, 40, 30, 30)": (2, 40, 30, 30),
}  # fmt: skip
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


# ------------------------------------------------------------------------------------------------------------ the same


@each_layer
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["planes", "rows"])
@each_dtype(torch.float32, torch.bfloat16, torch.float16, torch.float64)
def test_steps_are_the_same_bit_for_bit(make, shape, layout, dtype):
    found = []
    for way in (counted, in_python):
        layer = make(shape[1]).to(torch.float64 if dtype is torch.float64 else torch.float32)
        with way() as counts:
            found.append([step(layer, layout(noise(shape, seed, dtype) * 2 + seed)) for seed in range(3)])
        assert way is in_python or counts == {"forward": 3, "backward": 3}
    assert_same(*found)


@each_layer
@each_rule()
@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_whatever_the_rule_and_the_parameters(make, momentum, affine):
    found = []
    for way in (counted, in_python):
        layer = make(5, momentum=momentum, **affine)
        with way() as counts:
            found.append([step(layer, noise((n, 5, 3, 3), n)) for n in (1, 4, 2)])
        assert way is in_python or counts == {"forward": 3, "backward": 3}
    assert_same(*found)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (PreciseBatchNorm1d, (4, 3)),
        (PreciseBatchNorm1d, (4, 3, 5)),
        (PreciseBatchNorm3d, (2, 3, 2, 2, 2)),
        (RunningBatchNorm, (4, 3)),
        (RunningBatchNorm, (2, 3, 2, 2, 2, 2)),
        (lambda c: batchnormify(nn.BatchNorm2d(c)), (2, 3, 2, 2)),
        (lambda c: batchnormify(nn.BatchNorm2d(c), "precise"), (2, 3, 2, 2)),
    ],
)
def test_every_layer_is_taken(layer, shape):
    with counted() as counts:
        layer = layer(shape[1])
        step(layer, noise(shape, 0))
    assert counts == {"forward": 1, "backward": 1}
    if isinstance(layer, RunningBatchNorm):
        assert layer.input_dim == len(shape)


def edited(layer: nn.Module) -> Iterator[None]:
    """What may happen to a layer between steps, one after the other."""
    yield
    layer.eval()(noise((2, 6, 3, 3), 11))
    layer.train()
    yield
    layer.load_state_dict(nn.BatchNorm2d(6).state_dict(), strict=True)
    yield
    layer.running_mean = torch.arange(6.0)
    yield
    layer.eps, layer.momentum = 0.1, 0.3
    yield
    layer.double()
    yield
    layer.float()
    layer.weight = nn.Parameter(torch.full((6,), 2.0))
    yield
    layer._buffers["count"] = layer._buffers["count"].clone()
    yield
    layer.sums.data = layer.sums.data.clone()
    yield
    layer.momentum = Horizon(samples=64)
    if isinstance(layer, RunningBatchNorm):
        layer.max_lag = 0.5
    yield
    layer.reset_running_stats()
    yield


@each_layer
def test_whatever_happens_to_the_layer_in_between(make):
    found = []
    for way in (counted, in_python):
        layer, steps = make(6), []
        with way() as counts:
            for i, _ in enumerate(edited(layer)):
                steps.append(step(layer, noise((2, 6, 3, 3), i).to(layer.weight.dtype)))
        assert way is in_python or counts == {"forward": len(steps), "backward": len(steps)}
        found.append(steps)
    assert_same(*found)


def test_a_resized_layer_is_taken_again():
    found = []
    for way in (counted, in_python):
        layer = RunningBatchNorm(6)
        with way() as counts:
            first = step(layer, noise((2, 6, 3), 0))
            layer.running_mean, layer.running_var = layer.running_mean[:4], layer.running_var[:4]
            layer.weight, layer.bias = nn.Parameter(layer.weight[:4].detach()), nn.Parameter(layer.bias[:4].detach())
            found.append([first, step(layer, noise((2, 4, 3), 1))])
        assert way is in_python or counts == {"forward": 2, "backward": 2}
    assert_same(*found)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return y


@each_layer
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_updates_nothing(make, use_reentrant):
    found = []
    for way in (counted, in_python):
        layer = make(4)
        with way() as counts:
            found.append([step(Checkpointed(layer, use_reentrant), noise((2, 4, 3, 1), seed)) for seed in range(2)])
        # Each forward twice.
        assert way is in_python or counts == {"forward": 4, "backward": 2}
        assert layer.num_batches_tracked == 2
    assert_same(*found)


def test_only_the_gradients_that_are_needed():
    found = []
    for way in (counted, in_python):
        layer = RunningBatchNorm(4)
        layer.weight.requires_grad_(False)
        with way() as counts:
            x = noise((2, 4, 3), 0)
            layer(x).backward(noise((2, 4, 3), 1))
            found.append([{"bias.grad": layer.bias.grad, **buffers_of(layer)}])
        assert layer.weight.grad is None
        assert way is in_python or counts == {"forward": 1, "backward": 1}
    assert_same(*found)
