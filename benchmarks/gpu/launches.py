"""The kernel launches and copies of a call, as recorded by the profiler of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Kernel(NamedTuple):
    """One launch: a kernel, a copy or a fill, and how long it ran."""

    name: str
    microseconds: float


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """What one call launches, in order; nothing on a machine without a GPU."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [Kernel(event.name, event.time_range.elapsed_us()) for event in events]
