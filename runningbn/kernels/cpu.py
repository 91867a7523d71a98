"""The sweeps and whole training steps in C, on torch's own threads: float32, bfloat16 and float64 on the CPU.

The library is built with the package where there is a C compiler, see cpu.c, and loaded at its first use. It knows
nothing of torch: it is given pointers, sizes, and the address of torch's `parallel_for`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..momentum import Horizon, Momentum, SquareRoot, batch_weight, weighs_whole_batches
from ..statistics import GradientState, State, Sums
from .layout import dense, empty_like, is_rows

# The structs of cpu.h, whose fields are 8 bytes each: q and Q are integers and pointers, d doubles.
_FORWARD = Struct("@7q4Qd11Q4q3dQd13Q")
_BACKWARD = Struct("@7q18Q")
_STRUCTS = {"version": 1, "forward_size": _FORWARD.size, "backward_size": _BACKWARD.size}
_SUMS, _ABSORB, _APPLY = 1, 2, 4
_CONSTANT, _CUMULATIVE, _HORIZON, _SQUARE_ROOT, _GIVEN = range(5)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_STATISTICS = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
_TORCH_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
_NO_UPDATE: tuple[float, ...] = (0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0.0, *[0] * len(State._fields))


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
        and _library()[1] is None
    )


def batch_sums(x: Tensor, dtype: torch.dtype) -> tuple[Sums, None]:
    """Sums per channel about the mean as it is in `dtype`; they are taken in float64, and rounded once."""
    batch = [torch.empty(x.shape[1], dtype=dtype) for _ in Sums._fields]
    _forward(x, None, _SUMS, batch=_pointers(batch))
    return Sums(*batch), None


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    pivot: Tensor | None = None, centred: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x."""
    y = empty_like(x)
    mean, var = _vector(mean, x), _vector(var, x)
    _forward(x, y, _APPLY, weight, bias, eps, fixed=(*_pointers((mean, var)), 0, 0, 0, 0, 0))
    return y


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, mean and biased variance, (C,) in `dtype`, of a batch; without gradients."""
    y, mean, var = empty_like(x), *(torch.empty(x.shape[1], dtype=dtype) for _ in range(2))
    _forward(x, y, _SUMS | _APPLY, weight, bias, eps, fixed=(*_pointers((mean, var)), 0, 0, 0, 0, 0))
    return y, mean, var


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    _, sum_dy, sum_dy_xhat = _backward(dy, x, _SUMS, None, mean, rstd)
    return sum_dy, sum_dy_xhat


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    m0, m1 = _vector(m0, x), _vector(m1, x)
    dx, _, _ = _backward(dy, x, _APPLY, weight, mean, rstd, means=_pointers((m0, m1)))
    assert dx is not None
    return dx


def batch_norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z) of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    dx, sum_dy, sum_dy_xhat = _backward(dy, x, _SUMS | _APPLY, weight, mean, rstd)
    assert dx is not None
    return dx, sum_dy, sum_dy_xhat


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, state: State, momentum: Momentum,
    running: bool, absorbs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and `fixed`. Without `absorbs`, as in a recomputation, the state is taken as it is."""
    y, fixed = empty_like(x), torch.empty((6 if running else 2, x.shape[1]), dtype=_STATISTICS[x.dtype])
    mean, rstd, *others = _rows(fixed)
    stages = _APPLY | (_SUMS if absorbs or not running else 0) | (_ABSORB if absorbs or running else 0)
    weights, rule = None, _rule(momentum)
    if rule is None:
        weights, rule = batch_weight(momentum, len(x), state.samples, state.steps), (_GIVEN, 0.0, 0.0, 0.0)
    update = (
        running, absorbs, weighs_whole_batches(momentum), *rule, 0 if weights is None else weights.data_ptr(),
        len(x), *_pointers(state),
    )  # fmt: skip
    _forward(x, y, stages, weight, bias, eps, fixed=(mean, 0, rstd, *(others or (0, 0, 0, 0))), update=update)
    return y, fixed


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, fixed: Tensor, gradient: GradientState | None, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z): with the running means of these sums where `gradient` is given, which absorbs them first."""
    kappas = gains = (0, 0)
    rows = _rows(fixed)
    stages = _SUMS | (_APPLY if needs_dx else 0)
    running: tuple[int, ...] = (0, 0, 0)
    if gradient is not None:
        stages, gains, running = stages | _ABSORB, (rows[4], rows[5]), _pointers(gradient)
    elif len(rows) > 2:
        kappas = rows[2], rows[3]
    return _backward(dy, x, stages, weight, fixed[0], fixed[1], kappas=kappas, gains=gains, running=running)


def absorb(
    state: State, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool, running: bool
) -> tuple[Tensor, ...]:
    """Absorb sums that came from elsewhere; the vectors of `update.Coefficients`, the first two where not running."""
    mean = state.running_mean
    batch, weight = Sums(*(_vector(part.expand_as(mean), mean) for part in batch)), _vector(weight, mean)
    out = [torch.empty_like(mean) for _ in range(6 if running else 2)]
    first, second, *others = _pointers(out)
    packed = _FORWARD.pack(
        _DTYPES[mean.dtype], _ABSORB, 1, 1, 1, len(mean), 1, 0, 0, 0, 0, 0.0, *_pointers(batch),
        first, second, 0, *(others or (0, 0, 0, 0)),
        running, True, whole_batches, _GIVEN, 0.0, 0.0, 0.0, weight.data_ptr(), float(samples), *_pointers(state),
    )  # fmt: skip
    _check(_library()[0].runningbn_forward(packed))
    return tuple(out)


def absorb_gradient(
    state: GradientState, sum_dy: Tensor, sum_dy_xhat: Tensor, keep: Tensor, gain: Tensor, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Absorb sums that came from elsewhere; G0 and G1, see `update.absorb_gradient`."""
    like = state.sum_dy
    vectors = [_vector(t, like) for t in (sum_dy, sum_dy_xhat, keep, gain)]
    count = _vector(torch.as_tensor(n).expand_as(like), like)
    out = torch.empty_like(like), torch.empty_like(like)
    packed = _BACKWARD.pack(
        _DTYPES[like.dtype], _ABSORB, 1, 1, 1, len(like), 1, 0, 0, 0, 0, 0, 0, *_pointers(vectors[:2]),
        *_pointers(out), 0, 0, *_pointers(state), *_pointers(vectors[2:]), count.data_ptr(),
    )  # fmt: skip
    _check(_library()[0].runningbn_backward(packed))
    return out


def _forward(
    x: Tensor, y: Tensor | None, stages: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 0.0, *, batch: Sequence[int] = (0, 0, 0, 0), fixed: Sequence[int] = (0, 0, 0, 0, 0, 0, 0),
    update: Sequence[float] = _NO_UPDATE,
) -> None:  # fmt: skip
    x = x.detach()
    data = dense(x)
    weight, bias = _optional(weight, x), _optional(bias, x)
    packed = _FORWARD.pack(
        _DTYPES[x.dtype], stages, torch.get_num_threads(), *_geometry(x),
        data.data_ptr(), _pointer(y), _pointer(weight), _pointer(bias), eps, *batch, *fixed, *update,
    )  # fmt: skip
    _check(_library()[0].runningbn_forward(packed))


def _backward(
    dy: Tensor, x: Tensor, stages: int, weight: Tensor | None, mean: Tensor, rstd: Tensor, *,
    means: Sequence[int] = (0, 0), kappas: Sequence[int] = (0, 0), running: Sequence[int] = (0, 0, 0),
    gains: Sequence[int] = (0, 0),
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """dx where it is asked for, and the sums, which are empty where they are not."""
    dx = empty_like(x) if stages & _APPLY else None
    mean, rstd, weight = _vector(mean, x), _vector(rstd, x), _optional(weight, x)
    sums = torch.empty_like(mean), torch.empty_like(mean)
    data, gradient = dense(x), dense(dy.to(x.dtype), like=x)
    packed = _BACKWARD.pack(
        _DTYPES[x.dtype], stages, torch.get_num_threads(), *_geometry(x),
        gradient.data_ptr(), data.data_ptr(), _pointer(dx), _pointer(weight), mean.data_ptr(), rstd.data_ptr(),
        *_pointers(sums), *means, *kappas, *running, *gains, 0,
    )  # fmt: skip
    _check(_library()[0].runningbn_backward(packed))
    return dx, *sums


def _geometry(x: Tensor) -> tuple[int, int, int, int]:
    """Whether x is rows, and the sizes outside of the channels, of the channels and inside."""
    channels = x.shape[1]
    if is_rows(x):
        return 1, x.numel() // channels, channels, 1
    return 0, len(x), channels, x.numel() // (len(x) * channels)


def _vector(vector: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector as the library takes it beside data like these."""
    return vector.to(_STATISTICS[like.dtype]).contiguous()


def _optional(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return None if vector is None else _vector(vector, like)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


def _rows(matrix: Tensor) -> range:
    """Where the rows of a contiguous matrix begin."""
    rows, columns = matrix.shape
    first, size = matrix.data_ptr(), columns * matrix.element_size()
    return range(first, first + rows * size, size)


def _rule(momentum: Momentum) -> tuple[int, float, float, float] | None:
    """A momentum for the library; None for a rule that somebody has derived."""
    if momentum is None:
        return _CUMULATIVE, 0.0, 0.0, 0.0
    if type(momentum) is Horizon:
        return _HORIZON, momentum.samples, momentum.start, momentum.fraction
    if type(momentum) is SquareRoot:
        return _SQUARE_ROOT, momentum.momentum, 0.0, 0.0
    return None if isinstance(momentum, (Horizon, SquareRoot)) else (_CONSTANT, momentum, 0.0, 0.0)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the vectors over channels of a normalisation")


@functools.cache
def _library() -> tuple[Any, str | None, str]:
    """The library, or why there is none, and the instruction set that it uses."""
    folder = Path(__file__).parent
    built = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()), None)
    if built is None:
        return None, "the C library was not built when runningbn was installed: that takes a C compiler", ""
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
