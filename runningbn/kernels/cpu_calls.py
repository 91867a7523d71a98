"""The arguments of calls of the C library: how data and vectors are handed over, and what a layer's calls share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..momentum import GIVEN, RuleCode, rule_of
from ..ops.law import Law
from ..ops.spec import Mode, StepSpec
from ..ops.state import FORWARD_BUFFERS, Sums
from .cpu_library import DTYPES, STAGES, Backward, Forward
from .layout import STATISTICS, laid_out_like

SUMS, UPDATE, APPLY = (1 << i for i in range(len(STAGES)))
CODES = {getattr(torch, name.lower()): code for code, name in enumerate(DTYPES)}
BATCH = tuple(f"batch_{name}" for name in Sums._fields)


class Data(NamedTuple):
    """An input as dense rows or planes: which of them, and the sizes outside of the channels, of them and inside."""

    x: Tensor
    rows: bool
    outer: int
    channels: int
    inner: int


class _Described(NamedTuple):
    """A call, and the step that it does."""

    spec: StepSpec | None
    call: Forward


class LayerCall:
    """A call with all that stays from step to step in a layer, whose buffers lie at `pointers`."""

    __slots__ = ("_described", "pointers")

    def __init__(self, pointers: tuple[int, ...]) -> None:
        call = Forward()
        set_fields(call, FORWARD_BUFFERS, pointers)
        self.pointers, self._described = pointers, _Described(None, call)

    def forward(self, spec: StepSpec) -> Forward:
        """A call that does this step; to be completed."""
        # Read once and replaced as a whole: other threads may be here, too.
        described = self._described
        call = Forward.from_buffer_copy(described.call)
        if described.spec != spec:
            rule = rule_of(spec.momentum)
            code = rule.code()
            assert code is not None, "`kernels.fused` has asked"
            describe_update(call, spec.mode, rule.whole_batches, code, spec.law)
            call.eps = spec.eps
            self._described = _Described(spec, Forward.from_buffer_copy(call))
        return call


def set_data(call: Forward | Backward, data: Data, stages: int, *pointers: int) -> None:
    """Set the fields up to `inner`, and those of the pointers that come next."""
    x, rows, outer, channels, inner = data
    call.set_first(CODES[x.dtype], stages, torch.get_num_threads(), rows, outer, channels, inner, *pointers)


# A weight per channel, which the caller has computed.
GIVEN_WEIGHT = RuleCode(GIVEN)


def describe_update(call: Forward, mode: Mode, whole: bool, code: RuleCode, law: Law) -> None:
    """Set what an update does."""
    call.by_state, call.whole_batches = mode.by_state, whole
    call.rule, call.rule_first, call.rule_second, call.rule_third = code
    set_fields(call, Law._fields, law)


def data_of(x: Tensor) -> Data:
    """x, or a copy of it, as dense rows or planes."""
    outer, channels, *inner = x.shape
    size = math.prod(inner)
    if x.is_contiguous():
        if channels == 1:
            return Data(x, False, 1, 1, outer * size)
        return Data(x, False, outer, channels, size) if size > 1 else Data(x, True, outer, channels, 1)
    if inner and x.movedim(1, -1).is_contiguous():
        return Data(x, True, outer * size, channels, 1)
    return data_of(x.contiguous())


def like_data(dy: Tensor, data: Tensor) -> Tensor:
    """A gradient in the dtype and layout of dense data."""
    return laid_out_like(dy if dy.dtype is data.dtype else dy.to(data.dtype), data)


def vector_for(vector: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector as the library takes it beside data like these."""
    dtype = STATISTICS[like.dtype]
    return vector if vector.dtype is dtype and vector.is_contiguous() else vector.to(dtype).contiguous()


def vector_or_none(vector: Tensor | None, like: Tensor) -> Tensor | None:
    """`vector_for`, or None."""
    return None if vector is None else vector_for(vector, like)


def set_fields(call: Forward | Backward, names: Iterable[str], values: Iterable[float]) -> None:
    """Set the fields of these names; the values may be fewer."""
    for name, value in zip(names, values):
        setattr(call, name, value)


def addresses_of_rows(rows: Tensor) -> range:
    """The addresses of the rows of a contiguous tensor."""
    first, size = rows.data_ptr(), rows.shape[1] * rows.element_size()
    return range(first, first + len(rows) * size, size)


def pointer_of(tensor: Tensor | None) -> int:
    """The address of the data; NULL for None."""
    return 0 if tensor is None else tensor.data_ptr()


def pointers_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The addresses of the data."""
    return tuple([tensor.data_ptr() for tensor in tensors])
