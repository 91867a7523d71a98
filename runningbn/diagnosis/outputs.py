"""Compare the outputs of a model with two sets of statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class OutputChange:
    """The change of the outputs from the stored statistics. NaN if they cannot be compared.

    Attributes:
        relative_rms: ‖y − y₀‖/‖y₀‖ over all floating-point tensors of all outputs, where y₀ are the outputs with the
            stored statistics.
        agreement: fraction of positions at which the argmax over K is the same, in the first tensor of shape (N, K, …)
            with K > 1; for class scores, the top-1 agreement.
        batches: number of batches compared, without those with an output that is not finite.
    """

    relative_rms: float
    agreement: float
    batches: int


class Comparison:
    """Adds up the differences of outputs, batch by batch."""

    def __init__(self) -> None:
        self._difference = self._norm = 0.0
        self._same = self._places = 0
        self._batches = 0

    def add(self, before: Any, after: Any) -> None:
        """Add the outputs for one batch: with the stored statistics, and with others."""
        ours, others = list(_tensors(before)), list(_tensors(after))
        alike = [tensor.shape for tensor in ours] == [tensor.shape for tensor in others]
        if not ours or not alike or not all(bool(tensor.isfinite().all()) for tensor in (*ours, *others)):
            return
        pairs = list(zip(ours, others))
        self._batches += 1
        for a, b in pairs:
            self._difference += float(torch.linalg.vector_norm(_wide(b) - _wide(a))) ** 2
            self._norm += float(torch.linalg.vector_norm(_wide(a))) ** 2
        for a, b in pairs:
            if a.dim() > 1 and a.shape[1] > 1:
                same = a.argmax(1) == b.argmax(1)
                self._same += int(same.sum())
                self._places += same.numel()
                break

    def result(self) -> OutputChange:
        """The result over all batches."""
        nan = float("nan")
        if self._norm > 0:
            relative = (self._difference / self._norm) ** 0.5
        else:
            relative = 0.0 if self._batches and self._difference == 0 else nan
        return OutputChange(relative, self._same / self._places if self._places else nan, self._batches)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output: in mappings, sequences and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach()
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))
