"""One run: a stack of models, all rates and all seeds at once, trained, and scored in evaluation mode."""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn import update_bn_stats

from .experiments import ALL_LAYERS
from .grid import Job
from .networks import build_stack
from .results import Record
from .tasks import TASKS, Data, Part, Task, schedule

EVALUATED_AT_ONCE = 64
RECALIBRATED_AT_ONCE = 64


OPTIMIZERS = {"SGD": partial(torch.optim.SGD, momentum=0.9), "plain SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


class RatedOptimizer:
    """A torch optimizer with a rate for each model of a stack.

    It takes a step at rate 1, of which each model goes the part that is its rate: steps of SGD and AdamW, weight decay
    included, are proportional to the rate.
    """

    def __init__(self, kind: str, stack: nn.Module, rates: Tensor) -> None:
        self.parameters = list(stack.parameters())
        self.optimizer = OPTIMIZERS[kind](self.parameters, lr=1.0, fused=True)
        self.rates = [_per_row(rates, parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update all models with this part of their rates, and drop the gradients."""
        before = [parameter.clone() for parameter in self.parameters]
        self.optimizer.step()
        for parameter, old, rate in zip(self.parameters, before, self.rates, strict=True):
            parameter.copy_(old.lerp_(parameter, rate * factor))
        self.optimizer.zero_grad()


def _per_row(rates: Tensor, parameter: Tensor) -> Tensor:
    """The rate of the model that each row of a parameter belongs to, (rows, 1, ..., 1)."""
    rows = rates.repeat_interleave(len(parameter) // len(rates))
    return rows.view(-1, *[1] * (parameter.dim() - 1))


def stacked(samples: Tensor, copies: int) -> Tensor:
    """Samples of every seed, (S, N, C, *), as the input of a stack of copies · S models, (N, M·C, *)."""
    side_by_side = samples.transpose(0, 1).flatten(1, 2)
    return torch.cat([side_by_side] * copies, 1)


def logits_by_model(outputs: Tensor, models: int) -> Tensor:
    """(N, M·K, *) to (N, M, K, *), without the positions of a classifier, which are one."""
    logits = outputs.unflatten(1, (models, -1))
    return logits.flatten(2) if logits[0, 0, 0].numel() == 1 else logits


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each model, (M,), from (N, M, K, *) and (N, M, *)."""
    by_sample = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none")
    return by_sample.view(*labels.shape).transpose(0, 1).flatten(1).mean(1)


def train(
    stack: nn.Module, optimizer: RatedOptimizer, part: Part, batches: Tensor, copies: int, falling: bool = True
) -> None:  # fmt: skip
    """One step per batch of sample numbers, (steps, S, N), at rates that fall to zero linearly, or stay."""
    stack.train()
    models = batches.shape[1] * copies
    for step, batch in enumerate(batches):
        outputs = stack(stacked(part.inputs[batch], copies))
        labels = torch.cat([part.labels[batch].transpose(0, 1)] * copies, 1)
        # The gradient of the sum is, for each model, that of its own loss.
        losses(logits_by_model(outputs, models), labels).sum().backward()
        optimizer.step(1 - step / len(batches) if falling else 1.0)


@torch.no_grad()
def evaluate(stack: nn.Module, task: Task, part: Part, models: int) -> tuple[list[float], list[float]]:
    """Score and mean loss of every model. A model of NaNs is evaluated like any other: it answers 0."""
    stack.eval()
    answers, loss = [], torch.zeros(models, dtype=torch.float64)
    for inputs, labels in zip(part.inputs.split(EVALUATED_AT_ONCE), part.labels.split(EVALUATED_AT_ONCE), strict=True):
        logits = logits_by_model(stack(torch.cat([inputs] * models, 1)), models)
        answers.append(logits.argmax(2))
        everybody = labels.unsqueeze(1).expand(-1, models, *labels.shape[1:])
        loss += losses(logits, everybody).double() * len(inputs)
    return task.score(torch.cat(answers), part.labels).tolist(), (loss / len(part.inputs)).tolist()


def recalibrate(stack: nn.Module, part: Part, models: int) -> None:
    """`update_bn_stats` with all training samples, in shuffled batches."""
    order = torch.randperm(len(part.inputs), generator=torch.Generator().manual_seed(0))
    batches = [torch.cat([part.inputs[some]] * models, 1) for some in order.split(RECALIBRATED_AT_ONCE)]
    update_bn_stats(stack, batches)


def run(job: Job, samples: int) -> list[Record]:
    """Train a contender in a cell and score it; a record for it and for each other name that its run stands for.

    A contender that cannot train there, as BatchNorm on one value per channel, gets a record with the error.
    """
    cell, contender, models = job.cell, ALL_LAYERS[job.contender], len(job.rates) * len(job.seeds)
    task = TASKS[cell.task]
    data = task.data(cell.one_class)
    begin = time.perf_counter()
    order = [schedule(data.train.classes, cell.batch, cell.one_class, samples, seed) for seed in job.seeds]
    batches = torch.stack(order, 1)
    stack = build_stack(task.network, contender.norm(len(batches)), job.seeds, len(job.rates))
    optimizer = RatedOptimizer(cell.optimizer, stack, torch.tensor(job.rates).repeat_interleave(len(job.seeds)))
    try:
        train(stack, optimizer, data.train, batches, len(job.rates))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return [job.record(name) | {"error": "one value per channel"} for name in contender.names(cell.batch)]
    found = dict.fromkeys(contender.names(cell.batch), scores(job, task, data, stack))
    if contender.recalibrated is not None:
        recalibrate(stack, data.train, models)
        found[contender.recalibrated] = scores(job, task, data, stack)
    seconds = round(time.perf_counter() - begin, 1)
    return [job.record(name) | of_name | {"seconds": seconds} for name, of_name in found.items()]


def scores(job: Job, task: Task, data: Data, stack: nn.Module) -> Record:
    """Scores and test losses, by rate and seed; null for a loss that is not finite."""
    models = len(job.rates) * len(job.seeds)
    validation, _ = evaluate(stack, task, data.validation, models)
    test, loss = evaluate(stack, task, data.test, models)

    def by_rate(values: list[float], digits: int) -> list[list[float | None]]:
        rounded = [round(value, digits) if math.isfinite(value) else None for value in values]
        return [rounded[i : i + len(job.seeds)] for i in range(0, len(rounded), len(job.seeds))]

    return {"validation": by_rate(validation, 5), "test": by_rate(test, 5), "loss": by_rate(loss, 4)}
