"""The updates of the state that compiled code calls, in C; see csrc/operators.c.

An operator in Python takes 28 µs of a compiled step forward and 20 backward, of which the arithmetic is 2. The C
functions are registered with torch as the kernels for the CPU of the same operators. They take contiguous vectors only,
and have no way to go on in Python: whoever traces a call has to look at the tensors, see `ops.update`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..ops.compat import C_CURRENT_BACKWARD, C_RAISE
from .cpu_library import OPERATORS, library, torch_library

_FUNCTIONS = (
    "aoti_torch_get_data_ptr", "aoti_torch_get_dtype", "aoti_torch_get_numel", "aoti_torch_is_contiguous",
    "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object", C_CURRENT_BACKWARD, C_RAISE,
)  # fmt: skip
_DTYPES = (torch.float32, torch.float64)
# The C library takes this much, and older compilers do not trace `supports` in a backward.
_TORCH_MAY_CALL_C = torch.__version__ >= "2.10"  # as versions, not as text


class _Torch(ctypes.Structure):
    """The functions of torch as operators.c takes them."""

    _fields_ = [(f"function{i}", ctypes.c_void_p) for i in range(len(_FUNCTIONS))]


@functools.cache
def register() -> bool:
    """Register the C functions of the operators ``runningbn::update_...``; whether they were.

    They are not where there is no C library, or a torch without one of the functions that it takes.
    """
    if library().unavailable is not None:
        return False
    try:
        in_torch = torch_library()
        functions = _Torch(*(ctypes.cast(getattr(in_torch, name), ctypes.c_void_p) for name in _FUNCTIONS))
        init, add = in_torch.aoti_torch_library_init_impl, in_torch.aoti_torch_library_impl
    except (OSError, AttributeError):
        return False
    ours = library().handle
    ours.runningbn_initialize_operators(ctypes.byref(functions))
    registry = ctypes.c_void_p()
    if init(b"runningbn", b"CPU", Path(__file__).name.encode(), 1, ctypes.byref(registry)):
        return False
    failed = [add(registry, name.encode(), getattr(ours, f"runningbn_{name}")) for name in OPERATORS]
    return not any(failed)


def supports(tensors: Sequence[Tensor]) -> bool:
    """Whether these can be the arguments: vectors over channels like the first, but for counters."""
    if not _TORCH_MAY_CALL_C:
        return True
    first = tensors[0]
    if first.dtype not in _DTYPES:
        return False
    # A loop: torch 2.14 does not trace a generator here.
    for t in tensors:
        is_vector = t.dtype is first.dtype and t.shape == first.shape and t.is_contiguous()
        if not is_vector and (t.dim() or t.dtype is not torch.int64):
            return False
    return True
