"""sync=True as an argument: what is accepted, shown, copied, pickled and converted."""

import copy
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import assert_near, noise, with_random_affine
from copies import saved_and_loaded
from processes import ranks
from steps import assert_identical, buffers_of, evaluate, train, training_step
from test_sync import SHAPE, SIZES, each_basic_kind, layer_of, parts, whole
from torch import Tensor, nn

from runningbn import (
    Horizon,
    PreciseBatchNorm1d,
    PreciseBatchNorm2d,
    PreciseBatchNorm3d,
    RunningBatchNorm,
    batchnormify,
)

OURS = (RunningBatchNorm, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d)
each_class = pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)


# ---------------------------------------------------------------------------------------------------------- arguments


@each_class
@pytest.mark.parametrize("sync", [1, None, "yes"])
def test_sync_is_a_bool(cls, sync):
    with pytest.raises(TypeError, match=f"sync: expected True or False, got {sync!r}"):
        cls(3, sync=sync)


@each_class
@pytest.mark.parametrize("group", [0, "gloo", -100])
def test_process_group_is_a_process_group(cls, group):
    with pytest.raises(TypeError, match=rf"process_group: expected a torch.distributed.ProcessGroup .* got {group!r}"):
        cls(3, sync=True, process_group=group)


def refuse_a_group_without_sync(rank: int) -> None:
    for cls in OURS:
        with pytest.raises(ValueError, match="process_group: expected sync=True with it, got sync=False"):
            cls(3, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="expected sync=True with it"):
        batchnormify(nn.BatchNorm2d(3), process_group=dist.group.WORLD)


def test_process_group_without_sync_is_refused():
    ranks(2)(refuse_a_group_without_sync)


def test_repr_shows_sync_where_it_is_set():
    assert "sync" not in repr(RunningBatchNorm(3))
    assert repr(RunningBatchNorm(3, sync=True)).endswith("sync=True, gradient='running', max_lag=inf)")
    assert repr(RunningBatchNorm(3, sync=True, gradient="exact")).endswith("sync=True, gradient='exact')")
    assert repr(PreciseBatchNorm2d(3, sync=True)).endswith("track_running_stats=True, sync=True)")


@each_class
def test_state_dict_is_that_of_a_layer_without_sync(cls):
    layer, plain = cls(3, sync=True), cls(3)
    assert_identical(layer.state_dict(), plain.state_dict())
    layer.load_state_dict(plain.state_dict())


def train_on_one_value_per_channel(rank: int) -> Tensor:
    layer = PreciseBatchNorm1d(3, sync=True)
    return layer(torch.full((1, 3), 2.0 * rank))


def test_one_value_per_channel_and_rank_is_enough_with_others():
    first, second = ranks(2)(train_on_one_value_per_channel)
    torch.testing.assert_close(first, torch.full((1, 3), -1.0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(second, torch.full((1, 3), 1.0), rtol=1e-5, atol=0.0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        train_on_one_value_per_channel(0)


def train_without_statistics(rank: int, kind: str, how: str) -> dict[str, Tensor]:
    layer = layer_of(kind, torch.float64, sync=True, track_running_stats=how == "toggled")
    layer.track_running_stats = False
    before = buffers_of(layer)
    outcome = training_step(layer, *parts(1, SIZES[1], torch.float64)[rank])
    assert_identical(buffers_of(layer), before)
    return outcome


@each_basic_kind
@pytest.mark.parametrize("how", ["built so", "toggled"])
def test_without_running_statistics_the_batch_of_all_ranks_normalises(kind, how):
    outcomes = ranks(2)(train_without_statistics, kind, how)  # one of which is empty
    layer = layer_of(kind, torch.float64)
    x, dy = whole(1, 2)
    x.requires_grad_()
    y = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    y.backward(dy)
    assert_near(torch.cat([outcome["y"] for outcome in outcomes]), y.detach(), roundings=300)
    assert_near(torch.cat([outcome["dx"] for outcome in outcomes]), x.grad, roundings=300)


# ------------------------------------------------------------------------------------------------- copies and pickles


def copy_and_train(rank: int, kind: str) -> None:
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    layer = layer_of(kind, sync=True, process_group=alone)
    inputs = [x for step in range(2) for x, _ in parts(step, SIZES[step], torch.float32)[rank : rank + 1]]
    train(layer, inputs)
    for duplicate in (copy.deepcopy(layer), copy.copy(layer)):
        assert duplicate.sync
        assert duplicate.process_group is alone
    # A process group means nothing elsewhere: what comes back pools over all.
    copies = [pickle.loads(pickle.dumps(layer)), saved_and_loaded(layer)]
    for duplicate in copies:
        assert duplicate.sync
        assert duplicate.process_group is None
        assert_identical(buffers_of(duplicate), buffers_of(layer))
        train(duplicate, inputs)
    assert_identical(buffers_of(copies[0]), buffers_of(copies[1]))
    deep, again = copy.deepcopy(layer), layer
    assert_identical(buffers_of(train(deep, inputs)), buffers_of(train(again, inputs)))


@each_basic_kind
def test_copies_keep_the_process_group_and_pickles_drop_it(kind):
    ranks(2)(copy_and_train, kind)


# --------------------------------------------------------------------------------------------------------- conversion


def sync_batch_norm() -> nn.SyncBatchNorm:
    layer = with_random_affine(nn.SyncBatchNorm(3, momentum=0.3))
    layer.running_mean.copy_(noise((3,), 1))
    layer.running_var.copy_(noise((3,), 2).square() + 0.5)
    layer.num_batches_tracked.add_(7)
    return layer


@pytest.mark.parametrize("to", ["running", "precise"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 3, 4)], ids=str)
def test_sync_batch_norm_becomes_a_synchronised_layer_and_comes_back(to, shape):
    layer = sync_batch_norm()
    before, x, attributes = evaluate(layer, noise(shape, 3)), noise(shape, 3), list(vars(layer))
    parameters = list(layer.parameters())
    converted = batchnormify(layer, to)
    assert converted is layer
    assert layer.sync
    assert layer.momentum == (Horizon() if to == "running" else 0.3)
    torch.testing.assert_close(evaluate(layer, x), before, rtol=1e-6, atol=1e-6)
    train(layer, [x])
    trained = evaluate(layer, x)
    assert not torch.equal(trained, before)
    batchnormify(layer, "torch")
    assert type(layer) is nn.SyncBatchNorm
    assert sorted(vars(layer)) == sorted(attributes)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    torch.testing.assert_close(evaluate(layer, x), trained, rtol=1e-6, atol=1e-6)


def convert_with_groups(rank: int) -> None:
    group = dist.new_group([0, 1])
    for way in (["running"], ["precise"], ["running", "precise"], ["precise", "running"]):
        layer = nn.SyncBatchNorm(3, process_group=group)
        for to in way:
            batchnormify(layer, to)
            assert layer.sync
            assert layer.process_group is group
        assert batchnormify(layer, "torch").process_group is group
        assert type(layer) is nn.SyncBatchNorm
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    for to in ("running", "precise"):
        batchnormify(model, to, sync=True, process_group=group)
        assert all(layer.sync and layer.process_group is group for layer in model)
    batchnormify(model, sync=False)
    assert not any(layer.sync or layer.process_group for layer in model)
    assert [type(layer) for layer in batchnormify(model, "torch")] == [nn.BatchNorm2d, nn.SyncBatchNorm]


def test_conversions_keep_the_process_group_and_take_another():
    ranks(2)(convert_with_groups)


def train_converted(rank: int, to: str) -> tuple[dict, dict]:
    layer = batchnormify(sync_batch_norm().double(), to, momentum=None)
    return training_step(layer, *parts(0, SIZES[0], torch.float64)[rank]), buffers_of(layer)


@pytest.mark.parametrize("to", ["running", "precise"])
def test_converted_ranks_train_as_one_process(to):
    outcomes = ranks(2)(train_converted, to)
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    plain.load_state_dict(sync_batch_norm().state_dict())
    expected = training_step(batchnormify(plain, to, momentum=None), *whole(0, 2))
    for name in ("y", "dx"):
        assert_near(torch.cat([outcome[name] for outcome, _ in outcomes]), expected[name], roundings=300)
    assert_identical(outcomes[1][1], outcomes[0][1])


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)
def test_a_synchronised_layer_of_ours_becomes_sync_batch_norm(cls):
    layer = cls(3, sync=True)
    assert type(batchnormify(layer, "torch")) is nn.SyncBatchNorm
    assert layer.process_group is None
    assert layer(noise((4, *SHAPE), 0)).shape == (4, *SHAPE)


@pytest.mark.parametrize("to", ["running", "precise"])
def test_options_of_synchronisation_are_checked(to):
    layer = nn.BatchNorm2d(3)
    with pytest.raises(TypeError, match="sync: expected True or False"):
        batchnormify(layer, to, sync="yes")
    with pytest.raises(TypeError, match="takes no options, got sync"):
        batchnormify(layer, "torch", sync=True)
    assert type(layer) is nn.BatchNorm2d


class SyncBatchNormAct(nn.SyncBatchNorm):
    """A forward of its own around that of its base, which it calls by name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(nn.SyncBatchNorm.forward(self, x))


class Wrapping(nn.SyncBatchNorm):
    """The same by way of super()."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_sync_batch_norm_that_is_wrapped_stays_synchronised_on_the_way_to_torch(caplog):
    with caplog.at_level(logging.INFO, logger="runningbn"):
        assert type(batchnormify(Wrapping(3), "torch")) is Wrapping
    assert "Wrapping has a custom forward" in caplog.text
    layer = batchnormify(Wrapping(3))
    assert layer(noise((4, *SHAPE), 0)).min() == 0
    assert type(batchnormify(layer, "torch")) is Wrapping


@pytest.mark.parametrize("to", ["running", "precise"])
def test_sync_batch_norm_with_a_forward_of_its_own_is_left_alone(caplog, to):
    with caplog.at_level(logging.INFO, logger="runningbn"):
        assert type(batchnormify(SyncBatchNormAct(3), to)) is SyncBatchNormAct
    assert "SyncBatchNormAct has a custom forward" in caplog.text


def test_wrong_dimensions_are_refused_after_the_conversion():
    with pytest.raises(ValueError, match="expected at least 2 dimensions"):
        batchnormify(nn.SyncBatchNorm(3), "precise")(torch.zeros(3))
