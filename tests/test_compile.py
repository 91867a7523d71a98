"""torch.compile: one graph, the gradients and statistics of eager mode, no recompilation from step to step.

Traced code that overwrites statistics buffers is known to compile to silently wrong gradients, so every test here runs
several steps and compares the gradients of each.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import channels_last, noise, with_random_affine
from torch import nn
from torch._dynamo.utils import counters
from versions import needs_layouts_of_gradients

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, SquareRoot
from runningbn.ops.law import Law
from runningbn.ops.state import GradientState, NoiseState, State

LAYERS = {
    "running": lambda: RunningBatchNorm(4),
    "running-exact": lambda: RunningBatchNorm(4, gradient="exact"),
    "running-limited": lambda: RunningBatchNorm(4, max_lag=1e-3),
    "running-squareroot": lambda: RunningBatchNorm(4, momentum=SquareRoot(0.1)),
    "running-cumulative": lambda: RunningBatchNorm(4, momentum=None),
    "running-float": lambda: RunningBatchNorm(4, momentum=0.1, affine=False),
    "precise": lambda: PreciseBatchNorm2d(4),
    "precise-cumulative": lambda: PreciseBatchNorm2d(4, momentum=None, bias=False),
}


def layers(*quick: str) -> pytest.MarkDecorator:
    marks = {name: () if name in quick else pytest.mark.slow for name in LAYERS}
    return pytest.mark.parametrize("make", [pytest.param(LAYERS[name], id=name, marks=marks[name]) for name in LAYERS])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pair(make, **options):
    """A layer, and a compiled copy of it."""
    eager = with_random_affine(make())
    copied = copy.deepcopy(eager)
    return eager, copied, torch.compile(copied, fullgraph=True, **options)


def assert_steps_agree(eager, copied, compiled, sizes, shape=(4, 6, 5), loss=lambda y, dy: (y * dy).sum()):
    for step, size in enumerate(sizes):
        x, dy = noise((size, *shape), step), noise((size, *shape), 100 + step)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(inputs[i]) for i, layer in enumerate((eager, compiled))]
        for layer, y in zip((eager, copied), outputs):
            layer.zero_grad()
            loss(y, dy).backward()
        # Sums over up to 240 float32 elements of order 1, in another order: 240·6e-8.
        close = {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(outputs[1], outputs[0], **close)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
        for got, expected in zip(copied.parameters(), eager.parameters()):
            torch.testing.assert_close(got.grad, expected.grad, **close)
        for (name, got), expected in zip(copied.named_buffers(), eager.buffers()):
            # `sums` are differences of numbers as large as the count, and next to zero.
            atol = 2e-5 * x[:, 0].numel() if name.endswith("sums") else 2e-5
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=atol, msg=f"{name} differs")


# What aot_eager runs is what inductor gets.
QUICK = ("running", "running-exact", "precise")
BY_AOT_EAGER = [pytest.param(LAYERS[name], "aot_eager", id=f"{name}-aot_eager") for name in QUICK]
BY_INDUCTOR = [pytest.param(LAYERS[name], "inductor", id=f"{name}-inductor", marks=pytest.mark.slow) for name in LAYERS]


@pytest.mark.parametrize(("make", "backend"), BY_AOT_EAGER + BY_INDUCTOR)
def test_steps_equal_eager_in_one_graph(make, backend, way):
    """And so does evaluation after them."""
    eager, copied, compiled = pair(make, backend=backend)
    assert_steps_agree(eager, copied, compiled, [8] * 4)
    assert counters["stats"]["unique_graphs"] == 1
    eager.eval(), copied.eval()
    assert_steps_agree(eager, copied, compiled, [8] * 2)


@layers("running")
def test_dynamic_batch_sizes_need_one_extra_graph_for_batch_1(make, way):
    eager, copied, compiled = pair(make, backend="aot_eager", dynamic=True)
    assert_steps_agree(eager, copied, compiled, [8, 5, 3, 1, 7, 2, 1])
    assert counters["stats"]["unique_graphs"] == 2


def test_two_dimensional_input(way):
    eager, copied, compiled = pair(lambda: PreciseBatchNorm1d(4), backend="aot_eager")
    assert_steps_agree(eager, copied, compiled, [8] * 3, shape=(4,))


def test_an_activation_in_place_after_it(way):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RunningBatchNorm(4)

        def forward(self, x):
            return F.relu(self.norm(x), inplace=True)

    eager, copied, compiled = pair(Block, backend="aot_eager")
    assert_steps_agree(eager, copied, compiled, [8] * 3)


@pytest.mark.slow
def test_the_same_layer_twice_in_one_graph(way):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RunningBatchNorm(4)

        def forward(self, x):
            return self.norm(self.norm(x) * 2 + 1)

    eager, copied, compiled = pair(Twice, backend="aot_eager")
    assert_steps_agree(eager, copied, compiled, [8] * 3)


@needs_layouts_of_gradients
@pytest.mark.parametrize("make", [LAYERS["running"], LAYERS["running-float"], LAYERS["precise"]])
@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (6, 4, 5), (3, 4, 2, 3, 2)], ids=len)
def test_the_gradient_of_channels_last_is_channels_last(make, shape, way):
    if make is LAYERS["precise"] and len(shape) != 4:
        pytest.skip("takes four dimensions")
    layer = torch.compile(make(), fullgraph=True, backend="aot_eager")
    x = channels_last(noise(shape, 0)).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, channels_last(noise(shape, 1)))
    assert dx.stride() == y.stride() == x.stride()


def test_a_gradient_in_another_layout(way):
    layer = RunningBatchNorm(4)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for given in (noise((6, 4, 5, 5), 1), torch.ones(()).expand(6, 4, 5, 5), noise((6, 4, 5, 10), 2)[..., ::2]):
        found = []
        for run in (layer, compiled):
            x = channels_last(noise((6, 4, 5, 5), 0)).requires_grad_()
            found += torch.autograd.grad(run(x), x, given)
        torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


def test_a_channel_that_is_not_finite_is_guarded_as_in_eager(way):
    eager, copied, compiled = pair(lambda: RunningBatchNorm(4), backend="aot_eager")
    assert_steps_agree(eager, copied, compiled, [8] * 2)
    x = noise((8, 4, 6, 5), 7)
    x[3, 1] = float("nan")
    eager(x), compiled(x)
    for got, expected in zip(copied.buffers(), eager.buffers()):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-4)
        assert torch.isfinite(got).all()


def arguments(name: str, channels: int = 3) -> list[torch.Tensor]:
    """A state that has seen something, as an operator takes it, and the sums of a batch of 10 elements."""
    layer = RunningBatchNorm(channels)
    layer(noise((6, channels), 1))
    fields = (*State._fields, *NoiseState._fields) if name == "update_running" else State._fields
    sqrs, count = noise((channels,), 3).square(), torch.full((channels,), 10.0)
    batch = [noise((channels,), 2), torch.zeros(channels), sqrs, count]
    return [*(getattr(layer, field).clone() for field in fields), *batch]


@pytest.mark.parametrize("name", ["update_exact", "update_running", "update_batch"])
@pytest.mark.parametrize("whole_batches", [True, False])
def test_the_updates_are_sound_operators(name, whole_batches):
    operator = getattr(torch.ops.runningbn, name).default
    tensors = arguments(name)
    torch.library.opcheck(operator, (*tensors, torch.full((3,), 0.3), 10, whole_batches, *Law(max_lag=0.25)))


def test_the_update_of_the_gradient_is_a_sound_operator():
    state = [noise((3,), seed) for seed in range(len(GradientState._fields))]
    batch = [noise((3,), 10 + seed) for seed in range(2)]
    rstd, trust, offset, batch_std = (torch.full((3,), value) for value in (1.5, 0.3, 0.1, 0.8))
    torch.library.opcheck(
        torch.ops.runningbn.update_gradient.default, (*state, *batch, rstd, trust, offset, batch_std, 10)
    )
