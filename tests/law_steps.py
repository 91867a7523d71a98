"""Training steps in which each part of `ops.law` shows, and their check against the reference, for any backend.

All are (N, C, *) in float64, to be rounded to the dtype of a layer. n = elements per channel of a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from cases import RAGGED, noise, with_random_affine
from reference import ReferenceRunningBatchNorm, channel_rows
from torch import Tensor, nn

from runningbn import RunningBatchNorm
from runningbn.kernels import use_backend
from runningbn.ops.state import GradientState, NoiseState

C = 4
# What must be as in the reference after every step; sums depend on a pivot, which may be any near the mean.
COMPARED = (
    "running_mean", "running_var", "count_sqrs", "debias", "samples", "steps", *NoiseState._fields,
    *GradientState._fields,
)  # fmt: skip
Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Batches x and their dy, the layer that takes them, and what of the law has to bind in some channel and step."""

    batches: Callable[[], list[Batch]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    binds: frozenset[str] = frozenset()

    def layer(self, dtype: torch.dtype, device: str = "cpu") -> RunningBatchNorm:
        layer: RunningBatchNorm = with_random_affine(RunningBatchNorm(C, dtype=dtype, **self.options))
        return layer.to(device)


def drawn(sizes: tuple[int, ...] = RAGGED, positions: tuple[int, ...] = (6,)) -> list[Batch]:
    """Channels that differ in mean and spread, and gradients with a mean."""
    spread = [1, C, *[1] * len(positions)]
    width, centre = (torch.linspace(*ends, C).double().view(spread) for ends in ((0.5, 2), (-1, 1)))
    return [
        (noise((n, C, *positions), i, torch.float64) * width + centre,
         noise((n, C, *positions), 50 + i, torch.float64) + 0.5)
        for i, n in enumerate(sizes)
    ]  # fmt: skip


def not_finite() -> list[Batch]:
    """One channel at a time is not finite in x or in dy, first, last, and twice in a row."""
    batches = drawn((*RAGGED, 3, 4))
    for step, channel, value in ((0, 0, math.nan), (2, 1, math.inf), (3, 1, math.nan), (5, 2, -math.inf)):
        batches[step][0][-1, channel, 1] = value
    for step, channel, value in ((1, 3, math.inf), (4, 0, math.nan), (5, 2, math.inf), (7, 3, -math.inf)):
        batches[step][1][0, channel, 2] = value
    return batches


def lagging() -> list[Batch]:
    """Batches that jump and widen, in some channels and not in others."""
    batches = drawn()
    for step, shift, scale in ((1, 4, 1), (2, 0, 20), (4, -6, 8), (5, 0.5, 1 / 8)):
        batches[step][0][:, 1:].mul_(scale).add_(shift)
    return batches


def shrinking() -> list[Batch]:
    """Ever smaller gradients, so that what is remembered outgrows what comes; in one channel they are as before."""
    batches = drawn()
    for step, (_, dy) in enumerate(batches):
        dy[:, 1:] *= 10.0**-step
    return batches


def crosswise() -> list[Batch]:
    """A gradient along 1, then along x, then without either: nothing that is remembered is in the batch."""
    batches = drawn((8, 8, 8, 8))
    for step, (x, dy) in enumerate(batches):
        ones, along = torch.ones_like(x), x - x.mean((0, 2), keepdim=True)
        if step == 3:
            for part in (ones, along):
                dy.sub_(part * ((dy * part).sum((0, 2), keepdim=True) / part.square().sum((0, 2), keepdim=True)))
        else:
            dy.copy_(ones * 3 if step % 2 == 0 else along * 3)
    return batches


def constant() -> list[Batch]:
    """A channel of zeros, a constant one, one that is constant in each batch, and a plain one."""
    batches = drawn((24, 3, 1, 8, 5))
    for step, (x, _) in enumerate(batches):
        # Near 0, as the raw moments of the reference lose digits of a variance that is none.
        x[:, 0], x[:, 1], x[:, 2] = 0, 1 / 8, step / 8
    return batches


LIMITED, WIDENED, BOUNDED = "the mean is limited", "the variance is limited", "what is subtracted is bounded"
NEAR: Mapping[str, Any] = MappingProxyType({"max_lag": 1e-4})  # binds, however noisy a first few batches are
FREE: Mapping[str, Any] = MappingProxyType({"max_lag": math.inf})
SCENARIOS: Mapping[str, Scenario] = MappingProxyType(
    {
        "ragged": Scenario(drawn),
        "ragged, within 0.05": Scenario(drawn, {"max_lag": 0.05}),
        "ragged, near": Scenario(drawn, NEAR, frozenset({LIMITED})),
        "not finite": Scenario(not_finite, FREE),
        "not finite, near": Scenario(not_finite, NEAR, frozenset({LIMITED})),
        "lagging": Scenario(lagging, {**NEAR, "momentum": 0.1}, frozenset({LIMITED, WIDENED})),
        "lagging freely": Scenario(lagging, {**FREE, "momentum": 0.1}),
        "shrinking": Scenario(shrinking, FREE, frozenset({BOUNDED})),
        "shrinking, lagging": Scenario(shrinking, {**NEAR, "momentum": 0.1}, frozenset({LIMITED, BOUNDED})),
        "crosswise": Scenario(crosswise, {**FREE, "momentum": 0.3}, frozenset({BOUNDED})),
        "one element": Scenario(lambda: drawn((1,) * 6, ()), FREE, frozenset({BOUNDED})),
        "one element, near": Scenario(lambda: drawn((1,) * 6, ()), NEAR, frozenset({LIMITED, BOUNDED})),
        "one position": Scenario(lambda: drawn(RAGGED, (1, 1)), NEAR, frozenset({LIMITED})),
        "planes": Scenario(lambda: drawn((5, 1, 3), (3, 4)), NEAR, frozenset({LIMITED})),
        "constant": Scenario(constant, FREE, frozenset({BOUNDED})),
        "constant, forgetting": Scenario(constant, {**FREE, "momentum": 1.0}),
        "constant, near": Scenario(constant, {**NEAR, "momentum": 0.1}, frozenset({LIMITED})),
    }
)


def reference_of(layer: RunningBatchNorm) -> ReferenceRunningBatchNorm:
    weight, bias = (parameter.detach().cpu() for parameter in (layer.weight, layer.bias))
    return ReferenceRunningBatchNorm(weight, bias, layer.momentum, layer.gradient, layer.max_lag, layer.eps)


def binding(scenario: Scenario) -> set[str]:
    """What of the law binds, by the reference."""
    reference, found = reference_of(scenario.layer(torch.float64)), set()
    for x, dy in scenario.batches():
        step = reference.forward(x)
        dx = reference.backward(step, dy)[0]
        g = [
            reference.state(name) / reference.state("count_dy").clamp_min(1e-300) for name in ("sum_dy", "sum_dy_xhat")
        ]
        used = (channel_rows(x) - step.x_hat / step.rstd[:, None]).nanmedian(1).values
        var = step.rstd.pow(-2) - reference.eps
        good = channel_rows(x * dy).isfinite().all(1)
        subtracted = g[0][:, None] + step.x_hat * g[1][:, None]
        unbounded = (step.weight * step.rstd).detach()[:, None] * (channel_rows(dy) - subtracted)
        excess = (unbounded - channel_rows(dx)).abs().amax(1) / unbounded.abs().amax(1)
        for name, apart in (
            (LIMITED, (used - reference.state("running_mean")).abs()),
            (WIDENED, (var - reference.state("running_var")).abs()),
            (BOUNDED, excess),
        ):
            if (apart[good] > 1e-6).any():
                found.add(name)
    return found


def padded(x: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """x with more positions, or samples where it has none, that are `value`; and the mask that leaves them out."""
    if x.dim() == 2:
        wide = torch.cat([x, torch.full_like(x[:1], value)])
        return wide, torch.arange(len(wide), device=x.device) < len(x)
    wide = torch.cat([x, torch.full_like(x, value)], -1)
    return wide, (torch.arange(wide.shape[-1], device=x.device) < x.shape[-1]).expand(len(x), *wide.shape[2:])


def real_part(padded_values: Tensor, x: Tensor) -> Tensor:
    return padded_values[: len(x), :, ..., : x.shape[-1]] if x.dim() > 2 else padded_values[: len(x)]


def step_of(layer: nn.Module, x: Tensor, dy: Tensor, masked: bool) -> dict[str, Tensor]:
    """y, dx, dweight and dbias; `masked` with as much padding as there is to see."""
    given, of_y = x, dy
    if masked:
        (given, mask), (of_y, _) = padded(x, math.nan), padded(dy, 7.0)
    given = given.clone().requires_grad_()
    layer.zero_grad()
    y = layer(given, mask) if masked else layer(given)
    y.backward(of_y)
    assert given.grad is not None
    return {
        "y": real_part(y.detach(), x), "dx": real_part(given.grad, x),
        "dweight": layer.weight.grad, "dbias": layer.bias.grad,
    }  # fmt: skip


def assert_trains_as_the_reference(
    scenario: Scenario, backend: str, dtype: torch.dtype, masked: bool = False, device: str = "cpu"
) -> None:
    """Every output, every gradient and every buffer of every step."""
    layer = scenario.layer(dtype, device)
    reference = reference_of(layer)
    # Some tens of roundings a step, which R and the projections of dy multiply by up to `trust_noise` = 64.
    tolerance = 64 * 16 * torch.finfo(dtype).eps
    for i, (x, dy) in enumerate(scenario.batches()):
        x, dy = x.to(dtype), dy.to(dtype)
        with use_backend(backend):
            found = step_of(layer, x.to(device), dy.to(device), masked)
        step = reference.forward(x)
        expected = dict(zip(("dx", "dweight", "dbias"), reference.backward(step, dy)), y=step.y.detach())
        found |= {name: getattr(layer, name).clone() for name in COMPARED}
        expected |= {name: reference.state(name) for name in COMPARED}
        for name, value in found.items():
            wanted = expected[name].nan_to_num(0, 0, 0)
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(
                value.cpu().double(), expected[name], rtol=0, atol=tolerance * scale, equal_nan=True,
                msg=lambda text, name=name, i=i: f"step {i}: {name}: {text}",
            )  # fmt: skip
