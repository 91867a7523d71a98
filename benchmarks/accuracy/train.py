"""Training a stack of models, each with its own learning rate, and scoring it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn import update_bn_stats

from .tasks import Part, Task

EVALUATED_AT_ONCE = 64  # samples, but fewer if they are large:
POSITIONS_AT_ONCE = 8 * 28**2  # a stack of 15 is slower with more of them
RECALIBRATED_AT_ONCE, RECALIBRATED_WITH = 64, 1280

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
    stack: nn.Module, optimizer: RatedOptimizer, part: Part, batches: Tensor, copies: int, falling: bool = True,
    warmup: float = 0.0,
) -> None:  # fmt: skip
    """One step per batch of sample numbers, (steps, S, N), at rates that fall to zero linearly, or stay.

    In a part `warmup` of the steps, the first, they also rise from zero.
    """
    stack.train()
    models = batches.shape[1] * copies
    for step, batch in enumerate(batches):
        outputs = stack(stacked(part.inputs[batch], copies))
        labels = torch.cat([part.labels[batch].transpose(0, 1)] * copies, 1)
        # The gradient of the sum is, for each model, that of its own loss.
        losses(logits_by_model(outputs, models), labels).sum().backward()
        factor = 1 - step / len(batches) if falling else 1.0
        optimizer.step(factor * min(1.0, (step + 1) / max(1.0, warmup * len(batches))))


@torch.no_grad()
def evaluate(stack: nn.Module, task: Task, part: Part, models: int) -> tuple[list[float], list[float]]:
    """Score and mean loss of every model. A model of NaNs is evaluated like any other: it answers 0."""
    positions = part.inputs[0, 0].numel()
    at_once = max(1, min(EVALUATED_AT_ONCE, POSITIONS_AT_ONCE // positions))
    stack.eval()
    return _scored(stack, task, part, models, at_once)


@torch.no_grad()
def evaluate_as_trained(stack: nn.Module, task: Task, part: Part, models: int, batch: int) -> list[float]:
    """The score of every model in training mode, with batches as in training, by a copy that is thrown away."""
    copied = copy.deepcopy(stack).train()
    return _scored(copied, task, part, models, batch)[0]


def _scored(stack: nn.Module, task: Task, part: Part, models: int, batch: int) -> tuple[list[float], list[float]]:
    """Score and mean loss of every model as it is."""
    answers, loss = [], torch.zeros(models, dtype=torch.float64)
    for inputs, labels in zip(part.inputs.split(batch), part.labels.split(batch), strict=True):
        logits = logits_by_model(stack(torch.cat([inputs] * models, 1)), models)
        answers.append(logits.argmax(2))
        everybody = labels.unsqueeze(1).expand(-1, models, *labels.shape[1:])
        loss += losses(logits, everybody).double() * len(inputs)
    return task.score(torch.cat(answers), part.labels).tolist(), (loss / len(part.inputs)).tolist()


def recalibrate(stack: nn.Module, part: Part, models: int) -> None:
    """`update_bn_stats` with training samples, all or `RECALIBRATED_WITH`, in shuffled batches."""
    order = torch.randperm(len(part.inputs), generator=torch.Generator().manual_seed(0))[:RECALIBRATED_WITH]
    numbers = order.split(RECALIBRATED_AT_ONCE)
    with broken_models_aside(stack, torch.cat([part.inputs[numbers[0]]] * models, 1), models):
        update_bn_stats(stack, (torch.cat([part.inputs[some]] * models, 1) for some in numbers))


@contextmanager
def broken_models_aside(stack: nn.Module, example: Tensor, models: int) -> Iterator[None]:
    """Zeros in the place of models whose outputs are not finite; afterwards they are as before.

    `update_bn_stats` leaves out batches that are not finite anywhere, which would be all of them, for everybody.
    """
    with torch.no_grad():
        outputs = logits_by_model(copy.deepcopy(stack).train()(example), models)
        broken = ~outputs.isfinite().transpose(0, 1).flatten(1).all(1)
        tensors = [tensor.detach() for tensor in (*stack.parameters(), *stack.buffers()) if tensor.dim()]
        by_model = [tensor.view(models, -1) for tensor in tensors]
        before = [rows[broken] for rows in by_model]
        for rows in by_model:
            rows[broken] = 0
    try:
        yield
    finally:
        for rows, values in zip(by_model, before, strict=True):
            rows[broken] = values
