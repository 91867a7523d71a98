"""How far a training step lets the running statistics lag behind the batch, and whom the backward sums trust."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.utils.checkpoint
from cases import noise
from steps import assert_identical, buffers_of
from torch import Tensor, nn

from runningbn import Horizon, PreciseBatchNorm1d, RunningBatchNorm, batchnormify
from runningbn.kernels import BACKENDS, use_backend

POSITIONS = 192
# max_lag·(1 + 512/n) with n = 2·192 elements.
REACH = 0.05 * (1 + 512 / (2 * POSITIONS))


def settled(max_lag: float = 0.05, **options: object) -> RunningBatchNorm:
    """Trained on noise of mean 0 and variance 1, and remembering it for long."""
    layer = RunningBatchNorm(3, momentum=0.01, max_lag=max_lag, affine=False, dtype=torch.float64, **options)
    for seed in range(20):
        layer(batch(seed))
    return layer


def batch(seed: int, mean: float = 0.0) -> Tensor:
    return noise((2, 3, POSITIONS), seed, torch.float64) + mean


def far_and_wide() -> Tensor:
    return batch(99) * 10 + 15


def mean_of_output(y: Tensor) -> Tensor:
    return y.detach().mean((0, 2))


def std_of_output(y: Tensor) -> Tensor:
    return y.detach().std((0, 2), correction=0)


@pytest.mark.parametrize("jump", [5.0, -5.0])
def test_after_a_jump_the_mean_of_the_output_is_within_reach(jump):
    free = mean_of_output(settled(math.inf)(batch(99, jump)))
    limited = mean_of_output(settled()(batch(99, jump)))
    assert (free.abs() > 3).all()  # or there would be nothing to limit
    # In units of the running std, where y has eps beside the variance.
    torch.testing.assert_close(limited, torch.full_like(limited, math.copysign(REACH, jump)), rtol=1e-4, atol=0)


def test_a_batch_that_has_become_wide_comes_out_no_wider_than_is_within_reach():
    wide = batch(99) * 10
    assert (std_of_output(settled(math.inf)(wide)) > 3).all()
    limited = std_of_output(settled()(wide))
    torch.testing.assert_close(limited, torch.full_like(limited, 1 + REACH), rtol=1e-4, atol=0)


def test_both_limits_hold_of_one_batch():
    """The mean is within reach in units of the std that the output has them in, and that has grown."""
    y = settled()(far_and_wide())
    torch.testing.assert_close(std_of_output(y), torch.full((3,), 1 + REACH, dtype=y.dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean_of_output(y), torch.full((3,), REACH, dtype=y.dtype), rtol=1e-4, atol=0)


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
    """Two elements tell a mean to 0.7 std, and are let be up to 0.05·257 = 13 std from it."""
    layers = [RunningBatchNorm(3, momentum=0.01, max_lag=max_lag, dtype=torch.float64) for max_lag in (0.05, math.inf)]
    for layer in layers:
        layer(noise((64, 3), 0, torch.float64))
    x = noise((2, 3), 1, torch.float64) * 3 + 5
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


# Triton takes nothing on the CPU; see test_triton for its recomputation.
@pytest.mark.parametrize("backend", [name for name in ("cpu", "aten") if BACKENDS[name].unavailable() is None])
def test_a_recomputation_under_checkpointing_is_limited_alike(backend):
    layers = [settled() for _ in range(2)]
    x = [far_and_wide().requires_grad_() for _ in layers]
    with use_backend(backend):
        (layers[0](x[0]) ** 3).sum().backward()
        y = torch.utils.checkpoint.checkpoint(layers[1], x[1], use_reentrant=False)
        (y**3).sum().backward()
    assert torch.equal(x[0].grad, x[1].grad)
    assert_identical(buffers_of(layers[0]), buffers_of(layers[1]))


def test_padding_does_not_count():
    """Padding neither moves the batch's mean, nor widens it, nor makes n larger."""
    x = far_and_wide()
    padded = torch.cat([x, torch.full((2, 3, 500), -1e3, dtype=x.dtype)], 2)
    mask = (torch.arange(POSITIONS + 500) < POSITIONS).expand(2, -1)
    plain, masked = settled()(x), settled()(padded, mask)
    torch.testing.assert_close(masked[..., :POSITIONS], plain)


# ------------------------------------------------------------------------------------------------- the backward sums


@pytest.mark.parametrize(
    ("sizes", "max_lag", "weights"),
    # ρ = max(a, n/(n + 64)) with a = 0.25; without a limit, a.
    [
        ((32, 32), 0.05, (1 / 3, 1 / 3)),
        ((2, 2), 0.05, (0.25, 0.25)),
        ((2, 192), 0.05, (0.25, 0.75)),
        ((192, 2), 0.05, (0.75, 0.25)),
        ((2, 192), math.inf, (0.25, 0.25)),
    ],
)
def test_a_batch_weighs_in_the_backward_means_as_its_size_deserves(sizes, max_lag, weights):
    layer = RunningBatchNorm(3, momentum=0.25, max_lag=max_lag, affine=False, dtype=torch.float64)
    for size, dy in zip(sizes, (1.0, 3.0), strict=True):
        x = noise((size, 3), size, torch.float64).requires_grad_()
        layer(x).backward(torch.full_like(x, dy))
    first, second = weights[0] * (1 - weights[1]), weights[1]
    mean_dy = layer.sum_dy / layer.count_dy
    torch.testing.assert_close(mean_dy, torch.full_like(mean_dy, (first * 1 + second * 3) / (first + second)))


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
    assert batchnormify(model, "running")[0].max_lag == 0.05
    assert "max_lag" not in batchnormify(model, "torch")[0].__dict__
    with pytest.raises(TypeError, match="max_lag"):
        batchnormify(nn.Sequential(PreciseBatchNorm1d(3)), "precise", max_lag=0.5)


def test_the_defaults():
    layer = RunningBatchNorm(3)
    assert (layer.momentum, layer.gradient, layer.max_lag) == (Horizon(), "running", 0.05)
