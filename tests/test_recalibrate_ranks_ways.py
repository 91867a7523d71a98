"""update_bn_stats over several processes: batches that take different ways, wrong batches, models that communicate."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import pretrained
from processes import ranks
from recalibration_models import inputs_in_evaluation, mlp, moments, rows, statistics
from test_recalibrate_ranks import (
    assert_agree,
    assert_as_one,
    assert_usable,
    batches_of,
    collectives,
    contents,
    each_size,
    net,
    recalibrate,
)
from torch import Tensor, nn

from runningbn import update_bn_stats

each_procedure = pytest.mark.parametrize("normalize", ["batch", "population"])


def assert_settled(model: nn.Module, data: list[Any], but: tuple[str, ...] = ()) -> None:
    """Evaluation shows the stored statistics to 1e-4."""
    stored = statistics(model)
    for name, x in inputs_in_evaluation(model, data).items():
        mean, var = moments(x)
        if name not in but:
            assert ((stored[name][0] - mean).abs() <= 1e-4 * var.sqrt()).all(), name
            assert ((stored[name][1] - var).abs() <= 1e-4 * var).all(), name


# ---------------------------------------------------------------------------------------------------- different ways


class Branches(nn.Module):
    """A layer called twice, two that only some batches reach, on their way to the last, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.unused, self.shared, self.extra, self.more = (nn.BatchNorm1d(5) for _ in range(5))

    def forward(self, batch: tuple[Tensor, bool]) -> Tensor:
        x, extra = batch
        x = self.shared(self.shared(x) * 2 + 1)
        return self.last(self.more(self.extra(x).relu() + x).relu() if extra else x)


def branches() -> nn.Module:
    return pretrained(Branches()).double()


def branching_batches(rank: int) -> list[Any]:
    """Only rank 1 has batches that reach all; rank 2 has none."""
    return [(x, rank == 1) for x in batches_of(rank, "unequal")] if rank != 2 else []


def recalibrate_branches(rank: int, normalize: str) -> tuple:
    return recalibrate(branches(), branching_batches(rank), normalize=normalize, forward=nn.Module.__call__)


@each_size
@each_procedure
def test_shared_layers_and_layers_that_one_rank_uses(size, normalize):
    outcomes = ranks(size)(recalibrate_branches, normalize)
    assert_agree(outcomes)
    # those first that reach all
    batches = [batch for rank in (1, 0, 3) if rank < size for batch in branching_batches(rank)]
    assert_as_one(outcomes[0][0], branches(), batches, normalize=normalize, forward=nn.Module.__call__)
    assert outcomes[0][1]["unused"] == ["unused"]
    assert [layer["name"] for layer in outcomes[0][1]["layers"] if layer["feeds_itself"]] == ["shared"]


@each_size
def test_population_settles_where_the_batches_of_ranks_take_different_ways(size):
    model = branches()
    model.load_state_dict(ranks(size)(recalibrate_branches, "population")[0][0])
    assert_settled(model, [batch for rank in range(size) for batch in branching_batches(rank)], but=("shared",))


def test_population_settles_where_later_batches_take_another_way():
    model, batches = branches(), [*branching_batches(0), *branching_batches(1)]
    update_bn_stats(model, batches, normalize="population", forward=nn.Module.__call__)
    assert_settled(model, batches, but=("shared",))


# ---------------------------------------------------------------------------------------------------- wrong batches


class Overflow(nn.Module):
    """Infinite where the first feature is far out, as in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 4.5, torch.inf, x)


def overflowing() -> nn.Sequential:
    """Only the last layer sees the infinities."""
    torch.manual_seed(0)
    parts = (nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5), Overflow(), nn.BatchNorm1d(5))
    model = pretrained(nn.Sequential(*parts))
    nn.init.ones_(model[2].weight), nn.init.zeros_(model[2].bias)
    return model


def test_batches_that_overflow_in_the_middle_are_left_out_of_all_layers_in_every_pass():
    model, batches = overflowing(), [rows(32, seed=i) for i in range(8)]
    wrong = batches[3]
    wrong[0] = 40.0 * (model[1].weight[0] * model[0].weight).sign().detach()
    report = update_bn_stats(model, batches, normalize="population")
    assert report.not_finite == 1
    assert_settled(model, batches[:3] + batches[4:])


def population_batches(rank: int, wrong: bool) -> list[Tensor]:
    """Rank 0 has none; the second batch of rank 1 may have something in it that is not finite."""
    batches = [] if rank == 0 else [x.float() for x in batches_of(rank, "unequal")]
    if rank == 1 and wrong:
        batches[1] = batches[1].index_fill(0, torch.tensor([2]), torch.nan)
    return batches


def settle(rank: int, wrong: bool) -> tuple:
    return recalibrate(mlp(depth=4), population_batches(rank, wrong), normalize="population")


@each_size
@pytest.mark.parametrize("wrong", [False, True])
def test_population_statistics_are_what_evaluation_shows_over_all_ranks(size, wrong):
    outcomes = ranks(size)(settle, wrong)
    assert_agree(outcomes)
    state, report = outcomes[0]
    model = mlp(depth=4)
    model.load_state_dict(state)
    data = [x for rank in range(size) for x in population_batches(rank, wrong) if x.isfinite().all()]
    assert_settled(model, data)
    assert (report["not_finite"], report["batches"]) == (int(wrong), len(data))


# ---------------------------------------------------------------------------------------- models that communicate


class FullyShardedDataParallel(nn.Module):
    """What counts of torch's class of this name: its forward communicates, before and after."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        dist.all_reduce(torch.zeros(2))
        y = self.module(x)
        dist.all_reduce(torch.zeros(3))
        return y


class Unlucky(Exception):
    pass


def sharded_batches(rank: int, lengths: tuple[int, ...]) -> list[Tensor]:
    return [rows(6, seed=100 * rank + i, dtype=torch.float64) for i in range(lengths[rank])]


def recalibrate_sharded(rank: int, lengths: tuple[int, ...], options: dict) -> tuple:
    outcome = recalibrate(FullyShardedDataParallel(net()), sharded_batches(rank, lengths), **options)
    assert_usable(rank)
    return outcome


@each_size
@each_procedure
@pytest.mark.parametrize("lengths", [(5, 3, 9, 4), (3, 5, 4, 4), (4, 4, 4, 4)])
def test_ranks_of_a_sharded_model_stop_together(size, lengths, normalize):
    outcomes = ranks(size)(recalibrate_sharded, lengths, {"normalize": normalize})
    assert_agree(outcomes)
    shortest = min(lengths[:size])
    batches = [x for rank in range(size) for x in sharded_batches(rank, lengths)[:shortest]]
    state = {name.removeprefix("module."): value for name, value in outcomes[0][0].items()}
    assert_as_one(state, net(), batches, normalize=normalize)
    assert outcomes[0][1]["batches"] == size * shortest


@each_size
@pytest.mark.parametrize("tolerance", [0.2, 1e-6])
def test_ranks_of_a_sharded_model_stop_together_with_tolerance(size, tolerance):
    outcomes = ranks(size)(recalibrate_sharded, (40, 30, 50, 60), {"tolerance": tolerance})
    assert_agree(outcomes)
    assert (outcomes[0][1]["batches"] == 30 * size) == (tolerance < 1e-3)


class Unreadable:
    """A loader that cannot start."""

    def __iter__(self):
        raise Unlucky


def fail_sharded(rank: int, stage: str, options: dict) -> str:
    """One failure on rank 1, where no other rank is in the forward."""
    model = FullyShardedDataParallel(net())
    batches = sharded_batches(0, (20,))
    before = contents_of(model)

    def failing():
        yield from batches[:3]
        raise Unlucky

    def forward(model, x):
        model(x)
        calls.append(x)
        if rank == 1 and stage == f"after batch {len(calls)}":
            raise Unlucky

    calls: list[Tensor] = []
    loader = {"loader": failing(), "start of the loader": Unreadable()}.get(stage, batches) if rank == 1 else batches
    try:
        update_bn_stats(model, loader, forward=forward, **options)
    except (Unlucky, RuntimeError) as error:
        assert all(torch.equal(a, b) for a, b in zip(contents_of(model), before))
        assert_usable(rank)
        return type(error).__name__
    return "none"


def contents_of(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-6}, {"normalize": "population"}], ids=str)
@pytest.mark.parametrize("stage", ["start of the loader", "loader", "after batch 1", "after batch 8", "after batch 20"])
def test_failure_on_one_rank_of_a_sharded_model_reaches_all(stage, options):
    outcomes = ranks(2)(fail_sharded, stage, options)
    assert outcomes == ["OtherProcessError", "Unlucky"]


def empty_sharded(rank: int) -> str:
    with pytest.raises(ValueError, match="batch"):
        update_bn_stats(FullyShardedDataParallel(net()), sharded_batches(rank, (0, 4, 3, 3)))
    assert_usable(rank)
    return "refused"


@each_size
def test_sharded_model_is_refused_everywhere_if_one_rank_has_nothing(size):
    assert ranks(size)(empty_sharded) == ["refused"] * size


def recalibrate_fsdp(rank: int, lengths: tuple[int, ...], options: dict) -> tuple:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = net().float()
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    with collectives() as count:
        report = update_bn_stats(model, [x.float() for x in sharded_batches(rank, lengths)], None, **options)
    assert count() > 1
    # the parameters are as before, and the model computes and learns
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    assert all(torch.equal(p.full_tensor(), parameters[name]) for name, p in model.named_parameters())
    model.eval()(rows(4)).sum().backward()
    assert_usable(rank)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}, contents(report)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@each_size
@each_procedure
@pytest.mark.parametrize("lengths", [(5, 3, 9, 4), (3, 5, 4, 4)])
def test_ranks_of_fsdp_stop_together(size, lengths, normalize):
    outcomes = ranks(size)(recalibrate_fsdp, lengths, {"normalize": normalize})
    assert_agree(outcomes)
    batches = [x.float() for rank in range(size) for x in sharded_batches(rank, lengths)[: min(lengths[:size])]]
    expected, _ = recalibrate(net().float(), batches, normalize=normalize)
    for name, value in outcomes[0][0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
