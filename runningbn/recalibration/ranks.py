"""Communication between the processes of a recalibration: their sums, and whether one failed."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.pooling import check_synchronisation
from .flags import all_modules, all_tensors

logger = logging.getLogger("runningbn")

# Seconds of waiting for other processes after which a warning is logged.
_WARN_AFTER = 10.0


class OtherProcessError(RuntimeError):
    """Another process failed, so this one stops as well."""


class Ranks:
    """The processes of a group. Without ``torch.distributed``, or with a group of one, nothing is communicated.

    Every rank calls `exchange` equally often, or `fail` in place of one of these calls; then all ranks raise. All
    messages have the same length: a rank that fails does not know which exchange the others have reached, and gloo
    aborts at unequal lengths.

    Attributes:
        size: the number of ranks.
        excludes_others: whether there are other processes, which ``group=False`` leaves out.
        open: whether the other ranks will take part in another exchange.

    Args:
        group: the process group; None for all processes; False for this one alone.
        width: the longest message.

    Raises:
        TypeError, ValueError: for something that is not a process group.
    """

    def __init__(self, group: Any, width: int) -> None:
        if group is not False:
            check_synchronisation(True, group)
        self.group, self.width = group, width
        initialized = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if initialized and group is not False else 1
        self.excludes_others = initialized and group is False and dist.get_world_size() > 1
        self.open = self.size > 1

    def exchange(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, (ranks, ·), in order of rank; one collective, none in a group of one.

        Raises:
            OtherProcessError: if a rank failed.
        """
        if self.size == 1:
            return vector[None]
        return self._gather(vector, None).to(vector.device)[:, : len(vector)]

    def fail(self, error: BaseException) -> None:
        """Send the error to the other ranks, in place of an exchange, if they wait for one."""
        if not self.open:
            return
        try:
            message = f"{type(error).__name__}: {error}"
        except Exception:  # str(error) may raise; the others must not wait
            message = type(error).__name__
        # Errors in the communication are suppressed, so that the caller sees the original one.
        with suppress(Exception):
            self._gather(torch.zeros(0, dtype=torch.float64, device="cpu"), message)

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, while every rank has one; one collective per batch."""
        source, missing = iter(batches), object()
        while True:
            batch = next(source, missing)
            done = torch.tensor([float(batch is missing)], dtype=torch.float64, device="cpu")
            if bool(self.exchange(done).any()):
                return
            yield batch

    def _gather(self, vector: Tensor, error: str | None) -> Tensor:
        message = torch.zeros(self.width + 1, dtype=torch.float64, device=self._device())
        message[0] = error is not None
        message[1 : len(vector) + 1] = vector
        gathered = [torch.empty_like(message) for _ in range(self.size)]
        with _warning_while_waiting(self.size):
            dist.all_gather(gathered, message, group=self.group)
            vectors = torch.stack(gathered)
            failed = vectors[:, 0].nonzero().flatten().tolist()
        if failed:
            self.open = False
            errors: list[Any] = [None] * self.size
            dist.all_gather_object(errors, error, self.group)
            causes = "; ".join(f"rank {rank}: {errors[rank]}" for rank in failed)
            raise OtherProcessError(f"recalibration failed on another process, nothing was changed here ({causes})")
        return vectors[:, 1:]

    def _device(self) -> torch.device:
        """The device for the tensors of the group's backend: CUDA for NCCL, the CPU for gloo and MPI."""
        if "nccl" in str(dist.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def _warning_while_waiting(size: int) -> Iterator[None]:
    """Log a warning if the block takes long: without a call by every rank, it waits until the group's timeout."""
    timer = threading.Timer(_WARN_AFTER, logger.warning, (
        "recalibration has been waiting for %g s for other processes: all %d of the group must call it, each with its "
        "own data. No action is needed if the others only have more data. To recalibrate in this process alone, "
        "pass process_group=False.", _WARN_AFTER, size,
    ))  # fmt: skip
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, so that the result of an exchange is recorded on every rank."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


def is_sharded(model: nn.Module) -> bool:
    """Whether the forward has to communicate because parameters are spread over processes (FSDP, DTensor)."""
    bases = {base.__name__ for cls in set(map(type, all_modules(model))) for base in cls.__mro__}
    by_class = bases & {"FullyShardedDataParallel", "FSDPModule"}
    return bool(by_class) or "DTensor" in {cls.__name__ for cls in set(map(type, all_tensors(model)))}
