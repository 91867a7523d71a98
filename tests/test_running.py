"""RunningBatchNorm against its float64 reference, the fast.ai class, nn.BatchNorm, and facts."""

import copy
import math
import re
from collections.abc import Iterable, Iterator

import pytest
import torch
from cases import (
    GRADIENTS,
    POISONED,
    RAGGED,
    RULES,
    RUNNING,
    LayerCase,
    assert_near,
    each,
    each_dtype,
    each_gradient,
    each_pair,
    each_rule,
    from_this_state,
    names_of,
    noise,
    poisoned,
    with_random_affine,
)
from reference import (
    CLAMP_SAMPLES,
    CLAMP_VARIANCE,
    FastaiRunningBatchNorm,
    ReferenceRunningBatchNorm,
    Step,
    channel_rows,
    element_weights,
    pooled_moments,
)
from steps import assert_identical, buffers_of, see, training_step
from torch import Tensor, nn

from runningbn import Horizon, RunningBatchNorm, SquareRoot

SHAPES = RUNNING[:5]  # 2-D to 6-D input
IMAGE = next(case for case in RUNNING if case.id == "running-4d-input")
FULL_PRECISION = names_of(torch.float32, torch.float64)
STATE = ("count", "count_sqrs", "debias", "samples", "steps")
BACKWARD_STATE = ("sum_dy", "sum_dy_xhat", "count_dy")

# A value on the longest path is rounded about 30 times: a sum of up to 1000 elements (10 if pairwise or in lanes, and
# the errors are random), moving the pivot (4), the lerp (2), moments (4), rstd (3), the affine map (2); the six steps
# of a test carry on what they do not forget, and the backward sums add another dozen. 64 leaves a factor of two.
ROUNDINGS = 64


def reference_of(layer: RunningBatchNorm) -> ReferenceRunningBatchNorm:
    """The reference with the layer's settings and parameters, at the state of a new layer."""
    ones = torch.ones(layer.num_features)
    weight = ones if layer.weight is None else layer.weight
    bias = 0 * ones if layer.bias is None else layer.bias
    return ReferenceRunningBatchNorm(weight, bias, layer.momentum, layer.gradient, layer.max_lag, layer.eps)


def side_by_side(
    layer: RunningBatchNorm, reference: ReferenceRunningBatchNorm, batches: Iterable[Tensor]
) -> Iterator[tuple[tuple[Tensor | None, ...], Step, tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Trains both; yields per batch the layer's (y, dx, dweight, dbias), the reference's step and gradients, and dy."""
    for seed, x in enumerate(batches):
        dy = noise(x.shape, seed, x.dtype) + 0.5  # a mean, so that dropping its subtraction shows
        step = reference.forward(x)
        found = training_step(layer, x, dy)
        outputs = tuple(found.get(name) for name in ("y", "dx", "dweight", "dbias"))
        yield outputs, step, reference.backward(step, dy), dy


def assert_outputs_near(y: Tensor, step: Step, roundings: float = ROUNDINGS) -> None:
    # An error of one rounding in the mean or in x is one in |x|, which the output sees times weight·rstd.
    assert_near(y, step.y.detach(), roundings, (step.weight * step.rstd).max() * step.x.abs().max() + step.bias.max())


def assert_gradients_near(
    gradients: tuple[Tensor | None, ...], expected: tuple[Tensor, ...], step: Step, dy: Tensor
) -> None:
    """Each gradient is a difference or a sum of terms that may cancel; its scale is that of the terms."""
    dx, dweight, dbias = gradients
    rounded_x_hat = max(step.x_hat.abs().max(), (step.x.abs().max() * step.rstd.max()))
    assert_near(dx, expected[0], ROUNDINGS, (step.weight * step.rstd).max() * dy.abs().max() * rounded_x_hat)
    if dweight is not None:
        assert_near(dweight, expected[1], ROUNDINGS, channel_rows(dy.abs()).sum(1).max() * rounded_x_hat)
    if dbias is not None:
        assert_near(dbias, expected[2], ROUNDINGS, channel_rows(dy.abs()).sum(1).max())


def pooled_state(layer: RunningBatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the sums, whatever the pivot."""
    sums, sqrs, shift, count = (getattr(layer, name).double() for name in ("sums", "sqrs", "shift", "count"))
    return shift + sums / count, sqrs / count - (sums / count).square()


def assert_states_near(layer: RunningBatchNorm, reference: ReferenceRunningBatchNorm) -> None:
    mean, var = (reference.state(name) for name in ("mean", "var"))
    spread = (var + mean.square()).max().sqrt()  # the scale of the values that were summed
    dtype = layer.sums.dtype
    pooled_mean, pooled_var = pooled_state(layer)
    assert_near(pooled_mean.to(dtype), mean, ROUNDINGS, spread)
    assert_near(pooled_var.to(dtype), var, ROUNDINGS, spread.square())
    for name in STATE:
        assert_near(getattr(layer, name), reference.state(name), ROUNDINGS)
    assert_near(layer.running_mean, reference.state("running_mean"), ROUNDINGS, spread)
    assert_near(layer.running_var, reference.state("running_var"), ROUNDINGS, spread.square())
    assert layer.num_batches_tracked.item() == reference.num_batches_tracked


def assert_backward_sums_near(
    layer: RunningBatchNorm, reference: ReferenceRunningBatchNorm, step: Step, dy: Tensor
) -> None:
    assert_near(layer.count_dy, reference.state("count_dy"), ROUNDINGS)
    scale = channel_rows(dy.abs()).sum(1).max()
    assert_near(layer.sum_dy, reference.state("sum_dy"), ROUNDINGS, scale)
    # x_hat reaches about 4
    assert_near(layer.sum_dy_xhat, reference.state("sum_dy_xhat"), ROUNDINGS, 4 * scale)


# ------------------------------------------------------------------------------------------------ against the reference


@each_pair(case=names_of(*SHAPES), momentum=RULES, gradient=dict(zip(GRADIENTS, GRADIENTS)), dtype=FULL_PRECISION)
def test_a_step_equals_reference(case, momentum, gradient, dtype):
    layer = case.layer(dtype, momentum=momentum, gradient=gradient)
    reference = reference_of(layer)
    for (y, *gradients), step, expected, dy in side_by_side(layer, reference, case.batches(dtype=dtype)):
        assert_outputs_near(y, step)
        assert_gradients_near(gradients, expected, step, dy)
        assert_states_near(layer, reference)
        if gradient == "running":
            assert_backward_sums_near(layer, reference, step, dy)


@each_pair(lag={"wider": (3.0, 0.0), "farther": (1.0, 3.0), "both": (3.0, 3.0)}, momentum=RULES, dtype=FULL_PRECISION)
def test_steps_whose_statistics_lag_equal_reference(lag, momentum, dtype):
    (growth, drift), layer = lag, IMAGE.layer(dtype, momentum=momentum)
    batches = [x * growth**i + drift * i for i, x in enumerate(IMAGE.batches(dtype=dtype))]
    for (y, *gradients), step, expected, dy in side_by_side(layer, reference_of(layer), batches):
        assert_outputs_near(y, step)
        assert_gradients_near(gradients, expected, step, dy)


@pytest.mark.parametrize(
    "kwargs", [{"bias": False}, {"affine": False}, {"eps": 0.1}], ids=["no-bias", "no-affine", "eps"]
)
@each_gradient()
def test_constructor_variants_equal_reference(kwargs, gradient):
    layer = IMAGE.layer(torch.float64, gradient=gradient, **kwargs)
    for (y, *gradients), step, expected, dy in side_by_side(
        layer, reference_of(layer), IMAGE.batches(dtype=torch.float64)
    ):
        assert_outputs_near(y, step)
        assert_gradients_near(gradients, expected, step, dy)


@each_dtype(torch.bfloat16, torch.float16)
def test_half_precision_input_gives_half_precision_output_of_the_reference(dtype):
    layer = IMAGE.layer(torch.float32)
    reference = reference_of(layer)
    for x in IMAGE.batches(dtype=dtype):
        y = layer(x)
        assert y.dtype == dtype
        # One rounding of the output (half an eps); statistics and arithmetic are float32.
        assert_outputs_near(y.detach(), reference.forward(x), roundings=1)


@each_gradient()
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in-order", "reversed"])
def test_two_forwards_before_their_backwards_equal_reference(gradient, order):
    """Every backward works with the weights a and g, the mean and the rstd of its own forward."""
    layer = IMAGE.layer(torch.float64, gradient=gradient)
    reference = reference_of(layer)
    xs = [IMAGE.input(size, seed, torch.float64).requires_grad_() for seed, size in enumerate((5, 2))]
    ys = [layer(x) for x in xs]
    steps = [reference.forward(x) for x in xs]
    for i in order:
        dy = noise(ys[i].shape, i, torch.float64)
        layer.zero_grad()
        ys[i].backward(dy)
        expected = reference.backward(steps[i], dy)
        assert_gradients_near((xs[i].grad, layer.weight.grad, layer.bias.grad), expected, steps[i], dy)


@each_gradient()
def test_forwards_without_a_backward_leave_the_backward_sums_alone(gradient):
    layer = IMAGE.layer(gradient=gradient)
    training_step(layer, IMAGE.input(4), noise((4, *IMAGE.shape), 0))
    before = buffers_of(layer)
    with torch.no_grad():
        layer(IMAGE.input(4, seed=1))
    layer(IMAGE.input(4, seed=2))
    after = buffers_of(layer)
    assert_identical({name: after[name] for name in BACKWARD_STATE}, {name: before[name] for name in BACKWARD_STATE})


@pytest.mark.parametrize("momentum", [Horizon(), 0.1, 1.0], ids=repr)
@pytest.mark.parametrize("seen", [(), (12,), RAGGED], ids=["fresh", "clamped", "trained"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=lambda c: c.__name__)
def test_exact_gradient_is_the_derivative_of_the_forward(momentum, seen, check):
    """Finite differences know of the clamp too, which holds in one channel while there have been few samples."""
    case = RUNNING[0]
    layer = case.layer(torch.float64, momentum=momentum, gradient="exact")
    scale = torch.tensor([1.0, 0.01, 1.0], dtype=torch.float64) if seen == (12,) else 1.0
    see(layer, [x * scale for x in case.batches(seen, torch.float64)])
    function, parameters = from_this_state(layer)
    x = case.input(4, seed=9, dtype=torch.float64) * scale
    assert check(function, (x.requires_grad_(), *parameters))


def test_second_derivative_of_the_running_gradient_says_what_to_do():
    layer = IMAGE.layer(gradient="running")
    x = IMAGE.input(4).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="exact"):
        dx.sum().backward()


# ------------------------------------------------------------------------------------------------------ against fast.ai


@pytest.mark.parametrize("positions", [(), (5,), (4, 3)], ids=["2d-input", "3d-input", "4d-input"])
def test_square_root_rule_and_exact_gradient_are_the_fastai_class(positions):
    """Over 36 ragged batches, all float64."""
    case = LayerCase("", RunningBatchNorm, (3, *positions), {"momentum": SquareRoot(0.1), "gradient": "exact"})
    layer = case.layer(torch.float64)
    theirs = with_random_affine(FastaiRunningBatchNorm(case.channels))
    for seed in range(36):
        x = case.input((2, 3, 5, 8, 2, 16)[seed % 6], seed, torch.float64)
        dy = noise(x.shape, seed, torch.float64) + 0.5
        ours, others = training_step(layer, x, dy), training_step(theirs, x, dy)
        for name in ("y", "dx", "dweight", "dbias"):
            # Their raw moments lose mean²/var ≲ 100 of the 2e-16, ours nothing; both round some tens of times.
            torch.testing.assert_close(ours[name], others[name], rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------- against nn.BatchNorm


def torch_twin(layer: RunningBatchNorm) -> nn.BatchNorm2d:
    twin = nn.BatchNorm2d(layer.num_features, layer.eps, dtype=layer.weight.dtype)
    twin.load_state_dict({name: p.clone() for name, p in layer.named_parameters()}, strict=False)
    return twin


def pairs(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert actual.keys() == expected.keys()
    return [(actual[name], value) for name, value in expected.items()]


@each_rule()
@each_gradient()
def test_first_step_is_that_of_batchnorm(momentum, gradient):
    layer = IMAGE.layer(torch.float64, momentum=momentum, gradient=gradient)
    twin = torch_twin(layer)
    x, dy = IMAGE.input(6, dtype=torch.float64), noise((6, *IMAGE.shape), 0, torch.float64)
    for actual, expected in pairs(training_step(layer, x, dy), training_step(twin, x, dy)):
        assert_near(actual, expected, ROUNDINGS)


@pytest.mark.parametrize("momentum", [1.0, SquareRoot(1.0)], ids=repr)
@each_gradient()
def test_momentum_one_is_batchnorm_at_every_step(momentum, gradient):
    layer = IMAGE.layer(torch.float64, momentum=momentum, gradient=gradient)
    twin = torch_twin(layer)
    for seed, x in enumerate(IMAGE.batches(dtype=torch.float64)):
        dy = noise(x.shape, seed, torch.float64)
        for actual, expected in pairs(training_step(layer, x, dy), training_step(twin, x, dy)):
            assert_near(actual, expected, ROUNDINGS)


@each(SHAPES)
def test_untrained_layer_evaluates_as_batchnorm(case):
    layer = case.layer(torch.float64).eval()
    x = case.input(4, dtype=torch.float64)
    per_channel = (-1, *[1] * (len(case.shape) - 1))
    expected = x / math.sqrt(1 + layer.eps) * layer.weight.reshape(per_channel) + layer.bias.reshape(per_channel)
    assert_near(layer(x).detach(), expected.detach(), 4)


def test_is_a_batchnorm_to_third_parties():
    assert isinstance(RunningBatchNorm(3), nn.modules.batchnorm._BatchNorm)


# -------------------------------------------------------------------------------------------------------- seeded layers


def trained_batchnorm() -> nn.BatchNorm2d:
    twin = with_random_affine(nn.BatchNorm2d(IMAGE.channels, dtype=torch.float64), seed=1)
    return see(twin, [IMAGE.input(8, seed, torch.float64) for seed in range(10, 17)])


def seeded_pair(momentum: object, gradient: str = "running") -> tuple[RunningBatchNorm, ReferenceRunningBatchNorm]:
    twin = trained_batchnorm()
    layer = RunningBatchNorm(twin.num_features, momentum=momentum, gradient=gradient, dtype=torch.float64)
    layer.load_state_dict(twin.state_dict(), strict=True)
    reference = reference_of(layer)
    reference.seed(twin.running_mean, twin.running_var, int(twin.num_batches_tracked))
    return layer, reference


def test_seeding_keeps_the_statistics_bit_for_bit():
    layer, _ = seeded_pair(Horizon())
    found, given = buffers_of(layer), buffers_of(trained_batchnorm())
    assert_identical({name: found[name] for name in given}, given)


def test_seeded_layer_evaluates_as_its_source():
    layer, _ = seeded_pair(Horizon())
    x = IMAGE.input(4, dtype=torch.float64)
    assert_near(layer.eval()(x).detach(), trained_batchnorm().eval()(x).detach(), 4)


@each_rule()
@each_gradient()
def test_seeded_training_equals_reference(momentum, gradient):
    layer, reference = seeded_pair(momentum, gradient)
    for (y, *gradients), step, expected, dy in side_by_side(layer, reference, IMAGE.batches(dtype=torch.float64)):
        assert_outputs_near(y, step)
        assert_gradients_near(gradients, expected, step, dy)


@pytest.mark.parametrize(
    ("momentum", "a"),
    [(Horizon(), 1 - math.exp(-5 / 512)), (SquareRoot(0.1), 1 - 0.9 / 2), (0.1, 0.1), (None, 1 / 8)],
    ids=["horizon", "sqrt", "float", "none"],
)
def test_first_batch_after_a_seed_weighs_exactly_a(momentum, a):
    """The mean moves by the fraction a; Horizon has settled and None goes on from the 7 batches of the source."""
    layer, _ = seeded_pair(momentum)
    x = IMAGE.input(5, dtype=torch.float64)
    expected = torch.lerp(trained_batchnorm().running_mean, pooled_moments([x]).mean, a)
    layer(x)
    assert_near(layer.running_mean, expected, ROUNDINGS)


def test_fresh_batchnorm_seeds_nothing():
    """A source that has seen nothing leaves a layer that normalises its first batch by that batch alone."""
    layer = RunningBatchNorm(IMAGE.channels, dtype=torch.float64)
    layer.load_state_dict(nn.BatchNorm2d(IMAGE.channels, dtype=torch.float64).state_dict(), strict=True)
    x = IMAGE.input(5, dtype=torch.float64)
    layer(x)
    assert_near(layer.running_mean, pooled_moments([x]).mean, ROUNDINGS)


def test_assigned_statistics_seed_the_state():
    """After `bn.running_mean = t` the next batch is pooled with t, at weight a, and not with what was there before."""
    layer = see(IMAGE.layer(torch.float64, momentum=0.1), IMAGE.batches(dtype=torch.float64))
    mean, var = torch.full((IMAGE.channels,), 7.0).double(), torch.full((IMAGE.channels,), 2.0).double()
    layer.running_mean, layer.running_var = mean.clone(), var
    x = IMAGE.input(5, seed=9, dtype=torch.float64)
    layer(x)
    assert_near(layer.running_mean, torch.lerp(mean, pooled_moments([x]).mean, 0.1), ROUNDINGS)


def test_reset_makes_a_new_layer():
    layer = IMAGE.layer()
    fresh = buffers_of(layer)
    for seed, x in enumerate(IMAGE.batches()):
        training_step(layer, x, noise(x.shape, seed))
    layer.reset_running_stats()
    assert_identical(buffers_of(layer), fresh)


# ---------------------------------------------------------------------------------------------------------------- facts


@each_rule()
@each(SHAPES)
def test_running_statistics_are_weighted_moments_of_everything_seen(case, momentum):
    """No recursion: every element ever seen, with the weight it carries by now, in two direct sums."""
    layer = case.layer(torch.float64, momentum=momentum)
    batches = case.batches(dtype=torch.float64)
    see(layer, batches)
    expected = pooled_moments(batches, element_weights(momentum, RAGGED, math.prod(case.shape[1:])))
    # 23 samples are past the clamp, except where all weight is on the last 4 ...
    assert_near(layer.running_mean, expected.mean, ROUNDINGS, 4)
    # ... and even those have a variance far above it.
    assert_near(layer.running_var, expected.var, ROUNDINGS, 16)


def test_cumulative_statistics_do_not_depend_on_the_split():
    """momentum=None: the biased moments of all data, in batches of whatever sizes."""
    x = IMAGE.input(24, dtype=torch.float64)
    for sizes in (1, 4, 24, [1, 20, 3]):
        layer = see(IMAGE.layer(torch.float64, momentum=None), x.split(sizes))
        assert_near(layer.running_mean, x.mean((0, 2, 3)), ROUNDINGS, 4)
        assert_near(layer.running_var, x.var((0, 2, 3), correction=0), ROUNDINGS, 16)


def test_settled_horizon_forgets_per_sample():
    """32 batches of 1 leave as much of the old state as one batch of 32: exp(−32/512)."""
    for size in (1, 2, 32):
        layer = IMAGE.layer(torch.float64)
        layer.running_mean = torch.ones(IMAGE.channels, dtype=torch.float64)
        see(layer, torch.zeros(32, *IMAGE.shape, dtype=torch.float64).split(size))
        # The data are zeros, so what is left of the mean of one is the weight of the old state.
        assert_near(layer.running_mean, torch.full_like(layer.running_mean, math.exp(-32 / 512)), ROUNDINGS)


def test_horizon_weighs_batches_of_any_size_by_a():
    """Large batches must not drown small ones: a batch of one moves the mean by its a even after a batch of 64."""
    layer = IMAGE.layer(torch.float64, momentum=Horizon(samples=10, start=10))
    zeros = torch.zeros(64, *IMAGE.shape, dtype=torch.float64)
    see(layer, [zeros, torch.ones_like(zeros[:1])])
    a_large, a_small = 1 - math.exp(-6.4), 1 - math.exp(-0.1)
    share = a_small / (a_large * (1 - a_small) + a_small)
    assert_near(layer.running_mean, torch.full_like(layer.running_mean, share), ROUNDINGS)


@each(SHAPES)
@each_rule()
def test_without_a_limit_to_the_lag_training_and_evaluation_agree(case, momentum):
    layer = case.layer(momentum=momentum, max_lag=math.inf)
    for x in case.batches():
        y = layer.train()(x)
        # The same formula on the same numbers; 4 roundings if one is fused differently. rstd is 10 at most and weight
        # 1.5, so that 16·|x| bounds every term.
        assert_near(layer.eval()(x).detach(), y.detach(), 4, 16 * x.abs().max())


def test_evaluation_changes_nothing():
    layer = see(IMAGE.layer(), IMAGE.batches())
    before = buffers_of(layer)
    layer.eval()(IMAGE.input(4, seed=9))
    assert_identical(buffers_of(layer), before)


@each_rule()
@each_gradient()
def test_constant_input_has_that_mean_and_gives_the_bias(momentum, gradient):
    layer = IMAGE.layer(momentum=momentum, gradient=gradient)
    x = torch.full((4, *IMAGE.shape), 3.7)
    for _ in range(8):  # past the clamp, where rstd is eps^−½ = 316
        y = layer(x)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(layer.running_mean, torch.full_like(layer.running_mean, 3.7), rtol=2 * eps, atol=0.0)
    assert (layer.running_var <= (8 * eps * 3.7) ** 2).all()
    # The mean may be off by one rounding of 3.7, and weight ≤ 1.5.
    expected = layer.bias.reshape(-1, 1, 1).expand_as(y)
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=0.0, atol=2 * eps * 3.7 * 1.5 / math.sqrt(layer.eps))


def test_constant_input_has_a_variance_of_zero_and_not_less():
    layer = IMAGE.layer(momentum=0.1)
    for seed in range(40):
        layer(torch.full((4, *IMAGE.shape), 1000.1))
        assert (layer.running_var >= 0).all(), seed


# A float32 x at 1e4 is itself rounded by up to 5e-4: the truth is the float64 moments of the rounded numbers.
FAR = 1e4


@each(SHAPES)
@each_rule()
def test_variance_of_the_first_batch_survives_a_mean_of_ten_thousand_stds(case, momentum):
    layer = case.layer(momentum=momentum)
    x = noise((64, *case.shape), 0) + FAR
    layer(x)
    # The promise of the design; raw float32 moments return 0 or −16 here.
    torch.testing.assert_close(layer.running_var.double(), pooled_moments([x]).var, rtol=1e-3, atol=0.0)


@each(SHAPES)
@each_rule()
def test_variance_at_a_mean_of_ten_thousand_stds_is_sharp_once_warm(case, momentum):
    layer = case.layer(momentum=momentum)
    reference = reference_of(layer)
    for seed in range(6):
        x = noise((64, *case.shape), seed) + FAR
        layer(x)
        reference.forward(x)
    torch.testing.assert_close(layer.running_var.double(), reference.state("running_var"), rtol=1e-5, atol=0.0)


def test_output_at_a_mean_of_ten_thousand_stds():
    layer = IMAGE.layer()
    reference = reference_of(layer)
    for seed in range(3):
        x = noise((32, *IMAGE.shape), seed) + FAR
        # running_mean is a float32 number near 1e4: half an ulp is 4.9e-4 std, weight ≤ 1.5; twice that.
        torch.testing.assert_close(layer(x).detach().double(), reference.forward(x).y.detach(), rtol=0.0, atol=1.5e-3)


@each_rule()
def test_variance_follows_a_mean_that_drifts_a_thousand_stds(momentum):
    layer = IMAGE.layer(momentum=momentum)
    reference = reference_of(layer)
    for seed in range(100):
        x = noise((8, *IMAGE.shape), seed) + 10.0 * seed
        layer(x)
        reference.forward(x)
        # A step moves the mean by 10 stds: sums about the old mean lose 10² of the 64 roundings of 1.2e-7.
        torch.testing.assert_close(layer.running_var.double(), reference.state("running_var"), rtol=1e-3, atol=0.0)


@each_rule()
def test_variance_survives_a_jump_of_a_thousand_stds(momentum):
    layer = IMAGE.layer(momentum=momentum)
    reference = reference_of(layer)
    for seed, centre in enumerate([0.0, 0.0, 1000.0, 1000.0, 0.0]):
        x = noise((16, *IMAGE.shape), seed) + centre
        layer(x)
        reference.forward(x)
        torch.testing.assert_close(layer.running_var.double(), reference.state("running_var"), rtol=1e-3, atol=0.0)


def test_variance_survives_an_outlying_batch_of_little_weight():
    """A batch 1000 stds away at a = 1e-5 adds 10 to a variance of 2; sums about its mean would lose 10⁶ roundings."""
    layer = IMAGE.layer(momentum=1e-5)
    layer.running_var = torch.full((IMAGE.channels,), 2.0)
    reference = reference_of(layer)
    reference.seed(layer.running_mean, layer.running_var, 0)
    for seed, centre in enumerate([1000.0, 0.0]):
        x = noise((16, *IMAGE.shape), seed) + centre
        layer(x)
        reference.forward(x)
        torch.testing.assert_close(layer.running_var.double(), reference.state("running_var"), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("momentum", [0.0, SquareRoot(0.0)], ids=repr)
def test_momentum_zero_stays_finite(momentum):
    """A batch that weighs nothing leaves nothing to divide by."""
    layer = IMAGE.layer(momentum=momentum)
    x = IMAGE.input(2)
    step = training_step(layer, x, noise(x.shape, 0))
    assert step.keys() == {"y", "dx", "dweight", "dbias"}
    for tensor in (*step.values(), layer.running_mean, layer.running_var):
        assert tensor.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- small sizes


@each_rule()
@each_gradient()
def test_one_value_per_channel_gives_the_bias_and_no_gradient(momentum, gradient):
    """A first batch of one value: its mean is itself, the clamp keeps rstd at 10, and BatchNorm's dx is zero."""
    layer = RUNNING[0].layer(torch.float64, momentum=momentum, gradient=gradient)
    x = RUNNING[0].input(1, dtype=torch.float64)
    step = training_step(layer, x, torch.ones_like(x))
    assert_near(step["y"], layer.bias.detach()[None], 4)
    assert_near(step["dx"], torch.zeros_like(x), ROUNDINGS, 15)  # weight · rstd · dy


@each(SHAPES)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_empty_batch_gives_an_empty_output_gradients_of_zero_and_changes_nothing(case, trained):
    layer = case.layer()
    if trained:
        see(layer, case.batches())
    before = buffers_of(layer)
    x = torch.empty(0, *case.shape)
    step = training_step(layer, x, torch.empty_like(x))
    assert step["y"].shape == step["dx"].shape == x.shape
    assert torch.equal(step["dweight"], torch.zeros(case.channels))
    assert torch.equal(step["dbias"], torch.zeros(case.channels))
    assert_identical(buffers_of(layer), before)


# ------------------------------------------------------------------------------------------------------------ the clamp


def still(batch_size: int, seed: int = 0) -> Tensor:
    """A batch with a variance of 1e-4, a hundredth of the clamp."""
    return noise((batch_size, *IMAGE.shape), seed, torch.float64) * 0.01


def test_variance_is_clamped_below_twenty_samples():
    layer = IMAGE.layer(torch.float64)
    for seed, samples in enumerate((5, 10, 15, 19)):
        layer(still(5 if samples < 19 else 4, seed))
        assert torch.equal(layer.running_var, torch.full_like(layer.running_var, CLAMP_VARIANCE)), samples


def test_variance_is_free_at_twenty_samples():
    layer = IMAGE.layer(torch.float64, momentum=None)
    x = still(CLAMP_SAMPLES)
    see(layer, x.split(5))
    assert_near(layer.running_var, pooled_moments([x]).var, ROUNDINGS)


@each_gradient()
def test_clamped_output_equals_reference(gradient):
    layer = IMAGE.layer(torch.float64, gradient=gradient)
    reference = reference_of(layer)
    for seed in range(3):
        x = still(5, seed)
        assert_outputs_near(layer(x).detach(), reference.forward(x))


def test_clamped_variance_has_no_exact_gradient():
    """The z term drops while the clamp holds, and is there again after it; autograd of the reference knows."""
    layer = IMAGE.layer(torch.float64, gradient="exact")
    batches = [still(5, seed) for seed in range(6)]
    for (_, *gradients), step, expected, dy in side_by_side(layer, reference_of(layer), batches):
        assert_gradients_near(gradients, expected, step, dy)


def test_clamp_is_per_channel():
    layer = IMAGE.layer(torch.float64, gradient="exact")
    batches = [IMAGE.input(5, seed, torch.float64) for seed in range(3)]
    for x in batches:
        x[:, 1] *= 0.01
    for (_, *gradients), step, expected, dy in side_by_side(layer, reference_of(layer), batches):
        assert_gradients_near(gradients, expected, step, dy)


def test_seeded_layer_is_exempt_from_the_clamp():
    layer = IMAGE.layer(torch.float64)
    layer.running_mean = torch.zeros(IMAGE.channels, dtype=torch.float64)
    layer.running_var = torch.full((IMAGE.channels,), 1e-4, dtype=torch.float64)
    layer(still(5))
    assert (layer.running_var < 2e-4).all()


# -------------------------------------------------------------------------------------------------- non-finite channels

POISONS = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)


def with_poison(poison: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Ragged batches, the third of them poisoned."""
    return [poisoned(x, poison) if i == 2 else x for i, x in enumerate(IMAGE.batches(dtype=dtype))]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30], ids=["nan", "inf", "-inf", "overflow"])
@pytest.mark.parametrize(
    "seen", [[], [noise((5, *IMAGE.shape), 0) * 0.01], IMAGE.batches()], ids=["fresh", "clamped", "trained"]
)
def test_poisoned_channel_keeps_its_state(poison, seen):
    """1e30 is finite and its square, in float32, is not."""
    layer = see(IMAGE.layer(), seen)
    before = buffers_of(layer)
    layer(poisoned(IMAGE.input(4, seed=9), poison))
    after = buffers_of(layer)
    of_channels = [name for name in before if before[name].dim() and not name.startswith("last_")]
    assert_identical({n: after[n][POISONED] for n in of_channels}, {n: before[n][POISONED] for n in of_channels})


@POISONS
@each_rule()
def test_other_channels_advance_and_the_poisoned_one_recovers(poison, momentum):
    layer = IMAGE.layer(torch.float64, momentum=momentum)
    reference = reference_of(layer)
    for x in with_poison(poison):
        layer(x)
        reference.forward(x)
        assert_states_near(layer, reference)


@POISONS
def test_poisoned_channel_is_normalised_by_its_state(poison):
    layer = IMAGE.layer(torch.float64)
    reference = reference_of(layer)
    for x in with_poison(poison):
        y, expected = layer(x).detach(), reference.forward(x).y.detach()
        finite = expected.isfinite()
        assert_near(y[finite], expected[finite], ROUNDINGS)
        assert not y[~finite].isfinite().any()


def test_poisoned_first_batch_is_normalised_as_before_any_training():
    layer = IMAGE.layer(torch.float64)
    x = poisoned(IMAGE.input(4, dtype=torch.float64), math.nan)
    expected = copy.deepcopy(layer).eval()(x).detach()[1:, POISONED]
    assert_near(layer(x).detach()[1:, POISONED], expected, 4)


@POISONS
def test_exact_gradient_of_a_poisoned_channel_is_that_of_evaluation(poison):
    """κ = 0: dx = weight·rstd·dy wherever x is finite."""
    layer = IMAGE.layer(torch.float64, gradient="exact")
    reference = reference_of(layer)
    for seed, x in enumerate(with_poison(poison)):
        dy = noise(x.shape, seed, torch.float64)
        dx = training_step(layer, x, dy)["dx"]
        step = reference.forward(x)
        expected = reference.backward(step, dy)[0]
        assert_near(
            dx[x.isfinite()], expected[x.isfinite()], ROUNDINGS, (step.weight * step.rstd).max() * dy.abs().max() * 4
        )


@POISONS
def test_running_gradients_after_a_poisoned_batch_equal_reference(poison):
    """The poisoned batch leaves no trace in the backward sums of its channel, nor does it stop those of the others."""
    layer = IMAGE.layer(torch.float64, gradient="running")
    for i, (result, step, expected, dy) in enumerate(side_by_side(layer, reference_of(layer), with_poison(poison))):
        if i != 2:
            assert_gradients_near(result[1:], expected, step, dy)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_backward_of_a_poisoned_forward_leaves_the_backward_sums_of_its_channel(poison):
    """At 1e30 all sums of the backward are finite: it is the forward that has kept the channel out."""
    layer = IMAGE.layer(gradient="running")
    x, dy = IMAGE.input(4), noise((4, *IMAGE.shape), 0)
    training_step(layer, x, dy)
    before = {name: getattr(layer, name).clone() for name in BACKWARD_STATE}
    training_step(layer, poisoned(x, poison), noise(dy.shape, 1))
    for name in BACKWARD_STATE:
        assert getattr(layer, name)[POISONED] == before[name][POISONED], name


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_overflow_in_backward_leaves_the_backward_sums_of_its_channel(poison):
    layer = IMAGE.layer(gradient="running")
    x, dy = IMAGE.input(4), noise((4, *IMAGE.shape), 0)
    training_step(layer, x, dy)
    before = {name: getattr(layer, name).clone() for name in BACKWARD_STATE}
    training_step(layer, x, poisoned(dy, poison))
    for name in BACKWARD_STATE:
        unchanged = getattr(layer, name) == before[name]
        assert unchanged.tolist() == [c == POISONED for c in range(IMAGE.channels)], name


@each_gradient()
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_overflow_in_backward_shows_in_dx(gradient, poison):
    """A GradScaler has to see it."""
    layer = IMAGE.layer(gradient=gradient)
    dx = training_step(layer, IMAGE.input(4), poisoned(noise((4, *IMAGE.shape), 0), poison))["dx"]
    assert not dx[0, POISONED, 2, 3].isfinite()


@each_gradient()
def test_overflow_in_backward_stays_in_its_channel(gradient):
    layer = IMAGE.layer(gradient=gradient)
    dx = training_step(layer, IMAGE.input(4), poisoned(noise((4, *IMAGE.shape), 0), math.inf))["dx"]
    others = [c for c in range(IMAGE.channels) if c != POISONED]
    assert dx[:, others].isfinite().all()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_channel_count_names_both(training):
    layer = RunningBatchNorm(3).train(training)
    with pytest.raises((RuntimeError, ValueError), match=r"3[^0-9][\s\S]*[(\[]2, 4, 5[)\]]"):
        layer(torch.zeros(2, 4, 5))


@pytest.mark.parametrize("shape", [(), (3,)], ids=["0d", "1d"])
def test_too_few_dimensions_name_both(shape):
    with pytest.raises(ValueError, match=rf"N, C[\s\S]*{re.escape(str(shape))}"):
        RunningBatchNorm(3)(torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_float64_input_of_a_float32_layer_names_both(training):
    with pytest.raises(RuntimeError, match=r"float32[\s\S]*float64|float64[\s\S]*float32"):
        RunningBatchNorm(3).train(training)(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_input_that_is_not_floating_point_names_its_dtype(dtype, training):
    with pytest.raises((RuntimeError, TypeError), match=str(dtype).removeprefix("torch.")):
        RunningBatchNorm(3).train(training)(torch.zeros(2, 3, dtype=dtype))


def test_unknown_gradient_names_those_there_are():
    with pytest.raises(ValueError, match=r"running[\s\S]*exact|exact[\s\S]*running"):
        RunningBatchNorm(3, gradient="none")


def test_failed_forward_leaves_the_state():
    layer = see(IMAGE.layer(), IMAGE.batches())
    before = buffers_of(layer)
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.zeros(2, IMAGE.channels + 1, 5, 6))
    assert_identical(buffers_of(layer), before)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_must_be_positive_in_training(eps):
    """As torch says, and when: at the training forward."""
    with pytest.raises(ValueError, match="eps must be positive"):
        RunningBatchNorm(3, eps=eps)(torch.zeros(2, 3))


# ----------------------------------------------------------------------------------------------- buffers are plain data


def test_buffers_carry_no_autograd_history():
    """deepcopy refuses tensors with history; a copy taken between forward and backward must go on alike."""
    layer = IMAGE.layer()
    y = layer(IMAGE.input(4).requires_grad_())
    twin = copy.deepcopy(layer)
    y.sum().backward()
    before, after = ({n: b for n, b in buffers_of(of).items() if n not in BACKWARD_STATE} for of in (twin, layer))
    assert_identical(before, after)


@pytest.mark.parametrize("name", RULES)
def test_resuming_from_a_checkpoint_continues_bit_for_bit(name):
    batches = IMAGE.batches()
    layer = see(IMAGE.layer(momentum=RULES[name]), batches[:3])
    resumed = IMAGE.layer(momentum=RULES[name])
    resumed.load_state_dict(layer.state_dict())
    for x in batches[3:]:
        assert torch.equal(resumed(x), layer(x))


@pytest.mark.parametrize("size", [1, 2])
def test_a_constant_batch_too_far_away_for_its_squares_is_ignored(size):
    # Its own sum of squares is zero; it is the distance to what was seen before that overflows.
    layer = RunningBatchNorm(2)
    layer(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    before = layer.running_var.clone()
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1e25
    layer(x)
    assert layer.running_var[0] == before[0]
    assert layer.running_var[1] != before[1]
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())
