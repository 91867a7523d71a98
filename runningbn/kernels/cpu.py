"""The kernels in C, on torch's own threads: float32, bfloat16, float16 and float64 on the CPU.

The library is built with the package where there is a C compiler, see csrc/cpu.c, and loaded at its first use, by
`cpu_library`. It knows nothing of torch: a call is given pointers and sizes, in a struct whose fields it has by name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.law import Law
from ..ops.spec import Coefficients, Mode, StepSpec
from ..ops.state import FORWARD_BUFFERS, Batch, GradientState, LayerState, Sums
from .contract import Centred, Gradients, GradientSums, Reduction
from .cpu_calls import (
    APPLY,
    BATCH,
    CODES,
    GIVEN_WEIGHT,
    SUMS,
    UPDATE,
    Data,
    LayerCall,
    addresses_of_rows,
    data_of,
    describe_update,
    like_data,
    pointer_of,
    pointers_of,
    set_data,
    set_fields,
    vector_for,
    vector_or_none,
)  # fmt: skip
from .cpu_library import Backward, Forward, library
from .layout import STATISTICS, addresses, is_memory

# `var` takes the place of `rstd` in what an update returns.
_VECTORS = {mode: tuple("var" if name == "rstd" else name for name in mode.coefficients) for mode in Mode}


# By the address of the first buffer.
_layers: dict[int, LayerCall] = {}
_MOST_LAYERS = 4096


class Prepared(NamedTuple):
    """The buffers of a layer, and where they lie."""

    buffers: tuple[Tensor, ...]
    pointers: tuple[int, ...]


def unavailable() -> str | None:
    """Why the library cannot be used here; None if it can."""
    return library().unavailable


def version() -> str:
    """The instruction set that it uses."""
    return library().instruction_set


def supports(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x, with statistics in `dtype`, is memory that the library can work on."""
    return x.is_cpu and STATISTICS.get(x.dtype) is dtype and library().unavailable is None and is_memory(x)


def prepare(buffers: tuple[Tensor, ...]) -> Prepared | None:
    """The buffers of a layer as a training step takes them; None if they are no memory that the library can update."""
    pointers = addresses(buffers)
    return None if pointers is None else Prepared(buffers, pointers)


def _call_of_layer(pointers: tuple[int, ...]) -> LayerCall:
    layer = _layers.get(pointers[0])
    if layer is None or layer.pointers != pointers:
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        layer = _layers[pointers[0]] = LayerCall(pointers)
    return layer


def batch_sums(x: Tensor, dtype: torch.dtype) -> Reduction:
    """Sums per channel about the mean as it is in `dtype`; they are taken in float64, and rounded once."""
    batch = [x.new_empty(x.shape[1], dtype=dtype) for _ in BATCH]
    call, data = Forward(), data_of(x)
    set_data(call, data, SUMS, data.x.data_ptr())
    set_fields(call, BATCH, pointers_of(batch))
    library().forward(call)
    return Reduction(Sums(*batch))


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    centred: Centred | None = None,
) -> Tensor:  # fmt: skip
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x."""
    data = data_of(x)
    y, mean, var = torch.empty_like(data.x), vector_for(mean, x), vector_for(var, x)
    weight, bias = vector_or_none(weight, x), vector_or_none(bias, x)
    call = _mapping(data, APPLY, y, weight, bias, eps)
    call.mean, call.var = mean.data_ptr(), var.data_ptr()
    library().forward(call)
    return y


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, mean and biased variance, (C,) in `dtype`, of a batch; without gradients."""
    data = data_of(x)
    y, mean, var = torch.empty_like(data.x), *(x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    weight, bias = vector_or_none(weight, x), vector_or_none(bias, x)
    call = _mapping(data, SUMS | APPLY, y, weight, bias, eps)
    call.mean, call.var = mean.data_ptr(), var.data_ptr()
    library().forward(call)
    return y, mean, var


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> GradientSums:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    gradients = _gradients(dy, x, SUMS, None, _Vectors(mean, rstd))
    return GradientSums(gradients.sum_dy, gradients.sum_dy_xhat)


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    dx = _gradients(dy, x, APPLY, weight, _Vectors(mean, rstd, m0, m1)).dx
    assert dx is not None
    return dx


def batch_norm_gradients(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Gradients:
    """dx, Σdy and Σdy·z of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    return _gradients(dy, x, SUMS | APPLY, weight, _Vectors(mean, rstd))


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, prepared: Prepared, spec: StepSpec, updates: bool
) -> tuple[Tensor, Tensor]:
    """y, and the coefficients as the rows of one tensor. Without `updates`, the state is taken as it is."""
    data, mode = data_of(x), spec.mode
    y = torch.empty_like(data.x)
    rows = x.new_empty((len(mode.coefficients), data.channels), dtype=STATISTICS[x.dtype])
    stages = APPLY
    if updates or mode is not Mode.EXACT:
        stages |= SUMS
    if updates or mode.by_state:
        stages |= UPDATE
    weight, bias = vector_or_none(weight, x), vector_or_none(bias, x)
    call = _call_of_layer(prepared.pointers).forward(spec)
    set_data(call, data, stages, data.x.data_ptr(), y.data_ptr(), pointer_of(weight), pointer_of(bias))
    set_fields(call, mode.coefficients, addresses_of_rows(rows))
    call.updates, call.batch_samples = updates, len(x)
    if updates:
        _note_change(prepared.buffers)
    library().forward(call)
    return y, rows


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor, mode: Mode, prepared: Prepared | None, needs_dx: bool
) -> Gradients:
    """The gradients: by running means of the two sums where these are given, which are updated first."""
    rows = rows.contiguous()  # saved-tensor hooks may return other strides
    data, weight = data_of(x), vector_or_none(weight, x)
    stages = SUMS | APPLY if needs_dx else SUMS
    if prepared is not None:
        _note_change(prepared.buffers)
        stages |= UPDATE
    mean, rstd, *others = addresses_of_rows(rows)
    prepared_call = _backward_call(dy, data, stages, weight, mean, rstd, rows.dtype)
    set_fields(prepared_call.call, mode.coefficients[2:], others)
    if prepared is not None:
        set_fields(prepared_call.call, GradientState._fields, prepared.pointers)
    library().backward(prepared_call.call)
    return prepared_call.gradients


def update(mode: Mode, state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    """Let sums that came from elsewhere enter the state; the vectors that `update.update` makes coefficients of."""
    like = state.statistics.running_mean
    sums = [vector_for(part.expand_as(like), like) for part in batch.sums]
    weight = vector_for(batch.weight, like)
    out = tuple([torch.empty_like(like) for _ in _VECTORS[mode]])
    call = Forward(dtype=CODES[like.dtype], stages=UPDATE, threads=1, rows=1, outer=1, channels=len(like), inner=1)
    set_fields(call, BATCH, pointers_of(sums))
    set_fields(call, _VECTORS[mode], pointers_of(out))
    describe_update(call, mode, batch.whole, GIVEN_WEIGHT, law)
    call.updates, call.batch_weight, call.batch_samples = updates, weight.data_ptr(), float(batch.samples)
    buffers = state.forward_buffers
    set_fields(call, FORWARD_BUFFERS, pointers_of(buffers))
    if updates:
        _note_change(buffers)
    library().forward(call)
    return out


def update_gradient(
    state: GradientState, sums: GradientSums, coefficients: Coefficients, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Let sums that came from elsewhere enter the state; s·G0 and s·G1, see `update.update_gradient`."""
    like = state.sum_dy
    names = ("rstd", "trust", "offset", "batch_std")
    count = torch.as_tensor(n, device=like.device)
    sum_dy, sum_dy_xhat, count = (vector_for(t.expand_as(like), like) for t in (*sums, count))
    vectors = [vector_for(getattr(coefficients, name), like) for name in names]
    m0, m1 = torch.empty_like(like), torch.empty_like(like)
    call = Backward(
        dtype=CODES[like.dtype], stages=UPDATE, threads=1, rows=1, outer=1, channels=len(like), inner=1,
        batch_sum_dy=sum_dy.data_ptr(), batch_sum_dy_xhat=sum_dy_xhat.data_ptr(), pooled_count=count.data_ptr(),
        m0=m0.data_ptr(), m1=m1.data_ptr(),
    )  # fmt: skip
    set_fields(call, names, pointers_of(vectors))
    set_fields(call, GradientState._fields, pointers_of(state))
    _note_change(state)
    library().backward(call)
    return m0, m1


def _mapping(data: Data, stages: int, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Forward:
    """A call with an output. The caller keeps the vectors."""
    call = Forward()
    set_data(call, data, stages, data.x.data_ptr(), y.data_ptr(), pointer_of(weight), pointer_of(bias))
    call.eps = eps
    return call


class _Vectors(NamedTuple):
    mean: Tensor
    rstd: Tensor
    m0: Tensor | None = None
    m1: Tensor | None = None


class _BackwardCall(NamedTuple):
    """A call, what it writes, and the gradient that it reads, which has to live until it is done."""

    call: Backward
    gradients: Gradients
    dy: Tensor


def _backward_call(
    dy: Tensor, data: Data, stages: int, weight: Tensor | None, mean: int, rstd: int, dtype: torch.dtype
) -> _BackwardCall:
    """`mean` and `rstd` are addresses. dx is made where it is asked for; the sums stay empty where they are not."""
    dy, dx = like_data(dy, data.x), torch.empty_like(data.x) if stages & APPLY else None
    sum_dy, sum_dy_xhat = (dy.new_empty(data.channels, dtype=dtype) for _ in range(2))
    call = Backward()
    inputs = dy.data_ptr(), data.x.data_ptr(), pointer_of(dx), pointer_of(weight), mean, rstd
    set_data(call, data, stages, *inputs, sum_dy.data_ptr(), sum_dy_xhat.data_ptr())
    return _BackwardCall(call, Gradients(dx, sum_dy, sum_dy_xhat), dy)


def _gradients(dy: Tensor, x: Tensor, stages: int, weight: Tensor | None, vectors: _Vectors) -> Gradients:
    data, weight = data_of(x), vector_or_none(weight, x)
    vectors = _Vectors(*(vector_or_none(vector, x) for vector in vectors))  # type: ignore[arg-type]
    mean, rstd, m0, m1 = (pointer_of(vector) for vector in vectors)
    prepared_call = _backward_call(dy, data, stages, weight, mean, rstd, STATISTICS[x.dtype])
    prepared_call.call.m0, prepared_call.call.m1 = m0, m1
    library().backward(prepared_call.call)
    return prepared_call.gradients


def _note_change(buffers: tuple[Tensor, ...]) -> None:
    """Tell autograd that the buffers are written, in case one was saved for a backward pass."""
    # Tensors of inference mode have no version counter.
    if not (torch.is_inference_mode_enabled() and buffers[0].is_inference()):
        torch.autograd.graph.increment_version(buffers)
