"""Whole training steps on NVIDIA GPUs, in Triton: one or two launches forward, one or two backward, nothing between.

The first launch sums up and, in the last of its programs for a block of channels, updates the state; the second maps.
Of small inputs, each program has all elements of its channels, and the first launch maps as well. See `triton_kernels`.
Nothing here waits for the device, and all sums are added in a fixed order. Triton is imported by the first step that is
taken here.
"""

from __future__ import annotations

import functools
import importlib.util
from struct import pack, unpack
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..momentum import RuleCode, rule_of
from ..ops.law import Law
from ..ops.spec import Coefficients, Mode, StepSpec
from ..ops.state import Batch, GradientState, LayerState, NoiseState, State, Sums
from .aten import batch_norm, batch_norm_gradients, batch_sums, gradient_sums, input_gradient, normalize
from .contract import Gradients, GradientSums
from .layout import STATISTICS, addresses, is_memory, laid_out, laid_out_like
from .triton_devices import INTERPRETED, unavailable
from .triton_devices import device as device_of
from .triton_launch import OPTIONS, counter, launch, on
from .triton_plan import LARGEST_SIZE, MOST_CHANNELS, Plan, ceil, plan

__all__ = [
    "batch_norm",
    "batch_norm_gradients",
    "batch_sums",
    "gradient_sums",
    "input_gradient",
    "normalize",
    "prepare",
    "supports",
    "training_backward",
    "training_forward",
    "unavailable",
    "update",
    "update_gradient",
    "version",
]

Buffers = TypeVar("Buffers", bound=tuple[Tensor, ...])

# Channels of a program of an update alone.
_CHANNELS = 128


def version() -> str:
    """The release of Triton."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return f"Triton {triton.__version__}{', interpreted' if INTERPRETED else ''}"


def supports(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x, with statistics in `dtype`, is memory that the kernels can work on."""
    return (
        (x.is_cuda or x.is_cpu)
        and _can_use(x.get_device())
        and STATISTICS.get(x.dtype) is dtype
        and is_memory(x)
        and (x.dim() < 2 or (x.shape[1] <= MOST_CHANNELS and x.numel() // x.shape[1] <= LARGEST_SIZE))
    )


def prepare(buffers: Buffers) -> Buffers | None:
    """The buffers of a layer as they are; None if they are no memory that the kernels can update."""
    return None if addresses(buffers) is None else buffers


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, prepared: tuple[Tensor, ...], spec: StepSpec, updates: bool
) -> tuple[Tensor, Tensor]:
    """y, and the coefficients as the rows of one tensor. Without `updates`, the state is taken as it is."""
    kernels, mode, rule = _kernels(), spec.mode, rule_of(spec.momentum)
    data, in_rows = laid_out(x)
    plan, y = _plan_of(x.shape, in_rows, x.dtype, x.get_device()), torch.empty_like(data)
    splits = plan.summing.splits
    statistics, measured = State(*prepared[: len(State._fields)]), prepared[len(State._fields) :]
    noise = NoiseState(*measured) if measured else None
    rows = statistics.shift.new_empty((len(mode.coefficients), x.shape[1]))
    weight, bias = _contiguous(weight), _contiguous(bias)
    code = rule.code()
    assert code is not None, "`kernels.fused` has asked"
    key = "batch_statistics", code.rule, rule.whole_batches, mode, updates, _dtype(weight), _dtype(bias)
    constants = {
        "RULE": code.rule, "WHOLE_BATCHES": rule.whole_batches, "BY_STATE": mode.by_state, "UPDATES": updates,
        "BP": plan.merged_at_once, **plan.tile,
    }  # fmt: skip
    # With one split, the sums and the map are one launch; otherwise the map follows, and finds its rows in `scratch`.
    scratch = arrived = None
    if splits > 1:
        scratch, arrived = rows.new_empty((3 * splits + 3, x.shape[1])), counter(x.device, plan.blocks)
    with on(x.get_device()):
        launch(
            plan.launches, key, kernels.batch_statistics, plan.blocks * splits,
            (data, None if splits > 1 else y, scratch, arrived, weight, bias, rows, statistics, noise),
            (*plan.sizes, *plan.summing, len(x), *_numbers(spec.eps, spec.law, code)), constants,
        )  # fmt: skip
        if splits > 1:
            launch(
                plan.launches, "affine_map", kernels.affine_map, plan.blocks * plan.mapping.splits, (data, y, scratch),
                (*plan.sizes, *plan.mapping, splits), plan.tile,
            )  # fmt: skip
    if updates:
        torch.autograd.graph.increment_version(prepared)
    return y, rows


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor, mode: Mode, prepared: GradientState | None,
    needs_dx: bool,
) -> Gradients:  # fmt: skip
    """The gradients: by running means of the two sums where these are given, which are updated first."""
    rows = rows.contiguous()  # saved-tensor hooks may return other strides
    kernels, channels = _kernels(), x.shape[1]
    data, in_rows = laid_out(x)
    of_y = laid_out_like(dy, data)
    plan = _plan_of(x.shape, in_rows, x.dtype, x.get_device())
    splits = plan.summing.splits
    sums = rows.new_empty((2, channels))
    scratch = arrived = None
    if splits > 1:
        scratch, arrived = rows.new_empty((2 * splits + 3, channels)), counter(x.device, plan.blocks)
    weight = _contiguous(weight)
    dx = torch.empty_like(data) if needs_dx else None
    key = "gradient_statistics", mode.by_state, prepared is None, needs_dx, _dtype(weight), dy.dtype
    constants = {"BY_STATE": mode.by_state, "BP": plan.merged_at_once, **plan.tile}
    with on(x.get_device()):
        launch(
            plan.launches, key, kernels.gradient_statistics, plan.blocks * splits,
            (of_y, data, None if splits > 1 else dx, scratch, arrived, weight, rows, sums, prepared),
            (*plan.sizes, *plan.summing), constants,
        )  # fmt: skip
        if splits > 1 and dx is not None:
            launch(
                plan.launches, ("input_gradient", dy.dtype), kernels.input_gradient, plan.blocks * plan.mapping.splits,
                (of_y, data, dx, scratch, rows), (*plan.sizes, *plan.mapping, splits), plan.tile,
            )  # fmt: skip
    if prepared is not None:
        torch.autograd.graph.increment_version(prepared)
    return Gradients(dx, *sums.unbind())


def update(mode: Mode, state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    """Let sums that came from elsewhere enter the state; the vectors that `update.update` makes coefficients of."""
    mean = state.statistics.running_mean
    sums = Sums(*(part.expand_as(mean).contiguous() for part in batch.sums))
    out = tuple([torch.empty_like(mean) for _ in mode.coefficients])
    with on(mean.get_device()):
        _kernels().update_by_sums[(ceil(len(mean), _CHANNELS),)](
            sums, batch.weight.contiguous(), state.statistics, state.noise, out, batch.samples, len(mean),
            *map(_bits, law),
            WHOLE_BATCHES=batch.whole, BY_STATE=mode.by_state, UPDATES=updates, BC=_CHANNELS, **OPTIONS,
        )  # fmt: skip
    if updates:
        torch.autograd.graph.increment_version(state.forward_buffers)
    return out


def update_gradient(
    state: GradientState, sums: GradientSums, coefficients: Coefficients, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Let sums that came from elsewhere enter the state; s·G0 and s·G1, see `update.update_gradient`."""
    like = state.sum_dy
    count = n.expand_as(like).contiguous() if isinstance(n, Tensor) else torch.full_like(like, n)
    sums = GradientSums(*(t.contiguous() for t in sums))
    vectors = [getattr(coefficients, name).contiguous() for name in ("rstd", "trust", "offset", "batch_std")]
    out = torch.empty_like(like), torch.empty_like(like)
    with on(like.get_device()):
        _kernels().update_gradient_by_sums[(ceil(len(like), _CHANNELS),)](
            state, sums, *vectors, count, out, len(like), BC=_CHANNELS, **OPTIONS
        )
    torch.autograd.graph.increment_version(state)
    return out


@functools.cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


@functools.lru_cache(maxsize=4096)
def _plan_of(shape: torch.Size, rows: bool, dtype: torch.dtype, index: int) -> Plan:
    """The plan for an input, dense in rows or planes, on the device of this number."""
    device = device_of(index)
    assert device is not None, "`supports` has asked"
    channels = shape[1]
    elements = shape.numel() // channels
    if rows:
        outer, inner = elements, 1
    elif channels == 1:
        outer, inner = 1, elements
    else:
        outer, inner = shape[0], elements // shape[0]
    return plan(rows, outer, channels, inner, dtype == torch.float64, device)


@functools.lru_cache(maxsize=1024)
def _numbers(eps: float, law: Law, code: RuleCode) -> tuple[int, ...]:
    """eps, the law and the arguments of the rule in bits."""
    return tuple(map(_bits, (eps, *law, *code[1:])))


def _bits(value: float) -> int:
    """A float64 as the integer of the same bits: Triton would pass a float as float32."""
    bits: int = unpack("<q", pack("<d", value))[0]
    return bits


def _dtype(vector: Tensor | None) -> torch.dtype | None:
    return None if vector is None else vector.dtype


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


@functools.cache
def _can_use(index: int) -> bool:
    """Whether the kernels can run on a device, -1 for the CPU."""
    return device_of(index) is not None
