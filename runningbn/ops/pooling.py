"""Pooling over processes: the sums of a batch that is spread over ranks, and those of its gradients.

Shapes: C channels, W ranks; per-channel vectors are (C,) in the dtype of the statistics (float32 or float64).

Each pooling is one all_gather, which every backend of torch.distributed has. The sum is taken after it, by the same
arithmetic on the same bits in the same order everywhere, so that no rank's statistics drift away from another's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.contract import GradientSums
from .compat import process_group_of_name
from .state import Sums, move_pivot, without_empty


class RankGroup(NamedTuple):
    """The processes that pool: by the name of their group, since compiled code cannot carry the group itself.

    Attributes:
        world_size: W.
        group_name: what torch.distributed has registered the group under.
        written: a buffer of the module that compiled code is told to be written, and which stays as it is. Otherwise
            the compiler would drop a collective on a rank that has no use for its result, while others wait for it.
    """

    world_size: int
    group_name: str
    written: Tensor | None = None


class GroupReference:
    """A process group as an attribute of a module: copies refer to the same group, pickles to none.

    Attributes:
        group: the group; None stands for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> GroupReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupReference, ()


def check_synchronisation(sync: Any, process_group: Any) -> None:
    """Accept a bool, and with True a process group or None.

    Raises:
        TypeError: for another `sync`, or for something that is not a process group.
        ValueError: for a process group without ``sync=True``.
    """
    if not isinstance(sync, bool):
        raise TypeError(f"sync: expected True or False, got {sync!r}")
    if process_group is None:
        return
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup or None, got "
            f"{process_group!r}; new_group returns no group to a process that is not a member"
        )
    if not sync:
        raise ValueError("process_group: expected sync=True with it, got sync=False")


def ranks_of(group: dist.ProcessGroup | None, written: Tensor | None = None) -> RankGroup | None:
    """The ranks to pool over; None where there is nothing to pool: no torch.distributed in use, or a single process.

    Args:
        group: None for all processes.
        written: see `RankGroup`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    world_size = dist.get_world_size(group)
    return RankGroup(world_size, group.group_name, written) if world_size > 1 else None  # type: ignore[union-attr]


def all_gather(vector: Tensor, ranks: RankGroup) -> Tensor:
    """The vectors of all ranks, (W, *vector.shape), in the order of the ranks; one collective, without gradient.

    Args:
        vector: of the same shape on all ranks.
        ranks: the ranks.

    Raises:
        NotImplementedError: in compiled code without a buffer in `ranks.written`.
    """
    if not torch.compiler.is_compiling():
        return _all_gather(ranks.written, vector, ranks.world_size, ranks.group_name)
    if ranks.written is None:
        raise NotImplementedError("sync=True with track_running_stats=False cannot be compiled into one graph")
    gathered: Tensor = torch.ops.runningbn.all_gather(ranks.written, vector, ranks.world_size, ranks.group_name)
    return gathered


def pool(batch: Sums, samples: int | Tensor, ranks: RankGroup) -> tuple[Sums, Tensor]:
    """The sums of the batch of all ranks together, about their common mean pivot, and its samples, ().

    Each rank's sums are moved to the mean p of the pivots, weighted by their counts. As each pivot lies near its
    rank's mean, what the move adds to the squares is about the variance between ranks, and no digits are lost.

    Args:
        batch: this rank's sums; with a count of 0 they contribute nothing.
        samples: N of this rank, 0 where its count is; a tensor, (), where only the device knows it.
        ranks: the ranks.

    Where all ranks are empty, the squares are infinite: to the statistics, a batch that must not enter.
    """
    if isinstance(samples, Tensor):
        scalars = samples.reshape(1).to(batch.shift.dtype)
    else:
        scalars = batch.shift.new_full((1,), samples)
    vector = torch.cat((batch.shift, batch.sums, batch.sqrs, batch.count[:1], scalars))
    c = len(batch.shift)
    shift, sums, sqrs, counts, all_samples = all_gather(vector, ranks).split([c, c, c, 1, 1], dim=1)
    total = counts.sum(0)
    pivot = (shift * (counts / total.clamp_min(1))).sum(0)
    moved = move_pivot(Sums(shift, sums, sqrs, counts), pivot)
    pooled = Sums(pivot, moved.sums.sum(0), moved.sqrs.sum(0), total.expand(c))
    return without_empty(pooled), all_samples.sum()


def pool_gradients(sums: GradientSums, ranks: RankGroup) -> GradientSums:
    """Σdy and Σdy·z over all ranks, in one collective."""
    pooled = all_gather(torch.stack(sums), ranks).sum(0)
    return GradientSums(pooled[0], pooled[1])


def _all_gather(written: Tensor | None, vector: Tensor, world_size: int, group_name: str) -> Tensor:
    gathered = vector.new_empty(world_size, *vector.shape)
    # Into views of one tensor: the collectives on single tensors differ from backend to backend and release to release.
    dist.all_gather(list(gathered.unbind()), vector, process_group_of_name(group_name))
    return gathered


# The group and the communication are nothing that a compiler could trace.
_LIBRARY = torch.library.Library("runningbn", "FRAGMENT")
_LIBRARY.define("all_gather(Tensor(written!) written, Tensor vector, int world_size, str group_name) -> Tensor")
_LIBRARY.impl("all_gather", _all_gather, "CompositeExplicitAutograd")


@torch.library.register_fake("runningbn::all_gather")
def _gathered_shape(written: Tensor, vector: Tensor, world_size: int, group_name: str) -> Tensor:
    return vector.new_empty(world_size, *vector.shape)
