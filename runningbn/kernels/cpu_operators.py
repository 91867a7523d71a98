"""A training step in two operators in C, for compiled code on the CPU; see csrc/operators.c.

`forward` lets a batch enter the state. The output is left to the compiler, which can join it with what comes next, and
compute it again in the backward instead of keeping a mask for a ReLU. `backward` is the whole of a backward. Elsewhere,
and where `supports` says no, compilers trace all of a step, see `ops.step`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..momentum import RuleCode
from ..ops.compat import C_CURRENT_BACKWARD, C_RAISE, constant_in_compiled_code
from ..ops.law import Law
from ..ops.spec import Mode
from .cpu_library import OPERATORS, library, torch_library
from .layout import PLAIN, STATISTICS, empty_like, is_dense

_FUNCTIONS = (
    "aoti_torch_get_data_ptr", "aoti_torch_get_dtype", "aoti_torch_get_dim", "aoti_torch_get_sizes",
    "aoti_torch_get_strides", "aoti_torch_empty_strided", "aoti_torch_copy_", "aoti_torch_delete_tensor_object",
    "torch_get_num_threads", C_CURRENT_BACKWARD, C_RAISE,
)  # fmt: skip


class _Torch(ctypes.Structure):
    """The functions of torch as operators.c takes them."""

    _fields_ = [(f"function{i}", ctypes.c_void_p) for i in range(len(_FUNCTIONS))]


@constant_in_compiled_code
def are_registered() -> bool:
    """Whether the operators ``runningbn::forward_...`` and ``backward_...`` have their functions in C; registers them.

    They have none where there is no C library, or a torch without one of the functions that it takes.
    """
    return _register()


@functools.cache
def _register() -> bool:
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


def supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: tuple[Tensor, ...]) -> bool:
    """Whether the operators take these: dense data, and contiguous vectors beside it. Asked while a step is traced."""
    if not x.is_cpu or not are_registered() or x.dtype not in STATISTICS or type(x) not in PLAIN or not is_dense(x):
        return False
    # A loop: torch 2.14 does not trace a generator here.
    for t in (weight, bias, *buffers):
        if t is None:
            continue
        is_vector = t.dtype is STATISTICS[x.dtype] and t.shape == x.shape[1:2] and t.is_contiguous()
        is_counter = t.dim() == 0 and t.dtype is torch.int64
        if type(t) not in PLAIN or not t.is_cpu or not (is_vector or is_counter):
            return False
    return True


def forward(mode: Mode, x: Tensor, buffers: tuple[Tensor, ...], constants: tuple[float, ...]) -> Tensor:
    """Let a batch enter the state; the coefficients as the rows of one tensor, as `FusedBackend.training_forward`.

    Args:
        mode, x: see there.
        buffers: see `LayerState.forward_buffers`.
        constants: see `constants_of`.
    """
    rows: Tensor = getattr(torch.ops.runningbn, f"forward_{mode.label}")(x, *buffers, *constants)
    return rows


def backward(
    mode: Mode, dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor, buffers: tuple[Tensor, ...], needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`FusedBackend.training_backward`: dx, which is empty if not needed, Σdy and Σdy·z; `dy` has the dtype of x."""
    operator = getattr(torch.ops.runningbn, f"backward_{mode.label}")
    # A schema for C has no tensor that may be None.
    weight = x.new_empty(0) if weight is None else weight
    dx, sum_dy, sum_dy_xhat = operator(dy, x, weight, rows, *buffers, needs_dx)
    return dx, sum_dy, sum_dy_xhat


def constants_of(eps: float, law: Law, code: RuleCode, whole_batches: bool) -> tuple[float, ...]:
    """What a forward takes beside tensors, in the order of its arguments."""
    return (eps, *law, *code, whole_batches)


def _traced_forward(rows: int) -> Callable[..., Tensor]:
    def traced(x: Tensor, *others: object) -> Tensor:
        return x.new_empty((rows, x.shape[1]), dtype=STATISTICS[x.dtype])

    return traced


def _traced_backward(dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, *others: object) -> tuple[Tensor, ...]:
    *_, needs_dx = others
    sums = rows.new_empty(rows.shape[1]), rows.new_empty(rows.shape[1])
    return empty_like(x) if needs_dx else x.new_empty(0), *sums


def written(names: tuple[str, ...]) -> str:
    """Buffers of these names as the arguments of an operator that writes them."""
    return ", ".join(f"Tensor(buffer{i}!) {name}" for i, name in enumerate(names))


_CONSTANTS = constants_of(0.0, Law(), RuleCode(0), True)
_CONSTANT_NAMES = ("eps", *Law._fields, *(f"rule_{name}" for name in RuleCode._fields), "whole_batches")
_SCHEMA_TYPES: dict[type, str] = {float: "float", int: "int", bool: "bool"}
_LIBRARY = torch.library.Library("runningbn", "FRAGMENT")


def _define(name: str, arguments: str, results: str, traced: Callable[..., object]) -> None:
    # Whatever layout convolutions have chosen: converting it takes as long as the step.
    tags = (torch.Tag.flexible_layout,) if hasattr(torch.Tag, "flexible_layout") else ()
    _LIBRARY.define(f"{name}({arguments}) -> {results}", tags=tags)
    torch.library.register_fake(f"runningbn::{name}", traced)


_CONSTANT_ARGUMENTS = ", ".join(
    f"{_SCHEMA_TYPES[type(value)]} {name}" for name, value in zip(_CONSTANT_NAMES, _CONSTANTS)
)
for _mode in Mode:
    _arguments = f"Tensor x, {written(_mode.forward_buffers)}, {_CONSTANT_ARGUMENTS}"
    _define(f"forward_{_mode.label}", _arguments, "Tensor", _traced_forward(len(_mode.coefficients)))
    _buffers = f"{written(_mode.backward_buffers)}, " if _mode.backward_buffers else ""
    _arguments = f"Tensor dy, Tensor x, Tensor weight, Tensor rows, {_buffers}bool needs_dx"
    _define(f"backward_{_mode.label}", _arguments, "(Tensor, Tensor, Tensor)", _traced_backward)
