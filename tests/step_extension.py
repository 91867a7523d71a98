"""The extension for steps on the CPU, watched or out of the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from runningbn.kernels import cpu_step


@contextmanager
def by(forward: Any, backward: Any, batch_norm: Any) -> Iterator[None]:
    """These in the place of the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_step, "extension", lambda: cpu_step._Extension(forward, backward, batch_norm))
        yield


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How many calls of each of its functions the extension has taken, and declined."""
    real, counts = cpu_step.extension(), Counter[str]()

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            counts[name if result is not None else f"declined {name}"] += 1
            return result

        return call

    names = "forward", "backward", "batch_norm"
    with by(*(counting(name, getattr(real, name)) for name in names)):
        yield counts


def in_python() -> AbstractContextManager[None]:
    """No extension."""
    return by(*3 * [lambda *arguments: None])
