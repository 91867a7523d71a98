"""One recalibration: passes over the data, sums over batches and processes, and the statistics written at the end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .accumulate import Accumulator, Estimator, MeanOfBatches, Population
from .batches import Progress
from .buffers import VIEW, PooledStatistics
from .observe import EnoughSeen, Moments, Observer
from .ranks import Ranks, interrupts_deferred
from .report import LayerReport, StatsReport
from .selection import Layers, chosen

logger = logging.getLogger("runningbn")

_ESTIMATORS: dict[str, type[Estimator]] = {"population": Population, "batch": MeanOfBatches}
# With fewer batches, the scatter between them says too little about their error to stop on it.
_FEWEST_BATCHES = 8
# How far statistics may be from what evaluation shows: the mean in std, the variance relative to itself.
_SETTLED = 1e-4
# How often all layers are gone through until they have settled.
_MOST_ROUNDS = 3


@dataclass(frozen=True)
class Found:
    """The statistics of one layer; tensors are (C,), float64.

    Attributes:
        mean, var: of its input; var in the convention of the layer's `running_var`.
        stored: what the buffers will hold: with the prior mixed in, in their dtype.
        mean_error, var_error: standard errors.
        batches, samples, elements: the data they are from.
        residual: see `LayerReport`.
    """

    mean: Tensor
    var: Tensor
    stored: Moments
    mean_error: Tensor
    var_error: Tensor
    batches: int
    samples: int
    elements: int
    residual: float = float("nan")


class Recalibration:
    """Statistics being collected. `precise_bn` gives one; `update_bn_stats` works with one.

    Attributes:
        report: what came out, once the ``with`` of `precise_bn` is left; None before.
        batches: batches seen by this process.
    """

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
        self.report: StatsReport | None = None
        self.batches = 0
        self.observer = Observer(self.layers, self._so_far)
        self._estimator = _ESTIMATORS[variance]()
        self._sums = self._accumulator(range(len(self.layers)))
        self._found: dict[int, Found] = {}
        self._calls: list[list[int]] = []  # the layers in the order of their calls, batch by batch
        self._finite: list[Tensor] = []  # (), whether a batch was, batch by batch
        self._repeated: set[int] = set()  # layers called more than once in some batch
        self._passes = 1
        self._seen = self._dropped = 0  # batches of all processes
        self._sharded = False
        self._old = self._flat("running_mean"), self._flat("running_var")
        count = len(self.layers)
        self.ranks = Ranks(process_group, max(len(self._message(self._sums, done=True)), count * count))

    @contextmanager
    def together(self) -> Iterator[None]:
        """If this process fails inside, so do the others."""
        try:
            yield
        except BaseException as error:
            self.ranks.fail(error)
            raise

    def end_batch(self) -> None:
        """Add what the layers saw since the last time as one batch."""
        calls = self.observer.take_calls()
        self._calls.append([call.layer for call in calls])
        self._repeated.update(number for number, times in Counter(self._calls[-1]).items() if times > 1)
        self.batches += 1
        self._finite.append(self._sums.add(calls) if calls else torch.tensor(True))

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, as long as every process has one: for models whose forward communicates."""
        self._sharded = self.ranks.size > 1
        if self._sharded:
            logger.warning("the model is sharded: all processes stop with the first that runs out of batches")
        return self.ranks.in_step(batches)

    def collect(
        self, batches: Iterable[Any], run: Callable[[Any], None], tolerance: float | None = None, settles: bool = False
    ) -> None:
        """Run batches until they end or the statistics are known to `tolerance`; then add up over the processes.

        Args:
            settles: whether `settle` follows.
        """
        own = self._sums
        next_check = _FEWEST_BATCHES

        def check(done: bool) -> bool:
            with interrupts_deferred():
                merged, everyone_done = self._exchange(own, done)
                # While others go on, all look at the same sums and come to the same end.
                enough = everyone_done or (tolerance is not None and self._known_to(tolerance, merged))
                if enough:
                    self._sums = merged
                    self.ranks.open &= settles
            return enough

        enough = False
        for batch in batches:
            run(batch)
            self.end_batch()
            if tolerance is not None and self.batches == next_check:
                # In proportion to what was seen, for checking waits for the device and for the other processes.
                next_check += (next_check + 3) // 4
                enough = check(done=False)
                if enough:
                    break
        while not enough:
            enough = check(done=True)
        self._check_sums()
        self._found = self._statistics(self._sums, range(len(self.layers)))

    def settle(self, batches: Sequence[Any], run: Callable[[Any], None], show: Progress) -> None:
        """From statistics by batches to those that evaluation shows, layer by layer in the order of their calls.

        What a layer sees in evaluation depends only on the statistics of those before it. With these fixed, one pass
        over the data, up to the layer, gives its own. A last pass, with all of them fixed, measures what is left. If
        the model has taken other ways than before, that is too much, and the layers are gone through once more.
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
            "normalize='population' has not settled: evaluation shows moments off by %.1e. Do the batches stay the "
            "same while they are kept, and is the model deterministic in evaluation?",
            self._left(),
        )

    def finish(self) -> StatsReport:
        """Write the statistics and report; the layers are as before if that is interrupted."""
        before = [(self.layers[number], self._statistics_of(self.layers[number])) for number in sorted(self._found)]
        report = StatsReport(
            [self._report(number, found) for number, found in sorted(self._found.items())],
            [name for number, name in enumerate(self.names) if number not in self._found],
            self._seen - self._dropped, self._dropped, self._passes,
            before,
        )  # fmt: skip
        if self._dropped:
            logger.warning("batches left out, not finite: %d, first in %s", self._dropped, self._first_not_finite())
        try:
            for number, found in self._found.items():
                _write(self.layers[number], *found.stored)
        except BaseException:
            report.undo()
            raise
        self.report = report
        return report

    def _pass(
        self, batches: Sequence[Any], run: Callable[[Any], None], numbers: Sequence[int], up_to: int | None = None
    ) -> Accumulator:
        """The sums of some layers over the same batches again; of this process."""
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

    def _exchange(self, sums: Accumulator, done: bool) -> tuple[Accumulator, bool]:
        """The sums of all processes, and whether all are done."""
        if self.ranks.size == 1:
            self._seen = self.batches
            return sums, done
        messages = self.ranks.exchange(self._message(sums, done))
        count, width = len(self.layers), len(self._old[0])
        everyone_done, batches, repeated, means, variances, packs = messages.split(
            [1, 1, count, width, width, messages.shape[1] - 2 - count - 2 * width], dim=1
        )
        self._seen = int(batches.sum())
        self._repeated = {number for number in range(count) if repeated[:, number].any()}
        # Old statistics may differ between processes, as they do during training with DistributedDataParallel.
        self._old = means[0], variances[0]
        return sums.merged(packs), bool(everyone_done.all())

    def _message(self, sums: Accumulator, done: bool) -> Tensor:
        status = [float(done), float(self.batches), *(float(n in self._repeated) for n in range(len(self.layers)))]
        return torch.cat([torch.tensor(status, dtype=torch.float64, device=sums.device), *self._old, sums.pack()])

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

    def _known_to(self, tolerance: float, sums: Accumulator) -> bool:
        found = self._statistics(sums, range(len(self.layers)))
        reports = [self._report(number, one) for number, one in found.items()]
        # NaN, from a single batch, is not below anything.
        return bool(reports) and all(
            one.batches >= _FEWEST_BATCHES and one.standard_error <= tolerance for one in reports
        )

    def _check_sums(self) -> None:
        if self._seen == 0:
            raise ValueError("the data loader gave no batch")
        self._dropped = int(self._sums.dropped)
        if self._dropped and not self._sums.counts[1].any():
            raise RuntimeError(f"all {self._dropped} batches were not finite, first in {self._first_not_finite()}")
        if not self._sums.counts[1].any():
            raise ValueError(f"no batch reached any of the layers {', '.join(self.names)}")
        for name, elements in zip(self.names, self._sums.split(self._sums.counts[1])):
            if elements[0] == 1:
                raise ValueError(f"{name} saw a single element per channel in all, which has no variance")

    def _statistics(self, sums: Accumulator, numbers: Sequence[int]) -> dict[int, Found]:
        """What the sums of these layers come to, for those that were used."""
        estimate = sums.estimate()
        parts = zip(*(sums.split(vector) for vector in (*estimate, sums.totals[0])))
        found = {}
        for number, (mean, var, mean_error, var_error, batches, elements, samples, total) in zip(numbers, parts):
            if not total[0]:
                continue
            layer, n = self.layers[number], elements[0]
            corrects = not isinstance(layer, PooledStatistics) or layer.corrects_variance
            if corrects and isinstance(self._estimator, Population):
                var = var * n / (n - 1).clamp_min(1)
            stored = self._with_prior(number, mean, var, float(samples[0]))
            counts = int(batches[0]), int(samples[0]), int(n)
            found[number] = Found(mean, var, stored, mean_error, var_error, *counts)
        return found

    def _with_prior(self, number: int, mean: Tensor, var: Tensor, samples: float) -> Moments:
        """What to store: the moments, mixed with the old ones of `prior` samples, in the dtype of the buffers."""
        layer = self.layers[number]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        m0, v0 = (self._sums.split(old)[number].to(mean.device) for old in self._old)
        w = self.prior / (self.prior + samples)
        mixed = w * m0 + (1 - w) * mean, w * v0 + (1 - w) * var + w * (1 - w) * (m0 - mean).square()
        mean, var = mixed if self.prior else (mean, var)
        return mean.to(layer.running_mean), var.to(layer.running_var)

    def _so_far(self, number: int) -> Moments:
        """The statistics of a layer as collected until now; before the first batch, those that it has."""
        layer = self.layers[number]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        totals, pivot = self._sums.split(self._sums.totals)[number], self._sums.split(self._sums.pivot)[number]
        mean, var = self._estimator.moments(totals)
        empty = totals[0] == 0
        old_mean, old_var = (t.to(mean.device, torch.float64) for t in (layer.running_mean, layer.running_var))
        return torch.where(empty, old_mean, pivot + mean), torch.where(empty, old_var, var)

    def _report(self, number: int, found: Found) -> LayerReport:
        layer = self.layers[number]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        tensors = (*found.stored, layer.running_mean, layer.running_var, found.mean_error, found.var_error)
        mean, var, old_mean, old_var, *errors = (t.detach().to("cpu", torch.float64, copy=True) for t in tensors)
        return LayerReport(
            self.names[number], mean, var, old_mean, old_var, layer.eps, errors[0], errors[1],
            found.batches, found.samples, found.elements, found.residual, number in self._repeated,
        )  # fmt: skip

    def _left(self) -> float:
        """The largest residual of the layers that do not feed themselves."""
        left = [found.residual for number, found in self._found.items() if number not in self._repeated]
        return max(left, default=0.0)

    def _first_not_finite(self) -> str:
        not_finite = [number for number, part in enumerate(self._sums.split(self._sums.not_finite)) if bool(part.any())]
        calls = list(dict.fromkeys(number for way in self._calls for number in way))
        return self.names[min(not_finite, key=lambda n: (calls.index(n) if n in calls else len(calls), n))]

    def _statistics_of(self, layer: _BatchNorm) -> dict[str, Tensor]:
        """Copies of the buffers that writing statistics changes."""
        names = layer.statistics_names if isinstance(layer, PooledStatistics) else VIEW
        return {name: layer._buffers[name].clone() for name in names}  # type: ignore[union-attr]

    def _flat(self, name: str) -> Tensor:
        """A buffer of all layers, side by side, float64."""
        parts = [layer._buffers[name].to(self._sums.device, torch.float64) for layer in self.layers]  # type: ignore[union-attr]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def _accumulator(self, numbers: Sequence[int]) -> Accumulator:
        layers = [self.layers[number] for number in numbers]
        first = layers[0].running_mean if layers else None
        device = torch.device("cpu") if first is None else first.device
        return Accumulator([layer.num_features for layer in layers], self._estimator, device)


@torch.no_grad()
def _write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    if isinstance(layer, PooledStatistics):
        layer.replace_statistics(mean, var)
        return
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)


def _distance(one: Found, other: Found, eps: float) -> float:
    """The largest difference between two statistics of a layer: of means in std, of variances relative to them."""
    scale = other.var + eps
    by_mean = (one.mean - other.mean).abs() / scale.sqrt()
    by_var = (one.var - other.var).abs() / scale
    return float(torch.maximum(by_mean, by_var).max())
