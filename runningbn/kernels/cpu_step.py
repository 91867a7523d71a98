"""Training steps and recalibration on the CPU where nothing is out of the ordinary, by one call in each direction.

`cpu` prepares the calls of the C library in Python, which for a small input takes longer than the step. An extension,
csrc/step.c, does the same in C: it looks at the layer and its tensors, and makes the call that `cpu` would make, with
the same result bit for bit; or it declines, and has changed nothing. It is optional: it takes the headers of Python to
be built, the C library, and a torch with the C functions of DLPack.
"""

from __future__ import annotations

import functools
import importlib
from ctypes import c_void_p, cast
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..momentum import rule_of
from ..ops.compat import increment_versions
from ..ops.spec import StepSpec
from . import cpu
from .contract import StepKind
from .cpu_calls import describe_update
from .cpu_library import INTERFACE, Forward, library

_EXTENSION = f"{__package__}._step"
# A capsule of DLPack 1.3, in torch from 2.10 on.
_EXCHANGE = "__dlpack_c_exchange_api__"


class _Extension(NamedTuple):
    """The functions of the extension, or why there are none; see csrc/step.c."""

    forward: Any
    backward: Any
    batch_norm: Any
    unavailable: str | None = None


@functools.cache
def extension() -> _Extension:
    """The extension, loaded and told of the C library and of torch."""
    library_is_missing = library().unavailable
    if library_is_missing is not None:
        return _without(library_is_missing)
    exchange = getattr(Tensor, _EXCHANGE, None)
    if exchange is None:
        return _without(f"torch {torch.__version__} has no C functions of DLPack")
    try:
        step = importlib.import_module(_EXTENSION)
    except ImportError as error:
        return _without(f"not built, which takes the headers of Python ({error})")
    if step.interface.strip() != INTERFACE or not hasattr(step, "batch_norm"):
        return _without("built from other sources than these: install runningbn again")
    handle = library().handle
    functions = [cast(f, c_void_p).value for f in (handle.runningbn_forward, handle.runningbn_backward)]
    of_torch = Tensor, Parameter, torch.empty_like, increment_versions, torch.get_num_threads
    if not step.initialize(exchange, *functions, *of_torch, functools.partial(_plan_of, step.plan)):
        return _without("torch has another version of DLPack than is known here")
    return _Extension(step.forward, step.backward, step.batch_norm)


def unavailable() -> str | None:
    """Why steps take their way through Python; None if they do not."""
    return extension().unavailable


def _plan_of(plan: Any, layer: Any) -> StepKind | None:
    """What the steps of a layer have in common, as the extension takes it; None for a rule that C does not know."""
    spec: StepSpec = layer._spec()
    rule = rule_of(spec.momentum)
    code = rule.code()
    if code is None:
        return None
    call = Forward(eps=spec.eps)
    describe_update(call, spec.mode, rule.whole_batches, code, spec.law)
    mode = spec.mode
    planned = plan(bytes(call), mode.coefficients, mode.forward_buffers, mode.backward_buffers)
    return StepKind(planned, cpu, mode)


def _without(reason: str) -> _Extension:
    def decline(*arguments: Any) -> None:
        return None

    return _Extension(decline, decline, decline, reason)
