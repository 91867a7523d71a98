"""What holds before anything is imported, what pytest does not collect for doctests, and garbage collection."""

import atexit
import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Threads that wait for each other sleep: they may be more than there are cores, and then whoever spins is in the way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Their functions are compiled by triton.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["runningbn/kernels/triton_*.py"]
collect_ignore = [
    f"runningbn/integrations/{framework}.py"
    for framework in ("lightning", "transformers", "ignite", "fastai")
    if not importlib.util.find_spec(framework)
]


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Garbage is collected among the objects of tests only.

    What the test files import is a million objects that stay until the end. To look through them again and again took
    a third of the time of the imports and a tenth of that of the tests.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n`, workers begin far from each other and take over what another has not begun.

    So most of what a file makes for several of its tests (models, builds, processes) is made by one worker only.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


# At the end nothing is exempt: extensions report what is left of their classes.
atexit.register(gc.unfreeze)
