"""What training by the law remembers: its buffers in checkpoints of all kinds, conversions, resets and dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import each_dtype, noise
from models import pretrained
from steps import assert_identical, buffers_of, train, training_step
from torch import Tensor, nn

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, batchnormify
from runningbn.layers.buffers import TRAINING
from runningbn.ops.state import GradientState, NoiseState

NOISE, GRADIENT = NoiseState._fields, GradientState._fields
each_assign = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
each_max_lag = pytest.mark.parametrize("max_lag", [0.05, float("inf")])


def images(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise((5, 3, 2, 2), seed, dtype) * 2 + seed % 3


def trained_layer(cls: type[nn.Module] = RunningBatchNorm, **options: object) -> nn.Module:
    return train(cls(3, **options), [images(seed) for seed in range(4)])


def of(layer: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in names}


def assert_empty(layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        assert not getattr(layer, name).any(), name


def test_a_trained_layer_has_something_in_all_of_them():
    assert (*NOISE, *GRADIENT) == TRAINING
    assert all(value.all() for value in of(trained_layer(), TRAINING).values())


def without(state_dict: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state_dict.items() if key not in names}


# ------------------------------------------------------------------------------------------------ our own checkpoints


@each_assign
@each_max_lag
def test_a_checkpoint_continues_bit_for_bit(assign, max_lag):
    layer, resumed = trained_layer(max_lag=max_lag), trained_layer(max_lag=max_lag)
    train(layer, [images(9)])
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True, assign=assign)
    assert_identical(of(resumed, TRAINING), of(layer, TRAINING))
    for seed in range(10, 14):
        x = images(seed) * 3  # the noise matters: a limit is reached, and batches weigh by it
        assert_identical(training_step(resumed, x), training_step(layer, x))
    assert_identical(buffers_of(resumed), buffers_of(layer))


def test_the_noise_has_a_say_in_what_comes_next():
    """Or the test above would show nothing."""
    layer, forgetful = (trained_layer(max_lag=0.05) for _ in range(2))
    forgetful.noise.zero_()
    forgetful.noise_steps.fill_(1e6)
    steps = [training_step(one, images(9) * 3) for one in (layer, forgetful)]
    assert not torch.allclose(steps[0]["y"], steps[1]["y"])
    assert not torch.allclose(layer.count_dy, forgetful.count_dy)


@each_assign
def test_a_checkpoint_of_version_0_1_loads_strictly_and_starts_measuring(assign):
    """It had the sums of the backward, and no noise."""
    layer = trained_layer()
    old = without(layer.state_dict(), *NOISE)
    loaded = train(trained_layer(), [images(9)])
    assert not loaded.load_state_dict(old, strict=True, assign=assign).missing_keys
    assert_empty(loaded, NOISE)
    kept = [name for name in buffers_of(layer) if name not in (*NOISE, "last_keep", "last_gain")]
    assert_identical({n: buffers_of(loaded)[n] for n in kept}, {n: buffers_of(layer)[n] for n in kept})
    train(loaded, [images(10)])
    assert loaded.noise_steps.tolist() == [1, 1, 1]
    assert loaded.noise.tolist() == [5, 5, 5]  # N·R with R = 1


@each_assign
@pytest.mark.parametrize("name", TRAINING)
def test_a_part_of_the_noise_or_of_the_sums_is_reported_missing(name, assign):
    partial = without(trained_layer().state_dict(), name)
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{name}\""):
        trained_layer().load_state_dict(partial, strict=True, assign=assign)
    assert trained_layer().load_state_dict(partial, strict=False, assign=assign).missing_keys == [name]


@each_assign
def test_sums_without_noise_and_noise_without_sums_each_load(assign):
    layer = train(trained_layer(), [images(9)])
    for absent, there in ((NOISE, GRADIENT), (GRADIENT, NOISE)):
        loaded = trained_layer()
        loaded.load_state_dict(without(layer.state_dict(), *absent), strict=True, assign=assign)
        assert_empty(loaded, absent)
        assert_identical(of(loaded, there), of(layer, there))


@each_assign
def test_on_the_way_through_a_precise_layer_it_is_forgotten(assign):
    layer = trained_layer()
    between, back = trained_layer(PreciseBatchNorm2d), trained_layer()
    between.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    assert not hasattr(between, "noise")
    back.load_state_dict(between.state_dict(), strict=True, assign=assign)
    assert_empty(back, TRAINING)
    shared = list(between.state_dict())
    assert_identical({n: back.state_dict()[n] for n in shared}, {n: layer.state_dict()[n] for n in shared})
    train(back, [images(10)])
    assert back.noise.tolist() == [5, 5, 5]


@each_assign
def test_a_failed_load_leaves_it_as_it_was(assign):
    layer = trained_layer()
    before = of(layer, TRAINING)
    wrong = {**train(trained_layer(), [images(9)]).state_dict(), "noise": torch.ones(4)}
    with pytest.raises(RuntimeError, match="size mismatch for noise"):
        layer.load_state_dict(wrong, assign=assign)
    assert_identical(of(layer, TRAINING), before)


@each_assign
@each_dtype(torch.float16, torch.bfloat16)
def test_a_checkpoint_in_16_bits_starts_anew(assign, dtype):
    """Its counts do not fit, so its statistics seed the layer as those of another would."""
    narrow = {key: t.to(dtype) if t.is_floating_point() else t for key, t in trained_layer().state_dict().items()}
    layer = trained_layer()
    layer.load_state_dict(narrow, strict=True, assign=assign)
    assert_empty(layer, TRAINING)
    assert {getattr(layer, name).dtype for name in TRAINING} == {torch.float32}


# ------------------------------------------------------------------------------------------------------ taken over


@each_assign
def test_a_checkpoint_of_batchnorm_starts_measuring_afresh(assign):
    layer = trained_layer()
    layer.load_state_dict(pretrained(nn.BatchNorm2d(3)).state_dict(), strict=True, assign=assign)
    assert_empty(layer, TRAINING)
    x = images(10)
    training_step(layer, x)
    assert layer.noise_steps.tolist() == [1, 1, 1]
    assert layer.noise.tolist() == [5, 5, 5]
    torch.testing.assert_close(layer.last_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("way", [("running",), ("precise", "running"), ("running", "torch", "running")], ids="-".join)
def test_a_converted_layer_starts_measuring_afresh(way):
    """Statistics that were taken over say where the data are, not how noisy a batch of them is."""
    layer = pretrained(nn.BatchNorm2d(3))
    for to in way[:-1]:
        train(batchnormify(layer, to), [images(seed) for seed in range(3)])
    batchnormify(layer, way[-1])
    assert_empty(layer, TRAINING)
    training_step(layer, images(10))
    assert layer.noise_steps.tolist() == [1, 1, 1]
    assert layer.noise.tolist() == [5, 5, 5]


@pytest.mark.parametrize("to", ["precise", "torch"])
def test_a_conversion_to_another_layer_leaves_nothing_of_it(to):
    layer = train(batchnormify(pretrained(nn.BatchNorm2d(3))), [images(0)])
    names = {name for name, _ in batchnormify(layer, to).named_buffers()}
    assert names.isdisjoint(TRAINING)


def test_precise_layers_have_none_of_it():
    assert {name for name, _ in PreciseBatchNorm2d(3).named_buffers()}.isdisjoint(TRAINING)


def test_assigned_statistics_are_measured_on():
    """A recalibration moves the statistics, not the noise of batches."""
    layer = trained_layer()
    before = of(layer, TRAINING)
    layer.running_mean = torch.ones(3)
    assert_identical(of(layer, TRAINING), before)


# ------------------------------------------------------------------------------------------------- resets and dtypes


def test_a_reset_forgets_it():
    layer = trained_layer()
    layer.reset_running_stats()
    assert_empty(layer, TRAINING)
    fresh = RunningBatchNorm(3)
    for seed in range(3):
        assert_identical(training_step(layer, images(seed)), training_step(fresh, images(seed)))
    assert_identical(buffers_of(layer), buffers_of(fresh))


@pytest.mark.parametrize("halve", [nn.Module.half, nn.Module.bfloat16, lambda layer: layer.to(torch.float16)])
def test_halving_leaves_it_float32_bit_for_bit(halve):
    layer = trained_layer()
    before = of(layer, TRAINING)
    halve(layer)
    assert layer.weight.element_size() == 2
    assert_identical(of(layer, TRAINING), before)


@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_training_measures_as_float32_does(dtype):
    narrow, wide = RunningBatchNorm(3, dtype=dtype), RunningBatchNorm(3)
    for seed in range(4):
        x = images(seed).to(dtype)
        narrow(x)
        wide(x.float())
    assert_identical(of(narrow, ("noise_steps",)), of(wide, ("noise_steps",)))
    # The same numbers through different loops: some roundings of float32.
    for name in ("noise", "last_mean"):
        torch.testing.assert_close(getattr(narrow, name), getattr(wide, name), rtol=1e-5, atol=1e-6)


def test_double_makes_it_float64_and_keeps_every_value():
    layer = trained_layer()
    before = {name: value.double() for name, value in of(layer, TRAINING).items()}
    assert_identical(of(layer.double(), TRAINING), before)
