"""The law of training: what a batch is worth, how far statistics may lag behind it, what it weighs in the backward."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from cases import LAYERS, LayerCase, each, each_dtype, each_rule, noise
from reference import channel_rows
from steps import assert_identical, buffers_of, evaluate
from torch import Tensor, nn

from runningbn import Horizon, PreciseBatchNorm1d, RunningBatchNorm, batchnormify, kernels
from runningbn.kernels import BACKENDS, use_backend
from runningbn.layers.buffers import TRAINING
from runningbn.ops.law import MAX_LAG, Law
from runningbn.ops.state import NoiseState

LAW = Law()
NOISE = NoiseState._fields
# Triton takes nothing on the CPU; see test_triton.
each_backend = pytest.mark.parametrize(
    "backend", [name for name in ("cpu", "aten") if BACKENDS[name].unavailable() is None]
)


def measured(batches: list[Tensor], **options: object) -> RunningBatchNorm:
    """A layer after forwards on these."""
    x = batches[0]
    layer = RunningBatchNorm(x.shape[1], affine=False, dtype=x.dtype, **options)
    for x in batches:
        layer(x)
    return layer


# --------------------------------------------------------------------------------- R, the noise of the means of batches


def of_batch(layer: RunningBatchNorm, samples: int) -> Tensor:
    """R of a batch of N samples: `noise` is N·R, averaged."""
    return (layer.noise / samples).clamp(max=1)


CHANNELS = 64  # all alike, to average over
STEPS = 8 * int(LAW.window)  # the first batch, which counts as R = 1, has faded to exp(-7)/window
# R of one channel is an exponential average of squares of normal numbers, the differences of means: each has a relative
# variance of 2, and a correlation of ¼ with the next, which shares a batch with it. So R has 2·(1 + 2·¼)/(2·window).
SPREAD = math.sqrt(1.5 / LAW.window / CHANNELS)  # 1.5 %: that of the average over the channels


def independent(n: int, drift: float = 0.0) -> list[Tensor]:
    """Batches of n independent elements per channel, whose mean moves by `drift` std from batch to batch."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(STEPS, 4, CHANNELS, n // 4, generator=generator)
    return list(x + drift * torch.arange(STEPS).view(-1, 1, 1, 1))


@pytest.mark.parametrize("n", [64, 400])
def test_noise_of_independent_elements_is_one_over_their_number(n):
    found = of_batch(measured(independent(n)), 4)
    # max(v, v_b) is above v in half of the batches, by √(2/n) of it: E[1/max] is 1 − √(1/(π·n)), and less of what is
    # taken off, as v itself is an average over some batches.
    bias = math.sqrt(1 / (math.pi * n))
    torch.testing.assert_close(found.mean().item(), 1 / n, rtol=3 * SPREAD + bias, atol=0)


def test_noise_of_batches_whose_elements_share_an_offset_per_sample_is_the_true_ratio_of_variances():
    """Of var(offset) = 1 and var(element) = ¼, N samples and S positions: R = (1/N + ¼/(N·S)) / 1.25."""
    samples, positions = 32, 16
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(STEPS, samples, CHANNELS, 1, generator=generator)
    elements = torch.randn(STEPS, samples, CHANNELS, positions, generator=generator) / 2
    found = of_batch(measured(list(offsets + elements)), samples).mean().item()
    expected = (1 / samples + 0.25 / (samples * positions)) / 1.25
    # v_b varies as the variance of 32 offsets does, by 0.8·√(2/32) = 0.2 of it, so 1/max(v, v_b) is 0.2/√(2·π) lower.
    assert found == pytest.approx(expected, rel=3 * SPREAD + 0.08)
    assert found > 10 / (samples * positions)  # what n would say


def test_a_slow_linear_drift_leaves_the_noise_as_it_is():
    """8 std in all, but from batch to batch only a tenth of the std of their means."""
    n = 100
    drift = 0.1 / math.sqrt(n)
    still, moving = (measured(independent(n, d), momentum=0.1).noise.mean() for d in (0.0, drift))
    assert drift * STEPS >= 8
    # ½·drift² = 0.005/n comes on top. What the last 10 batches moved is in v: 0.01²·10² = 1 % of it. Its product with
    # the noise averages out, to 0.1·√2·SPREAD.
    torch.testing.assert_close(moving, still, rtol=0.02, atol=0)


def test_a_fast_drift_counts_as_noise():
    """Where each batch is 1 std from the one before, its mean is no better known than to ½ of the variance."""
    n = 100
    found = of_batch(measured(independent(n, 1.0), momentum=1.0), 4).mean().item()
    assert found == pytest.approx(0.5 + 1 / n, rel=0.03 + 3 * SPREAD)


def test_noise_is_the_mean_of_half_the_squared_differences_and_of_one_for_the_first_batch():
    batches = [noise((2, 3, 8), seed, torch.float64) for seed in range(6)]
    layer = measured(batches[:1])
    assert of_batch(layer, 2).tolist() == [1, 1, 1]
    observed = [torch.ones(3, dtype=torch.float64)]
    for before, x in itertools.pairwise(batches):
        layer(x)
        difference = x.mean((0, 2)) - before.mean((0, 2))
        variance = torch.maximum(layer.running_var, x.var((0, 2), correction=0))
        observed.append(0.5 * difference.square() / variance)
        torch.testing.assert_close(of_batch(layer, 2), torch.stack(observed).mean(0))
        torch.testing.assert_close(layer.last_mean, x.mean((0, 2)))
    assert layer.noise_steps.tolist() == [6, 6, 6]


@pytest.mark.parametrize("seen", [0, 5, LAW.window - 2, LAW.window - 1, LAW.window, 1e4])
def test_an_observation_weighs_one_of_the_batches_seen_until_the_window_is_full(seen):
    layer = measured([noise((4, 3, 8), 0, torch.float64)], momentum=0.5)
    layer.noise.fill_(0.25)
    layer.noise_steps.fill_(seen)
    layer(noise((4, 3, 8), 0, torch.float64))  # the same batch: an observation of 0, unless it is the first
    share = 1 / min(seen + 1, LAW.window)
    expected = 0.25 + share * ((4 if seen == 0 else 0) - 0.25)  # N = 4 and R = 1, where it is the first
    torch.testing.assert_close(layer.noise, torch.full_like(layer.noise, expected))


@each_backend
@each_dtype(torch.float32, torch.float64)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_noise_is_within_0_and_1(backend, dtype, scale):
    with use_backend(backend):
        layer = RunningBatchNorm(3, dtype=dtype)
        for seed in range(20):
            layer(noise((2, 3, 4), seed, dtype) * scale + (-1) ** seed * seed * scale)
            assert ((layer.noise >= 0) & (layer.noise <= 2)).all()  # N·R


@each_backend
@each_dtype(torch.float32, torch.float64)
def test_a_jump_counts_as_one_at_most(backend, dtype):
    with use_backend(backend):
        layer = measured([torch.zeros(4, 3, 8, dtype=dtype) + noise((4, 3, 8), 0, dtype) for _ in range(4)])
        before = layer.noise.clone()
        layer(noise((4, 3, 8), 0, dtype) + 1e6)
        torch.testing.assert_close(layer.noise, before + (4 - before) / 5)


@each_backend
@each_dtype(torch.float32, torch.float64)
def test_a_constant_channel_has_no_noise_but_that_of_the_first_batch(backend, dtype):
    with use_backend(backend):
        layer = RunningBatchNorm(3, dtype=dtype)
        for t in range(1, 40):  # also past the 20 samples below which the variance has a floor
            layer(torch.full((2, 3, 4), 2.5, dtype=dtype))
            torch.testing.assert_close(of_batch(layer, 2), torch.full_like(layer.noise, 1 / t))


@each_backend
@each_dtype(torch.float32, torch.float64)
@pytest.mark.parametrize("step", [1e-12, 1.0, 1e10])
def test_without_any_variance_a_move_counts_as_one(backend, dtype, step):
    """Of a momentum of 1, v is that of the batch: 0. Its mean is all noise, then."""
    with use_backend(backend):
        layer = RunningBatchNorm(3, momentum=1.0, dtype=dtype)
        layer.samples.fill_(LAW.warmup_samples)
        for i in range(4):
            y = layer(torch.full((2, 3, 4), i * step, dtype=dtype, requires_grad=True))
            y.sum().backward()
            assert y.isfinite().all()
            assert of_batch(layer, 2).tolist() == [1, 1, 1]


@each_backend
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30], ids=str)
def test_a_channel_that_is_not_finite_keeps_its_noise(backend, poison):
    """1e30 is finite and its square, in float32, is not."""
    with use_backend(backend):
        layer = measured([noise((2, 3, 4), seed) for seed in range(3)])
        before = {name: getattr(layer, name).clone() for name in NOISE}
        x = noise((2, 3, 4), 9)
        x[0, 1, 0] = poison
        layer(x)
        for name in NOISE:
            assert (getattr(layer, name) == before[name]).tolist() == [False, True, False], name
        layer(noise((2, 3, 4), 10))
        assert layer.noise_steps.tolist() == [5, 4, 5]
        assert all(getattr(layer, name).isfinite().all() for name in NOISE)


def test_noise_follows_a_batch_size_that_changes():
    """Measured on batches of 16 samples, R of one sample is 16 times as much, and no batch has to be waited for."""
    generator = torch.Generator().manual_seed(0)
    layer = measured(list(torch.randn(STEPS, 16, CHANNELS, 1, generator=generator)))
    assert of_batch(layer, 16).mean().item() == pytest.approx(1 / 16, rel=0.2)
    before = layer.count_dy.clone()
    x = torch.randn(1, CHANNELS, 1, generator=generator, requires_grad=True)
    layer(x).sum().backward()
    trust = (1 / (1 + LAW.trust_noise * of_batch(layer, 1))).clamp_min(1 - layer.last_keep)
    torch.testing.assert_close(layer.count_dy, before + trust * (1 - before))
    assert trust.mean() < 0.1  # 1/65 or so, not the 1/5 of a batch of 16


def test_noise_is_per_channel():
    """Of one channel all elements of a batch are alike, of the other they are independent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(int(LAW.window), 4, 2, 100, generator=generator)
    x[:, :, 0] = torch.randn(len(x), 1, 1, generator=generator)
    alike, independent_ = of_batch(measured(list(x)), 4).tolist()
    assert alike > 0.4
    assert independent_ < 2 / LAW.window  # 1/400, and what is left of the first batch


def test_only_training_with_running_gradients_measures():
    x = [noise((4, 3, 8), seed) for seed in range(3)]
    exact, evaluated = measured(x, gradient="exact"), measured(x).eval()
    before = buffers_of(evaluated)
    evaluated(x[0])
    assert_identical(buffers_of(evaluated), before)
    assert not any(getattr(exact, name).any() for name in TRAINING)


def test_a_batch_without_elements_is_none():
    layer = measured([noise((4, 3, 8), seed) for seed in range(3)])
    before = buffers_of(layer)
    layer(torch.empty(0, 3, 8))
    assert_identical(buffers_of(layer), before)


# ----------------------------------------------------------------------------------------------- how far statistics lag

POSITIONS = 192
LIMIT = 0.05


def settled(max_lag: float = LIMIT, **options: object) -> RunningBatchNorm:
    """Trained on noise of mean 0 and variance 1, and remembering it for long; that n elements are independent, too."""
    layer = RunningBatchNorm(3, momentum=0.01, max_lag=max_lag, affine=False, dtype=torch.float64, **options)
    for seed in range(20):
        layer(batch(seed))
    layer.noise.fill_(1 / POSITIONS)  # N·R with N = 2
    layer.noise_steps.fill_(LAW.window)
    return layer


def batch(seed: int, mean: float = 0.0) -> Tensor:
    return noise((2, 3, POSITIONS), seed, torch.float64) + mean


def far_and_wide() -> Tensor:
    return batch(99) * 10 + 15


def reach(layer: RunningBatchNorm) -> Tensor:
    """d, by the noise that has been measured, the last batch included."""
    return layer.max_lag * (1 + LAW.lag_noise * of_batch(layer, 2))


def mean_of_output(y: Tensor) -> Tensor:
    return y.detach().mean((0, 2))


def std_of_output(y: Tensor) -> Tensor:
    return y.detach().std((0, 2), correction=0)


# In units of the running std, where y has eps beside the variance.
WITHIN_EPS = {"rtol": 1e-4, "atol": 0}


@pytest.mark.parametrize("jump", [5.0, -5.0])
def test_after_a_jump_the_mean_of_the_output_is_within_reach(jump):
    layer = settled()
    free = mean_of_output(settled(math.inf)(batch(99, jump)))
    limited = mean_of_output(layer(batch(99, jump)))
    assert (free.abs() > 3).all()  # or there would be nothing to limit
    assert (reach(layer) < 1).all()
    torch.testing.assert_close(limited, math.copysign(1, jump) * reach(layer), **WITHIN_EPS)


def test_a_batch_that_has_become_wide_comes_out_no_wider_than_is_within_reach():
    layer, wide = settled(), batch(99) * 10
    assert (std_of_output(settled(math.inf)(wide)) > 3).all()
    torch.testing.assert_close(std_of_output(layer(wide)), 1 + reach(layer), **WITHIN_EPS)


def test_both_limits_hold_of_one_batch():
    """The mean is within reach in units of the std that the output has them in, and that has grown."""
    layer = settled()
    y = layer(far_and_wide())
    torch.testing.assert_close(std_of_output(y), 1 + reach(layer), **WITHIN_EPS)
    torch.testing.assert_close(mean_of_output(y), reach(layer), **WITHIN_EPS)


def test_the_reach_is_farther_where_batches_are_noisier():
    quiet, noisy = settled(), settled()
    noisy.noise.mul_(8)
    means = [mean_of_output(layer(batch(99, 5.0))) for layer in (quiet, noisy)]
    torch.testing.assert_close(means[1], reach(noisy), **WITHIN_EPS)
    assert (reach(noisy) > 1.5 * reach(quiet)).all()


def test_a_batch_that_has_become_narrow_is_not_widened():
    narrow = batch(99) / 10
    assert torch.equal(settled()(narrow), settled(math.inf)(narrow))


def test_a_step_within_reach_is_by_the_running_statistics():
    ours, free = settled(), settled(math.inf)
    assert torch.equal(ours(batch(99)), free(batch(99)))


def test_the_state_does_not_know_of_the_limit():
    ours, free = settled(), settled(math.inf)
    for layer in (ours, free):
        layer(far_and_wide())
    assert_identical(buffers_of(ours), buffers_of(free))


def test_evaluation_has_no_limit():
    ours, free = settled().eval(), settled(math.inf).eval()
    assert torch.equal(ours(far_and_wide()), free(far_and_wide()))


def test_a_few_elements_are_no_reason_to_leave_the_running_statistics():
    """Two elements tell a mean to 0.7 std, R = ½: at the limit of 0.05 and 512·R they are let be 13 std from it."""
    layers = [
        measured([noise((2, 3), seed, torch.float64) for seed in range(50)], momentum=0.01, max_lag=max_lag)
        for max_lag in (LIMIT, math.inf)
    ]
    x = noise((2, 3), 99, torch.float64) * 3 + 5
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_has_no_limit(poison):
    ours, free = settled(), settled(math.inf)
    x = far_and_wide()
    x[0, 1, 0] = poison
    torch.testing.assert_close(ours(x)[:, 1], free(x)[:, 1], rtol=0, atol=0, equal_nan=True)


def test_exact_gradients_go_with_the_running_statistics_as_they_are():
    exact = settled(gradient="exact")(far_and_wide())
    assert torch.equal(exact, settled(math.inf, gradient="exact")(far_and_wide()))


@each_backend
@pytest.mark.parametrize("max_lag", [LIMIT, math.inf])
def test_a_recomputation_under_checkpointing_is_limited_alike_and_measures_nothing(backend, max_lag):
    layers = [settled(max_lag) for _ in range(2)]
    x = [far_and_wide().requires_grad_() for _ in layers]
    with use_backend(backend):
        (layers[0](x[0]) ** 3).sum().backward()
        y = torch.utils.checkpoint.checkpoint(layers[1], x[1], use_reentrant=False)
        (y**3).sum().backward()
    assert torch.equal(x[0].grad, x[1].grad)
    assert_identical(buffers_of(layers[0]), buffers_of(layers[1]))


def test_padding_does_not_count():
    """Padding neither moves the batch's mean, nor widens it, nor makes it less noisy."""
    x = far_and_wide()
    padded = torch.cat([x, torch.full((2, 3, 500), -1e3, dtype=x.dtype)], 2)
    mask = (torch.arange(POSITIONS + 500) < POSITIONS).expand(2, -1)
    plain, masked = settled(), settled()
    torch.testing.assert_close(masked(padded, mask)[..., :POSITIONS], plain(x))
    for name in NOISE:
        torch.testing.assert_close(getattr(masked, name), getattr(plain, name))


# -------------------------------------------------------------------------------------- training and evaluation agree


def by_the_state(layer: RunningBatchNorm, x: Tensor) -> Tensor:
    """y by the statistics that evaluation takes, through the kernels of training."""
    weight, bias = (None if p is None else p.detach() for p in (layer.weight, layer.bias))
    return kernels.normalize(x, layer.running_mean, layer.running_var, weight, bias, layer.eps)


@pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="without its kernels")
@each([case for case in LAYERS if case.constructor is RunningBatchNorm])
@each_dtype(torch.float32, torch.float64)
def test_without_a_limit_training_is_evaluation_just_after_to_the_last_bit(case: LayerCase, dtype):
    """By one kernel. Evaluation itself is by torch's, which rounds elsewhere: see test_running."""
    layer = case.layer(dtype, max_lag=math.inf)
    for i, x in enumerate(case.batches(dtype=dtype)):
        x = x * 3**i + 4 * i
        with use_backend("cpu"):
            assert torch.equal(layer(x).detach(), by_the_state(layer, x))


@each_backend
@each_rule()
def test_without_a_limit_no_jump_parts_training_and_evaluation(backend, momentum):
    layer = RunningBatchNorm(3, momentum=momentum, max_lag=math.inf, dtype=torch.float64)
    with use_backend(backend):
        for i in range(6):
            x = batch(i) * 10**i - 10**i
            # Some roundings of x, times rstd.
            atol = 8 * torch.finfo(x.dtype).eps * float(x.abs().max() * (layer.running_var + layer.eps).rsqrt().max())
            torch.testing.assert_close(layer(x).detach(), evaluate(layer, x), rtol=0, atol=max(atol, 1e-14))


# ------------------------------------------------------------------------------------------------- the backward sums


@each_backend
@pytest.mark.parametrize("max_lag", [LIMIT, math.inf])
@pytest.mark.parametrize("noise_before", [0.0, 1e-4, 0.01, 0.1, 2.0])
def test_a_batch_weighs_in_the_backward_sums_as_its_noise_deserves(backend, max_lag, noise_before):
    """ρ = max(a, 1/(1 + 64·R)), with R as it is after the forward."""
    momentum = 0.05
    layer = settled(max_lag)
    layer.momentum = momentum
    layer.noise.copy_(noise_before * torch.tensor([1.0, 0.5, 0.25]))
    for name, value in (("sum_dy", 3.0), ("sum_dy_xhat", -2.0), ("count_dy", 0.5)):
        getattr(layer, name).fill_(value)
    x, dy = batch(99).requires_grad_(), noise((2, 3, POSITIONS), 5, torch.float64) + 0.5
    with use_backend(backend):
        y = layer(x)
        y.backward(dy)
    trust = (1 / (1 + LAW.trust_noise * of_batch(layer, 2))).clamp_min(momentum)
    if noise_before == 2.0:
        assert trust[0] == momentum  # its weight in the forward is more than the noise leaves of it
    mean_dy, mean_dy_xhat = (channel_rows(t).mean(1) for t in (dy, dy * y.detach()))
    torch.testing.assert_close(layer.sum_dy, torch.lerp(torch.full_like(trust, 3.0), mean_dy, trust))
    torch.testing.assert_close(layer.sum_dy_xhat, torch.lerp(torch.full_like(trust, -2.0), mean_dy_xhat, trust))
    torch.testing.assert_close(layer.count_dy, torch.lerp(torch.full_like(trust, 0.5), torch.ones_like(trust), trust))


def test_the_first_batch_weighs_little_and_its_means_are_debiased():
    """R = 1: a batch of a new layer is 1 effective element. The means are quotients, so the weight is not seen yet."""
    layer = RunningBatchNorm(3, momentum=1e-3, affine=False, dtype=torch.float64)
    x = batch(0).requires_grad_()
    y = layer(x)
    y.backward(y.detach() * 2 + 5)
    torch.testing.assert_close(layer.count_dy, torch.full_like(layer.count_dy, 1 / (1 + LAW.trust_noise)))
    torch.testing.assert_close(layer.sum_dy / layer.count_dy, torch.full((3,), 5.0, dtype=x.dtype))
    # dy is in the span of 1 and x_hat, and nothing of it is left.
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ the argument


@pytest.mark.parametrize("max_lag", [0, -1.0, math.nan])
def test_a_limit_that_is_none_is_refused(max_lag):
    with pytest.raises(ValueError, match=r"max_lag: expected .* above 0, got"):
        RunningBatchNorm(3, max_lag=max_lag)
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="max_lag"):
        batchnormify(model, max_lag=max_lag)
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("max_lag", ["0.05", None, True])
def test_a_limit_that_is_no_number_is_refused(max_lag):
    with pytest.raises(TypeError, match="max_lag: expected a number of standard deviations, got"):
        RunningBatchNorm(3, max_lag=max_lag)


def test_conversion_sets_the_limit_and_takes_it_away():
    model = batchnormify(nn.Sequential(nn.BatchNorm1d(3)), max_lag=1)
    assert model[0].max_lag == 1
    assert "max_lag=1)" in repr(copy.deepcopy(model))
    assert batchnormify(model, "precise")[0].__dict__.keys().isdisjoint({"max_lag", "gradient"})
    assert batchnormify(model, "running")[0].max_lag == MAX_LAG
    assert "max_lag" not in batchnormify(model, "torch")[0].__dict__
    with pytest.raises(TypeError, match="max_lag"):
        batchnormify(nn.Sequential(PreciseBatchNorm1d(3)), "precise", max_lag=0.5)


def test_the_defaults():
    layer = RunningBatchNorm(3)
    assert (layer.momentum, layer.gradient, layer.max_lag) == (Horizon(), "running", MAX_LAG)
    assert LAW.max_lag == MAX_LAG
