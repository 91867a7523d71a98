"""Ctrl-C at any line of a recalibration: the model, grad mode and torch functions are as before."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recalibration_models import MODELS, assert_same, each_procedure, everything, picture_batches
from torch import nn

import runningbn
from runningbn import update_bn_stats
from runningbn.ops.compat import torch_function_enabled

PACKAGE = Path(runningbn.__file__).parent
# Where the model is changed and put back. What puts back at last, `model_state.py`, defers signals, which this does not
# send.
NAMES = ("recalibrate.py", "passes.py", "procedures.py", "joined_pass.py", "hooks.py", "observer.py")
FILES = {str(PACKAGE / "recalibration" / name) for name in NAMES}


@pytest.fixture(autouse=True)
def _compiles_again() -> Iterator[None]:
    """At the end of a with statement, an exception may come before its exit, and torch's stance then stays."""
    yield
    if hasattr(torch.compiler, "set_stance"):
        torch.compiler.set_stance("default")


def interrupted(model: nn.Module, at: int, normalize: str) -> int:
    """Run until so many lines have been executed; how many there were."""
    lines = 0

    def in_frame(frame, event, argument):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return in_frame

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: in_frame if frame.f_code.co_filename in FILES else None)
    try:
        update_bn_stats(model, picture_batches(2), normalize=normalize)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("build", ["mixed flags", "running", "own arithmetic"])
@each_procedure
def test_interrupt_at_any_line_changes_nothing(build, normalize):
    lines = interrupted(MODELS[build](), 0, normalize)
    assert lines > 500
    for at in random.Random(1).sample(range(1, lines + 1), 25):
        model = MODELS[build]()
        before = everything(model)
        assert interrupted(model, at, normalize) == at
        assert torch.is_grad_enabled()
        assert torch_function_enabled()
        assert_same(everything(model), before)
