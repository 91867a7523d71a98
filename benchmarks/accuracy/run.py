"""One run: a stack of models, all rates and all seeds at once, trained, and scored in evaluation mode."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .contenders import CONTENDERS, DEPTHWISE, FINE_TUNED, Contender
from .jobs import Job
from .networks import build_stack
from .pretrained import pretrained_stack
from .results import Record
from .tasks import Data, Task, schedule
from .tasks_real import ALL_TASKS
from .train import RatedOptimizer, evaluate, evaluate_as_trained, recalibrate, train

EVERYBODY = CONTENDERS | DEPTHWISE | FINE_TUNED
SMALL_BATCH = 2  # up to here the training mode is scored, too,
SCORED_AS_TRAINED = 1000  # with so many test samples


@dataclass(frozen=True)
class Run:
    """A job with what it needs."""

    job: Job
    task: Task
    contender: Contender
    data: Data

    @classmethod
    def of(cls, job: Job) -> Run:
        """Look up the task and the contender, and load the data."""
        task = ALL_TASKS[job.cell.task]
        return cls(job, task, EVERYBODY[job.contender], task.data(job.cell.batches))

    @property
    def models(self) -> int:
        """In the stack: the seeds at the first rate, at the second, ..."""
        return len(self.job.rates) * len(self.job.seeds)

    def batches(self) -> torch.Tensor:
        """The samples of every step and seed, (steps, S, N)."""
        cell, classes = self.job.cell, self.data.train.classes
        return torch.stack(
            [schedule(classes, cell.batch, cell.batches, cell.samples, seed) for seed in self.job.seeds], 1
        )  # fmt: skip

    def stack(self, steps: int) -> nn.Module:
        """The models before they are trained."""
        seeds, copies = self.job.seeds, len(self.job.rates)
        if not self.task.pretrained:
            stack = build_stack(self.task.network, self.contender.norm(steps), seeds, copies)
            if self.contender.prepare is not None:
                self.contender.prepare(stack)
            return stack
        stack = pretrained_stack(self.task.network, seeds, copies)
        if self.contender.recalibrated_first:
            recalibrate(stack, self.data.train, self.models)
        if self.contender.convert is None:
            raise ValueError(f"{self.contender.name} cannot take over a net of nn.BatchNorm2d")
        self.contender.convert(stack)
        return stack

    def scores(self, stack: nn.Module) -> Record:
        """Scores and test losses, by rate and seed; null for a loss that is not finite."""
        validation, _ = evaluate(stack, self.task, self.data.validation, self.models)
        test, loss = evaluate(stack, self.task, self.data.test, self.models)
        return {
            "validation": self._by_rate(validation, 5), "test": self._by_rate(test, 5), "loss": self._by_rate(loss, 4),
        }  # fmt: skip

    def training_mode(self, stack: nn.Module) -> Record:
        """The test scores in training mode, where the training mode has statistics and the batch is small."""
        batch = self.job.cell.batch
        if not self.contender.statistics or batch > SMALL_BATCH:
            return {}
        test = type(self.data.test)(*(tensor[:SCORED_AS_TRAINED] for tensor in self.data.test))
        return {"training_mode": self._by_rate(evaluate_as_trained(stack, self.task, test, self.models, batch), 5)}

    def _by_rate(self, values: Sequence[float], digits: int) -> list[list[float | None]]:
        rounded = [round(value, digits) if math.isfinite(value) else None for value in values]
        seeds = len(self.job.seeds)
        return [rounded[i : i + seeds] for i in range(0, len(rounded), seeds)]


def run(job: Job) -> list[Record]:
    """Train a contender in a cell and score it; a record for it and for each other name that its run stands for.

    A contender that cannot train there, as BatchNorm on one value per channel, gets a record with the error.
    """
    begin = time.perf_counter()
    this = Run.of(job)
    contender, names = this.contender, this.contender.names
    batches = this.batches()
    stack = this.stack(len(batches))
    optimizer = RatedOptimizer(job.cell.optimizer, stack, torch.tensor(job.rates).repeat_interleave(len(job.seeds)))
    try:
        train(stack, optimizer, this.data.train, batches, len(job.rates), warmup=contender.warmup)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return [job.record(name) | {"error": "one value per channel"} for name in names]
    found = dict.fromkeys(names, this.scores(stack) | this.training_mode(stack))
    if contender.recalibrated is not None:
        recalibrate(stack, this.data.train, this.models)
        found[contender.recalibrated] = this.scores(stack)
    seconds = round(time.perf_counter() - begin, 1)
    return [job.record(name) | of_name | {"seconds": seconds} for name, of_name in found.items()]
