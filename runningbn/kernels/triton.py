"""Whole training steps on NVIDIA GPUs, in Triton: two launches forward, two backward, and nothing in between.

The first launch sums up and, in the last of its programs for a block of channels, updates the state; the second maps.
See `triton_kernels`. Nothing here waits for the device, and all sums are added in a fixed order. Triton is imported by
the first step that is taken here.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext
from struct import pack, unpack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ..law import Law
from ..momentum import rule_of
from ..spec import Coefficients, Mode, StepSpec
from ..statistics import Batch, GradientState, LayerState, NoiseState, State, Sums
from .aten import batch_norm, batch_norm_gradients, batch_sums, gradient_sums, input_gradient, normalize
from .contract import Gradients, GradientSums
from .layout import are_vectors, dense, empty_like, is_rows

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

_STATISTICS = {
    torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32,
    torch.float64: torch.float64,
}  # fmt: skip
# With Triton's interpreter, which is what TRITON_INTERPRET means to Triton itself, the kernels run on the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
# The first release that takes named tuples of tensors.
_OLDEST_TRITON = (3, 3)
# The first generation of GPUs that Triton supports.
_OLDEST_GPU = (8, 0)

# Threads of a program, and elements of a tile for each: whole vectors of every dtype, and sums that stay in registers.
_THREADS, _PER_THREAD = 256, 16
# Memory is read in vectors where sizes are multiples of this; otherwise each element needs an address of its own, and
# half as many are held. So are float64.
_ALIGNED = 4
# Channels of a tile of rows: whole sectors of memory, and blocks enough for few partial sums of each.
_CHANNELS_OF_ROWS = 32
# Programs for each multiprocessor: as many as it holds at once where their sums have to be merged, some rounds of them
# where there is nothing to merge.
_SUMMING, _MAPPING = 4, 16
# Tiles in a split, at most: it bounds what the pivot of a split can cost, see `batch_statistics`.
_LARGEST_SPLIT = 64
# Partial sums that are merged at once, of all channels in a block.
_MERGED_AT_ONCE, _FEW_SPLITS = 1024, 16
# Channels of a program that knows no data.
_VECTOR = 128
# Offsets in a tile are 32 bits wide, and so is every size.
_LARGEST_SIZE, _MOST_CHANNELS = 2**31 - 2**13, 2**20


class _Plan(NamedTuple):
    """How the elements of an input are shared out. See `triton_kernels` for what the names mean.

    Attributes:
        sizes: outer, channels, inner.
        summing, mapping: (splits, tiles of each) of the two launches.
        tile: what the shape of a tile is, and the number of threads.
        at_once: BP.
        blocks: blocks of channels.
    """

    sizes: tuple[int, int, int]
    summing: tuple[int, int]
    mapping: tuple[int, int]
    tile: dict[str, Any]
    at_once: int
    blocks: int


def unavailable() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _INTERPRETED:
        if not torch.cuda.is_available():
            return "torch found no CUDA device"
        if torch.version.hip is not None:
            return "the kernels were written for CUDA and have never met ROCm"
        if not any(_multiprocessors(index) for index in range(torch.cuda.device_count())):
            return f"no CUDA device has compute capability {'.'.join(map(str, _OLDEST_GPU))} or above"
    return _too_old()


def version() -> str:
    """The release of Triton."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return f"Triton {triton.__version__}{', interpreted' if _INTERPRETED else ''}"


def supports(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x, with statistics in `dtype`, is memory that the kernels can work on."""
    return (
        (x.is_cuda or (_INTERPRETED and x.is_cpu))
        and _STATISTICS.get(x.dtype) is dtype
        # Subclasses and modes want to see operations, and may have no memory.
        and type(x) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        # A negated view and a tensor of zeros do not mean what lies at their address.
        and not (x.is_neg() or x._is_zerotensor())
        and x.numel() > 0
        and (x.dim() < 2 or (x.shape[1] <= _MOST_CHANNELS and x.numel() // x.shape[1] <= _LARGEST_SIZE))
        and _can_use(x.get_device())
    )


def prepare(buffers: Buffers) -> Buffers | None:
    """The buffers of a layer as they are; None if they are no memory that the kernels can update."""
    return buffers if are_vectors(buffers) else None


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, prepared: tuple[Tensor, ...], spec: StepSpec, updates: bool
) -> tuple[Tensor, Tensor]:
    """y, and the coefficients as the rows of one tensor. Without `updates`, the state is taken as it is."""
    kernels, x = _kernels(), x.detach()
    data, plan, y = dense(x), _plan_for(x), empty_like(x)
    (splits, tiles), channels = plan.summing, x.shape[1]
    statistics, measured = State(*prepared[: len(State._fields)]), prepared[len(State._fields) :]
    noise = NoiseState(*measured) if measured else None
    dtype = statistics.shift.dtype
    rows = x.new_empty((len(spec.mode.coefficients), channels), dtype=dtype)
    scratch = x.new_empty((3 * splits + 3, channels), dtype=dtype)
    weight, bias = _vector(weight), _vector(bias)
    rule = rule_of(spec.momentum)
    code = rule.code()
    assert code is not None
    with _on(x.device):
        kernels.batch_statistics[(plan.blocks * splits,)](
            data, scratch, _counter(x.device, plan.blocks), weight, bias, rows, statistics, noise,
            *plan.sizes, splits, tiles, len(x), _bits(spec.eps), *map(_bits, (*spec.law, *code[1:])),
            RULE=code.rule, WHOLE_BATCHES=rule.whole_batches, BY_STATE=spec.mode.by_state, UPDATES=updates,
            BP=plan.at_once, **plan.tile, **_OPTIONS,
        )  # fmt: skip
        kernels.affine_map[(plan.blocks * plan.mapping[0],)](
            data, dense(y, like=x), scratch, *plan.sizes, *plan.mapping, splits, **plan.tile, **_OPTIONS
        )
    if updates:
        torch.autograd.graph.increment_version(prepared)
    return y, rows


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor, mode: Mode, prepared: GradientState | None,
    needs_dx: bool,
) -> Gradients:  # fmt: skip
    """The gradients: by running means of the two sums where these are given, which are updated first."""
    kernels, x = _kernels(), x.detach()
    data, of_y, plan = dense(x), dense(dy.detach(), like=x), _plan_for(x)
    (splits, tiles), channels = plan.summing, x.shape[1]
    sums, scratch = rows.new_empty((2, channels)), rows.new_empty((2 * splits + 3, channels))
    dx = empty_like(x) if needs_dx else None
    with _on(x.device):
        kernels.gradient_statistics[(plan.blocks * splits,)](
            of_y, data, scratch, _counter(x.device, plan.blocks), _vector(weight), rows, sums, prepared,
            *plan.sizes, splits, tiles, BY_STATE=mode.by_state, BP=plan.at_once, **plan.tile, **_OPTIONS,
        )  # fmt: skip
        if dx is not None:
            kernels.input_gradient[(plan.blocks * plan.mapping[0],)](
                of_y, data, dense(dx, like=x), scratch, rows,
                *plan.sizes, *plan.mapping, splits, **plan.tile, **_OPTIONS,
            )  # fmt: skip
    if prepared is not None:
        torch.autograd.graph.increment_version(prepared)
    return Gradients(dx, sums[0], sums[1])


def update(mode: Mode, state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    """Let sums that came from elsewhere enter the state; the vectors that `update.update` makes coefficients of."""
    statistics, noise = state.statistics, state.noise
    mean = statistics.running_mean
    sums = Sums(*(part.expand_as(mean).contiguous() for part in batch.sums))
    out = tuple([torch.empty_like(mean) for _ in mode.coefficients])
    with _on(mean.device):
        _kernels().update_by_sums[(_vectors(len(mean)),)](
            sums, batch.weight.contiguous(), statistics, noise, out, batch.samples, len(mean), *map(_bits, law),
            WHOLE_BATCHES=batch.whole, BY_STATE=mode.by_state, UPDATES=updates, BC=_VECTOR, **_OPTIONS,
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
    of_batch = [getattr(coefficients, name) for name in ("rstd", "trust", "offset", "batch_std")]
    vectors = [t.contiguous() for t in (*sums, *of_batch)]
    m0, m1 = torch.empty_like(like), torch.empty_like(like)
    with _on(like.device):
        _kernels().update_gradient_by_sums[(_vectors(len(like)),)](
            state, *vectors, count, m0, m1, len(like), BC=_VECTOR, **_OPTIONS
        )
    torch.autograd.graph.increment_version(state)
    return m0, m1


# Registers for four programs of 256 threads on a multiprocessor: the sums fit, and what follows them once may spill.
# That multiplications and additions are fused is said since Triton 3.9 warns of a change of its default.
_OPTIONS = {"maxnreg": 64, "enable_fp_fusion": True}


def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


def _plan_for(x: Tensor) -> _Plan:
    n, channels = x.shape[:2]
    elements = x.numel() // channels
    if is_rows(x):
        rows, outer, inner = True, elements, 1
    elif channels == 1:
        rows, outer, inner = False, 1, elements
    else:
        rows, outer, inner = False, n, elements // n
    programs = _multiprocessors(x.get_device())
    return _plan(rows, outer, channels, inner, x.dtype == torch.float64, programs)


@functools.lru_cache(maxsize=4096)
def _plan(rows: bool, outer: int, channels: int, inner: int, double: bool, multiprocessors: int) -> _Plan:
    """Tiles of much the same size and of few shapes: each makes Triton compile the kernels once more."""
    divisor = math.gcd(channels if rows else inner, 16)
    per_thread = _PER_THREAD // 2 if double or divisor < _ALIGNED else _PER_THREAD
    tile, wide = _THREADS * per_thread, _power_of_two(channels)
    if rows:
        of_channels, of_inner = min(wide, _CHANNELS_OF_ROWS), 1
    else:
        # The length along a plane that leaves the least of the last tile empty; long ones first.
        lengths = [tile, tile // 2, tile // 4]
        of_inner = min(lengths, key=lambda length: _ceil(inner, length) * length)
        of_inner = min(of_inner, _power_of_two(inner))
        of_channels = min(wide, tile // of_inner)
        if of_channels * inner > _LARGEST_SIZE:
            of_channels = 1
    of_outer = tile // (of_channels * of_inner)
    if not rows and channels * inner * of_outer > _LARGEST_SIZE:
        of_outer = 1
    # Few samples get a smaller tile rather than an empty one; not of every size, as samples vary.
    if outer <= of_outer // 16:
        of_outer //= 16
    blocks, tiles = _ceil(channels, of_channels), _ceil(outer, of_outer) * _ceil(inner, of_inner)

    def shared_out(programs: int) -> tuple[int, int]:
        of_split = min(_ceil(tiles, max(programs * multiprocessors // blocks, 1)), _LARGEST_SPLIT)
        return _ceil(tiles, of_split), of_split

    shape = {
        "ROWS": rows, "DIVISOR": divisor, "BN": of_outer, "BC": of_channels, "BS": of_inner,
        "num_warps": max(1, of_outer * of_channels * of_inner // per_thread // 32),
    }  # fmt: skip
    summing, mapping = shared_out(_SUMMING), shared_out(_MAPPING)
    at_once = _FEW_SPLITS if summing[0] <= _FEW_SPLITS else max(_MERGED_AT_ONCE // of_channels, _FEW_SPLITS)
    return _Plan((outer, channels, inner), summing, mapping, shape, at_once, blocks)


@functools.lru_cache(maxsize=1024)
def _bits(value: float) -> int:
    """A float64 as the integer of the same bits: Triton would pass a float as float32."""
    bits: int = unpack("<q", pack("<d", value))[0]
    return bits


def _counter(device: torch.device, blocks: int) -> Tensor:
    """Zeros, (≥ blocks,), int32, that no other launch counts in meanwhile, and each leaves as zeros.

    Launches of one stream run one after the other, so it has them for good. A graph may be replayed beside any other
    work and has zeros of its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counter = _counters.get(key)
    if counter is None or len(counter) < blocks:
        counter = _counters[key] = torch.zeros(max(4096, blocks), dtype=torch.int32, device=device)
    return counter


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().contiguous()


def _vectors(channels: int) -> int:
    return _ceil(channels, _VECTOR)


def _ceil(size: int, of: int) -> int:
    return -(-size // of)


def _power_of_two(size: int) -> int:
    """The least that is not below."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _can_use(index: int) -> bool:
    """Whether the kernels can run on a device, -1 for the CPU."""
    return unavailable() is None and _multiprocessors(index) > 0


@functools.cache
def _multiprocessors(index: int) -> int:
    """How many a device has; 0 if it is too old. The interpreter, which is slow, has one."""
    if _INTERPRETED:
        return 1
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count if (properties.major, properties.minor) >= _OLDEST_GPU else 0


@functools.cache
def _too_old() -> str | None:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    return None
