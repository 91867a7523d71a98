"""Processes that stand in for ranks: started once per size, then given one job after another.

A job is a function at the top of a test module; it is called in every process with the rank and some arguments, and
gives back anything that can be pickled. A job that fails in one process, or hangs, ends them all and is an error.
"""

import contextlib
import datetime
import functools
import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Seconds for a job; far more than any takes, as a machine may be busy.
PATIENCE = 120


class Processes:
    """`size` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[Any, Any]] = []

    def __call__(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``[job(rank, *arguments) for rank in range(size)]``, all at the same time."""
        if not self.workers:
            self._start()
        for _, connection in self.workers:
            connection.send((job, arguments))
        try:
            replies = [self._receive(rank) for rank in range(self.size)]
        except BaseException:
            self._stop()
            raise
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(replies) if text]
        if failures:
            self._stop()
            raise RuntimeError("\n".join(failures))
        return [pickle.loads(data) for _, data in replies]

    def _receive(self, rank: int) -> tuple[str, bytes]:
        process, connection = self.workers[rank]
        if not connection.poll(PATIENCE):
            raise TimeoutError(f"rank {rank} of {self.size} gave no answer within {PATIENCE} s: a deadlock?")
        try:
            return connection.recv()
        except EOFError:
            return f"ended with exit code {process.exitcode}", b""

    def _start(self) -> None:
        context = _context()
        store = tempfile.mktemp(prefix="runningbn-test-store-")
        for rank in range(self.size):
            connection, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, connection))

    def _stop(self) -> None:
        for process, connection in self.workers:
            process.kill()
            process.join()
            connection.close()
        self.workers = []


def _context() -> Any:
    """On Linux, processes are forked from one that has imported torch, and no more: to import it takes seconds."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._inductor"])  # the latter for deterministic algorithms
    return context


def _work(rank: int, size: int, store: str, connection: Any) -> None:
    # As in conftest.py.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Less than the patience outside, so that a deadlock names the collective it is in.
    timeout = datetime.timedelta(seconds=PATIENCE / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    with contextlib.suppress(EOFError):
        while True:
            job, arguments = connection.recv()
            try:
                reply = "", pickle.dumps(job(rank, *arguments))
            except Exception:
                reply = traceback.format_exc(), b""
            # Not as tensors, whose memory would be shared with a process that may be gone.
            connection.send(reply)


@functools.cache
def ranks(size: int) -> Processes:
    """The processes of a size, which all tests share."""
    return Processes(size)
