"""The kernels in C, on torch's own threads: float32, bfloat16 and float64 on the CPU.

The library is built with the package where there is a C compiler, see cpu.c, and loaded at its first use, by
`cpu_library`. It knows nothing of torch: a call is given pointers and sizes, in a struct whose fields it has by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..law import Law
from ..momentum import GIVEN, RuleCode, rule_of
from ..spec import Coefficients, Mode, StepSpec
from ..statistics import Batch, GradientState, LayerState, NoiseState, State, Sums
from .contract import Centred, Gradients, GradientSums, Reduction
from .cpu_library import DTYPES, Backward, Forward, library
from .layout import addresses

_SUMS, _UPDATE, _APPLY = 1, 2, 4
_CODES = {getattr(torch, name.lower()): code for code, name in enumerate(DTYPES)}
_STATISTICS = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
# `var` takes the place of `rstd` in what an update returns.
_VECTORS = {mode: tuple("var" if name == "rstd" else name for name in mode.coefficients) for mode in Mode}
_BATCH = tuple(f"batch_{name}" for name in Sums._fields)
_FORWARD_BUFFERS = (*State._fields, *NoiseState._fields)


class _Layer:
    """A call with all that stays from step to step in a layer.

    Attributes:
        pointers: where its buffers lie.
        call: the call.
        spec: the step that it describes.
    """

    __slots__ = ("call", "pointers", "spec")

    def __init__(self, pointers: tuple[int, ...]) -> None:
        self.pointers, self.spec, self.call = pointers, None, Forward()
        _set(self.call, _FORWARD_BUFFERS, pointers)

    spec: StepSpec | None

    def forward(self, spec: StepSpec) -> Forward:
        """A call that does this step; to be completed."""
        call = Forward.from_buffer_copy(self.call)
        if self.spec != spec:
            rule = rule_of(spec.momentum)
            _describe_update(call, spec.mode, rule.whole_batches, rule.code() or _GIVEN, spec.law)
            call.eps = spec.eps
            self.call, self.spec = Forward.from_buffer_copy(call), spec
        return call


# By the address of the first buffer.
_layers: dict[int, _Layer] = {}
_MOST_LAYERS = 4096


class Prepared(NamedTuple):
    """The buffers of a layer, and the call that goes with them."""

    buffers: tuple[Tensor, ...]
    layer: _Layer


class _Data(NamedTuple):
    """An input as dense rows or planes: which of them, and the sizes outside of the channels, of them and inside."""

    x: Tensor
    rows: bool
    outer: int
    channels: int
    inner: int


def unavailable() -> str | None:
    """Why the library cannot be used here; None if it can."""
    return library().unavailable


def version() -> str:
    """The instruction set that it uses."""
    return library().instruction_set


def supports(x: Tensor, dtype: torch.dtype) -> bool:
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
        and library().unavailable is None
    )


def prepare(buffers: tuple[Tensor, ...]) -> Prepared | None:
    """The buffers of a layer as a training step takes them; None if they are no memory that the library can update."""
    pointers = addresses(buffers)
    if pointers is None:
        return None
    layer = _layers.get(pointers[0])
    if layer is None or layer.pointers != pointers:
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        layer = _layers[pointers[0]] = _Layer(pointers)
    return Prepared(buffers, layer)


def batch_sums(x: Tensor, dtype: torch.dtype) -> Reduction:
    """Sums per channel about the mean as it is in `dtype`; they are taken in float64, and rounded once."""
    batch = [torch.empty(x.shape[1], dtype=dtype) for _ in _BATCH]
    call, data = Forward(), _laid_out(x)
    _set_data(call, data, _SUMS, data.x.data_ptr())
    _set(call, _BATCH, _pointers(batch))
    library().forward(call)
    return Reduction(Sums(*batch))


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    centred: Centred | None = None,
) -> Tensor:  # fmt: skip
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x."""
    data = _laid_out(x)
    y, mean, var = torch.empty_like(data.x), _vector(mean, x), _vector(var, x)
    weight, bias = _vector_or_none(weight, x), _vector_or_none(bias, x)
    call = _mapping(data, _APPLY, y, weight, bias, eps)
    call.mean, call.var = mean.data_ptr(), var.data_ptr()
    library().forward(call)
    return y


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, mean and biased variance, (C,) in `dtype`, of a batch; without gradients."""
    data = _laid_out(x)
    y, mean, var = torch.empty_like(data.x), *(torch.empty(x.shape[1], dtype=dtype) for _ in range(2))
    weight, bias = _vector_or_none(weight, x), _vector_or_none(bias, x)
    call = _mapping(data, _SUMS | _APPLY, y, weight, bias, eps)
    call.mean, call.var = mean.data_ptr(), var.data_ptr()
    library().forward(call)
    return y, mean, var


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> GradientSums:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    gradients = _gradients(dy, x, _SUMS, None, _Vectors(mean, rstd))
    return GradientSums(gradients.sum_dy, gradients.sum_dy_xhat)


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    dx = _gradients(dy, x, _APPLY, weight, _Vectors(mean, rstd, m0, m1)).dx
    assert dx is not None
    return dx


def batch_norm_gradients(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Gradients:
    """dx, Σdy and Σdy·z of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    return _gradients(dy, x, _SUMS | _APPLY, weight, _Vectors(mean, rstd))


def training_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, prepared: Prepared, spec: StepSpec, updates: bool
) -> tuple[Tensor, Tensor]:
    """y, and the coefficients as the rows of one tensor. Without `updates`, the state is taken as it is."""
    data, mode = _laid_out(x), spec.mode
    y = torch.empty_like(data.x)
    rows = torch.empty((len(mode.coefficients), data.channels), dtype=_STATISTICS[x.dtype])
    stages = _APPLY
    if updates or mode is not Mode.EXACT:
        stages |= _SUMS
    if updates or mode.by_state:
        stages |= _UPDATE
    weight, bias = _vector_or_none(weight, x), _vector_or_none(bias, x)
    call = prepared.layer.forward(spec)
    _set_data(call, data, stages, data.x.data_ptr(), y.data_ptr(), _pointer(weight), _pointer(bias))
    _set_rows(call, mode.coefficients, rows)
    call.updates, call.batch_samples = updates, len(x)
    if updates:
        _note_change(prepared.buffers)
    library().forward(call)
    return y, rows


def training_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor, mode: Mode, prepared: Prepared | None, needs_dx: bool
) -> Gradients:
    """The gradients: by running means of the two sums where these are given, which are updated first."""
    data = _laid_out(x)
    result = _Result.of(dy, data, _SUMS | _APPLY if needs_dx else _SUMS, rows.dtype)
    weight = _vector_or_none(weight, x)
    call = result.call(data, weight)
    _set_rows(call, mode.coefficients, rows)
    if prepared is not None:
        _note_change(prepared.buffers)
        call.stages |= _UPDATE
        _set(call, GradientState._fields, prepared.layer.pointers)
    library().backward(call)
    return result.gradients


def update(mode: Mode, state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    """Let sums that came from elsewhere enter the state; the vectors that `update.update` makes coefficients of."""
    like = state.statistics.running_mean
    sums = [_vector(part.expand_as(like), like) for part in batch.sums]
    weight = _vector(batch.weight, like)
    out = tuple([torch.empty_like(like) for _ in _VECTORS[mode]])
    call = Forward(dtype=_CODES[like.dtype], stages=_UPDATE, threads=1, rows=1, outer=1, channels=len(like), inner=1)
    _set(call, _BATCH, _pointers(sums))
    _set(call, _VECTORS[mode], _pointers(out))
    _describe_update(call, mode, batch.whole, _GIVEN, law)
    call.updates, call.batch_weight, call.batch_samples = updates, weight.data_ptr(), float(batch.samples)
    buffers = state.forward_buffers
    _set(call, _FORWARD_BUFFERS, _pointers(buffers))
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
    sum_dy, sum_dy_xhat, count = (_vector(torch.as_tensor(t).expand_as(like), like) for t in (*sums, n))
    vectors = [_vector(getattr(coefficients, name), like) for name in names]
    m0, m1 = torch.empty_like(like), torch.empty_like(like)
    call = Backward(
        dtype=_CODES[like.dtype], stages=_UPDATE, threads=1, rows=1, outer=1, channels=len(like), inner=1,
        batch_sum_dy=sum_dy.data_ptr(), batch_sum_dy_xhat=sum_dy_xhat.data_ptr(), pooled_count=count.data_ptr(),
        m0=m0.data_ptr(), m1=m1.data_ptr(),
    )  # fmt: skip
    _set(call, names, _pointers(vectors))
    _set(call, GradientState._fields, _pointers(state))
    _note_change(state)
    library().backward(call)
    return m0, m1


_GIVEN = RuleCode(GIVEN)


def _describe_update(call: Forward, mode: Mode, whole: bool, code: RuleCode, law: Law) -> None:
    call.by_state, call.whole_batches = mode.by_state, whole
    call.rule, call.rule_first, call.rule_second, call.rule_third = code
    _set(call, Law._fields, law)


def _set_data(call: Forward | Backward, data: _Data, stages: int, *pointers: int) -> None:
    """Set the fields up to `inner`, and those of the pointers that come next."""
    x, rows, outer, channels, inner = data
    call.set_first(_CODES[x.dtype], stages, torch.get_num_threads(), rows, outer, channels, inner, *pointers)


def _mapping(data: _Data, stages: int, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Forward:
    """A call with an output. The caller keeps the vectors."""
    call = Forward()
    _set_data(call, data, stages, data.x.data_ptr(), y.data_ptr(), _pointer(weight), _pointer(bias))
    call.eps = eps
    return call


class _Vectors(NamedTuple):
    mean: Tensor
    rstd: Tensor
    m0: Tensor | None = None
    m1: Tensor | None = None


class _Result(NamedTuple):
    """What a backward call writes: dx where it is asked for, and the sums, which stay empty where they are not."""

    dy: Tensor
    stages: int
    gradients: Gradients

    @classmethod
    def of(cls, dy: Tensor, data: _Data, stages: int, dtype: torch.dtype) -> _Result:
        dx = torch.empty_like(data.x) if stages & _APPLY else None
        sums = torch.empty(data.channels, dtype=dtype), torch.empty(data.channels, dtype=dtype)
        return cls(_like(dy, data.x), stages, Gradients(dx, *sums))

    def call(self, data: _Data, weight: Tensor | None) -> Backward:
        call, (dx, sum_dy, sum_dy_xhat) = Backward(), self.gradients
        pointers = self.dy.data_ptr(), data.x.data_ptr(), _pointer(dx), _pointer(weight)
        _set_data(call, data, self.stages, *pointers)
        call.batch_sum_dy, call.batch_sum_dy_xhat = sum_dy.data_ptr(), sum_dy_xhat.data_ptr()
        return call


def _gradients(dy: Tensor, x: Tensor, stages: int, weight: Tensor | None, vectors: _Vectors) -> Gradients:
    data = _laid_out(x)
    vectors = _Vectors(*(_vector_or_none(vector, x) for vector in vectors))  # type: ignore[arg-type]
    weight = _vector_or_none(weight, x)
    result = _Result.of(dy, data, stages, _STATISTICS[x.dtype])
    call = result.call(data, weight)
    _set(call, _Vectors._fields, [_pointer(vector) for vector in vectors])
    library().backward(call)
    return result.gradients


def _laid_out(x: Tensor) -> _Data:
    outer, channels, *inner = x.shape
    size = math.prod(inner)
    if x.is_contiguous():
        if channels == 1:
            return _Data(x, False, 1, 1, outer * size)
        return _Data(x, False, outer, channels, size) if size > 1 else _Data(x, True, outer, channels, 1)
    if inner and x.movedim(1, -1).is_contiguous():
        return _Data(x, True, outer * size, channels, 1)
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


def _vector_or_none(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return None if vector is None else _vector(vector, like)


def _note_change(buffers: tuple[Tensor, ...]) -> None:
    """Tell autograd that they are written, for whoever has saved one for a backward pass."""
    # Tensors of inference mode have no such count, and there nobody asks.
    if not (torch.is_inference_mode_enabled() and buffers[0].is_inference()):
        torch.autograd.graph.increment_version(buffers)


def _set(call: Forward | Backward, names: Iterable[str], values: Iterable[float]) -> None:
    """Set the fields of these names; the values may be fewer."""
    for name, value in zip(names, values):
        setattr(call, name, value)


def _set_rows(call: Forward | Backward, names: tuple[str, ...], rows: Tensor) -> None:
    """Set the fields of these names to the rows of a contiguous tensor."""
    pointer, size = rows.data_ptr(), rows.shape[1] * rows.element_size()
    for name in names:
        setattr(call, name, pointer)
        pointer += size


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])
