"""From batches to the statistics that evaluation shows, and writing what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.buffers import VIEW, PooledStatistics
from .batches import Progress
from .conventions import Moments
from .moments import Accumulator
from .observer import EnoughSeen
from .passes import Found, Passes
from .ranks import interrupts_deferred
from .report import StatsReport
from .selection import left_alone

logger = logging.getLogger("runningbn")

# How far statistics may be from what evaluation shows: the mean in std, the variance relative to itself.
_SETTLED = 1e-4
# How often all layers are gone through until they have settled.
_MOST_ROUNDS = 3


class Recalibration(Passes):
    """Statistics being collected. `precise_bn` gives one; `update_bn_stats` works with one.

    Attributes:
        report: what came out, once the ``with`` of `precise_bn` is left; None before.
        batches: batches seen by this process.
    """

    report: StatsReport | None = None

    def settle(self, batches: Sequence[Any], run: Callable[[Any], None], show: Progress) -> None:
        """From statistics by batches to those that evaluation shows, layer by layer in the order of their calls.

        What a layer sees in evaluation depends only on the statistics of those before it. With these fixed, one pass
        over the data, up to the layer, gives its own. A last pass, with all of them fixed, measures what is left. If
        the model has taken other ways than before, or a layer sees what depends on its own statistics, that is too
        much, and the layers are gone through once more.
        """
        everything = range(len(self.layers))
        for attempt in range(_MOST_ROUNDS):
            order, first = self._agree_on_order()
            for number in show(order, len(order)):
                # Where nothing comes before a layer, what it saw by batches was right already.
                if number not in first or number in self._repeated or attempt > 0:
                    sums = self._pass(batches, run, [number], up_to=None if attempt > 0 else number)
                    self._found.update(self._statistics(self._exchange(sums, done=True)[0], [number]))
                self.observer.fixed[number] = self._found[number].stored
            sums = self._pass(batches, run, everything)
            with interrupts_deferred():
                evaluated = self._statistics(self._exchange(sums, done=True)[0], everything)
                for number, now in evaluated.items():
                    kept = self._found.get(number, now)
                    left = _distance(kept, now, self.layers[number].eps)
                    self._found[number] = replace(now, mean=kept.mean, var=kept.var, stored=kept.stored, residual=left)
                new = evaluated.keys() - self.observer.fixed.keys()
                settled = self._left() <= _SETTLED and not new
                self.ranks.open &= not settled and attempt + 1 < _MOST_ROUNDS
            if settled:
                return
        logger.warning(
            "normalize='population' has not settled: evaluation shows moments off by %.1e, most in %s. Do the batches "
            "stay the same while they are kept, and is the model deterministic in evaluation? Does what a layer sees "
            "depend on its own statistics, as where weights are scaled by them and then rounded?",
            self._left(),
            self.names[max(self._found, key=self._residual)],
        )

    def finish(self) -> StatsReport:
        """Write the statistics and report; the layers are as before if that is interrupted."""
        before = [(self.layers[number], self._statistics_of(self.layers[number])) for number in sorted(self._found)]
        missed = {name: self._why(number) for number, name in enumerate(self.names) if number not in self._found}
        report = StatsReport(
            [self._report(number, found) for number, found in sorted(self._found.items())],
            [name for name, reason in missed.items() if not reason],
            self._seen - self._dropped, self._dropped, self._passes, self._available,
            {name: reason for name, reason in missed.items() if reason} | left_alone(self._model, self.layers),
            before,
        )  # fmt: skip
        if self._dropped:
            logger.warning("batches left out, not finite: %d, first in %s", self._dropped, self._first_not_finite())
        try:
            for number, found in self._found.items():
                _write(self.layers[number], *found.stored)
            self.report = report
            return report
        except BaseException:
            report.undo()
            raise

    def _pass(
        self, batches: Sequence[Any], run: Callable[[Any], None], numbers: Sequence[int], up_to: int | None = None
    ) -> Accumulator:
        """The sums of some layers over the same batches again; of this process."""
        # Every pass starts from the same state, but for the statistics, which other modules may read.
        self._kept.restore()
        for number, found in self._found.items():
            _show(self.layers[number], found.stored)
        sums = self._accumulator(numbers)
        self._passes += 1
        places = {number: place for place, number in enumerate(numbers)}
        self.observer.watched = set(numbers)
        whole = up_to is None or self._sharded
        ways: list[list[int]] = []
        for batch, way, finite in zip(batches, self._calls, self._finite):
            skipped = not bool(finite) or (not whole and up_to not in way)
            if skipped and not self._sharded:
                ways.append([])
                continue
            self.observer.last = None if whole or up_to is None else (up_to, way.count(up_to))
            with suppress(EnoughSeen):
                run(batch)
            calls = [replace(call, layer=places[call.layer]) for call in self.observer.take_calls()]
            ways.append([numbers[call.layer] for call in calls])
            if calls and not skipped:
                sums.add(calls)
        self.observer.last = None
        if len(numbers) == len(self.layers):
            self._calls = ways
        return sums

    def _agree_on_order(self) -> tuple[list[int], set[int]]:
        """The layers that were used, none before one that some batch, on any process, calls before it; and the first.

        The first are those with none before them.
        """
        count = len(self.layers)
        follows = torch.zeros(count, count, dtype=torch.float64)
        for way in self._calls:
            ahead = list(dict.fromkeys(way))
            for one, next_one in pairwise(ahead):
                follows[one, next_one] = 1
        told = self.ranks.exchange(follows.flatten()).amax(0).view(count, count)
        before = {number: set(told[:, number].nonzero().flatten().tolist()) for number in self._found}
        first = {number for number, ahead in before.items() if not ahead}
        order: list[int] = []
        while len(order) < len(before):
            left = [number for number in before if number not in order]
            free = [number for number in left if before[number] <= set(order)]
            # Ways that contradict each other leave none free.
            order.append(min(free or left))
        return order, first

    def _left(self) -> float:
        """The largest residual of the layers that do not feed themselves."""
        return max(map(self._residual, self._found), default=0.0)

    def _residual(self, number: int) -> float:
        return 0.0 if number in self._repeated else self._found[number].residual

    def _why(self, number: int) -> str:
        """Why a layer was not updated, where it is not just that no batch reached it."""
        if number in self.observer.elsewhere:
            return "normalised by outside of the layer's own forward, in whole or in part, which is not observed"
        if self._sums.split(self._sums.counts[1])[number].any():
            return "a single element per channel in every batch, which has no variance"
        return ""

    def _statistics_of(self, layer: _BatchNorm) -> dict[str, Tensor]:
        """Copies of the buffers that writing statistics changes."""
        names = layer.statistics_names if isinstance(layer, PooledStatistics) else VIEW
        return {name: layer._buffers[name].clone() for name in names}  # type: ignore[union-attr]


@torch.no_grad()
def _show(layer: _BatchNorm, statistics: Moments) -> None:
    """Let `running_mean` and `running_var` be these for a while."""
    for name, value in zip(VIEW, statistics):
        buffer = layer._buffers[name]
        assert buffer is not None
        buffer.copy_(value)


@torch.no_grad()
def _write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    if isinstance(layer, PooledStatistics):
        layer.replace_statistics(mean, var)
        return
    _show(layer, (mean, var))


def _distance(one: Found, other: Found, eps: float) -> float:
    """The largest difference between two statistics of a layer: of means in std, of variances relative to them."""
    scale = other.var + eps
    by_mean = (one.mean - other.mean).abs() / scale.sqrt()
    by_var = (one.var - other.var).abs() / scale
    return float(torch.maximum(by_mean, by_var).max())
