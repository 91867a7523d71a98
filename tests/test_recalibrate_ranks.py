"""update_bn_stats over several processes: all end with the statistics of one process that sees all their batches."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import noise
from models import pretrained
from processes import ranks
from recalibration_models import reference, rows
from torch import Tensor, nn

from runningbn import StatsReport, precise_bn, update_bn_stats

each_size = pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
# The batch sizes of each rank; two ranks take the first two.
SHARDS = {
    "unequal": ((5, 3, 8), (2, 9), (16,), (4, 4, 4, 4)),
    "rank 0 runs out first": ((6,), (6, 6, 6, 6, 6), (6, 6), (6, 6, 6)),
    "rank 1 runs out first": ((6, 6, 6, 6, 6), (6,), (6, 6), (6, 6, 6)),
    "rank 0 has none": ((), (5, 7, 2), (3,), ()),
    "rank 1 has none": ((5, 7, 2), (), (), (4, 4)),
}
each_shard = pytest.mark.parametrize("shard", SHARDS)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "batch variance": {"variance": "batch"},
    "prior": {"prior": 7.0},
    "population": {"normalize": "population"},
    "population and prior": {"normalize": "population", "prior": 7.0},
    "some layers": {"layers": ["4", "1"]},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def batches_of(rank: int, shard: str) -> list[Tensor]:
    """Float64, of another mean and spread on every rank."""
    return [
        rows(n, seed=10 * rank + i, dtype=torch.float64) * (1 + rank) + 3 * rank
        for i, n in enumerate(SHARDS[shard][rank])
    ]


def all_batches(size: int, shard: str) -> list[Tensor]:
    return [x for rank in range(size) for x in batches_of(rank, shard)]


def net() -> nn.Sequential:
    """Layers of different widths, float64."""
    torch.manual_seed(0)
    widths = (5, 6, 8, 3)
    blocks = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return pretrained(nn.Sequential(*(module for block in blocks for module in block))).double()


@contextlib.contextmanager
def collectives(*groups: Any) -> Iterator[Callable[[], int]]:
    """How many there were, those that torch makes in C++ included."""

    def count() -> int:
        return sum(group._get_sequence_number_for_group() for group in groups or (dist.group.WORLD,))

    before = count()
    yield lambda: count() - before


def assert_usable(rank: int) -> None:
    """The group sums as ever: no rank waits in a collective that others have left."""
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    size = dist.get_world_size()
    assert total.item() == size * (size + 1) / 2


def contents(report: StatsReport) -> dict[str, Any]:
    """All that it says; NaN as a word, since it is not equal to itself."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [plain(v) for v in value.tolist()]
        return "NaN" if isinstance(value, float) and math.isnan(value) else value

    layers = [{f.name: plain(getattr(r, f.name)) for f in dataclasses.fields(r)} for r in report.layers]
    rest = {name: getattr(report, name) for name in ("unused", "batches", "not_finite", "passes")}
    return {"layers": layers, **rest, "text": str(report)}


def recalibrate(model: nn.Module, batches: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    report = update_bn_stats(model, batches, None, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, contents(report)


def assert_agree(outcomes: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    """All ranks have the same state, bit for bit, and the same report."""
    (first, first_report), *others = outcomes
    for state, report in others:
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert report == first_report


def assert_as_one(state: dict[str, Tensor], model: nn.Module, batches: list[Any], **options: Any) -> None:
    """The state is that of one process."""
    expected, _ = recalibrate(model, batches, **options)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------- as one process


def recalibrate_shard(rank: int, shard: str, options: dict) -> tuple:
    with collectives() as count:
        outcome = recalibrate(net(), iter(batches_of(rank, shard)), **options)
    return *outcome, count()


@each_size
@each_shard
@each_option
def test_all_ranks_end_as_one_process_over_all_batches(size, shard, options):
    outcomes = ranks(size)(recalibrate_shard, shard, options)
    assert_agree([(state, report) for state, report, _ in outcomes])
    state, report, _ = outcomes[0]
    assert_as_one(state, net(), all_batches(size, shard), **options)
    assert report["batches"] == len(all_batches(size, shard))


@each_size
@each_shard
def test_statistics_are_the_moments_of_the_data_of_all_ranks(size, shard):
    state = ranks(size)(recalibrate_shard, shard, {})[-1][0]
    for name, (mean, var) in reference(net(), all_batches(size, shard)).items():
        torch.testing.assert_close(state[f"{name}.running_mean"], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state[f"{name}.running_var"], var, rtol=1e-10, atol=1e-10)


@each_size
@each_shard
def test_ranks_communicate_once(size, shard):
    assert [count for *_, count in ranks(size)(recalibrate_shard, shard, {})] == [1] * size


def far_apart(rank: int, variance: str) -> tuple[Tensor, Tensor]:
    layer = nn.BatchNorm1d(3)
    update_bn_stats(layer, (noise((2000, 3), rank) + 10 * (rank % 2)).split(100), variance=variance)
    return layer.running_mean, layer.running_var


@each_size
@pytest.mark.parametrize(("variance", "expected"), [("population", 26.0), ("batch", 1.0)])
def test_variance_between_ranks_is_included_unless_asked_otherwise(size, variance, expected):
    for mean, var in ranks(size)(far_apart, variance):
        torch.testing.assert_close(mean, torch.full((3,), 5.0), rtol=0, atol=0.1)
        torch.testing.assert_close(var, torch.full((3,), expected), rtol=0.1, atol=0)


def single_rows(rank: int) -> tuple:
    return recalibrate(net(), batches_of(rank, "unequal")[0].split(1))


@each_size
def test_ranks_of_single_samples_give_the_first_layer_its_moments(size):
    outcomes = ranks(size)(single_rows)
    assert_agree(outcomes)
    x = net()[0](torch.cat([batches_of(rank, "unequal")[0] for rank in range(size)]))
    torch.testing.assert_close(outcomes[0][0]["1.running_mean"], x.mean(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(outcomes[0][0]["1.running_var"], x.var(0), rtol=1e-11, atol=1e-11)


def recalibrate_moved(rank: int, tolerance: float | None) -> tuple:
    """As after training under DDP, where each rank has seen batches of its own."""
    model = net()
    for x in batches_of(rank, "unequal"):
        model.train()(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.mul_(1 + 1000 * rank)
    torch.manual_seed(rank)
    batches = (torch.randn(32, 5, dtype=torch.float64) for _ in range(30))
    state, report = recalibrate(model, batches, prior=1000.0, tolerance=tolerance)
    assert_usable(rank)
    return {name: value for name, value in state.items() if "running" in name}, report["batches"]


@each_size
@pytest.mark.parametrize("tolerance", [None, 0.03])
def test_prior_of_ranks_whose_old_statistics_differ_gives_all_the_same(size, tolerance):
    assert_agree(ranks(size)(recalibrate_moved, tolerance))


# ------------------------------------------------------------------------------------------------------- tolerance


def stop_at(rank: int, tolerance: float, lengths: tuple[int, ...]) -> tuple:
    drawn = []

    def loader():
        torch.manual_seed(rank)
        for _ in range(lengths[rank]):
            drawn.append(rank)
            yield torch.randn(16, 5, dtype=torch.float64)

    with collectives() as count:
        outcome = recalibrate(net(), loader(), tolerance=tolerance)
    assert_usable(rank)
    return *outcome, len(drawn), count()


@each_size
@pytest.mark.parametrize("lengths", [(200, 200, 200, 200), (9, 200, 0, 40), (200, 3, 70, 200), (0, 200, 200, 5)])
@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-6])
def test_tolerance_stops_all_ranks_together(size, lengths, tolerance):
    outcomes = ranks(size)(stop_at, tolerance, lengths)
    assert_agree([outcome[:2] for outcome in outcomes])
    drawn = [outcome[2] for outcome in outcomes]
    report = outcomes[0][1]
    assert report["batches"] == sum(drawn)
    assert (sum(drawn) == sum(lengths[:size])) == (tolerance < 1e-3)
    assert all(n == min(length, max(drawn)) for n, length in zip(drawn, lengths))
    assert len({count for *_, count in outcomes}) == 1
    assert outcomes[0][3] <= 2 + math.log(max(drawn) / 8, 1.2)


# ------------------------------------------------------------------------------------------------------ precise_bn


def loop(rank: int, shard: str) -> tuple:
    model = net()
    with collectives() as count, precise_bn(model) as recalibration:
        for x in batches_of(rank, shard):
            model(x)
    assert count() == 1
    return model.state_dict(), contents(recalibration.report)


@each_size
@each_shard
def test_precise_bn_pools_the_loops_of_all_ranks(size, shard):
    outcomes = ranks(size)(loop, shard)
    assert_agree(outcomes)
    assert_as_one(outcomes[0][0], net(), all_batches(size, shard))
