"""Loading the C library, and the structs of its calls.

The fields are named here after the tables of the package, in C by the macros of cpu.h. Both sides' names are compared
when the library is loaded, so that one that was built from other sources is never called.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..momentum import RULES
from ..ops.law import Law
from ..ops.spec import Mode
from ..ops.state import FORWARD_BUFFERS, GradientState, Sums
from .building import library_in, why_not_built

_TORCH_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
# In the order of their codes.
DTYPES = ("FLOAT32", "BFLOAT16", "FLOAT16", "FLOAT64")
STAGES = ("SUMS", "UPDATE", "APPLY")  # bits
# Functions that `cpu_operators` registers.
OPERATORS = tuple(f"{direction}_{mode.label}" for direction in ("forward", "backward") for mode in Mode)
_KINDS: dict[str, Any] = {"I": ctypes.c_int64, "P": ctypes.c_size_t, "R": ctypes.c_double}
_GEOMETRY = [("I", name) for name in ("dtype", "stages", "threads", "rows", "outer", "channels", "inner")]


def _pointers(*names: str) -> list[tuple[str, str]]:
    return [("P", name) for name in names]


_FORWARD = [
    *_GEOMETRY, *_pointers("x", "y", "weight", "bias"), ("R", "eps"), *(("R", name) for name in Law._fields),
    *_pointers(*(f"batch_{name}" for name in Sums._fields)),
    *_pointers("mean", "var", "rstd", "kappa_mean", "kappa_var", "trust", "offset", "batch_std"),
    *(("I", name) for name in ("by_state", "updates", "whole_batches", "rule")),
    *(("R", f"rule_{name}") for name in ("first", "second", "third")),
    *_pointers("batch_weight"), ("R", "batch_samples"), *_pointers(*FORWARD_BUFFERS),
]  # fmt: skip
_BACKWARD = [
    *_GEOMETRY, *_pointers("dy", "x", "dx", "weight", "mean", "rstd", "batch_sum_dy", "batch_sum_dy_xhat"),
    *_pointers("m0", "m1", "kappa_mean", "kappa_var", *GradientState._fields),
    *_pointers("trust", "offset", "batch_std", "pooled_count"),
]  # fmt: skip
INTERFACE = " ".join(
    (*DTYPES, *RULES, *STAGES, *OPERATORS, *(f"{kind}:{name}" for kind, name in (*_FORWARD, *_BACKWARD)))
)


class _Call(ctypes.Structure):
    """The arguments of a call. What is not set is 0, NULL for a pointer."""

    def set_first(self, *values: int) -> None:
        """Set the first fields, all at once: faster than one by one."""
        super().__init__(*values)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class Forward(_Call):
    """A call of a forward; see cpu.h for what the fields mean."""

    _fields_ = [(name, _KINDS[kind]) for kind, name in _FORWARD]


class Backward(_Call):
    """A call of a backward; likewise."""

    _fields_ = [(name, _KINDS[kind]) for kind, name in _BACKWARD]


class Library(NamedTuple):
    """The library, or why there is none.

    Attributes:
        forward, backward: do what a call says.
        unavailable: why the library cannot be used here; None if it can.
        instruction_set: what it uses.
        handle: of ctypes.
    """

    forward: Callable[[Forward], None]
    backward: Callable[[Backward], None]
    unavailable: str | None = None
    instruction_set: str = ""
    handle: Any = None


def torch_library() -> ctypes.CDLL:
    """torch's own library, for the functions of its C interface."""
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(folder / _TORCH_LIBRARY.get(sys.platform, "libtorch_cpu.so")))


@functools.cache
def library() -> Library:
    """The library, loaded and told of torch's threads."""
    folder = Path(__file__).parent
    built = library_in(folder, EXTENSION_SUFFIXES)
    if built is None:
        return _without(why_not_built(folder, EXTENSION_SUFFIXES))
    try:
        parallel_for = torch_library().torch_parallel_for
    except (OSError, AttributeError):
        return _without(f"torch {torch.__version__} has no torch_parallel_for, which came with torch 2.10")
    try:
        loaded = ctypes.CDLL(str(built))
        loaded.runningbn_interface.restype = ctypes.c_char_p
        interface = loaded.runningbn_interface().decode().strip()
    except OSError as error:
        return _without(f"{built.name} cannot be loaded: {error}")
    except AttributeError:
        interface = None
    if interface != INTERFACE:
        return _without(f"{built.name} was built from other sources than these: install runningbn again")
    loaded.runningbn_initialize.restype = ctypes.c_char_p
    # What torch itself would use, the environment variable ATEN_CPU_CAPABILITY included.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    used = loaded.runningbn_initialize(parallel_for, {"default": b"baseline"}.get(capability, capability.encode()))
    functions = loaded.runningbn_forward, loaded.runningbn_backward
    for function, cls in zip(functions, (Forward, Backward)):
        function.argtypes, function.restype = [ctypes.POINTER(cls)], _check
    return Library(*functions, instruction_set=used.decode(), handle=loaded)


def _without(reason: str) -> Library:
    def refuse(call: Any) -> None:
        raise RuntimeError(reason)

    return Library(refuse, refuse, reason)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the vectors over channels of a normalisation")
