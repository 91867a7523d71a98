"""``python -m runningbn diagnose``: import the model and the loader by their Python paths, diagnose and print."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import textwrap
import traceback
from typing import Any

from torch import nn

from ..inspection.commands import FINE, WRONG
from ..recalibration.text import positive_integer
from .diagnose import diagnose
from .result import Diagnosis
from .rules import ERROR, RULES

TROUBLE = 2  # an exit status, beside those of ``inspect``

DESCRIPTION = """\
Import a model and a loader from your code, run the model on the batches, and report whether it evaluates badly because
of its BatchNorm layers. Unlike inspect and diff, which only read files, this imports and runs the code at the given
paths: use it only on code that you trust."""

EPILOG = """\
A path is PACKAGE.MODULE:ATTRIBUTE, where ATTRIBUTE may have dots. Modules are searched as by python -m, in the current
folder first. A function or a class is called without arguments.

Rules for the advice:

{rules}

Exit status: 0 where no rule of the severity "error" applies, 1 where one does, 2 where something could not be
imported or failed while it ran; 130 after Ctrl-C."""


class PathError(Exception):
    """A path that cannot be resolved, or an object of the wrong type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m runningbn diagnose``."""
    parser.add_argument("model", metavar="PYTHON.PATH:MODEL", help="a torch.nn.Module, with its weights loaded")
    parser.add_argument("loader", metavar="PYTHON.PATH:LOADER", help="its batches, as in training")
    parser.add_argument(
        "--metric", metavar="PATH", help="a function of the model that gives a number, larger being better"
    )
    parser.add_argument("--forward", metavar="PATH", help="a function of the model and a batch that calls the model")
    parser.add_argument(
        "--num-iters", type=positive_integer, default=50, metavar="N", help="batches to use (default: 50)"
    )
    parser.add_argument("--device", help="where to move the batches, the model being there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    described = (f"{rule.name} ({rule.severity}): {rule.when} {rule.reason}" for rule in RULES)
    wrapped = (textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="      ") for text in described)
    parser.epilog = EPILOG.format(rules="\n".join(wrapped))


def run(arguments: argparse.Namespace) -> int:
    """Diagnose and print.

    Returns:
        0, 1 or 2, as documented in the help. Exceptions from the user's code are printed with their traceback.
    """
    try:
        diagnosis = _diagnose(arguments)
    except PathError as error:
        print(f"runningbn diagnose: {error}", file=sys.stderr)
        return TROUBLE
    except (Exception, SystemExit):
        traceback.print_exc()
        return TROUBLE
    print(json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False) if arguments.json else diagnosis)
    return WRONG if any(finding.severity == ERROR for finding in diagnosis.findings) else FINE


def _diagnose(arguments: argparse.Namespace) -> Diagnosis:
    model = _made(arguments.model)
    if not isinstance(model, nn.Module):
        raise PathError(f"{arguments.model}: expected a torch.nn.Module, got {type(model).__name__}")
    loader = _made(arguments.loader)
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise PathError(f"{arguments.loader}: expected something to loop over, got {type(loader).__name__}")
    functions: dict[str, Any] = {}
    for name in ("metric", "forward"):
        path = getattr(arguments, name)
        functions[name] = None if path is None else _resolved(path)
        if path is not None and not callable(functions[name]):
            raise PathError(f"{path}: expected a function, got {type(functions[name]).__name__}")
    return diagnose(model, loader, arguments.num_iters, device=arguments.device, **functions)


def _made(path: str) -> Any:
    """The object at the path; if it is a function or a class, the result of calling it."""
    found = _resolved(path)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise PathError(f"{path}: cannot be called without arguments: {error}") from error
    except ValueError:  # a builtin without a signature
        pass
    return found()


def _resolved(path: str) -> Any:
    name, colon, attributes = path.partition(":")
    if not (name and colon and attributes):
        raise PathError(f"{path}: expected PACKAGE.MODULE:ATTRIBUTE")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # If a module imported by the user's module is missing, the traceback is shown.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise PathError(f"{path}: there is no module {error.name!r}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise PathError(f"{path}: {found!r} has no attribute {attribute!r}")
        found = getattr(found, attribute)
    return found
