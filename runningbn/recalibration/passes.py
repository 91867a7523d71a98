"""Passes over the data: the moments of the layers' inputs, summed over batches and processes, and their statistics."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.buffers import PooledStatistics
from .conventions import Convention, Moments, views
from .layer_statistics import LayerStatistics, on_cpu
from .model_state import state_kept
from .moments import Accumulator, Estimator, MeanOfBatches, Population
from .observer import Observer
from .ranks import Ranks, interrupts_deferred
from .report import LayerReport
from .selection import Layers, chosen

logger = logging.getLogger("runningbn")

_ESTIMATORS: dict[str, type[Estimator]] = {"population": Population, "batch": MeanOfBatches}
# With fewer batches, the estimate of the standard error is too uncertain to stop on it.
_MIN_BATCHES = 8


class Passes:
    """Collects the moments of the layers' inputs, batch by batch, and computes their statistics.

    Attributes:
        names, layers: the layers to recalibrate.
        batches: batches seen by this process.
        without_batch: the message where there was no batch.
    """

    without_batch = "the data loader gave no batch"

    def __init__(
        self, model: nn.Module, *, variance: str, layers: Layers, prior: float, process_group: Any
    ) -> None:  # fmt: skip
        if variance not in _ESTIMATORS:
            raise ValueError(f"variance: expected one of {', '.join(map(repr, _ESTIMATORS))}, got {variance!r}")
        if not 0 <= prior < float("inf"):
            raise ValueError(f"prior: expected a finite number of pseudo-samples of at least 0, got {prior!r}")
        targets = chosen(model, layers)
        self.names, self.layers = list(targets), list(targets.values())
        self.prior = prior
        self.available: int | None = None  # number of batches that this process has; None if not known
        self.observer = Observer(self.layers, self._so_far, self.names)
        self._model = model
        self._estimator = _ESTIMATORS[variance]()
        self._forget_batches()
        self._passes = 0
        self._seen = self._dropped = 0  # batches of all processes
        self._available: int | None = None  # of all processes
        self._biased: set[int] = set()  # layers whose running_var is biased
        self._sharded = False
        self._old = self._flat("running_mean"), self._flat("running_var")
        count = len(self.layers)
        self.ranks = Ranks(process_group, max(len(self._message(self._sums, done=True)), count * count))

    def _forget_batches(self) -> None:
        """Start to collect from no batch."""
        self.batches = 0
        self._sums = self._accumulator(range(len(self.layers)))
        self._found: dict[int, LayerStatistics] = {}
        self._calls: list[list[int]] = []  # for each batch, the layers in the order of their calls
        self._finite: list[Tensor] = []  # for each batch, whether it was finite, ()
        self._repeated: set[int] = set()  # layers called more than once in some batch

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Restore the model on leaving. If this process raises inside, the other processes raise, too."""
        try:
            with state_kept(self._model) as self._kept:
                yield
        except BaseException as error:
            self.ranks.fail(error)
            raise

    def end_batch(self) -> None:
        """Add the calls since the last `end_batch` as one batch."""
        calls = self.observer.take_calls()
        self._calls.append([call.layer for call in calls])
        self._repeated.update(number for number, times in Counter(self._calls[-1]).items() if times > 1)
        self.batches += 1
        self._finite.append(self._sums.add(calls) if calls else torch.tensor(True, device=self._sums.device))

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, while every process has one: for models whose forward communicates.

        Raises:
            ValueError: with ``process_group=False``.
        """
        if self.ranks.excludes_others:
            raise ValueError("process_group=False: expected a model on one process; this one is sharded over several")
        self._sharded = self.ranks.size > 1
        if self._sharded:
            logger.warning("the model is sharded: all processes stop when the first one has no more batches")
        return self.ranks.in_step(batches)

    def collect(
        self, batches: Iterable[Any], run: Callable[[Any], None], tolerance: float | None = None, refines: bool = False
    ) -> None:
        """Run batches until they end or the standard errors are below `tolerance`; then sum over the processes.

        Args:
            refines: whether `Recalibration.refine` follows.
        """
        own = self._sums
        self._passes += 1
        next_check = _MIN_BATCHES

        def check(done: bool) -> bool:
            with interrupts_deferred():
                merged, everyone_done = self._exchange(own, done)
                # All processes check the same merged sums, so they come to the same decision.
                enough = everyone_done or (tolerance is not None and self._known_to(tolerance, merged))
                if enough:
                    self._sums = merged
                    self.ranks.open &= refines
            return enough

        enough = False
        for batch in batches:
            run(batch)
            self.end_batch()
            if tolerance is not None and self.batches == next_check:
                # The interval grows by a quarter each time: a check waits for the device and the other processes.
                next_check += (next_check + 3) // 4
                enough = check(done=False)
                if enough:
                    break
        while not enough:
            enough = check(done=True)
        self._check_sums()
        self._found = self._statistics(self._sums, range(len(self.layers)))

    def _exchange(self, sums: Accumulator, done: bool) -> tuple[Accumulator, bool]:
        """The sums over all processes, and whether all processes are done."""
        count, width = len(self.layers), len(self._old[0])
        messages = self.ranks.exchange(self._message(sums, done))
        packed = messages.shape[1] - (3 + 2 * count) - 2 * width
        status, means, variances, packs = messages.split([3 + 2 * count, width, width, packed], dim=1)
        # In one transfer.
        everyone_done, batches, available, repeated, corrections = status.cpu().split([1, 1, 1, count, count], dim=1)
        self._seen = int(batches.sum())
        self._available = None if available.isnan().any() else int(available.sum())
        self._repeated = {number for number in range(count) if repeated[:, number].any()}
        # The convention of a subclass with a custom forward is known only to processes that had a batch for it.
        self._biased = {number for number in range(count) if (corrections[:, number] == 0).any()}
        if self.ranks.size == 1:
            return sums, done
        # Old statistics may differ between processes, as they do during training with DistributedDataParallel.
        self._old = means[0], variances[0]
        return sums.merged(packs), bool(everyone_done.all())

    def _message(self, sums: Accumulator, done: bool) -> Tensor:
        numbers = range(len(self.layers))
        available = float("nan") if self.available is None else float(self.available)
        repeated = [float(number in self._repeated) for number in numbers]
        status = [float(done), float(self.batches), available, *repeated, *map(self._correction, numbers)]
        return torch.cat([torch.tensor(status, dtype=torch.float64, device=sums.device), *self._old, sums.pack()])

    def _correction(self, number: int) -> float:
        """1 if the layer's `running_var` has Bessel's correction, 0 if not; 1 if this process has not detected it."""
        layer = self.layers[number]
        if isinstance(layer, PooledStatistics):
            return float(layer.corrects_variance)
        return float(self.observer.conventions.get(number, Convention()).correction)

    def _known_to(self, tolerance: float, sums: Accumulator) -> bool:
        found = self._statistics(sums, range(len(self.layers)))
        reports = [self._report(number, one) for number, one in found.items()]
        # The standard error of a single batch is NaN, and comparisons with it are False.
        return bool(reports) and all(one.batches >= _MIN_BATCHES and one.standard_error <= tolerance for one in reports)

    def _check_sums(self) -> None:
        if self._seen == 0:
            raise ValueError(self.without_batch)
        self._dropped = int(self._sums.dropped)
        if self._dropped and not self._sums.elements.any():
            raise RuntimeError(f"all {self._dropped} batches were not finite, first in {self._first_not_finite()}")
        if not self._sums.elements.any():
            outside = (
                "; code outside of their forward normalises by their statistics" if self.observer.used_outside else ""
            )
            raise ValueError(f"no batch reached any of the layers {', '.join(self.names)}{outside}")
        for name, elements in zip(self.names, self._sums.split(self._sums.elements)):
            if elements[0] == 1 and not self.prior:
                raise ValueError(f"{name} saw a single element per channel in all, which has no variance")

    def _statistics(self, sums: Accumulator, numbers: Sequence[int]) -> dict[int, LayerStatistics]:
        """The statistics of these layers from their sums, for the layers that were used."""
        estimate = sums.estimate()
        mean, var = estimate.mean, estimate.var
        if isinstance(self._estimator, Population):
            bessel = estimate.elements / (estimate.elements - 1).clamp_min(1)
            for number, factor in zip(numbers, sums.split(bessel)):
                if number in self._biased:
                    factor.fill_(1)
            var = var * bessel
        stored = self._with_prior(numbers, mean, var, estimate.samples) if self.prior else (mean, var)
        vectors = zip(*(sums.split(v) for v in (mean, var, *stored, estimate.mean_error, estimate.var_error)))
        # All counts in one transfer; they are the same for all channels of a layer.
        firsts = [0, *accumulate(sums.channels)][:-1]
        counts = torch.stack((estimate.batches, estimate.elements, estimate.samples, sums.totals[0])).T[firsts].tolist()
        found = {}
        for number, of_layer, (batches, elements, samples, used) in zip(numbers, vectors, counts):
            if used:
                mean, var, stored_mean, stored_var, mean_error, var_error = of_layer
                old_mean, old_var = views(self.layers[number])
                found[number] = LayerStatistics(
                    mean=mean, var=var, stored=(stored_mean.to(old_mean), stored_var.to(old_var)),
                    mean_error=mean_error, var_error=var_error,
                    batches=int(batches), samples=int(samples), elements=int(elements),
                )  # fmt: skip
        return found

    def _with_prior(self, numbers: Sequence[int], mean: Tensor, var: Tensor, samples: Tensor) -> Moments:
        """The moments of the layers, concatenated, mixed with the old statistics as `prior` samples."""
        old = (self._sums.split(old) for old in self._old)
        m0, v0 = (torch.cat([parts[number] for number in numbers]).to(mean.device) for parts in old)
        w = self.prior / (self.prior + samples)
        return w * m0 + (1 - w) * mean, w * v0 + (1 - w) * var + w * (1 - w) * (m0 - mean).square()

    def _so_far(self, number: int) -> Moments:
        """The statistics of a layer from the batches collected so far; before the first batch, those in its buffers."""
        totals, pivot = self._sums.split(self._sums.totals)[number], self._sums.split(self._sums.pivot)[number]
        mean, var = self._estimator.moments(totals)
        empty = totals[0] == 0
        old_mean, old_var = (t.to(mean.device, torch.float64) for t in views(self.layers[number]))
        return torch.where(empty, old_mean, pivot + mean), torch.where(empty, old_var, var)

    def _report(self, number: int, found: LayerStatistics) -> LayerReport:
        layer = self.layers[number]
        mean, var = map(on_cpu, found.stored)
        old_mean, old_var = map(on_cpu, views(layer))
        return LayerReport(
            name=self.names[number],
            mean=mean,
            var=var,
            old_mean=old_mean,
            old_var=old_var,
            eps=layer.eps,
            feeds_itself=number in self._repeated,
            correction=int(number not in self._biased),
            computes_itself=number in self.observer.conventions,
            **found.certainty_on_cpu(),
        )

    def _first_not_finite(self) -> str:
        not_finite = [number for number, part in enumerate(self._sums.split(self._sums.not_finite)) if bool(part.any())]
        calls = list(dict.fromkeys(number for order in self._calls for number in order))
        return self.names[min(not_finite, key=lambda n: (calls.index(n) if n in calls else len(calls), n))]

    def _flat(self, name: str) -> Tensor:
        """A buffer of all layers, concatenated, float64."""
        parts = [layer._buffers[name].to(self._sums.device, torch.float64) for layer in self.layers]  # type: ignore[union-attr]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=self._sums.device)

    def _accumulator(self, numbers: Sequence[int]) -> Accumulator:
        layers = [self.layers[number] for number in numbers]
        first = layers[0].running_mean if layers else None
        device = torch.device("cpu") if first is None else first.device
        return Accumulator([layer.num_features for layer in layers], self._estimator, device)
