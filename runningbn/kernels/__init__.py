"""All that touches the N·C·S elements of a batch, in one contract with several backends.

Shapes: N batch, C channels, any trailing dimensions, n = elements per channel; per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64). A backend is a module with

    unavailable()                          -> why it cannot serve on this machine, None if it can
    version()                              -> what it was made with
    serves(x, dtype)                       -> whether it can take this input, with statistics in `dtype`

and with sweeps, which leave the state of the layer to others:

    batch_sums(x, dtype)                              -> Sums, x − p   p, Σ(x − p), Σ(x − p)², n; pivot p near the mean;
                                                                  x − p, or None, is memory for `normalize`
    normalize(x, mean, var, weight, bias, eps, p, x − p) -> y     (x − mean)·rstd·weight + bias
    gradient_sums(dy, x, mean, rstd)                  -> Σdy, Σdy·z    with z = (x − mean)·rstd
    input_gradient(dy, x, mean, rstd, weight, m0, m1) -> dx       weight·rstd·(dy − m0 − z·m1)
    batch_norm_gradients(dy, x, mean, rstd, weight)   -> dx, Σdy, Σdy·z    both at once where m0 = Σdy/n, m1 = Σdy·z/n
    batch_norm(x, weight, bias, eps, dtype)           -> y, mean, var    the first two at once, for n > 1, no gradients

`aten` is the definition of correctness, runs everywhere, and is what compilers trace. The others are fused: they can
also do a whole training step of one process, the update of the state included, while the data are in cache,

    prepared(buffers)                                 -> the buffers of a layer as the next two take them, or None
    training_forward(x, weight, bias, eps, state, momentum, running, absorbs, law) -> y, fixed
    training_backward(dy, x, weight, fixed, gradient, needs_dx)                    -> dx or None, Σdy, Σdy·z

and the update alone, for sums that came from elsewhere,

    absorb(state, noise, batch, weight, samples, whole_batches, running, absorbs, law) -> the vectors of the `update`
    absorb_gradient(state, sum_dy, sum_dy_xhat, rstd, trust, offset, batch_std, n)     -> s·G0, s·G1

A forward whose backward goes by running means has in `state`, behind the buffers of a `State`, those of a `NoiseState`;
in `absorb`, `noise` is None without them. Without `absorbs`, as in a recomputation, the buffers are taken as they are.

`fixed` is (2, C), mean and rstd, where x is normalised by itself; (4, C) where it is by the running statistics, with
an exact backward: mean, rstd, kappa_mean, kappa_var; and (5, C) with one by running means: mean, rstd, trust, offset,
batch_std. See `update` for what these mean.

The first of `BACKENDS` that serves an input takes it, unless `use_backend` or the environment variable
RUNNINGBN_BACKEND names one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..momentum import Momentum, has_code
from ..statistics import Sums
from . import aten, cpu, triton

Backend = Any  # a module with the functions above
BACKENDS: dict[str, Backend] = {"triton": triton, "cpu": cpu, "aten": aten}
TAKES = {
    "triton": "NVIDIA GPUs: float32, bfloat16, float16, float64",
    "cpu": "CPU: float32, bfloat16, float64",
    "aten": "anything",
}

_FUSED = [backend for backend in BACKENDS.values() if hasattr(backend, "training_forward")]
_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let one backend take every input of eager mode, in all threads, until the block is left.

    Args:
        name: ``"triton"`` (NVIDIA GPUs), ``"cpu"`` (C, on the CPU) or ``"aten"`` (plain torch, anywhere).

    Raises:
        ValueError: for a name that is none of these.
        RuntimeError: if the backend cannot serve on this machine; within the block, if it cannot take an input.

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
        if not backend.serves(x, dtype):
            raise RuntimeError(
                f"the backend {_forced!r} is forced and cannot take {type(x).__name__} of {x.dtype} on {x.device}"
            )
        return backend
    for backend in _FUSED:
        if backend.serves(x, dtype):
            return backend
    return aten


def fused(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: tuple[Tensor, ...], momentum: Momentum
) -> tuple[Backend, Any] | None:
    """A backend that can do a whole training step on these, and the buffers as it takes them."""
    if not has_code(momentum) or x.numel() == 0 or len(state[0]) != x.shape[1]:
        return None
    # Backends go by addresses, which say nothing of the device: torch's own operations refuse the mix.
    device = x.device
    if state[0].device != device or any(t is not None and t.device != device for t in (weight, bias)):
        return None
    backend = backend_for(x, state[0].dtype)
    if backend is aten or (buffers := backend.prepared(state)) is None:
        return None
    return backend, buffers


def updating(state: tuple[Tensor, ...]) -> Backend | None:
    """A backend that can update these buffers by sums that came from elsewhere, if any."""
    backend = backend_for(state[0], state[0].dtype)
    return None if backend is aten or backend.prepared(state) is None else backend


def prepared(backend: Backend, dy: Tensor, x: Tensor, fixed: Tensor, gradient: tuple[Tensor, ...] | None) -> Any:
    """What the backend of a forward takes for `gradient`, () for none; None if it cannot do the backward."""
    # The gradient may be another kind of tensor, as may what was saved, and it may be compiled.
    if torch.compiler.is_compiling() or not (backend.serves(dy, fixed.dtype) and backend.serves(x, fixed.dtype)):
        return None
    if gradient is None:
        return ()
    fits = gradient[0].dtype is fixed.dtype and len(gradient[0]) == fixed.shape[1]
    return backend.prepared(gradient) if fits else None


def batch_sums(x: Tensor, dtype: torch.dtype) -> tuple[Sums, Tensor | None]:
    """Sums about a pivot near the mean, and x − p where that is at hand."""
    sums: tuple[Sums, Tensor | None] = backend_for(x, dtype).batch_sums(x, dtype)
    return sums


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    pivot: Tensor | None = None, centred: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x; overwrites `centred` = x − pivot."""
    y: Tensor = backend_for(x, mean.dtype).normalize(x, mean, var, weight, bias, eps, pivot, centred)
    return y


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, mean and biased variance, (C,) in `dtype`, of a batch with n > 1; without gradients."""
    results: tuple[Tensor, Tensor, Tensor] = backend_for(x, dtype).batch_norm(x, weight, bias, eps, dtype)
    return results


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    sums: tuple[Tensor, Tensor] = _backend_for_both(dy, x, mean.dtype).gradient_sums(dy, x, mean, rstd)
    return sums


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    dx: Tensor = _backend_for_both(dy, x, mean.dtype).input_gradient(dy, x, mean, rstd, weight, m0, m1)
    return dx


def batch_norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z) of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    results: tuple[Tensor, Tensor, Tensor] = _backend_for_both(dy, x, mean.dtype).batch_norm_gradients(
        dy, x, mean, rstd, weight
    )
    return results


def _backend_for_both(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Backend:
    backend = backend_for(x, dtype)
    return backend if backend is aten or backend.serves(dy, dtype) else aten


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source}: {name!r} cannot serve here: {reason}")
    return name


if "RUNNINGBN_BACKEND" in os.environ:
    _forced = _checked(os.environ["RUNNINGBN_BACKEND"], "RUNNINGBN_BACKEND")
