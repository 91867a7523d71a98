"""update_bn_stats over several processes: groups, wrappers for parallel training, and synchronised layers."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import ranks
from test_recalibrate_ranks import (
    all_batches,
    assert_agree,
    assert_as_one,
    batches_of,
    collectives,
    each_size,
    net,
    recalibrate,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel

from runningbn import PreciseBatchNorm1d, RunningBatchNorm

# ------------------------------------------------------------------------------------------- groups and wrappers


def recalibrate_pair(rank: int) -> tuple:
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = pairs[rank % 2]
    with collectives() as everywhere, collectives(own) as there:
        outcome = recalibrate(net(), batches_of(rank, "rank 0 has none"), process_group=own)
    assert (everywhere(), there()) == (0, 1)
    return outcome


@pytest.mark.slow
def test_process_group_shares_among_its_members_only():
    outcomes = ranks(4)(recalibrate_pair)
    for pair in ((0, 2), (1, 3)):
        assert_agree([outcomes[rank] for rank in pair])
        batches = [x for rank in pair for x in batches_of(rank, "rank 0 has none")]
        assert_as_one(outcomes[pair[0]][0], net(), batches)


def parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": parallel,
    "AveragedModel of DDP": lambda model: AveragedModel(parallel(model)),
    "DDP in a Sequential": lambda model: nn.Sequential(parallel(model)),
    "after training": lambda model: trained_once(parallel(model)),
}


def trained_once(model: nn.Module) -> nn.Module:
    model.train()(batches_of(2, "unequal")[0]).sum().backward()
    return model


def recalibrate_wrapped(rank: int, wrapper: str, shard: str) -> tuple:
    model = WRAPPERS[wrapper](net())
    with collectives() as count:
        state, report = recalibrate(model, batches_of(rank, shard))
    assert count() == 1
    with collectives() as count:  # and DDP works as ever
        trained_once(model)
        assert count() > 0
    return {name.replace("module.", "").removeprefix("0.1"): value for name, value in state.items()}, report


@each_size
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shard", ["rank 0 runs out first", "rank 1 has none"])
def test_ddp_does_not_communicate_in_the_forward(size, wrapper, shard):
    outcomes = ranks(size)(recalibrate_wrapped, wrapper, shard)
    assert_agree(outcomes)
    expected, _ = recalibrate(net(), all_batches(size, shard))
    found = [value for name, value in outcomes[0][0].items() if "running_" in name]
    for value, one in zip(found, [value for name, value in expected.items() if "running_" in name], strict=True):
        torch.testing.assert_close(value, one, rtol=1e-11, atol=1e-11)


def synchronised(kind: str, sync: bool) -> nn.Module:
    layers: dict[str, Callable[..., nn.Module]] = {
        "SyncBatchNorm": nn.SyncBatchNorm if sync else nn.BatchNorm1d,
        "RunningBatchNorm": lambda *args, **kwargs: RunningBatchNorm(*args, sync=sync, **kwargs),
        "PreciseBatchNorm1d": lambda *args, **kwargs: PreciseBatchNorm1d(*args, sync=sync, **kwargs),
    }
    torch.manual_seed(0)
    layer = layers[kind]
    model = nn.Sequential(layer(5), nn.Linear(5, 4), layer(4), layer(4, track_running_stats=False), layer(4))
    model[2].eval()
    return model.double()


def recalibrate_synchronised(rank: int, kind: str, normalize: str) -> tuple:
    model = synchronised(kind, sync=True)
    with collectives() as count:
        outcome = recalibrate(model, batches_of(rank, "rank 0 runs out first"), normalize=normalize)
    assert count() == 1 if normalize == "batch" else count() <= 2 + 4
    return outcome


@each_size
@pytest.mark.parametrize("kind", ["SyncBatchNorm", "RunningBatchNorm", "PreciseBatchNorm1d"])
@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_synchronised_layers_do_not_communicate_in_the_forward(size, kind, normalize):
    outcomes = ranks(size)(recalibrate_synchronised, kind, normalize)
    assert_agree(outcomes)
    batches = all_batches(size, "rank 0 runs out first")
    assert_as_one(outcomes[0][0], synchronised(kind, sync=False), batches, normalize=normalize)
