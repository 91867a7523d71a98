"""The sweeps and whole training steps in C, on torch's own threads: float32, bfloat16 and float64 on the CPU.

The library is built with the package where there is a C compiler, see cpu.c, and loaded at its first use. It knows
nothing of torch: it is given pointers, sizes, and the address of torch's `parallel_for`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from operator import is_
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..law import Law
from ..momentum import SQUARE_ROOT, Momentum, encoded, weighs_whole_batches
from ..statistics import GradientState, NoiseState, State, Sums
from .building import library_in, why_not_built
from .layout import are_vectors

# The structs of cpu.h, whose fields are 8 bytes each: q and Q are integers and pointers, d doubles.
_FORWARD = Struct("@7q4Q7d12Q4q3dQd16Q")
_BACKWARD = Struct("@7q19Q")
_STRUCTS = {"version": 2, "forward_size": _FORWARD.size, "backward_size": _BACKWARD.size}
_SUMS, _ABSORB, _APPLY = 1, 2, 4
_GIVEN = SQUARE_ROOT + 1  # a weight per channel instead of a rule
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_STATISTICS = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
_TORCH_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
Prepared = tuple[tuple[Tensor, ...], tuple[int, ...]]
# Of a backward call: m0, m1, kappa_mean, kappa_var, three running sums, trust, offset, batch_std.
_NO_VECTORS: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
# Layers whose buffers are known; looking at a dozen tensors takes longer than a small batch.
_prepared: dict[int, tuple[tuple[int, ...], list[weakref.ref[Tensor]]]] = {}
_MOST_PREPARED = 4096
_NO_BATCH = (0, 0, 0, 0)
# Of `fixed`, by whether x is normalised by running statistics and whether within limits.
_ROWS = {(False, False): 2, (True, False): 4, (True, True): 5}
_NO_NOISE = (0, 0, 0)
_NO_COEFFICIENTS = (0, 0, 0, 0, 0, 0)  # rstd, kappa_mean, kappa_var, trust, offset, batch_std
_NO_UPDATE: tuple[float, ...] = (0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0.0, *[0] * len(State._fields), *_NO_NOISE)
_NO_LAW = Law()


def unavailable() -> str | None:
    """Why the library cannot be used here; None if it can."""
    return _library()[1]


def version() -> str:
    """The instruction set that it uses."""
    return _library()[2]


def serves(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x, with statistics in `dtype`, is memory that the library can work on."""
    return (
        x.is_cpu
        and _STATISTICS.get(x.dtype) is dtype
        # Subclasses and modes want to see operations, and may have no memory.
        and type(x) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        # A negated view and a tensor of zeros do not mean what lies at their address.
        and not (x.is_neg() or x._is_zerotensor())
        and x.numel() > 0
        and _library()[1] is None
    )


def prepared(buffers: tuple[Tensor, ...]) -> Prepared | None:
    """The buffers of a layer, and where they lie; None if they are no memory that the library can update."""
    pointers = tuple([tensor.data_ptr() for tensor in buffers])
    found = _prepared.get(id(buffers[0]))
    # The same tensors at the same place as when they were looked at, so at least their storage is what it was.
    if found is not None and found[0] == pointers and all(map(is_, [known() for known in found[1]], buffers)):
        return buffers, pointers
    if not are_vectors(buffers):
        return None
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[id(buffers[0])] = pointers, [weakref.ref(tensor) for tensor in buffers]
    return buffers, pointers


def batch_sums(x: Tensor, dtype: torch.dtype) -> tuple[Sums, None]:
    """Sums per channel about the mean as it is in `dtype`; they are taken in float64, and rounded once."""
    batch = [torch.empty(x.shape[1], dtype=dtype) for _ in Sums._fields]
    _forward(*_laid_out(x), None, _SUMS, batch=_pointers(batch))
    return Sums(*batch), None


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    pivot: Tensor | None = None, centred: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x."""
    data, geometry = _laid_out(x)
    y = torch.empty_like(data)
    mean, var = _vector(mean, x), _vector(var, x)
    _forward(data, geometry, y, _APPLY, weight, bias, eps, fixed=(*_pointers((mean, var)), *_NO_COEFFICIENTS))
    return y


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, mean and biased variance, (C,) in `dtype`, of a batch; without gradients."""
    data, geometry = _laid_out(x)
    y, mean, var = torch.empty_like(data), *(torch.empty(x.shape[1], dtype=dtype) for _ in range(2))
    _forward(data, geometry, y, _SUMS | _APPLY, weight, bias, eps, fixed=(*_pointers((mean, var)), *_NO_COEFFICIENTS))
    return y, mean, var


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    mean, rstd = _vector(mean, x), _vector(rstd, x)
    _, sum_dy, sum_dy_xhat = _backward(dy, x, _SUMS, None, mean.data_ptr(), rstd.data_ptr(), _NO_VECTORS)
    return sum_dy, sum_dy_xhat


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    vectors = [_vector(vector, x) for vector in (mean, rstd, m0, m1)]
    pointers = _pointers(vectors)
    dx, _, _ = _backward(dy, x, _APPLY, weight, pointers[0], pointers[1], (*pointers[2:], *_NO_VECTORS[2:]))
    assert dx is not None
    return dx


def batch_norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z) of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    mean, rstd = _vector(mean, x), _vector(rstd, x)
    dx, sum_dy, sum_dy_xhat = _backward(dy, x, _SUMS | _APPLY, weight, mean.data_ptr(), rstd.data_ptr(), _NO_VECTORS)
    assert dx is not None
    return dx, sum_dy, sum_dy_xhat


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, state: Prepared, momentum: Momentum,
    running: bool, absorbs: bool, law: Law,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and `fixed`. Without `absorbs`, as in a recomputation, the state is taken as it is."""
    buffers, pointers = state
    limited = len(buffers) > len(State._fields)
    data, geometry = _laid_out(x)
    y = torch.empty_like(data)
    dtype = _STATISTICS[x.dtype]
    fixed = torch.empty((_ROWS[running, limited], geometry[2]), dtype=dtype)
    first, row = fixed.data_ptr(), geometry[2] * dtype.itemsize
    second = first + row
    stages = _APPLY
    if absorbs or not running or limited:
        stages |= _SUMS
    if absorbs or running:
        stages |= _ABSORB
    if limited:
        fixes = (first, 0, second, 0, 0, second + row, second + 2 * row, second + 3 * row)
    elif running:
        fixes = (first, 0, second, second + row, second + 2 * row, 0, 0, 0)
    else:
        fixes = (first, 0, second, 0, 0, 0, 0, 0)
    rule = (running, absorbs, weighs_whole_batches(momentum), *encoded(momentum), 0, len(x))
    update = (*rule, *pointers, *(() if limited else _NO_NOISE))
    if absorbs:
        _note_change(buffers)
    _forward(data, geometry, y, stages, weight, bias, eps, _NO_BATCH, fixes, update, law)
    return y, fixed


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, fixed: Tensor, gradient: Prepared | None, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z): with the running means of these sums where `gradient` is given, which absorbs them first."""
    first, row = fixed.data_ptr(), fixed.shape[1] * fixed.element_size()
    stages, vectors = _SUMS | _APPLY if needs_dx else _SUMS, _NO_VECTORS
    if gradient is not None:
        _note_change(gradient[0])
        stages |= _ABSORB
        vectors = (0, 0, 0, 0, *gradient[1], first + 2 * row, first + 3 * row, first + 4 * row)
    elif len(fixed) > 2:
        vectors = (0, 0, first + 2 * row, first + 3 * row, 0, 0, 0, 0, 0, 0)
    return _backward(dy, x, stages, weight, first, first + row, vectors)


def absorb(
    state: State, noise: NoiseState | None, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool,
    running: bool, absorbs: bool, law: Law,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Absorb sums that came from elsewhere; the vectors of the `update` that this is."""
    mean = state.running_mean
    batch, weight = Sums(*(_vector(part.expand_as(mean), mean) for part in batch)), _vector(weight, mean)
    out = [torch.empty_like(mean) for _ in range(_ROWS[running, noise is not None])]
    first, second, *others = _pointers(out)
    of_batch, kappas = (others, (0, 0)) if noise is not None else ((0, 0, 0), others or (0, 0))
    packed = _FORWARD.pack(
        _DTYPES[mean.dtype], _ABSORB, 1, 1, 1, len(mean), 1, 0, 0, 0, 0, 0.0, *law, *_pointers(batch),
        first, second, 0, *kappas, *of_batch,
        running, absorbs, whole_batches, _GIVEN, 0.0, 0.0, 0.0, weight.data_ptr(), float(samples), *_pointers(state),
        *(_NO_NOISE if noise is None else _pointers(noise)),
    )  # fmt: skip
    if absorbs:
        _note_change((*state, *(noise or ())))
    _check(_library()[0].runningbn_forward(packed))
    return tuple(out)


def absorb_gradient(
    state: GradientState, sum_dy: Tensor, sum_dy_xhat: Tensor, rstd: Tensor, trust: Tensor, offset: Tensor,
    batch_std: Tensor, n: int | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Absorb sums that came from elsewhere; G0 and G1, bounded, see `update.absorb_gradient`."""
    like = state.sum_dy
    sums, fixed = [sum_dy, sum_dy_xhat], [rstd, trust, offset, batch_std]
    sums, fixed = ([_vector(t, like) for t in vectors] for vectors in (sums, fixed))
    count = _vector(torch.as_tensor(n).expand_as(like), like)
    out = torch.empty_like(like), torch.empty_like(like)
    packed = _BACKWARD.pack(
        _DTYPES[like.dtype], _ABSORB, 1, 1, 1, len(like), 1, 0, 0, 0, 0, 0, fixed[0].data_ptr(), *_pointers(sums),
        *_pointers(out), 0, 0, *_pointers(state), *_pointers(fixed[1:]), count.data_ptr(),
    )  # fmt: skip
    _note_change(state)
    _check(_library()[0].runningbn_backward(packed))
    return out


def _forward(
    data: Tensor, geometry: tuple[int, int, int, int], y: Tensor | None, stages: int,
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0,
    batch: Sequence[int] = _NO_BATCH, fixed: Sequence[int] = (0, 0, *_NO_COEFFICIENTS),
    update: Sequence[float] = _NO_UPDATE, law: Law = _NO_LAW,
) -> None:  # fmt: skip
    weight = None if weight is None else _vector(weight, data)
    bias = None if bias is None else _vector(bias, data)
    packed = _FORWARD.pack(
        _DTYPES[data.dtype], stages, torch.get_num_threads(), *geometry,
        data.data_ptr(), _pointer(y), _pointer(weight), _pointer(bias), eps, *law, *batch, *fixed, *update,
    )  # fmt: skip
    _check(_library()[0].runningbn_forward(packed))


def _backward(
    dy: Tensor, x: Tensor, stages: int, weight: Tensor | None, mean: int, rstd: int, vectors: Sequence[int]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx where it is asked for, and the sums, which are empty where they are not."""
    data, geometry = _laid_out(x)
    dy = _like(dy, data)
    dx = torch.empty_like(data) if stages & _APPLY else None
    dtype = _STATISTICS[x.dtype]
    sum_dy, sum_dy_xhat = torch.empty(geometry[2], dtype=dtype), torch.empty(geometry[2], dtype=dtype)
    weight = None if weight is None else _vector(weight, data)
    packed = _BACKWARD.pack(
        _DTYPES[x.dtype], stages, torch.get_num_threads(), *geometry, dy.data_ptr(), data.data_ptr(), _pointer(dx),
        _pointer(weight), mean, rstd, sum_dy.data_ptr(), sum_dy_xhat.data_ptr(), *vectors, 0,
    )  # fmt: skip
    _check(_library()[0].runningbn_backward(packed))
    return dx, sum_dy, sum_dy_xhat


def _laid_out(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x as dense rows or planes; whether it is rows, and the sizes outside of the channels, of them and inside."""
    outer, channels, *inner = x.shape
    size = math.prod(inner)
    if x.is_contiguous():
        if channels == 1:
            return x, (0, 1, 1, outer * size)
        return x, (0, outer, channels, size) if size > 1 else (1, outer, channels, 1)
    if inner and x.movedim(1, -1).is_contiguous():
        return x, (1, outer * size, channels, 1)
    return _laid_out(x.contiguous())


def _like(dy: Tensor, data: Tensor) -> Tensor:
    """A gradient in the dtype and layout of dense data."""
    if dy.dtype is not data.dtype:
        dy = dy.to(data.dtype)
    if data.is_contiguous():
        return dy.contiguous()
    return dy if dy.stride() == data.stride() else torch.empty_like(data).copy_(dy)


def _vector(vector: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector as the library takes it beside data like these."""
    dtype = _STATISTICS[like.dtype]
    return vector if vector.dtype is dtype and vector.is_contiguous() else vector.to(dtype).contiguous()


def _note_change(buffers: tuple[Tensor, ...]) -> None:
    """Tell autograd that they are written, for whoever has saved one for a backward pass."""
    # Tensors of inference mode have no such count, and there nobody asks.
    if not (torch.is_inference_mode_enabled() and buffers[0].is_inference()):
        torch.autograd.graph.increment_version(buffers)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the vectors over channels of a normalisation")


@functools.cache
def _library() -> tuple[Any, str | None, str]:
    """The library, or why there is none, and the instruction set that it uses."""
    folder = Path(__file__).parent
    built = library_in(folder, EXTENSION_SUFFIXES)
    if built is None:
        return None, why_not_built(folder, EXTENSION_SUFFIXES), ""
    torch_library = Path(torch.__file__).parent / "lib" / _TORCH_LIBRARY.get(sys.platform, "libtorch_cpu.so")
    try:
        parallel_for = ctypes.CDLL(str(torch_library)).torch_parallel_for
    except (OSError, AttributeError):
        return None, f"torch {torch.__version__} has no torch_parallel_for, which came with torch 2.10", ""
    try:
        library = ctypes.CDLL(str(built))
        sizes = [ctypes.c_int64.in_dll(library, f"runningbn_{name}").value for name in _STRUCTS]
    except (OSError, ValueError) as error:
        return None, f"{built.name} cannot be loaded: {error}", ""
    if sizes != list(_STRUCTS.values()):
        return None, f"{built.name} was built from other sources than these: install runningbn again", ""
    library.runningbn_initialize.restype = ctypes.c_char_p
    for function in (library.runningbn_forward, library.runningbn_backward):
        function.argtypes = [ctypes.c_char_p]
    # What torch itself would use, the environment variable ATEN_CPU_CAPABILITY included.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    used = library.runningbn_initialize(parallel_for, {"default": b"baseline"}.get(capability, capability.encode()))
    return library, None, used.decode()
