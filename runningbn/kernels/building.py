"""Why a copy of runningbn has no C library."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang", "cl")


def library_in(kernels: Path, suffixes: Iterable[str]) -> Path | None:
    """The C library in a folder ``kernels``; None where it was not built."""
    return next((path for suffix in suffixes if (path := kernels / f"_cpu{suffix}").exists()), None)


def why_not_built(kernels: Path, suffixes: Iterable[str]) -> str:
    """The reason why there is none, and what can be done about it.

    Args:
        kernels: the folder ``kernels`` of the copy that was imported.
        suffixes: of extension modules of this Python.
    """
    package, suffixes = kernels.parent, tuple(suffixes)
    other = _other_copy(package, suffixes)
    if other is not None:
        return (
            f"the C library of this copy, {package}, was not built; that of {other} was. Python looks into the current "
            "folder first: run it from another folder, or build this copy by `pip install -e .`"
        )
    compiler = _compiler()
    have = "none is found here" if compiler is None else f"there is one here, {compiler}"
    if (package.parent / "pyproject.toml").is_file():
        return (
            f"the C library of this source tree, {package.parent}, was not built: `pip install -e .` does that. "
            f"It takes a C compiler; {have}"
        )
    again = "" if compiler is None else ": install runningbn again"
    return f"the C library was not built when runningbn was installed. That takes a C compiler; {have}{again}"


def _other_copy(package: Path, suffixes: tuple[str, ...]) -> Path | None:
    """Another copy that could be imported, and has its library."""
    for entry in sys.path:
        copy = Path(entry or ".").resolve() / package.name
        if copy != package.resolve() and library_in(copy / "kernels", suffixes) is not None:
            return copy
    return None


def _compiler() -> str | None:
    """The first that is found, beginning with the one that built this Python."""
    own = (sysconfig.get_config_var("CC") or "").split()[:1]
    return next((found for name in (*own, *COMPILERS) if (found := shutil.which(name))), None)
