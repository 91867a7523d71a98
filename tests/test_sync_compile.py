"""sync=True under torch.compile: one graph, the gradients and statistics of eager mode, and no rank left waiting."""

import copy
import functools
import warnings

import pytest
import torch
from cases import noise, with_random_affine
from processes import ranks
from steps import training_step
from test_sync import SHAPE, SIZES, layer_of, parts
from torch import Tensor, nn
from torch._dynamo.utils import counters
from versions import needs_graph_breaks_with_named_tuples

from runningbn import PreciseBatchNorm2d, RunningBatchNorm
from runningbn.ops.law import Law


def train_compiled(rank: int, build, sizes: list[tuple[int, ...]], options: dict) -> int:
    """The number of graphs; outputs, gradients and statistics are compared with those of eager mode here."""
    torch._dynamo.reset()
    counters.clear()
    eager = build()
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True, **options)
    for step, step_sizes in enumerate(sizes):
        x, dy = parts(step, step_sizes, torch.float32)[rank]
        expected, actual = training_step(eager, x, dy), {}
        x = x.requires_grad_()
        compiled_layer.zero_grad()
        compiled(x).backward(dy)
        actual = {"dx": x.grad, **{f"d{name}": p.grad for name, p in compiled_layer.named_parameters()}}
        for name, value in actual.items():
            # Sums over up to 240 float32 elements of order 1, in another order.
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=f"step {step}: {name}")
        for (name, value), buffer in zip(compiled_layer.named_buffers(), eager.buffers()):
            atol = 1e-4 * 240 if name.endswith("sums") else 1e-4
            torch.testing.assert_close(value, buffer, rtol=1e-4, atol=atol, msg=f"step {step}: {name}")
    return counters["stats"]["unique_graphs"]


def one_layer(kind: str) -> nn.Module:
    return layer_of(kind, sync=True)


def two_layers(kind: str) -> nn.Module:
    return nn.Sequential(layer_of(kind, sync=True), nn.Tanh(), with_random_affine(layer_of(kind, sync=True), seed=1))


# What inductor makes of each kind is in test_compile.py.
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("running", "aot_eager"),
        pytest.param("running-limited", "aot_eager", marks=pytest.mark.slow),
        pytest.param("exact", "aot_eager", marks=pytest.mark.slow),
        pytest.param("precise", "aot_eager", marks=pytest.mark.slow),
        pytest.param("running", "inductor", marks=pytest.mark.slow),
        pytest.param("precise", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_ranks_train_as_eager_ones_in_one_graph(kind, backend):
    assert ranks(2)(train_compiled, functools.partial(one_layer, kind), [(5, 3)] * 4, {"backend": backend}) == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"), [("exact", "aot_eager"), ("running", "aot_eager"), ("running", "inductor")]
)
def test_compiled_ranks_meet_where_one_of_them_is_empty(kind, backend):
    # Nothing on an empty rank depends on the collectives, and still it has to take part in each, in order.
    ranks(2)(train_compiled, functools.partial(two_layers, kind), [(5, 3), (0, 3), (5, 3)], {"backend": backend})


@pytest.mark.slow
def test_compiled_ranks_take_ragged_batches():
    sizes = [(5, 3), (2, 3), (7, 6), (1, 4), (0, 3), (0, 0), (3, 0)]
    ranks(2)(train_compiled, functools.partial(one_layer, "precise"), sizes, {"backend": "aot_eager", "dynamic": True})


def compile_without_statistics(rank: int) -> tuple[str, Tensor]:
    torch._dynamo.reset()
    layer = PreciseBatchNorm2d(3, track_running_stats=False, sync=True)
    x = parts(0, SIZES[0], torch.float32)[rank][0]
    try:
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    except Exception as error:
        text = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return text, torch.compile(layer, backend="aot_eager")(x) - layer(x)


@needs_graph_breaks_with_named_tuples
@pytest.mark.slow
def test_without_running_statistics_the_graph_breaks():
    for text, difference in ranks(2)(compile_without_statistics):
        assert "track_running_stats=False cannot be compiled into one graph" in text
        assert difference.abs().max() < 1e-5


def check_operator(rank: int) -> None:
    operator = torch.ops.runningbn.all_gather.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (torch.zeros(2), noise((5,), rank), 2, "0"), test_utils=tests)


def test_the_collective_is_a_sound_operator():
    ranks(2)(check_operator)


@pytest.mark.parametrize("name", ["update_exact_pooled", "update_running_pooled", "update_batch_pooled"])
@pytest.mark.parametrize("samples", [0.0, 10.0])
def test_the_pooled_updates_are_sound_operators(name, samples):
    layer = RunningBatchNorm(3)
    layer(noise((6, *SHAPE), 1))
    state = [buffer.clone() for buffer in layer._layer_state(name == "update_running_pooled").forward_buffers]
    batch = [noise((3,), 2), torch.zeros(3), noise((3,), 3).square(), torch.full((3,), 10.0)]
    operator = getattr(torch.ops.runningbn, name).default
    law = Law(max_lag=0.25)
    torch.library.opcheck(operator, (*state, *batch, torch.full((3,), 0.3), torch.tensor(samples), True, *law))


def test_the_pooled_update_of_the_gradient_is_a_sound_operator():
    vectors = [noise((3,), seed) for seed in range(5)]
    rstd, trust, offset, batch_std = (torch.full((3,), value) for value in (1.5, 0.3, 0.1, 0.8))
    arguments = (*vectors, rstd, trust, offset, batch_std, torch.tensor([10.0]))
    torch.library.opcheck(torch.ops.runningbn.update_gradient_pooled.default, arguments)
