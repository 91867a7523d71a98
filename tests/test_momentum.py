"""The rules for the weight of a batch, as objects and by the weights a layer gives."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from cases import RULES, noise
from reference import batch_weight

from runningbn import Horizon, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm, SquareRoot
from runningbn.kernels import BACKENDS, use_backend

LAYERS = pytest.mark.parametrize(
    "layer",
    [RunningBatchNorm, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d],
    ids=lambda cls: cls.__name__,
)
DATACLASSES = pytest.mark.parametrize(
    "rule", [Horizon(), Horizon(64, 4, 0.1), SquareRoot(0.1), SquareRoot(0.5)], ids=repr
)


def weights_given(momentum: object, batch_sizes: list[int]) -> list[float]:
    """The weight of every batch, seen from outside: debias is 1 − Π (1 − a)."""
    layer = RunningBatchNorm(2, momentum=momentum, dtype=torch.float64)
    weights, left = [], 1.0
    for seed, size in enumerate(batch_sizes):
        layer(noise((size, 2), seed, torch.float64))
        still_left = 1 - layer.debias[0].item()
        weights.append(1 - still_left / left)
        left = still_left
    return weights


# -------------------------------------------------------------------------------------------------------------- objects


def test_horizon_has_the_defaults_it_documents():
    assert Horizon() == Horizon(samples=512, start=8, fraction=0.1)


@DATACLASSES
def test_rule_is_frozen(rule):
    field = dataclasses.fields(rule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, field, 1)


@DATACLASSES
def test_rule_prints_as_the_call_that_makes_it(rule):
    assert eval(repr(rule), {"Horizon": Horizon, "SquareRoot": SquareRoot}) == rule


@pytest.mark.parametrize("copied", [lambda r: pickle.loads(pickle.dumps(r)), copy.deepcopy], ids=["pickle", "deepcopy"])
@DATACLASSES
def test_rule_survives_copying(rule, copied):
    assert copied(rule) == rule


@pytest.mark.parametrize(
    "other", [Horizon(samples=127), Horizon(start=9), Horizon(fraction=0.06), SquareRoot(0.1), 0.1, None], ids=repr
)
def test_rule_differs_from_others(other):
    assert Horizon() != other


def test_equal_rules_hash_alike():
    assert len({Horizon(), Horizon(512, 8, 0.1), SquareRoot(0.1), SquareRoot(0.1)}) == 2


@LAYERS
@pytest.mark.parametrize("momentum", [Horizon(), SquareRoot(0.1), 0.3, None], ids=repr)
def test_layer_prints_its_momentum(layer, momentum):
    assert f"momentum={momentum!r}" in repr(layer(3, momentum=momentum))


@LAYERS
@pytest.mark.parametrize("momentum", RULES.values(), ids=RULES.keys())
def test_layer_keeps_its_momentum_through_pickle(layer, momentum):
    assert pickle.loads(pickle.dumps(layer(3, momentum=momentum))).momentum == momentum


def test_running_batchnorm_has_a_horizon_and_precise_batchnorm_torchs_momentum():
    assert RunningBatchNorm(3).momentum == Horizon()
    assert PreciseBatchNorm2d(3).momentum == 0.1


# ----------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "kwargs",
    [
        {"samples": 4},  # below the start of 8
        {"start": 513},  # above the samples of 512
        {"start": 0},
        {"start": -1},
        {"samples": -1, "start": -2},
        {"samples": 0, "start": 0},
        {"fraction": 0.0},
        {"fraction": -0.05},
        {"samples": math.nan},
        {"start": math.nan},
        {"fraction": math.nan},
    ],
    ids=repr,
)
def test_horizon_refuses_what_has_no_meaning(kwargs):
    with pytest.raises(ValueError, match="|".join(kwargs)):
        Horizon(**kwargs)


@pytest.mark.parametrize("kwargs", [{"samples": 8}, {"start": 1e-3}, {"fraction": 2.0}], ids=repr)
def test_horizon_takes_the_edges(kwargs):
    assert dataclasses.asdict(Horizon(**kwargs)).items() >= kwargs.items()


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
def test_square_root_refuses_what_is_no_weight(momentum):
    with pytest.raises(ValueError, match=str(momentum)):
        SquareRoot(momentum)


@pytest.mark.parametrize("momentum", [0.0, 0, 0.1, 1, 1.0])
def test_square_root_takes_any_weight(momentum):
    assert dataclasses.astuple(SquareRoot(momentum)) == (momentum,)


@LAYERS
@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
def test_layer_refuses_a_float_that_is_no_weight(layer, momentum):
    with pytest.raises(ValueError, match=str(momentum)):
        layer(3, momentum=momentum)


@LAYERS
@pytest.mark.parametrize("momentum", [0.0, 0, 0.1, 1, 1.0, None], ids=repr)
def test_layer_takes_any_weight(layer, momentum):
    assert layer(3, momentum=momentum).momentum == momentum


@LAYERS
def test_layer_refuses_what_is_no_rule(layer):
    with pytest.raises((TypeError, ValueError), match="Horizon"):
        layer(3, momentum="0.1")


# --------------------------------------------------------------------------------------------------------------- values


def test_float_is_the_weight():
    assert weights_given(0.3, [5, 1, 8]) == pytest.approx([0.3, 0.3, 0.3])


def test_none_weighs_all_batches_alike():
    layer = RunningBatchNorm(1, momentum=None, dtype=torch.float64)
    for value in (1.0, 2.0, 3.0, 6.0):
        layer(torch.full((4, 1), value, dtype=torch.float64))
    assert layer.running_mean.item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("batch_size", "weight"),
    # The table of the fast.ai notebook; it divides by zero at 1, where the rule stays at m.
    [
        (1, 0.1),
        (2, 0.1),
        (3, 0.3636),
        (4, 0.4804),
        (8, 0.6598),
        (32, 0.8384),
        (64, 0.8866),
        (128, 0.9201),
        (512, 0.9602),
    ],
)
def test_square_root_gives_the_fastai_weights(batch_size, weight):
    assert weights_given(SquareRoot(0.1), [batch_size]) == pytest.approx([weight], abs=5e-5)


@pytest.mark.parametrize(
    ("samples_before", "horizon"),
    [(0, 8), (80, 8), (200, 20), (1000, 100), (5120, 512), (100_000, 512)],
    ids=["empty", "end-of-start", "growing", "growing-more", "settled", "long-settled"],
)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_horizon_grows_with_the_samples_seen_before(samples_before, horizon, batch_size):
    layer = RunningBatchNorm(2, dtype=torch.float64)
    layer.samples.fill_(samples_before)
    layer(noise((batch_size, 2), 0, torch.float64))
    torch.testing.assert_close(layer.debias, torch.full_like(layer.debias, 1 - math.exp(-batch_size / horizon)))


@pytest.mark.parametrize("momentum", RULES.values(), ids=RULES.keys())
def test_weights_over_ragged_batches_equal_reference(momentum):
    sizes = [5, 1, 2, 8, 3]
    if momentum in (1.0, None):  # nothing is left of what came before a weight of 1, so later ones do not show
        sizes = sizes[:1]
    expected = [batch_weight(momentum, size, sum(sizes[:step]), step) for step, size in enumerate(sizes)]
    assert weights_given(momentum, sizes) == pytest.approx(expected, rel=1e-9)


def test_momentum_can_be_changed_on_a_live_layer():
    """Schedulers write `bn.momentum`; the next batch must weigh by it."""
    layer = RunningBatchNorm(1, momentum=0.5, dtype=torch.float64)
    layer(torch.zeros(4, 1, dtype=torch.float64))
    layer.momentum = 1.0
    layer(torch.ones(4, 1, dtype=torch.float64))
    assert layer.running_mean.item() == pytest.approx(1.0)


@pytest.mark.parametrize("layer", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_a_forward_with_momentum_zero_is_not_counted(layer, backend):
    """As SAM has it for its second forward; `num_batches_tracked` counts on, as in torch."""
    first, second = torch.randn((2, 4, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    plain, twice = layer(3), layer(3)
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(reason)
    with use_backend(backend):
        plain(first), twice(first)
        rule, twice.momentum = twice.momentum, 0
        twice(3 * second + 1).sum().backward()
        twice.momentum = rule
    assert twice.num_batches_tracked == 2
    for name, buffer in plain.named_buffers():
        if name not in ("num_batches_tracked", "last_keep", "last_gain"):
            assert torch.equal(twice.get_buffer(name), buffer), name


def test_a_horizon_twice_as_long_makes_up_for_two_forwards_a_step():
    once, twice = Horizon(), Horizon(samples=1024, start=16)
    for images in (0.0, 50.0, 500.0, 5000.0):
        one = once.weight(4, torch.tensor([images]), torch.zeros(1))
        two = twice.weight(4, torch.tensor([2 * images]), torch.zeros(1))
        torch.testing.assert_close(1 - one, (1 - two) ** 2)
