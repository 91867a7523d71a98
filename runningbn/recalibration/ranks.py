"""What the processes of a recalibration tell each other: their sums, and whether they failed."""

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

logger = logging.getLogger("runningbn")

# Seconds to wait for other processes without a word.
_PATIENCE = 10.0


class OtherProcessError(RuntimeError):
    """Another process failed, so this one does not go on either."""


class Ranks:
    """The processes of a group. Without ``torch.distributed``, or with a group of one, nothing is communicated.

    Every rank calls `exchange` equally often, or `fail` instead of one of these calls: then all raise. All messages are
    of one width, since a rank that fails cannot know which one the others are at, and gloo aborts at unequal lengths.

    Attributes:
        size: the number of ranks.
        leaves_out: whether there are processes that do not take part though nobody named a group.
        open: whether the others will take part in another exchange.

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
        self.leaves_out = initialized and group is False and dist.get_world_size() > 1
        self.open = self.size > 1

    def exchange(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, (ranks, ·), in their order; one collective. Nothing happens to a group of one.

        Raises:
            OtherProcessError: if a rank failed.
        """
        if self.size == 1:
            return vector[None]
        return self._gather(vector, None).to(vector.device)[:, : len(vector)]

    def fail(self, error: BaseException) -> None:
        """Tell the others in the place of an exchange, if they wait for one."""
        if not self.open:
            return
        try:
            said = f"{type(error).__name__}: {error}"
        except Exception:  # whatever is wrong with the error, the others must not wait
            said = type(error).__name__
        # Whatever goes wrong now, the error itself is what the caller wants to see.
        with suppress(Exception):
            self._gather(torch.zeros(0, dtype=torch.float64), said)

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches as long as every rank has one; one collective a batch."""
        source, missing = iter(batches), object()
        while True:
            batch = next(source, missing)
            if bool(self.exchange(torch.tensor([float(batch is missing)], dtype=torch.float64)).any()):
                return
            yield batch

    def _gather(self, vector: Tensor, error: str | None) -> Tensor:
        message = torch.zeros(self.width + 1, dtype=torch.float64, device=self._device())
        message[0] = error is not None
        message[1 : len(vector) + 1] = vector
        gathered = [torch.empty_like(message) for _ in range(self.size)]
        with _told_while_waiting(self.size):
            dist.all_gather(gathered, message, group=self.group)
            vectors = torch.stack(gathered)
            failed = vectors[:, 0].nonzero().flatten().tolist()
        if failed:
            self.open = False
            said: list[Any] = [None] * self.size
            dist.all_gather_object(said, error, self.group)
            words = "; ".join(f"rank {rank}: {said[rank]}" for rank in failed)
            raise OtherProcessError(f"recalibration failed on another process, nothing was changed here ({words})")
        return vectors[:, 1:]

    def _device(self) -> torch.device:
        """Where the group's backend wants its tensors; gloo and MPI work on the CPU."""
        if "nccl" in str(dist.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def _told_while_waiting(size: int) -> Iterator[None]:
    """Warn if the block takes long: a rank that never calls would be waited for until the group's timeout."""
    timer = threading.Timer(_PATIENCE, logger.warning, (
        "recalibration has been waiting for %g s for other processes: it needs all %d of the group to call it, each "
        "with its own data. If some have more data than this one, that is all. To recalibrate in this process alone, "
        "pass process_group=False.", _PATIENCE, size,
    ))  # fmt: skip
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the end: what the ranks agree on has to be noted before anything else happens."""
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
    by_class = any(
        base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for m in model.modules() for base in type(m).__mro__
    )
    return by_class or any(type(p).__name__ == "DTensor" for p in model.parameters())
