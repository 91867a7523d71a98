"""Whole training steps on NVIDIA GPUs, in Triton: two launches forward, two backward, and nothing in between.

The first launch sums up and, in the last of its programs for a block of channels, updates the state; the second maps.
See `triton_kernels`. Nothing here waits for the device, and all sums are added in a fixed order. Triton is imported by
the first step that is taken here.
"""

from __future__ import annotations

import functools
import importlib.util
from struct import pack, unpack
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ..law import Law
from ..momentum import Momentum, encoded, weighs_whole_batches
from ..statistics import GradientState, NoiseState, State, Sums
from .aten import batch_norm, batch_norm_gradients, batch_sums, gradient_sums, input_gradient, normalize
from .layout import addresses, laid_out, laid_out_like
from .triton_devices import INTERPRETED, unavailable
from .triton_devices import device as device_of
from .triton_launch import OPTIONS, counter, launch, on
from .triton_plan import LARGEST_SIZE, MOST_CHANNELS, Plan, ceil, plan

__all__ = [
    "absorb",
    "absorb_gradient",
    "batch_norm",
    "batch_norm_gradients",
    "batch_sums",
    "gradient_sums",
    "input_gradient",
    "normalize",
    "prepared",
    "serves",
    "training_backward",
    "training_forward",
    "unavailable",
    "version",
]

Buffers = TypeVar("Buffers", bound=tuple[Tensor, ...])

_STATISTICS = {
    torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32,
    torch.float64: torch.float64,
}  # fmt: skip
# Channels of a program that knows no data.
_VECTOR = 128


def version() -> str:
    """The release of Triton."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return f"Triton {triton.__version__}{', interpreted' if INTERPRETED else ''}"


def serves(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x, with statistics in `dtype`, is memory that the kernels can work on."""
    return (
        (x.is_cuda or x.is_cpu)
        and _STATISTICS.get(x.dtype) is dtype
        # Subclasses and modes want to see operations, and may have no memory.
        and type(x) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        # A negated view and a tensor of zeros do not mean what lies at their address.
        and not (x.is_neg() or x._is_zerotensor())
        and x.numel() > 0
        and (x.dim() < 2 or (x.shape[1] <= MOST_CHANNELS and x.numel() // x.shape[1] <= LARGEST_SIZE))
        and _can_use(x.get_device())
    )


def prepared(buffers: Buffers) -> Buffers | None:
    """The buffers of a layer as they are; None if they are no memory that the kernels can update."""
    return None if addresses(buffers) is None else buffers


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, state: tuple[Tensor, ...], momentum: Momentum,
    running: bool, absorbs: bool, law: Law,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and `fixed`. Without `absorbs`, as in a recomputation, the state is taken as it is."""
    kernels, channels = _kernels(), x.shape[1]
    data, rows = laid_out(x)
    plan, y = _plan_of(x.shape, rows, x.dtype, x.get_device()), torch.empty_like(data)
    splits = plan.summing[0]
    statistics, measured = State(*state[: len(State._fields)]), state[len(State._fields) :]
    noise = NoiseState(*measured) if measured else None
    fixed = statistics.shift.new_empty((2 if not running else 4 if noise is None else 5, channels))
    scratch = fixed.new_empty((3 * splits + 3, channels))
    weight, bias = _vector(weight), _vector(bias)
    rule, numbers = _numbers(eps, law, momentum)
    whole, of_weight, of_bias = weighs_whole_batches(momentum), _dtype(weight), _dtype(bias)
    with on(x.get_device()):
        launch(
            plan.launches,
            ("batch_statistics", rule, whole, running, absorbs, noise is None, of_weight, of_bias),
            kernels.batch_statistics,
            plan.blocks * splits,
            (data, scratch, counter(x.device, plan.blocks), weight, bias, fixed, statistics, noise),
            (*plan.sizes, *plan.summing, len(x), *numbers),
            {"RULE": rule, "WHOLE_BATCHES": whole, "RUNNING": running, "ABSORBS": absorbs, "BP": plan.at_once,
             "WIDE": plan.wide, **plan.tile},
        )  # fmt: skip
        launch(
            plan.launches, "affine_map", kernels.affine_map, plan.blocks * plan.mapping[0], (data, y, scratch),
            (*plan.sizes, *plan.mapping, splits), plan.tile,
        )  # fmt: skip
    if absorbs:
        torch.autograd.graph.increment_version(state)
    return y, fixed


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, fixed: Tensor, gradient: GradientState | None, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z): with the running means of these sums where `gradient` is given, which absorbs them first."""
    kernels, channels = _kernels(), x.shape[1]
    data, rows = laid_out(x)
    of_y = laid_out_like(dy, data)
    plan = _plan_of(x.shape, rows, x.dtype, x.get_device())
    splits = plan.summing[0]
    sums, scratch = fixed.new_empty((2, channels)), fixed.new_empty((2 * splits + 3, channels))
    weight, by_state = _vector(weight), len(fixed) > 2
    dx = torch.empty_like(data) if needs_dx else None
    with on(x.get_device()):
        launch(
            plan.launches,
            ("gradient_statistics", by_state, gradient is None, _dtype(weight), dy.dtype),
            kernels.gradient_statistics,
            plan.blocks * splits,
            (of_y, data, scratch, counter(x.device, plan.blocks), weight, fixed, sums, gradient),
            (*plan.sizes, *plan.summing),
            {"BY_STATE": by_state, "BP": plan.at_once, "WIDE": plan.wide, **plan.tile},
        )
        if dx is not None:
            launch(
                plan.launches, ("input_gradient", dy.dtype), kernels.input_gradient, plan.blocks * plan.mapping[0],
                (of_y, data, dx, scratch, fixed), (*plan.sizes, *plan.mapping, splits), plan.tile,
            )  # fmt: skip
    if gradient is not None:
        torch.autograd.graph.increment_version(gradient)
    sum_dy, sum_dy_xhat = sums.unbind()
    return dx, sum_dy, sum_dy_xhat


def absorb(
    state: State, noise: NoiseState | None, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool,
    running: bool, absorbs: bool, law: Law,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Absorb sums that came from elsewhere; the vectors of the `update` that this is."""
    mean = state.running_mean
    vectors = Sums(*(part.expand_as(mean).contiguous() for part in batch))
    out = tuple([torch.empty_like(mean) for _ in range(2 if not running else 4 if noise is None else 5)])
    with on(mean.get_device()):
        _kernels().absorb_sums[(_vectors(len(mean)),)](
            vectors, weight.contiguous(), state, noise, out, samples, len(mean), *map(_bits, law),
            WHOLE_BATCHES=whole_batches, RUNNING=running, ABSORBS=absorbs, BC=_VECTOR, **OPTIONS,
        )  # fmt: skip
    if absorbs:
        torch.autograd.graph.increment_version((*state, *(noise or ())))
    return out


def absorb_gradient(
    state: GradientState, sum_dy: Tensor, sum_dy_xhat: Tensor, rstd: Tensor, trust: Tensor, offset: Tensor,
    batch_std: Tensor, n: int | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Absorb sums that came from elsewhere; G0 and G1, bounded, see `update.absorb_gradient`."""
    like = state.sum_dy
    count = n.expand_as(like).contiguous() if isinstance(n, Tensor) else torch.full_like(like, n)
    vectors = [t.contiguous() for t in (sum_dy, sum_dy_xhat, rstd, trust, offset, batch_std)]
    out = torch.empty_like(like), torch.empty_like(like)
    with on(like.get_device()):
        _kernels().absorb_gradient_sums[(_vectors(len(like)),)](
            state, *vectors, count, *out, len(like), BC=_VECTOR, **OPTIONS
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
    assert device is not None, "`serves` has asked"
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
def _numbers(eps: float, law: Law, momentum: Momentum) -> tuple[int, tuple[int, ...]]:
    """The code of the rule; eps, the law and the parameters of the rule in bits."""
    rule, *parameters = encoded(momentum)
    return rule, tuple(map(_bits, (eps, *law, *parameters)))


def _bits(value: float) -> int:
    """A float64 as the integer of the same bits: Triton would pass a float as float32."""
    bits: int = unpack("<q", pack("<d", value))[0]
    return bits


def _dtype(vector: Tensor | None) -> torch.dtype | None:
    return None if vector is None else vector.dtype


def _vector(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _vectors(channels: int) -> int:
    return ceil(channels, _VECTOR)


@functools.cache
def _can_use(index: int) -> bool:
    """Whether the kernels can run on a device, -1 for the CPU."""
    return device_of(index) is not None
