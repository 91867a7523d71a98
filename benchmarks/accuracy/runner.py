"""Run the jobs that are missing in a file of results, in separate processes."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from ..results_file import machine
from .jobs import Grid, Job
from .results import Record, append, drop_unfinished_line, load
from .run import run


def run_missing(path: Path, grid: Grid, jobs: int, budget: float, say: Callable[[str], None]) -> None:
    """Run what a file of results lacks of a grid, so many processes at a time, until the budget of seconds is spent.

    No run is begun after that; those under way are waited for.
    """
    drop_unfinished_line(path)
    results = load(path)
    deadline = time.monotonic() + budget
    described = {**machine(), "threads": 1}
    append(path, [{"part": {"command": grid.command, "machine": described}}])
    context = multiprocessing.get_context("spawn")
    running: dict[Future[list[Record]], Job] = {}
    with ProcessPoolExecutor(jobs, context, initializer=_prepare_worker) as pool:
        while True:
            waiting = (job for job in grid.pending(results) if job not in running.values())
            while len(running) < jobs and time.monotonic() < deadline and (job := next(waiting, None)) is not None:
                running[pool.submit(run, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, records = running.pop(future), future.result()
                append(path, records)
                say(_line(job, records))
                for record in records:
                    results.add(record)
    left = sum(1 for _ in grid.pending(results))
    say(f"{left} runs left" if left else "complete")


def _prepare_worker() -> None:
    """One thread each; Ctrl-C is for the parent, who ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _line(job: Job, records: list[Record]) -> str:
    return f"{job.cell}: {job.contender}, {records[0].get('error') or str(records[0]['seconds']) + ' s'}"
