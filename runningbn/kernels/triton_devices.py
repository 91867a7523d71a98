"""What the Triton kernels need of a machine, and what they want to know of a device.

Triton itself is imported by nothing here but `too_old`, which is asked once all the rest is there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

# With Triton's interpreter, which is what TRITON_INTERPRET means to Triton itself, the kernels run on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
# The first release that takes named tuples of tensors.
_OLDEST_TRITON = (3, 3)
# The first generation of GPUs that Triton supports.
_OLDEST_GPU = (8, 0)
# Bytes of shared memory for a program, at most: a test compiles the kernels and looks.
SHARED_MEMORY = 32 << 10


class Device(NamedTuple):
    """A device that the kernels can run on.

    Attributes:
        multiprocessors: how many it has.
    """

    multiprocessors: int


def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED:
        if not torch.cuda.is_available():
            return "torch found no CUDA device"
        if torch.version.hip is not None:
            return "the kernels were written for CUDA and have never met ROCm"
        reasons = [unsuitable(index) for index in range(torch.cuda.device_count())]
        if None not in reasons:
            return "; ".join(str(reason) for reason in reasons)
    return too_old()


def device(index: int) -> Device | None:
    """The device of this number, -1 for the CPU; None if the kernels cannot run on it."""
    # The interpreter, which is slow, has one multiprocessor.
    if INTERPRETED:
        return Device(1) if unavailable() is None else None
    if index < 0 or unavailable() is not None or unsuitable(index) is not None:
        return None
    return Device(torch.cuda.get_device_properties(index).multi_processor_count)


def unsuitable(index: int) -> str | None:
    """What a CUDA device lacks; None if nothing."""
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) < _OLDEST_GPU:
        needed, found = ".".join(map(str, _OLDEST_GPU)), f"{properties.major}.{properties.minor}"
        return f"{properties.name}: expected compute capability {needed} or above, got {found}"
    # Not every release of torch says it, and no such GPU has less than 48 KiB.
    shared = getattr(properties, "shared_memory_per_block", SHARED_MEMORY)
    if shared < SHARED_MEMORY:
        return f"{properties.name}: expected {SHARED_MEMORY} bytes of shared memory for a block, got {shared}"
    return None


@functools.cache
def too_old() -> str | None:
    """Why the installed release of Triton cannot be used; None if it can."""
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    return None
