"""Refine the statistics layer by layer for ``normalize="population"``, and write the results to the layers."""

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
from .conventions import write_views
from .joined_pass import JoinedPass
from .layer_statistics import LayerStatistics
from .moments import Accumulator
from .observer import EnoughSeen
from .ranks import interrupts_deferred
from .report import StatsReport
from .selection import left_alone

logger = logging.getLogger("runningbn")

# Maximal number of passes through all layers.
_MAX_ROUNDS = 3


class Recalibration(JoinedPass):
    """A recalibration in progress, as `precise_bn` yields it.

    Attributes:
        report: the results, after the ``with`` block of `precise_bn`; None before.
        batches: batches seen by this process.
    """

    report: StatsReport | None = None

    def refine(self, batches: Sequence[Any], run: Callable[[Any], None], show: Progress) -> None:
        """Replace the statistics by the moments of the layers' inputs in evaluation, layer by layer in call order.

        The input of a layer in evaluation depends only on the statistics of the layers before it. With these fixed, one
        pass over the data, up to the layer, gives its statistics. A last pass, with all statistics fixed, measures the
        residuals. They may exceed the tolerance if the order of the calls has changed, or if the input of a layer
        depends on its own statistics. The layers are then processed once more.
        """
        every_layer = range(len(self.layers))
        for attempt in range(_MAX_ROUNDS):
            order, first = self._call_order()
            for number in show(order, len(order)):
                # The input of a layer without layers before it does not depend on how others normalise.
                if number not in first or number in self._repeated or attempt > 0:
                    sums = self._pass(batches, run, [number], up_to=None if attempt > 0 else number)
                    self._found.update(self._statistics(self._exchange(sums, done=True)[0], [number]))
                self.observer.fixed[number] = self._found[number].stored
            sums = self._pass(batches, run, every_layer)
            with interrupts_deferred():
                evaluated = self._statistics(self._exchange(sums, done=True)[0], every_layer)
                converged = self._compare(evaluated)
                self.ranks.open &= not converged and attempt + 1 < _MAX_ROUNDS
            if converged:
                return
        logger.warning(
            "normalize='population' has not converged: in evaluation, moments differ from the statistics by up to "
            "%.1e, in %s. Possible causes: the batches change while they are kept, the model is not deterministic in "
            "evaluation, or the input of a layer depends on its own statistics, as where weights are scaled by them "
            "and then rounded.",
            self._largest_residual(),
            self.names[max(self._found, key=self._residual)],
        )

    def finish(self) -> StatsReport:
        """Write the statistics and return the report; if interrupted, the layers are restored.

        Raises:
            RuntimeError: if the buffers of a layer cannot hold its statistics.
        """
        for number, found in self._found.items():
            if not all(bool(moment.isfinite().all()) for moment in found.stored):
                raise RuntimeError(f"{self.names[number]}: {self._reason_not_finite(found)}")
        before = [(self.layers[number], _statistics_of(self.layers[number])) for number in sorted(self._found)]
        missed = {
            name: self._reason_missed(number) for number, name in enumerate(self.names) if number not in self._found
        }
        report = StatsReport(
            layers=[self._report(number, found) for number, found in sorted(self._found.items())],
            unused=[name for name, reason in missed.items() if not reason],
            batches=self._seen - self._dropped,
            not_finite=self._dropped,
            passes=self._passes,
            available=self._available,
            skipped={name: reason for name, reason in missed.items() if reason} | left_alone(self._model, self.layers),
            _before=before,
        )
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

    def _reason_not_finite(self, found: LayerStatistics) -> str:
        """Why the statistics to store are not finite, although those of the data are."""
        dtype = found.stored[1].dtype
        largest = float(torch.maximum(found.mean.abs(), found.var).max())
        if largest > torch.finfo(dtype).max:
            return f"a mean or variance of {largest:.2g} does not fit into {dtype}; convert the layer to a wider dtype"
        return f"with its old statistics mixed in by prior, its statistics are not finite in {dtype}"

    def _pass(
        self, batches: Sequence[Any], run: Callable[[Any], None], numbers: Sequence[int], up_to: int | None = None
    ) -> Accumulator:
        """The sums of some layers over the kept batches; of this process.

        If `up_to` is given, each forward ends after the last call of that layer.
        """
        # Every pass starts from the same state. Only the statistics are new, since other modules may read them.
        self._kept.restore()
        for number, found in self._found.items():
            write_views(self.layers[number], found.stored)
        sums = self._accumulator(numbers)
        self._passes += 1
        places = {number: place for place, number in enumerate(numbers)}
        self.observer.watched = set(numbers)
        whole = up_to is None or self._sharded
        orders: list[list[int]] = []
        for batch, order, finite in zip(batches, self._calls, self._finite):
            skipped = not bool(finite) or (not whole and up_to not in order)
            if skipped and not self._sharded:
                orders.append([])
                continue
            self.observer.last = None if whole or up_to is None else (up_to, order.count(up_to))
            with suppress(EnoughSeen):
                run(batch)
            calls = [replace(call, layer=places[call.layer]) for call in self.observer.take_calls()]
            orders.append([numbers[call.layer] for call in calls])
            if calls and not skipped:
                sums.add(calls)
        self.observer.last = None
        if len(numbers) == len(self.layers):
            self._calls = orders
        return sums

    def _call_order(self) -> tuple[list[int], set[int]]:
        """A topological order of the used layers by their calls, in all batches and processes; and the first layers.

        The first layers are those that no layer is called before.
        """
        count = len(self.layers)
        follows = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        for calls in self._calls:
            for one, next_one in pairwise(dict.fromkeys(calls)):
                follows[one, next_one] = 1
        merged = self.ranks.exchange(follows.flatten()).amax(0).view(count, count)
        before = {number: set(merged[:, number].nonzero().flatten().tolist()) for number in self._found}
        first = {number for number, previous in before.items() if not previous}
        order: list[int] = []
        while len(order) < len(before):
            left = [number for number in before if number not in order]
            free = [number for number in left if before[number] <= set(order)]
            # If batches call layers in contradicting orders, the relation has a cycle, and `free` may be empty.
            order.append(min(free or left))
        return order, first

    def _reason_missed(self, number: int) -> str:
        """Why a layer was not updated; empty if no batch reached it."""
        if number in self.observer.used_outside:
            return "code outside of the layer's forward normalises by its statistics, which is not observed"
        if self._sums.split(self._sums.elements)[number].any():
            return "a single element per channel in every batch, which has no variance"
        return ""


def _statistics_of(layer: _BatchNorm) -> dict[str, Tensor]:
    """Copies of the buffers that writing statistics changes."""
    names = layer.statistics_names if isinstance(layer, PooledStatistics) else VIEW
    return {name: layer._buffers[name].clone() for name in names}  # type: ignore[union-attr]


@torch.no_grad()
def _write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    if isinstance(layer, PooledStatistics):
        layer.replace_statistics(mean, var)
        return
    write_views(layer, (mean, var))
