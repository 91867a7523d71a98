"""What the package uses of torch's private interface: each name with its reason, and with what it falls back to.

No other module uses a private name of torch (`tests/test_architecture.py`), except for the base classes in
``torch.nn.modules``, such as ``_BatchNorm``, which other libraries and torch's own documentation name as well. The
private attributes of tensors and modules, such as ``_version`` and ``_buffers``, stand where they are used.

Names are bound when this is imported. So a call of one is a call of torch's own function, which compilers know. A
release of torch that lacks one without a fallback fails here, with an ImportError that names it: statistics that are
wrong without a word would be worse.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# What runs above a call, of which there is no public sign, and the version counters of several tensors by one call, for
# which older releases have no public function; no fallback.
from torch._C import DisableTorchFunction as torch_functions_disabled
from torch._C import DisableTorchFunctionSubclass as class_functions_disabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _current_graph_task_id as current_backward
from torch._C import _disabled_torch_function_impl as disabled_torch_function
from torch._C import _has_storage as has_storage
from torch._C import _increment_version as increment_versions
from torch._C import _is_torch_function_enabled as torch_function_enabled
from torch._C import _is_tracing as is_jit_tracing
from torch._C import _len_torch_dispatch_stack as number_of_dispatch_modes
from torch._C import _len_torch_function_stack as number_of_function_modes
from torch._C import _pop_torch_function_stack as pop_function_mode

# A layer inside ``torch.func.grad`` sees wrapped tensors, whose moments are taken outside of the transform. torch.func
# has no public way to look into its wrappers or to step out, nor torch.autograd one to tell that a gradient stands for
# several; no fallback.
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_transforms
from torch.autograd import forward_ad

# Documented, and used by many libraries, but only at these places; no fallback.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

# C++ functions of torch by their names in its libraries: whether a backward pass is running, as `current_backward`, and
# what raises a RuntimeError. torch's stable C interface has neither. Fallback: operators in Python.
C_CURRENT_BACKWARD = "_ZN5torch8autograd25get_current_graph_task_idEv"
C_RAISE = "_ZN3c106detail14torchCheckFailEPKcS2_jS2_"

__all__ = [
    "C_CURRENT_BACKWARD",
    "C_RAISE",
    "TorchDispatchMode",
    "are_transformed",
    "class_functions_disabled",
    "compiler_is_loaded",
    "constant_in_compiled_code",
    "current_backward",
    "current_raw_stream",
    "disabled_torch_function",
    "get_unwrapped",
    "has_storage",
    "increment_versions",
    "is_batchedtensor",
    "is_captured",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "is_observed",
    "number_of_dispatch_modes",
    "number_of_function_modes",
    "outside_transforms",
    "peek_interpreter_stack",
    "pop_function_mode",
    "process_group_of_name",
    "torch_function_enabled",
    "torch_functions_disabled",
    "transforms_active",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]


Function = TypeVar("Function", bound=Callable[[], Any])

# Whether the compiler cannot trace the question for transforms.
_TRANSFORMS_ARE_OPAQUE = torch.__version__ < "2.5"  # as versions, not as text


def are_transformed(*inputs: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` is at work, or one of these is a dual number of forward-mode derivatives.

    The level of forward-mode differentiation is private. It spares three calls of `unpack_dual` in every step outside
    of that mode, and is a number that changes, so it is read here. No fallback.
    """
    if not (_TRANSFORMS_ARE_OPAQUE and torch.compiler.is_compiling()) and transforms_active():
        return True
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def is_observed() -> bool:
    """Whether a compiler, a transform, forward-mode differentiation or a mode sees what torch does here."""
    return bool(
        torch.compiler.is_compiling()
        or transforms_active()
        or forward_ad._current_level >= 0
        or number_of_dispatch_modes()
        or number_of_function_modes()
        or torch.is_inference_mode_enabled()
        or is_jit_tracing()
    )


def constant_in_compiled_code(function: Function) -> Function:
    """A function without arguments that compilers call, rather than trace, and take the result of for a constant.

    As ``torch.compiler.assume_constant_result``, which imports the compiler. No fallback.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_compiled_code
def _is_exporting() -> bool:
    # Called, not traced: Dynamo of torch 2.11 takes `is_exporting` for True wherever it compiles. Fallback, for torch
    # before 2.7: exports in training mode are not recognised.
    return getattr(torch.compiler, "is_exporting", bool)()


def is_captured() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records what runs here, which leaves out the backward."""
    return _is_exporting() if torch.compiler.is_compiling() else is_jit_tracing()


def process_group_of_name(name: str) -> Any:
    """The process group of this name: operators take names, and the registry of torch's own collectives is private.

    Not bound above, since torch may be built without ``torch.distributed``. No fallback.
    """
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def compiler_is_loaded() -> bool:
    """Whether anything can be compiled: asked by the name of dynamo's module, since importing it takes seconds."""
    return "torch._dynamo" in sys.modules


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# The address of the current stream of a device. Fallback: the public way, which makes an object in each launch. It is
# what a torch without CUDA has.
current_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
