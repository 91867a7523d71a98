"""Time several calls in turn, on a CPU or a GPU, and record page faults and the load by other processes."""

from __future__ import annotations

import gc
import os
import random
import resource
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST_ROUNDS = 5
# Of the device, before what is timed: some 2 ms, in which the host sends a step of a layer.
CYCLES_OF_WAITING = 4_000_000

Call = Callable[[], object]


class Sample(NamedTuple):
    """One call: seconds on the device and on the host, which on a CPU are the same, and minor page faults."""

    device: float
    host: float
    faults: int


def on_cpu(run: Call) -> Sample:
    """Time a call."""
    faults = page_faults()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    return Sample(seconds, seconds, page_faults() - faults)


def on_cuda(run: Call) -> Sample:
    """Time a call that finds a cold cache; the host's time is what it takes to send the work.

    The device waits until all is sent: otherwise it would wait between the launches of small calls, and the time were
    the host's.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CYCLES_OF_WAITING)
    flusher().zero_()
    faults = page_faults()
    begin.record()
    started = time.perf_counter()
    run()
    host = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3, host, page_faults() - faults)


@lru_cache(maxsize=1)
def flusher() -> Tensor:
    """More than any L2 cache holds; writing it leaves nothing else there."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def page_faults() -> int:
    """Those of this process that needed no disk, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def others_seconds() -> float:
    """CPU seconds that other processes have taken on this machine so far; constant where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts_and_stolen = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    own = resource.getrusage(resource.RUSAGE_SELF)
    return busy - own.ru_utime - own.ru_stime


def take_turns(calls: dict[str, Call], seconds: float, device: str) -> dict[str, list[Sample]]:
    """Everybody once a round, until the seconds are over; by contender, a sample of each round."""
    clock = on_cuda if device == "cuda" else on_cpu
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    # In a fixed order everybody would always find the same predecessor's data in the cache.
    order, shuffle = list(calls), random.Random(0).shuffle
    for run in calls.values():
        run()
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(samples[order[0]]) < FEWEST_ROUNDS:
        shuffle(order)
        for name in order:
            samples[name].append(clock(calls[name]))
    gc.enable()
    return samples
