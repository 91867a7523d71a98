"""The law of `ops.law` in every backend, by whole steps and by masked ones, whose updates are calls of their own.

What the law says is in test_law and test_law_bound; for Triton, the same as here is in test_triton.
"""

from __future__ import annotations

import pytest
import torch
from cases import each_dtype, noise
from law_steps import SCENARIOS, Scenario, assert_trains_as_the_reference, binding, step_of
from steps import assert_identical, buffers_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runningbn import RunningBatchNorm
from runningbn.kernels import cpu, use_backend
from runningbn.ops.state import GradientState

SERVING = [name for name, module in (("cpu", cpu),) if module.unavailable() is None] + ["aten"]
each_backend = pytest.mark.parametrize("backend", SERVING)
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
each_way = pytest.mark.parametrize("masked", [False, True], ids=["whole steps", "masked"])
each_statistics_dtype = each_dtype(torch.float32, torch.float64)


@each_scenario
def test_what_a_scenario_is_for_happens_in_it(scenario: Scenario):
    assert scenario.binds <= binding(scenario)


@each_scenario
@each_backend
@each_way
@each_statistics_dtype
def test_training_is_that_of_the_reference(dtype, masked, backend, scenario: Scenario):
    assert_trains_as_the_reference(scenario, backend, dtype, masked)


@each_backend
@each_way
@each_statistics_dtype
def test_sums_that_overflow_are_no_part_of_the_memory_and_nothing_is_subtracted(dtype, masked, backend):
    layer, largest = RunningBatchNorm(3, dtype=dtype, max_lag=float("inf")), torch.finfo(dtype).max
    x = [noise((4, 3, 5), step, dtype) for step in range(2)]
    dy = noise((4, 3, 5), 9, dtype) + 0.5
    large = dy.clone()
    large[:, 1] = largest / 64  # whose sum does not overflow, and which one would see
    with use_backend(backend):
        step_of(layer, x[0], large, masked)
        before = buffers_of(layer)
        assert before["sum_dy"][1] > largest / 1e4
        large[:, 1] = largest / 8
        step = step_of(layer, x[1], large, masked)
    assert step["dbias"][1] == torch.inf
    for name in GradientState._fields:
        assert getattr(layer, name)[1] == before[name][1], name
        assert (getattr(layer, name) != before[name]).tolist() == [True, False, True], name
    rstd = (layer.running_var[1] + layer.eps).rsqrt()
    torch.testing.assert_close(step["dx"][:, 1], large[:, 1] * rstd, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------- what is done again


@each_backend
@each_way
@each_statistics_dtype
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["ragged, near", "lagging", "shrinking, lagging", "not finite, near", "one element"])
def test_a_recomputation_is_the_same_bit_for_bit_and_leaves_the_noise_alone(
    name, use_reentrant, dtype, masked, backend
):
    plain, checkpointed = (SCENARIOS[name].layer(dtype) for _ in range(2))

    class Repeated(torch.nn.Module):
        weight, bias = checkpointed.weight, checkpointed.bias

        def forward(self, *inputs: Tensor) -> Tensor:
            return checkpoint(checkpointed, *inputs, use_reentrant=use_reentrant)

    wrapped = Repeated()
    with use_backend(backend):
        for x, dy in SCENARIOS[name].batches():
            x, dy = x.to(dtype), dy.to(dtype)
            checkpointed.zero_grad()
            assert_identical(step_of(wrapped, x, dy, masked), step_of(plain, x, dy, masked))
            assert_identical(buffers_of(checkpointed), buffers_of(plain))


@each_backend
@each_statistics_dtype
@pytest.mark.parametrize("name", ["lagging", "shrinking, lagging", "not finite, near"])
def test_a_gradient_that_a_backend_cannot_take_is_done_by_torch(name, dtype, backend):
    """As of another kind of tensor, or in a compiled backward; by what the forward of the backend has left."""
    scenario = SCENARIOS[name]
    layers = [scenario.layer(dtype) for _ in range(2)]

    class Mine(Tensor):
        pass

    for x, dy in scenario.batches():
        steps = []
        for layer, kind in zip(layers, (Tensor, Mine)):
            given = x.to(dtype).requires_grad_()
            layer.zero_grad()
            with use_backend(backend):
                layer(given).backward(dy.to(dtype).as_subclass(kind))
            steps.append({"dx": given.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad})
        steps = [{**step, **{f: getattr(m, f) for f in GradientState._fields}} for step, m in zip(steps, layers)]
        for part, value in steps[0].items():
            finite = value.nan_to_num(0, 0, 0).abs().max().item()
            close = {"rtol": 0.0, "atol": 512 * torch.finfo(dtype).eps * max(1.0, finite)}
            torch.testing.assert_close(steps[1][part].as_subclass(Tensor), value, equal_nan=True, **close)
