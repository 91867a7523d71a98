"""All that touches the N·C·S elements of a batch, in one contract with several backends; see `contract`.

`aten` defines what is correct, runs everywhere, and is what compilers trace. The others are fused: they can also do a
whole training step of one process, the update of the state included, while the data are in cache.

The first of `BACKENDS` that supports an input takes it, unless `use_backend` or the environment variable
RUNNINGBN_BACKEND names one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..momentum import Momentum, rule_of
from ..ops.compat import is_observed
from ..ops.state import GradientState, LayerState
from . import aten, cpu, cpu_step, triton
from .contract import Backend, Centred, FusedBackend, Gradients, GradientSums, Reduction
from .layout import is_addressable

FUSED: dict[str, FusedBackend] = {"triton": triton, "cpu": cpu}
BACKENDS: dict[str, Backend] = {**FUSED, "aten": aten}
TAKES = {
    "triton": "NVIDIA GPUs: float32, bfloat16, float16, float64",
    "cpu": "CPU: float32, bfloat16, float16, float64",
    "aten": "anything",
}

_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for all inputs in eager mode, in all threads, inside the ``with`` block.

    The environment variable RUNNINGBN_BACKEND, set to a name, does the same for a whole process.

    Args:
        name: ``"triton"`` (NVIDIA GPUs), ``"cpu"`` (C, on the CPU) or ``"aten"`` (plain torch, anywhere).

    Raises:
        ValueError: for another name.
        RuntimeError: if the backend cannot be used on this machine; inside the block, if it does not support an input.

    Example:
        >>> import torch
        >>> from runningbn import RunningBatchNorm
        >>> from runningbn.kernels import use_backend
        >>> with use_backend("aten"):
        ...     RunningBatchNorm(16)(torch.randn(2, 16)).shape
        torch.Size([2, 16])
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """What `use_backend` or RUNNINGBN_BACKEND names now."""
    return _forced


def backend_for(x: Tensor, dtype: torch.dtype) -> Backend:
    """What takes the input x, with statistics in `dtype`.

    Raises:
        RuntimeError: if a backend is forced that cannot take it.
    """
    if torch.compiler.is_compiling():
        return aten
    if _forced is not None:
        backend = BACKENDS[_forced]
        if not backend.supports(x, dtype):
            raise RuntimeError(
                f"the backend {_forced!r} is forced and cannot take {type(x).__name__} of {x.dtype} on {x.device}"
            )
        return backend
    for fused_backend in FUSED.values():
        if fused_backend.supports(x, dtype):
            return fused_backend
    return aten


def is_ordinary() -> bool:
    """Whether nobody traces, transforms or watches what torch does, and no other backend than `cpu` is forced."""
    return not is_observed() and _forced in (None, "cpu")


class Fused(NamedTuple):
    """A backend that can do a whole training step, and the buffers of the layer as it takes them."""

    backend: FusedBackend
    prepared: Any


def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: LayerState, momentum: Momentum) -> Fused | None:
    """A backend that can do a whole training step on these, if any."""
    first = state.statistics.shift
    if torch.compiler.is_compiling():
        return None
    if rule_of(momentum).code() is None or x.numel() == 0 or len(first) != x.shape[1]:
        return None
    if first.device != x.device or not (is_addressable(weight, x) and is_addressable(bias, x)):
        return None
    return _prepared(backend_for(x, first.dtype), state.forward_buffers)


def updating(buffers: tuple[Tensor, ...]) -> FusedBackend | None:
    """A backend that can update these buffers by sums that came from elsewhere, if any."""
    found = _prepared(backend_for(buffers[0], buffers[0].dtype), buffers)
    return None if found is None else found.backend


def fused_backward(
    backend: FusedBackend, dy: Tensor, x: Tensor, rows: Tensor, gradient: GradientState | None
) -> tuple[bool, Any]:
    """Whether the backend of a forward can do its backward, and `gradient` as it takes it."""
    # The gradient may be another kind of tensor, as may what was saved, and it may be compiled.
    if torch.compiler.is_compiling() or not (backend.supports(dy, rows.dtype) and backend.supports(x, rows.dtype)):
        return False, None
    if gradient is None:
        return True, None
    fits = gradient.sum_dy.dtype is rows.dtype and len(gradient.sum_dy) == rows.shape[1]
    prepared = backend.prepare(gradient) if fits else None
    return prepared is not None, prepared


def _prepared(backend: Backend, buffers: tuple[Tensor, ...]) -> Fused | None:
    if backend is aten:
        return None
    fused_backend = cast("FusedBackend", backend)
    prepared = fused_backend.prepare(buffers)
    return None if prepared is None else Fused(fused_backend, prepared)


def batch_sums(x: Tensor, dtype: torch.dtype) -> Reduction:
    """See `Backend.batch_sums`."""
    return backend_for(x, dtype).batch_sums(x, dtype)


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    centred: Centred | None = None,
) -> Tensor:  # fmt: skip
    """See `Backend.normalize`."""
    return _backend_beside(x, mean.dtype, weight, bias).normalize(x, mean, var, weight, bias, eps, centred)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.batch_norm`."""
    if x.is_cpu and is_ordinary():
        found: tuple[Tensor, Tensor, Tensor] | None = cpu_step.extension().batch_norm(x, weight, bias, eps)
        if found is not None:
            return found
    return _backend_beside(x, dtype, weight, bias).batch_norm(x, weight, bias, eps, dtype)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> GradientSums:
    """See `Backend.gradient_sums`."""
    return _backend_for_both(dy, x, mean.dtype).gradient_sums(dy, x, mean, rstd)


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """See `Backend.input_gradient`."""
    return _backend_for_both(dy, x, mean.dtype, weight).input_gradient(dy, x, mean, rstd, weight, m0, m1)


def batch_norm_gradients(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Gradients:
    """See `Backend.batch_norm_gradients`."""
    return _backend_for_both(dy, x, mean.dtype, weight).batch_norm_gradients(dy, x, mean, rstd, weight)


def _backend_beside(x: Tensor, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> Backend:
    backend = backend_for(x, dtype)
    takes_all = backend is aten or (is_addressable(weight, x) and is_addressable(bias, x))
    return backend if takes_all else aten


def _backend_for_both(dy: Tensor, x: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> Backend:
    backend = backend_for(x, dtype)
    takes_all = backend is aten or (backend.supports(dy, dtype) and is_addressable(weight, x))
    return backend if takes_all else aten


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source}: {name!r} cannot be used here: {reason}")
    return name


if "RUNNINGBN_BACKEND" in os.environ:
    _forced = _checked(os.environ["RUNNINGBN_BACKEND"], "RUNNINGBN_BACKEND")
