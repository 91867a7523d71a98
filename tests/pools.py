"""Stand-ins for pools of processes."""

from __future__ import annotations

from concurrent.futures import Future


class InThisProcess:
    """A pool that works at once."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future
