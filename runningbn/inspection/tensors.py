"""Tensors of a checkpoint, created on demand from their description in a pickle.

`Tensors` knows the names of the functions with which torch and numpy pickle arrays. None of them is called: the arrays
are created here from their arguments, after these were checked.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import Budget, UnreadableError
from .spans import Span, span_of
from .unpickling import DAMAGED, Global, Reference, Stub

DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
    }.items()
}  # fmt: skip
_WIDTHS = {
    **{name: dtype.itemsize for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": 1, "torch.UntypedStorage": 1,
    "torch.QInt8Storage": 1, "torch.QUInt8Storage": 1, "torch.QInt32Storage": 4,
}  # fmt: skip
_NUMPY = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "i4": torch.int32,
    "i2": torch.int16, "i1": torch.int8, "u1": torch.uint8, "b1": torch.bool, "c16": torch.complex128,
    "c8": torch.complex64,
}  # fmt: skip
# The dtypes that are read: those that ``Tensor.double`` supports, except types of fewer than 8 bits.
_READ = {*_STORAGES.values(), *(value for name, value in DTYPES.items() if "float8" in name or "uint" in name)} - {
    value for name, value in DTYPES.items() if name in {f"torch.uint{bits}" for bits in range(1, 8)}
}
_OTHER_ORDER = {"little": ">", "big": "<"}[sys.byteorder]
# Largest nesting of wrappers around a tensor, such as a parameter of a subclass of a parameter.
_MAX_WRAPPERS = 8


class SavedTensor(ABC):
    """A tensor in a file."""

    @abstractmethod
    def read(self, budget: Budget) -> Tensor:
        """The tensor, on the CPU; on the meta device if it holds no plain numbers.

        Raises:
            UnreadableError: if the file does not contain what it declares.
        """


@dataclass(frozen=True, eq=False)
class StridedTensor(SavedTensor):
    """Elements of a storage, as for ``torch.as_strided``; ``swapped`` if the byte order is not that of this machine."""

    storage: Span
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    swapped: bool = False

    def read(self, budget: Budget) -> Tensor:
        """See `SavedTensor`."""
        if self.dtype not in _READ:
            return NO_NUMBERS.read(budget)
        number, size = math.prod(self.shape), self.dtype.itemsize
        budget.spend(number * (8 + size))  # it becomes float64
        if number == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        # A view of few elements may span a large part of its storage.
        budget.spend(2 * extent * size)
        raw = torch.frombuffer(bytearray(self.storage.read(self.offset * size, extent * size)), dtype=torch.uint8)
        if self.swapped:
            width = size // 2 if self.dtype.is_complex else size
            raw = raw.view(-1, width).flip(1).reshape(-1)
        strided = raw.view(self.dtype).as_strided(self.shape, self.stride)
        return strided.clone(memory_format=torch.contiguous_format)


class _NoNumbers(SavedTensor):
    """A tensor that holds no plain numbers: sparse, quantised, on the meta device, or of a custom class."""

    def read(self, budget: Budget) -> Tensor:
        """See `SavedTensor`."""
        return torch.empty(1, device="meta")


NO_NUMBERS = _NoNumbers()


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None  # None if only the tensor declares it
    span: Span


class Tensors:
    """Converts the stubs of one pickle to tensors.

    Args:
        storages: the spans of the storages, by the keys of their persistent ids.
        swapped: whether their byte order is not that of this machine.
        nested: reads a storage that a pickle contains as bytes.
    """

    def __init__(
        self, storages: Mapping[str, Span], swapped: bool, nested: Callable[[bytes], tuple[Any, Tensors]]
    ) -> None:
        self._storages, self._swapped, self._nested = storages, swapped, nested

    def tensor(self, value: Any) -> SavedTensor | None:
        """The tensor that a value stands for; None if it is none.

        Raises:
            UnreadableError: if it is a tensor with invalid arguments.
        """
        try:
            return self._tensor(value)
        except (ValueError, IndexError) as error:  # fewer arguments than the function takes
            raise UnreadableError(DAMAGED) from error

    def _tensor(self, value: Any) -> SavedTensor | None:
        for _ in range(_MAX_WRAPPERS):
            if not isinstance(value, Stub):
                return None
            if value.name in _WRAPPERS:
                value = value.arguments[0]
            elif value.name in _WITH_CLASS:
                function, _, arguments = value.arguments[:3]
                if not (isinstance(function, Global) and isinstance(arguments, tuple)):
                    raise UnreadableError(DAMAGED)
                value = Stub(function.name, arguments)
            else:
                break
        else:
            raise UnreadableError(DAMAGED)
        if value.name in _TORCH:
            return self._of_torch(value.arguments)
        if value.name in _NUMPY_NAMES:
            return _of_numpy(value)
        return NO_NUMBERS if value.name.startswith(_TORCH_OTHERS) else None

    def _of_torch(self, arguments: tuple[Any, ...]) -> SavedTensor:
        source, offset, shape, stride = arguments[:4]
        storage = self._storage(source)
        named = [part.name for part in arguments[4:] if isinstance(part, Global)]  # of _rebuild_tensor_v3
        dtype = DTYPES.get(named[0]) if named else storage.dtype
        if dtype is None:
            return NO_NUMBERS
        shape, stride = sizes(shape), sizes(stride)
        (offset,) = sizes((offset,))
        if len(shape) != len(stride):
            raise UnreadableError(DAMAGED)
        return StridedTensor(storage.span, dtype, shape, stride, offset, self._swapped)

    def _storage(self, value: Any) -> _Storage:
        if isinstance(value, Stub) and value.name == "torch.storage._load_from_bytes":
            # A pickle of tensors that is not by torch.save contains a file of torch.save for every storage.
            (contents,) = value.arguments
            inner, tensors = self._nested(_bytes(contents))
            return tensors._storage(inner)
        if not isinstance(value, Reference) or not isinstance(value.id, tuple):
            raise UnreadableError(DAMAGED)
        identifier = value.id
        if len(identifier) < 5 or identifier[0] != "storage":
            raise UnreadableError(DAMAGED)
        dtype, key = storage_dtype(identifier), identifier[2]
        if not isinstance(key, str) or key not in self._storages:
            raise UnreadableError("has a tensor without a storage: the file is damaged")
        span = self._storages[key]
        view = identifier[5] if len(identifier) > 5 else None
        if view is not None and dtype is not None:  # in files before torch 0.4
            start, number = sizes(view[1:] if isinstance(view, tuple) and len(view) == 3 else None)
            span = span.part(start * dtype.itemsize, number * dtype.itemsize)
        return _Storage(dtype, span)


def storage_dtype(identifier: tuple[Any, ...]) -> torch.dtype | None:
    """The dtype of a storage, by its persistent id; None for an unknown kind."""
    kind = identifier[1]
    return _STORAGES.get(kind.name) if isinstance(kind, Global) else None


def storage_width(identifier: tuple[Any, ...]) -> int | None:
    """The size in bytes of an element of a storage, by its persistent id; None for an unknown kind."""
    kind = identifier[1]
    return _WIDTHS.get(kind.name) if isinstance(kind, Global) else None


_TORCH = frozenset(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_TORCH_OTHERS = ("torch._utils._rebuild_", "torch._tensor._rebuild_", "torch.nn.parameter.Uninitialized")
# Functions whose first argument is the tensor.
_WRAPPERS = frozenset(
    (
        *(f"torch._utils._rebuild_{kind}" for kind in ("parameter", "parameter_with_state")),
        *(f"torch._utils._rebuild_device_tensor_from_{source}" for source in ("numpy", "cpu_tensor")),
        "torch._utils._rebuild_xla_tensor",
        "torch.nn.parameter.Parameter",
        "torch.jit._pickle.restore_type_tag",
    )
)
# Functions whose arguments are a function, a class, and the arguments of that function.
_WITH_CLASS = frozenset(("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"))
_NUMPY_ARRAYS = frozenset(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"))
_NUMPY_SCALARS = frozenset(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"))
_NUMPY_BUFFERS = frozenset(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"))
_NUMPY_NAMES = _NUMPY_ARRAYS | _NUMPY_SCALARS | _NUMPY_BUFFERS
_NAMES = _TORCH | _WRAPPERS | _WITH_CLASS | _NUMPY_NAMES


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, by its name alone, so that tensors of optimizers are not examined.

    Values tagged by ``torch.jit`` may be other objects; these contain nothing that is searched for either.
    """
    named = isinstance(value, Stub) and (value.name in _NAMES or value.name.startswith(_TORCH_OTHERS))
    return named or isinstance(value, SavedTensor)


def sizes(values: Any) -> tuple[int, ...]:
    """A ``torch.Size``, strides or offsets in a pickle, as a tuple.

    Raises:
        UnreadableError: if they are invalid.
    """
    if isinstance(values, Stub) and values.name == "torch.Size" and len(values.arguments) == 1:
        values = values.arguments[0]
    if not isinstance(values, (list, tuple)) or len(values) > 64:
        raise UnreadableError(DAMAGED)
    if not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise UnreadableError(DAMAGED)
    return tuple(values)


def _bytes(value: Any) -> bytes:
    """Bytes in a pickle; protocols before 3 have no opcode for bytes and encode them as strings."""
    if isinstance(value, Stub) and value.name == "_codecs.encode" and value.arguments:
        value = value.arguments[0]
    if isinstance(value, str):
        try:
            value = value.encode("latin-1")
        except UnicodeEncodeError:
            raise UnreadableError(DAMAGED) from None
    if not isinstance(value, (bytes, bytearray)):
        raise UnreadableError(DAMAGED)
    return bytes(value)


def _of_numpy(value: Stub) -> SavedTensor | None:
    """An array or a scalar of numpy; None if it has objects or another unsupported dtype."""
    shape: Any = ()
    rows_first: bool = True
    if value.name in _NUMPY_SCALARS:
        dtype, contents = value.arguments[:2]
    elif value.name in _NUMPY_BUFFERS:
        contents, dtype, shape, *order = value.arguments[:4]
        rows_first = order != ["F"]
    else:
        _, shape, dtype, columns_first, contents = value.state if isinstance(value.state, tuple) else ()
        rows_first = not columns_first
    known = _numpy_dtype(dtype)
    if known is None or isinstance(contents, list):
        return None
    shape, stride = sizes(shape), [1]
    for n in shape[:0:-1] if rows_first else shape[:-1]:
        stride.append(stride[-1] * max(n, 1))
    stride = (stride[::-1] if rows_first else stride)[: len(shape)]
    return StridedTensor(span_of(_bytes(contents)), known[0], shape, tuple(stride), 0, known[1])


def _numpy_dtype(value: Any) -> tuple[torch.dtype, bool] | None:
    """The dtype, and whether its byte order is not that of this machine; None if torch has no such dtype."""
    if not isinstance(value, Stub) or value.name != "numpy.dtype" or not value.arguments:
        return None
    name = value.arguments[0]
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "|"
    dtype = _NUMPY.get(name) if isinstance(name, str) else None
    return None if dtype is None else (dtype, order == _OTHER_ORDER)
