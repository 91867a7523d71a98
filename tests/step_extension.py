"""The extension for steps on the CPU, watched or out of the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from runningbn.kernels import cpu_step


@contextmanager
def by(forward: Any, backward: Any) -> Iterator[None]:
    """These in the place of the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_step, "extension", lambda: cpu_step._Extension(forward, backward))
        yield


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How many forwards and backwards the extension has taken, and declined."""
    real, counts = cpu_step.extension(), Counter[str]()

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            counts[name if result is not None else f"declined {name}"] += 1
            return result

        return call

    with by(counting("forward", real.forward), counting("backward", real.backward)):
        yield counts


def in_python() -> AbstractContextManager[None]:
    """No extension."""
    return by(lambda *arguments: None, lambda *arguments: None)
