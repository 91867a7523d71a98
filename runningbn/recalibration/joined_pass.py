"""The statistics for ``normalize="population"`` by a single forward pass of all batches joined, where that is possible.

The batches advance through the model together. So the moments of each layer's input over all data are known when the
layer is called, and the layer can normalise by them at once: the layers after it get the input that evaluation gives
them. Whether a model treats the samples of a batch independently is not known beforehand. A pass over the batches as
they are, with the new statistics, tests it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .conventions import Moments, write_views
from .joined import PeakMemory, check_joinable, joined, samples
from .layer_statistics import LayerStatistics
from .moments import Call
from .passes import Passes

logger = logging.getLogger("runningbn")

# Largest residual at convergence: of the mean in std, of the variance relative to itself.
_TOLERANCE = 1e-4


class _NotPossible(BaseException):
    """Ends the forward of joined batches. It is no Exception, so that a model does not catch it."""


class JoinedPass(Passes):
    """Passes over the data, and the pass of all batches joined."""

    def refine_joined(self, batches: Sequence[Any], run: Callable[[Any], None], memory_limit: float) -> bool:
        """Replace the statistics by the moments in evaluation with one forward of all batches joined, if possible.

        In that forward, the first call of each layer gives its statistics, and the layer normalises by them. A pass
        over the batches then measures the residuals, as in `refine`, and collects the counts and the standard errors.

        Returns:
            Whether it succeeded. If not, the statistics must be computed in another way; where `batches` is 0 in the
            only process, `collect` first. Reasons are several processes, batches that cannot be joined, too little
            memory, an error, batches that are not finite, layers called several times, and residuals above the
            tolerance.
        """
        if self.ranks.size > 1 or not batches or not memory_limit:
            return False
        try:
            settled = self._settled_by_joined_pass(batches, run, memory_limit)
        except (Exception, _NotPossible) as error:  # an error that is due to the model comes again with the batches
            self._start_again()
            logger.info("normalize='population' goes layer by layer: %s: %s", type(error).__name__, error)
            return False
        self._start_again(settled)
        self.collect(batches, run)
        self._found, evaluated = settled, self._found
        if self._compare(evaluated) and evaluated.keys() == settled.keys() and not self._dropped:
            return True
        self._start_again()
        logger.info("normalize='population' goes layer by layer: the batches by themselves are evaluated differently")
        return False

    def _settled_by_joined_pass(
        self, batches: Sequence[Any], run: Callable[[Any], None], memory_limit: float
    ) -> dict[int, LayerStatistics]:
        """The statistics of the layers that a forward of all batches joined calls."""
        settled: dict[int, LayerStatistics] = {}

        def settle(call: Call) -> Moments:
            sums = self._accumulator([call.layer])
            sums.add([replace(call, layer=0)])
            settled.update(self._statistics(self._exchange(sums, done=True)[0], [call.layer]))
            if call.n == 1 or call.layer not in settled:
                raise _NotPossible(
                    f"{self.names[call.layer]} sees one element per channel, or some that are not finite"
                )
            stored = settled[call.layer].stored
            write_views(self.layers[call.layer], stored)
            return stored

        check_joinable(batches)
        self._start_again()
        with PeakMemory() as memory:
            # A copy, since a model may write into its input.
            run(joined(batches[:1]))
        self._refuse_repetition()
        needed = memory.peak * sum(map(samples, batches)) / max(samples(batches[0]), 1)
        if needed > memory_limit:
            raise _NotPossible(f"about {needed:.2g} bytes are needed, the limit is {memory_limit:.2g}")
        together = joined(batches)
        self._start_again()
        self.observer.settle = settle
        run(together)
        self._passes += 1
        self._refuse_repetition()
        return settled

    def _refuse_repetition(self) -> None:
        layers = [call.layer for call in self.observer.take_calls()]
        if len(set(layers)) < len(layers):
            raise _NotPossible("a layer is called several times in a forward")

    def _start_again(self, found: Mapping[int, LayerStatistics] | None = None) -> None:
        """Set the model and the observer to the state before the first batch, but for the statistics given."""
        self._forget_batches()
        self._kept.restore()
        self.observer.settle = None
        self.observer.take_calls()
        self.observer.fixed.clear()
        for number, one in (found or {}).items():
            self.observer.fixed[number] = one.stored
            write_views(self.layers[number], one.stored)

    def _compare(self, evaluated: Mapping[int, LayerStatistics]) -> bool:
        """Set the residuals and counts of the statistics from those in evaluation; whether the residuals are small."""
        for number, now in evaluated.items():
            kept = self._found.get(number, now)
            residual = _distance(kept, now, self.layers[number].eps)
            self._found[number] = replace(now, mean=kept.mean, var=kept.var, stored=kept.stored, residual=residual)
        return self._largest_residual() <= _TOLERANCE and evaluated.keys() <= self.observer.fixed.keys()

    def _largest_residual(self) -> float:
        """The largest residual of the layers that are called once per forward."""
        return max(map(self._residual, self._found), default=0.0)

    def _residual(self, number: int) -> float:
        return 0.0 if number in self._repeated else self._found[number].residual


def _distance(one: LayerStatistics, other: LayerStatistics, eps: float) -> float:
    """The largest difference between two statistics of a layer: of means in std, of variances relative to `other`."""
    scale = other.var + eps
    by_mean = (one.mean - other.mean).abs() / scale.sqrt()
    by_var = (one.var - other.var).abs() / scale
    return float(torch.maximum(by_mean, by_var).max())
