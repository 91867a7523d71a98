"""PreciseBatchNorm1d/2d/3d: trains as nn.BatchNorm*d, evaluates with exact pooled statistics."""

import copy
import math

import pytest
import torch
from cases import (
    POISONED,
    PRECISE,
    RAGGED,
    RULES,
    LayerCase,
    assert_near,
    each,
    each_dtype,
    each_rule,
    from_this_state,
    noise,
    poisoned,
    with_random_affine,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import element_weights, pooled_moments
from steps import assert_identical, buffers_of, see, training_step
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, module_db
from versions import BATCH_NORM_TAKES_BIAS, needs_batch_norm_without_bias

from runningbn import Horizon, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm, SquareRoot

TORCH = {PreciseBatchNorm1d: nn.BatchNorm1d, PreciseBatchNorm2d: nn.BatchNorm2d, PreciseBatchNorm3d: nn.BatchNorm3d}
PAIRS = pytest.mark.parametrize(("precise", "plain"), TORCH.items(), ids=lambda cls: cls.__name__)
SHAPES = PRECISE[:4]  # (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W)
IMAGE = next(case for case in PRECISE if case.id == "precise2d")
SIZES = tuple(size for size in RAGGED if size > 1)  # batches of (N, C) need two values

VARIANTS = {
    "default": {},
    "eps": {"eps": 0.1},
    "momentum": {"momentum": 0.8},
    "momentum-one": {"momentum": 1.0},
    "cumulative": {"momentum": None},
    "no-bias": pytest.param({"bias": False}, marks=needs_batch_norm_without_bias),
    "no-affine": {"affine": False},
    "no-tracking": {"track_running_stats": False},
}
# A value is rounded about 30 times (see test_running.py), torch's as often.
ROUNDINGS = 64


def twins(case: LayerCase, dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's with the same parameters; torch's has no rules, but neither does its momentum train."""
    layer = case.layer(dtype, **kwargs)
    kwargs = {
        name: value for name, value in kwargs.items() if name != "momentum" or value is None or type(value) is float
    }
    return layer, with_random_affine(TORCH[case.constructor](case.channels, dtype=dtype, **kwargs))


def scales(case_dy: Tensor, x: Tensor, layer: nn.Module) -> dict[str, float]:
    """The size of the terms that are added or subtracted in y and in each gradient."""
    dims = [d for d in range(x.dim()) if d != 1]
    std = (x.double().var(dims, correction=0) + layer.eps).sqrt()
    reach = (x.double().abs().amax(dims) / std).max().item()  # x / std; x_hat is not larger than twice that
    sum_dy = case_dy.double().abs().sum(dims).max().item()
    dx = 1.5 / std.min().item() * case_dy.double().abs().max().item() * max(reach, 1.0)
    return {"y": 1.5 * max(reach, 1.0), "dx": dx, "dweight": sum_dy * max(reach, 1.0), "dbias": sum_dy}


def assert_steps_near(
    actual: dict[str, Tensor], expected: dict[str, Tensor], scale: dict[str, float], roundings: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_near(value, expected[name], roundings, scale[name])


# -------------------------------------------------------------------------------------------------- trains as BatchNorm


@each(SHAPES)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
@each_dtype(torch.float32, torch.float64)
def test_training_step_equals_batchnorm(case, kwargs, dtype):
    layer, twin = twins(case, dtype, **kwargs)
    for seed, x in enumerate(case.batches(SIZES, dtype)):
        dy = noise(x.shape, seed, dtype)
        assert_steps_near(training_step(layer, x, dy), training_step(twin, x, dy), scales(dy, x, twin), ROUNDINGS)


@pytest.mark.parametrize("momentum", [Horizon(), SquareRoot(0.1)], ids=repr)
def test_training_step_does_not_depend_on_the_rule(momentum):
    layer, twin = twins(IMAGE, torch.float64, momentum=momentum)
    for seed, x in enumerate(IMAGE.batches(dtype=torch.float64)):
        dy = noise(x.shape, seed, torch.float64)
        assert_steps_near(training_step(layer, x, dy), training_step(twin, x, dy), scales(dy, x, twin), ROUNDINGS)


@each(SHAPES)
@pytest.mark.parametrize(
    ("input_dtype", "layer_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=["bfloat16-in-float32", "float16-in-float32", "bfloat16", "float16"],
)
def test_half_precision_step_is_the_rounded_float64_one(case, input_dtype, layer_dtype):
    layer = case.layer().to(layer_dtype)
    exact = with_random_affine(TORCH[case.constructor](case.channels)).to(layer_dtype).double()
    for seed, x in enumerate(case.batches(SIZES, input_dtype)):
        dy = noise(x.shape, seed, input_dtype)
        actual = training_step(layer, x, dy)
        expected = training_step(exact, x.double(), dy.double())
        assert (actual["y"].dtype, actual["dx"].dtype, actual["dweight"].dtype) == (
            input_dtype,
            input_dtype,
            layer_dtype,
        )
        # One rounding of what is returned, half an eps of the largest; sums and arithmetic are float32.
        assert_steps_near(
            {name: value.to(input_dtype) for name, value in actual.items()}, expected, scales(dy, x, exact), roundings=1
        )


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_whole_layer_in_half_precision_keeps_its_state_in_float32(convert):
    layer = getattr(see(IMAGE.layer(), IMAGE.batches()), convert)()
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} == {torch.float32}


def test_whole_layer_in_half_precision_evaluates():
    layer = see(IMAGE.layer(), IMAGE.batches())
    x = IMAGE.input(4, seed=9, dtype=torch.bfloat16)
    halved = copy.deepcopy(layer).bfloat16().eval()
    exact = copy.deepcopy(halved).double()
    assert_near(halved(x).detach(), exact(x.double()).detach(), 1)


def test_double_makes_the_state_float64():
    layer = IMAGE.layer().double()
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize(
    ("case", "memory_format"),
    [(PRECISE[2], torch.channels_last), (PRECISE[3], torch.channels_last_3d)],
    ids=["channels_last", "channels_last_3d"],
)
def test_memory_format_is_kept(case, memory_format):
    layer = case.layer()
    x = case.input(4).to(memory_format=memory_format)
    step = training_step(layer, x, noise(x.shape, 0).to(memory_format=memory_format))
    assert step["y"].is_contiguous(memory_format=memory_format)
    assert step["dx"].is_contiguous(memory_format=memory_format)


STRIDES = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("dy_strides", STRIDES.values(), ids=[f"dy-{name}" for name in STRIDES])
def test_strides_make_no_difference(strides, dy_strides):
    layer, twin = twins(IMAGE, torch.float64)
    x, dy = strides(IMAGE.input(4, dtype=torch.float64)), dy_strides(noise((4, *IMAGE.shape), 0, torch.float64))
    actual, expected = training_step(layer, x, dy), training_step(twin, x.contiguous(), dy.contiguous())
    assert_steps_near(actual, expected, scales(dy, x, twin), ROUNDINGS)


def test_gradients_only_where_they_are_asked_for():
    layer = IMAGE.layer()
    layer.weight.requires_grad_(False)
    layer(IMAGE.input(4)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@each(SHAPES)
@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=lambda check: check.__name__
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivatives(case, check, training):
    layer = see(case.layer(torch.float64), case.batches(SIZES, torch.float64)).train(training)
    # few values, as the Jacobian is dense
    x = case.input(3, seed=9, dtype=torch.float64)[(slice(None), slice(None), *[slice(2)] * (len(case.shape) - 1))]
    function, parameters = from_this_state(layer)
    assert check(function, (x.clone().requires_grad_(), *parameters))


# ------------------------------------------------------------------------------------------------- torch's module tests

MODULES = {info.module_cls: info for info in module_db if info.module_cls in TORCH.values()}


def module_inputs(info: ModuleInfo, training: bool):
    # their generator is torch's global one
    torch.manual_seed(0)
    return info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)


@PAIRS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchs_module_inputs(precise, plain, training):
    inputs = module_inputs(MODULES[plain], training)
    assert len(inputs) >= 6
    for case in inputs:
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        layer, twin = (with_random_affine(cls(*args, **kwargs).double()).train(training) for cls in (precise, plain))
        (x,) = case.forward_input.args
        for seed in range(2):
            dy = noise(x.shape, seed, torch.float64)
            actual, expected = training_step(layer, x, dy), training_step(twin, x, dy)
            assert actual.keys() == expected.keys(), case.desc
            for name in actual:
                torch.testing.assert_close(
                    actual[name], expected[name], rtol=1e-10, atol=1e-10, msg=f"{case.desc}: {name}"
                )


@PAIRS
def test_torchs_module_error_inputs(precise, plain):
    info = MODULES[plain]
    if info.module_error_inputs_func is None:
        pytest.skip(f"the table of torch {torch.__version__} has no wrong inputs for {plain.__name__}")
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    assert len(errors) >= 2
    for error in errors:
        arguments = error.module_error_input
        layer = precise(*arguments.constructor_input.args, **arguments.constructor_input.kwargs).double()
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*arguments.forward_input.args)


@PAIRS
def test_is_its_torch_class(precise, plain):
    assert issubclass(precise, plain)


# ------------------------------------------------------------------------------------------------------ errors as torch


def error_of(layer: nn.Module, x: Tensor) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which exception it is, is what is compared
        layer(x)
    return caught.value


@PAIRS
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5, 6], ids=lambda dims: f"{dims}d")
def test_wrong_number_of_dimensions_is_torchs_error(precise, plain, dims):
    x = torch.zeros((2, 3, 2, 2, 2, 2)[:dims] if dims > 1 else (3,))
    if dims in {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[plain]:
        assert precise(3)(x).shape == x.shape
    else:
        expected = error_of(plain(3), x)
        actual = error_of(precise(3), x)
        assert (type(actual), str(actual)) == (type(expected), str(expected))


@each(SHAPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_channel_count_names_both(case, training):
    x = torch.zeros(2, case.channels + 1, *case.shape[1:])
    layer = case.layer().train(training)
    with pytest.raises((RuntimeError, ValueError), match=rf"{case.channels}\D") as caught:
        layer(x)
    assert str(tuple(x.shape)) in str(caught.value) or str(list(x.shape)) in str(caught.value)


@each(SHAPES)
def test_one_value_per_channel_is_torchs_error_in_training(case):
    x = torch.zeros(1, case.channels, *[1] * (len(case.shape) - 1))
    layer, twin = twins(case)
    actual, expected = error_of(layer, x), error_of(twin, x)
    assert (type(actual), str(actual)) == (type(expected), str(expected))


@each(SHAPES)
def test_one_value_per_channel_evaluates(case):
    x = torch.zeros(1, case.channels, *[1] * (len(case.shape) - 1))
    layer, twin = twins(case)
    assert_near(layer.eval()(x), twin.eval()(x), 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_dtype_is_named(dtype, training):
    with pytest.raises((RuntimeError, TypeError), match=str(dtype).removeprefix("torch.")):
        PreciseBatchNorm2d(3).train(training)(torch.zeros(2, 3, 4, 4, dtype=dtype))


@each(SHAPES)
def test_empty_batch_gives_an_empty_output_gradients_of_zero_and_changes_nothing(case):
    layer = see(case.layer(), case.batches(SIZES))
    before = buffers_of(layer)
    x = torch.empty(0, *case.shape)
    step = training_step(layer, x, torch.empty_like(x))
    assert step["y"].shape == step["dx"].shape == x.shape
    assert torch.equal(step["dweight"], torch.zeros(case.channels))
    assert torch.equal(step["dbias"], torch.zeros(case.channels))
    assert_identical(buffers_of(layer), before)


# ----------------------------------------------------------------------------------------------------------- evaluation


@each(PRECISE)
def test_untrained_layer_evaluates_as_batchnorm(case):
    if "bias" in case.kwargs and not BATCH_NORM_TAKES_BIAS:
        pytest.skip(f"nn.BatchNorm2d of torch {torch.__version__} has no argument `bias`")
    layer = case.layer().eval()
    twin = with_random_affine(TORCH[case.constructor](case.channels, **{**case.kwargs, "momentum": 0.1})).eval()
    x = case.input(4)
    assert_near(layer(x).detach(), twin(x).detach(), 4)


@each(PRECISE)
def test_evaluation_is_batchnorms_with_the_running_statistics(case):
    layer = see(case.layer(), case.batches(SIZES)).eval()
    x = case.input(4, seed=9)
    expected = nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )
    assert_near(layer(x).detach(), expected.detach(), 8)


@each(PRECISE)
def test_evaluation_changes_nothing(case):
    layer = see(case.layer(), case.batches(SIZES)).eval()
    before = buffers_of(layer)
    layer(case.input(4, seed=9))
    assert_identical(buffers_of(layer), before)


@each(SHAPES)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradients_in_evaluation_equal_batchnorm(case, kwargs):
    layer, twin = twins(case, torch.float64, **kwargs)
    see(layer, case.batches(SIZES, torch.float64)).eval()
    twin.running_mean, twin.running_var = layer.running_mean, layer.running_var
    twin.eval()
    x = case.input(4, seed=9, dtype=torch.float64)
    dy = noise(x.shape, 0, torch.float64)
    assert_steps_near(training_step(layer, x, dy), training_step(twin, x, dy), scales(dy, x, twin), ROUNDINGS)


# ---------------------------------------------------------------------------------------------------- pooled statistics


@each(SHAPES)
@each_rule()
def test_running_mean_is_the_weighted_mean_of_everything_seen(case, momentum):
    layer = case.layer(torch.float64, momentum=momentum)
    batches = case.batches(SIZES, torch.float64)
    see(layer, batches)
    expected = pooled_moments(batches, element_weights(momentum, SIZES, math.prod(case.shape[1:])))
    assert_near(layer.running_mean, expected.mean, ROUNDINGS, 4)


@each(SHAPES)
@each_rule()
def test_running_var_is_the_unbiased_weighted_variance_of_everything_seen(case, momentum):
    """Correction by the effective count (Σw)²/Σw² of the elements."""
    layer = case.layer(torch.float64, momentum=momentum)
    batches = case.batches(SIZES, torch.float64)
    see(layer, batches)
    expected = pooled_moments(batches, element_weights(momentum, SIZES, math.prod(case.shape[1:])))
    assert_near(layer.running_var, expected.unbiased, ROUNDINGS, 16)


@each(SHAPES)
@each_rule()
def test_after_one_batch_the_statistics_are_torchs_at_momentum_one(case, momentum):
    layer = case.layer(torch.float64, momentum=momentum)
    twin = TORCH[case.constructor](case.channels, momentum=1.0, dtype=torch.float64)
    x = case.input(5, dtype=torch.float64)
    layer(x)
    twin(x)
    assert_near(layer.running_mean, twin.running_mean, ROUNDINGS, 4)
    assert_near(layer.running_var, twin.running_var, ROUNDINGS, 16)


def test_momentum_one_is_torchs_at_every_step():
    layer, twin = twins(IMAGE, torch.float64, momentum=1.0)
    for x in IMAGE.batches(dtype=torch.float64):
        layer(x)
        twin(x)
        assert_near(layer.running_mean, twin.running_mean, ROUNDINGS, 4)
        assert_near(layer.running_var, twin.running_var, ROUNDINGS, 16)


@settings(deadline=None, max_examples=50, database=None)
@given(data=st.data())
def test_cumulative_statistics_are_those_of_everything_seen_however_split(data):
    """torch.mean and torch.var(correction=1) of all values; torch's own momentum=None averages variances of batches."""
    total = data.draw(st.integers(2, 40), label="samples")
    sizes, left = [], total
    while left:
        sizes.append(data.draw(st.integers(1, left), label="batch size"))
        left -= sizes[-1]
    # samples that differ in mean, so that the variance between batches is most of the variance
    centres = 3 * noise((total, 2, 1, 1), 1, torch.float64)
    x = noise((total, 2, 2, 3), data.draw(st.integers(0, 1000), label="seed"), torch.float64) + centres
    layer = see(PreciseBatchNorm2d(2, momentum=None, dtype=torch.float64), x.split(sizes))
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3), correction=1), rtol=1e-11, atol=1e-11)


def test_variance_between_batches_counts():
    """Eight zeros and two tens: mean 2 and variance 17.8, where averaging the batches' statistics gives 5 and 0."""
    layer = see(PreciseBatchNorm1d(1, momentum=None), [torch.zeros(8, 1), torch.full((2, 1), 10.0)])
    assert layer.running_mean.item() == pytest.approx(2.0)
    assert layer.running_var.item() == pytest.approx(160 / 9)


def test_constant_input_has_that_mean_and_no_variance():
    layer = see(IMAGE.layer(), [torch.full((4, *IMAGE.shape), 3.7)] * 5)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(layer.running_mean, torch.full_like(layer.running_mean, 3.7), rtol=2 * eps, atol=0.0)
    assert (layer.running_var >= 0).all()
    assert (layer.running_var <= (8 * eps * 3.7) ** 2).all()


# A float32 x at 1e4 is itself rounded by up to 5e-4: the truth is the float64 moments of the rounded numbers.
FAR = 1e4


@each(SHAPES)
@each_rule()
def test_first_variance_survives_a_mean_of_ten_thousand_stds(case, momentum):
    layer = case.layer(momentum=momentum)
    x = noise((64, *case.shape), 0) + FAR
    layer(x)
    torch.testing.assert_close(layer.running_var.double(), pooled_moments([x]).unbiased, rtol=1e-3, atol=0.0)


@each(SHAPES)
@each_rule()
def test_variance_at_a_mean_of_ten_thousand_stds_is_sharp_once_warm(case, momentum):
    layer = case.layer(momentum=momentum)
    batches = [noise((64, *case.shape), seed) + FAR for seed in range(6)]
    see(layer, batches)
    expected = pooled_moments(batches, element_weights(momentum, [64] * 6, math.prod(case.shape[1:])))
    torch.testing.assert_close(layer.running_var.double(), expected.unbiased, rtol=1e-5, atol=0.0)


@each(SHAPES)
@pytest.mark.parametrize("centre", [0.0, 1e3, 1e4], ids=lambda centre: f"from-{centre:g}")
def test_output_survives_a_jump_of_the_mean(case, centre):
    """Batch statistics are used by themselves: a pivot left behind by 10⁴ stds must not show in them."""
    layer = see(case.layer(), [noise((16, *case.shape), seed) + centre for seed in range(3)])
    x = noise((16, *case.shape), 9) + (FAR - centre)
    y = layer(x).detach()
    twin = with_random_affine(TORCH[case.constructor](case.channels, dtype=torch.float64))
    # A float32 mean near 1e4 is off by up to half an ulp, 4.9e-4 std, the variance by 1e-3; |x_hat| < 5, weight ≤ 1.5.
    atol = 1.5e-3 + 0.5e-3 * 1.5 * 5
    torch.testing.assert_close(y.double(), twin(x.double()).detach(), rtol=0.0, atol=atol)


# -------------------------------------------------------------------------------------------------- non-finite channels


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_non_finite_input_shows_as_in_torch(poison):
    layer, twin = twins(IMAGE, torch.float64)
    x, dy = poisoned(IMAGE.input(4, dtype=torch.float64), poison), noise((4, *IMAGE.shape), 0, torch.float64)
    actual, expected = training_step(layer, x, dy), training_step(twin, x, dy)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
    for name, value in expected.items():
        assert torch.equal(actual[name].isfinite(), value.isfinite()), name


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_poisoned_channel_keeps_its_state(poison):
    layer = see(IMAGE.layer(), IMAGE.batches())
    before = buffers_of(layer)
    layer(poisoned(IMAGE.input(4, seed=9), poison))
    after = buffers_of(layer)
    of_channels = [name for name in before if before[name].dim() and not name.startswith("last_")]
    assert_identical({n: after[n][POISONED] for n in of_channels}, {n: before[n][POISONED] for n in of_channels})


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@each_rule()
def test_statistics_go_on_without_the_poisoned_batch(poison, momentum):
    """The poisoned channel ends as if it had never been given that batch, the others as if nothing had been wrong."""
    clean = IMAGE.batches(dtype=torch.float64)
    layer = see(
        IMAGE.layer(torch.float64, momentum=momentum),
        [poisoned(x, poison) if i == 2 else x for i, x in enumerate(clean)],
    )
    others = see(IMAGE.layer(torch.float64, momentum=momentum), clean)
    without = see(IMAGE.layer(torch.float64, momentum=momentum), clean[:2] + clean[3:])
    for name in ("running_mean", "running_var"):
        expected = getattr(others, name).clone()
        expected[POISONED] = getattr(without, name)[POISONED]
        assert_near(getattr(layer, name), expected, ROUNDINGS, 16)


# -------------------------------------------------------------------------------------------------- track_running_stats


@PAIRS
def test_layer_without_tracking_has_no_statistics(precise, plain):
    layer = precise(3, track_running_stats=False)
    assert [layer.running_mean, layer.running_var, layer.num_batches_tracked] == [None] * 3
    assert list(layer.state_dict()) == list(plain(3, track_running_stats=False).state_dict())


@each(SHAPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layer_without_tracking_normalises_by_the_batch(case, training):
    layer, twin = twins(case, torch.float64, track_running_stats=False)
    x = case.input(4, dtype=torch.float64)
    assert_near(layer.train(training)(x).detach(), twin.train(training)(x).detach(), ROUNDINGS)


def toggled(layer: nn.Module) -> nn.Module:
    layer.track_running_stats = False
    return layer


def test_clearing_the_flag_on_a_live_layer_freezes_its_statistics():
    layer = toggled(see(IMAGE.layer(), IMAGE.batches()))
    before = buffers_of(layer)
    layer(IMAGE.input(4, seed=9))
    assert_identical(buffers_of(layer), before)


def test_clearing_the_flag_on_a_live_layer_trains_on():
    layer, twin = (toggled(bn) for bn in twins(IMAGE, torch.float64))
    x, dy = IMAGE.input(4, dtype=torch.float64), noise((4, *IMAGE.shape), 0, torch.float64)
    assert_steps_near(training_step(layer, x, dy), training_step(twin, x, dy), scales(dy, x, twin), ROUNDINGS)


def test_clearing_the_flag_on_a_live_layer_still_evaluates_by_its_statistics():
    layer = see(IMAGE.layer(), IMAGE.batches())
    x = IMAGE.input(4, seed=9)
    expected = copy.deepcopy(layer).eval()(x)
    assert torch.equal(toggled(layer).eval()(x), expected)


def test_setting_the_flag_again_goes_on():
    layer = toggled(see(IMAGE.layer(), IMAGE.batches()))
    layer.track_running_stats = True
    layer(IMAGE.input(4, seed=9))
    assert layer.num_batches_tracked == len(RAGGED) + 1


def as_tent(layer: nn.Module) -> nn.Module:
    """What test-time adaptation does to a trained model (Wang et al., ICLR 2021: "force use of batch stats")."""
    layer.track_running_stats = False
    layer.running_mean = None
    layer.running_var = None
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tent_idiom_normalises_by_the_batch(training):
    layer, twin = (as_tent(see(bn, IMAGE.batches(dtype=torch.float64))) for bn in twins(IMAGE, torch.float64))
    x, dy = IMAGE.input(4, seed=9, dtype=torch.float64), noise((4, *IMAGE.shape), 0, torch.float64)
    actual, expected = training_step(layer.train(training), x, dy), training_step(twin.train(training), x, dy)
    assert_steps_near(actual, expected, scales(dy, x, twin), ROUNDINGS)


def test_tent_idiom_leaves_no_state_behind():
    layer, twin = (as_tent(see(bn, IMAGE.batches())) for bn in twins(IMAGE))
    assert layer.state_dict().keys() == twin.state_dict().keys()
    # What episodic adaptation does before each batch.
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True)
    for other in (layer, copy.deepcopy(layer).half().float()):
        assert other(IMAGE.input(4)).isfinite().all()
    for bn in (layer, twin):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            bn.load_state_dict(IMAGE.layer().state_dict())


# ---------------------------------------------------------------------------------------------------------- taking over


@each(SHAPES)
@each_rule()
def test_checkpoint_of_batchnorm_evaluates_identically(case, momentum):
    layer, twin = twins(case, torch.float64, momentum=momentum)
    see(twin, case.batches(SIZES, torch.float64))
    layer.load_state_dict(twin.state_dict(), strict=True)
    x = case.input(4, seed=9, dtype=torch.float64)
    assert_near(layer.eval()(x).detach(), twin.eval()(x).detach(), 4)


@pytest.mark.parametrize(("momentum", "a"), [(0.1, 0.1), (None, 1 / 7)], ids=["float", "none"])
def test_first_batch_after_a_seed_weighs_exactly_a(momentum, a):
    layer, twin = twins(IMAGE, torch.float64, momentum=momentum)
    see(twin, IMAGE.batches(dtype=torch.float64))
    layer.load_state_dict(twin.state_dict(), strict=True)
    x = IMAGE.input(5, seed=9, dtype=torch.float64)
    layer(x)
    assert_near(layer.running_mean, torch.lerp(twin.running_mean, pooled_moments([x]).mean, a), ROUNDINGS)


@pytest.mark.parametrize("name", RULES)
def test_resuming_from_a_checkpoint_continues_bit_for_bit(name):
    batches = IMAGE.batches()
    layer = see(IMAGE.layer(momentum=RULES[name]), batches[:3])
    resumed = IMAGE.layer(momentum=RULES[name])
    resumed.load_state_dict(layer.state_dict())
    see(layer, batches[3:])
    see(resumed, batches[3:])
    assert_identical(buffers_of(resumed), buffers_of(layer))


# ---------------------------------------------------------------------------------------------- several faults at once


POSITIVE, NEGATIVE = "eps must be positive during training", "eps must be non-negative"
INTEGERS, WIDE = torch.zeros(2, 3, 2, 2, dtype=torch.int64), torch.zeros(2, 4, 2, 2, dtype=torch.float64)
# What nn.BatchNorm2d of torch 2.13 complains of, in training and in evaluation.
FAULTS = {
    "eps and dtype": ({"eps": 0.0}, INTEGERS, POSITIVE, "expected a floating-point input"),
    "eps and channels": ({"eps": -1.0}, torch.zeros(2, 4, 2, 2), POSITIVE, NEGATIVE),
    "eps, channels and dtype": ({"eps": 0.0}, WIDE, POSITIVE, "expected 3 channels"),
    "channels and dtype": ({}, WIDE, "expected 3 channels", "expected 3 channels"),
    "dimensions and eps": ({"eps": 0.0}, torch.zeros(2), "expected", "expected"),
    "eps": ({"eps": -1e-3}, torch.zeros(2, 3, 2, 2), POSITIVE, NEGATIVE),
}


@pytest.mark.parametrize(("options", "x", "training", "evaluation"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("cls", [PreciseBatchNorm2d, RunningBatchNorm])
def test_of_several_faults_the_one_that_torch_names_is_named(cls, options, x, training, evaluation):
    layer = cls(3, **options)
    with pytest.raises((ValueError, RuntimeError), match=training):
        layer(x)
    with pytest.raises((ValueError, RuntimeError), match=evaluation):
        layer.eval()(x)


def test_without_statistics_evaluation_is_as_strict_as_training():
    with pytest.raises(ValueError, match=POSITIVE):
        PreciseBatchNorm2d(3, eps=0.0, track_running_stats=False).eval()(torch.zeros(2, 3, 2, 2))
