"""sync=True: ranks that each see a part of the batch train as one process that sees it all."""

import functools

import pytest
import torch
import torch.distributed as dist
from cases import assert_near, noise, with_random_affine
from processes import ranks
from reference import ReferenceRunningBatchNorm, affine, element_weights, pooled_moments
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import Tensor, nn

from runningbn import Horizon, PreciseBatchNorm2d, RunningBatchNorm
from runningbn.layers.buffers import TRAINING

KINDS = {
    "running": functools.partial(RunningBatchNorm, gradient="running"),
    # So near a limit that it binds, however noisy a few batches are.
    "running-limited": functools.partial(RunningBatchNorm, max_lag=1e-3),
    "running-cumulative": functools.partial(RunningBatchNorm, momentum=None),
    "exact": functools.partial(RunningBatchNorm, gradient="exact"),
    "precise": PreciseBatchNorm2d,
    "precise-horizon": functools.partial(PreciseBatchNorm2d, momentum=Horizon()),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_basic_kind = pytest.mark.parametrize("kind", ["running", "exact", "precise"])
each_size = pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Samples of each rank, step by step; two ranks take the first two columns.
SIZES = ((5, 2, 1, 3), (0, 3, 2, 0), (4, 4, 1, 6), (1, 0, 0, 0))
SHAPE = (3, 4, 5)


def layer_of(kind: str, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    return with_random_affine(KINDS[kind](3, dtype=dtype, **kwargs))


def parts(step: int, sizes: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """x and dy of each rank, which differ in mean and spread from rank to rank."""
    return [
        ((noise((n, *SHAPE), 10 * step + rank) * (1 + rank) + 3 * rank).to(dtype),
         (noise((n, *SHAPE), 100 + 10 * step + rank) + 0.5 * (1 + rank)).to(dtype))
        for rank, n in enumerate(sizes)
    ]  # fmt: skip


def whole(step: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, dy = zip(*parts(step, SIZES[step][:size], dtype))
    return torch.cat(x), torch.cat(dy)


# ------------------------------------------------------------------------------------------------- against one process


def take_steps(rank: int, kind: str, dtype: torch.dtype, size: int) -> list[tuple[dict, dict]]:
    layer = layer_of(kind, dtype, sync=True)
    results = []
    for step, sizes in enumerate(SIZES):
        x, dy = parts(step, sizes[:size], dtype)[rank]
        results.append((training_step(layer, x, dy), buffers_of(layer)))
    return results


@functools.cache
def steps_of_ranks(kind: str, dtype: str, size: int) -> list[list[tuple[dict, dict]]]:
    return ranks(size)(take_steps, kind, DTYPES[dtype], size)


def joined(outcomes: list[dict]) -> dict[str, Tensor]:
    """y and dx of the whole batch, and the sums of the parameters' gradients."""
    return {
        **{name: torch.cat([outcome[name] for outcome in outcomes]) for name in ("y", "dx")},
        **{name: sum(outcome[name] for outcome in outcomes) for name in ("dweight", "dbias")},
    }


def expected_running(kind: str, size: int) -> list[tuple[dict, dict]]:
    layer = layer_of(kind, torch.float64)
    reference = ReferenceRunningBatchNorm(layer.weight, layer.bias, layer.momentum, layer.gradient, layer.max_lag)
    expected = []
    for step in range(len(SIZES)):
        x, dy = whole(step, size)
        forward = reference.forward(x)
        gradients = dict(zip(("dx", "dweight", "dbias"), reference.backward(forward, dy)))
        names = ("running_mean", "running_var", "count_sqrs", "debias", "samples", "steps")
        names += TRAINING if layer.gradient == "running" else ()
        expected.append(({"y": forward.y.detach(), **gradients}, {name: reference.state(name) for name in names}))
    return expected


def expected_precise(kind: str, size: int) -> list[tuple[dict, dict]]:
    layer = layer_of(kind, torch.float64)
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    plain.load_state_dict({**plain.state_dict(), "weight": layer.weight, "bias": layer.bias})
    expected, seen = [], []
    for step in range(len(SIZES)):
        x, dy = whole(step, size)
        seen.append(x)
        weights = element_weights(layer.momentum, [len(part) for part in seen], SHAPE[1] * SHAPE[2])
        moments = pooled_moments(seen, weights)
        statistics = {"running_mean": moments.mean, "running_var": moments.unbiased}
        expected.append((training_step(plain, x, dy), statistics))
    return expected


@each_kind
@each_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_train_as_one_process(kind, size, dtype):
    expected = (expected_precise if kind.startswith("precise") else expected_running)(kind, size)
    for step, outcomes in enumerate(zip(*steps_of_ranks(kind, dtype, size))):
        results, state = expected[step]
        # Sums of up to 300 elements, some steps long.
        for name, value in joined([outcome for outcome, _ in outcomes]).items():
            assert_near(value, results[name], roundings=300)
        for name, value in state.items():
            assert_near(outcomes[0][1][name], value, roundings=300)


@each_kind
@each_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ranks_hold_the_same_bits(kind, size, dtype):
    for outcomes in zip(*steps_of_ranks(kind, dtype, size)):
        for _, buffers in outcomes[1:]:
            assert_identical(buffers, outcomes[0][1])


def train_on(rank: int, kind: str, inputs: list[Tensor], dtype: torch.dtype) -> tuple[dict, dict]:
    layer = layer_of(kind, dtype, sync=True)
    return training_step(layer, inputs[rank]), buffers_of(layer)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("apart", [0.0, 1.0, 100.0], ids=lambda apart: f"{apart:g} std apart")
def test_ranks_with_other_data_each_keep_the_variance_far_from_zero(kind, apart):
    inputs = [1e4 + apart * rank + noise((50, *SHAPE), rank, torch.float64) for rank in range(4)]
    inputs = [x.float() for x in inputs]
    (outcome, buffers), *_ = ranks(4)(train_on, kind, inputs, torch.float32)
    moments = pooled_moments(inputs)
    var = moments.unbiased if kind.startswith("precise") else moments.var
    torch.testing.assert_close(buffers["running_var"].double(), var, rtol=1e-3, atol=0.0)
    layer = layer_of(kind)
    y = affine(inputs[0].double(), moments.mean, moments.var + 1e-5, layer.weight, layer.bias)
    # x itself is known to 5e-4 std.
    torch.testing.assert_close(outcome["y"].double(), y, rtol=0.0, atol=2e-3)


def train_then_see_empty(rank: int, kind: str) -> list[dict]:
    layer = train(layer_of(kind, sync=True), [parts(0, SIZES[0], torch.float32)[rank][0]])
    before = buffers_of(layer)
    outcome = training_step(layer, torch.empty(0, *SHAPE))
    return [before, buffers_of(layer), outcome]


@each_kind
def test_nothing_changes_where_all_ranks_are_empty(kind):
    for before, after, outcome in ranks(2)(train_then_see_empty, kind):
        for passing in ("last_keep", "last_gain"):
            del before[passing], after[passing]
        assert_identical(after, before)
        assert outcome["y"].shape == outcome["dx"].shape == (0, *SHAPE)
        assert not outcome["dweight"].any()
        assert not outcome["dbias"].any()


# -------------------------------------------------------------------------------------------------------- not finite


def train_with_a_nan(rank: int, kind: str, where: int) -> list[tuple[dict, dict]]:
    layer = layer_of(kind, torch.float64, sync=True)
    training_step(layer, *parts(0, SIZES[0], torch.float64)[rank])
    x, dy = parts(2, SIZES[2], torch.float64)[rank]
    if rank == where:
        x[0, 1, 2, 3] = torch.nan
    return training_step(layer, x, dy), buffers_of(layer)


@each_kind
@pytest.mark.parametrize("where", [0, 1])
def test_a_nan_on_one_rank_is_a_nan_in_the_batch_of_all(kind, where):
    outcomes = ranks(2)(train_with_a_nan, kind, where)
    assert_identical(outcomes[1][1], outcomes[0][1])
    one_process = layer_of(kind, torch.float64)
    training_step(one_process, *whole(0, 2))
    (x, _), (other, _) = parts(2, SIZES[2][:2], torch.float64)
    (x, other)[where][0, 1, 2, 3] = torch.nan
    expected = training_step(one_process, torch.cat([x, other]), whole(2, 2)[1])
    for name, value in joined([outcome for outcome, _ in outcomes]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, equal_nan=True)
    for name in ("running_mean", "running_var", "samples", "steps", "count"):
        torch.testing.assert_close(outcomes[0][1][name], getattr(one_process, name), rtol=1e-11, atol=1e-11)
    # A running layer goes on by its statistics; what a precise one normalises by is gone, on every rank.
    finite = torch.isfinite(outcomes[1 - where][0]["y"][:, 1])
    assert finite.all() if kind.startswith(("running", "exact")) else not finite.any()


# ------------------------------------------------------------------------------------------------------- collectives


def count_collectives(rank: int, kind: str) -> list[int]:
    calls, names = [], ("all_gather", "all_reduce", "broadcast", "all_gather_object", "all_to_all", "barrier")
    originals = {name: getattr(dist, name) for name in names}
    layer = layer_of(kind, sync=True)
    x = parts(0, SIZES[0], torch.float32)[rank][0].requires_grad_()
    counts = []
    try:
        for name, original in originals.items():
            setattr(dist, name, lambda *args, name=name, original=original: calls.append(name) or original(*args))
        y = layer(x)
        counts.append(len(calls))
        y.sum().backward()
        counts.append(len(calls))
        evaluate(layer, x)
        counts.append(len(calls))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


@each_kind
def test_one_collective_forward_one_backward_none_in_evaluation(kind):
    assert ranks(2)(count_collectives, kind) == [[1, 2, 2]] * 2


def train_in_pairs(rank: int, kind: str) -> dict:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = layer_of(kind, torch.float64, sync=True, process_group=pairs[rank // 2])
    for step, sizes in enumerate(SIZES[:3]):
        training_step(layer, *parts(step, sizes, torch.float64)[rank])
    return buffers_of(layer)


@pytest.mark.slow
@each_basic_kind
def test_a_process_group_pools_over_its_members_only(kind):
    outcomes = ranks(4)(train_in_pairs, kind)
    for pair in (0, 1):
        one_process = layer_of(kind, torch.float64)
        for step, sizes in enumerate(SIZES[:3]):
            x, dy = zip(*parts(step, sizes, torch.float64)[2 * pair : 2 * pair + 2])
            training_step(one_process, torch.cat(x), torch.cat(dy))
        for name in ("running_mean", "running_var", "samples"):
            assert_near(outcomes[2 * pair][name], getattr(one_process, name), roundings=300)
        assert_identical(outcomes[2 * pair + 1], outcomes[2 * pair])


def train_alone(rank: int, kind: str) -> tuple[dict, dict, dict, dict]:
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    layer, plain = layer_of(kind, sync=True, process_group=alone), layer_of(kind)
    x, dy = parts(0, SIZES[0], torch.float32)[rank]
    return training_step(layer, x, dy), training_step(plain, x, dy), buffers_of(layer), buffers_of(plain)


@each_basic_kind
def test_a_group_of_one_and_no_group_at_all_train_as_without_sync(kind):
    for outcome, expected, buffers, expected_buffers in ranks(2)(train_alone, kind):
        assert_identical(outcome, expected)
        assert_identical(buffers, expected_buffers)
    x, dy = whole(0, 2, torch.float32)
    layer, plain = layer_of(kind, sync=True), layer_of(kind)
    assert_identical(training_step(layer, x, dy), training_step(plain, x, dy))
    assert_identical(buffers_of(layer), buffers_of(plain))
