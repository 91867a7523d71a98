"""The statistics of one layer while a recalibration runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .conventions import Moments
from .report import Certainty


@dataclass(frozen=True, kw_only=True)
class LayerStatistics(Certainty):
    """The statistics of one layer while a recalibration runs; tensors are (C,), float64, on the device of the layer.

    Users get a `LayerReport` of it, with the stored values and the old ones on the CPU.

    Attributes:
        mean, var: of its input; var in the convention of the layer's `running_var`.
        stored: the values to write to the buffers: with the prior mixed in, in their dtype.
    """

    mean: Tensor
    var: Tensor
    stored: Moments

    def certainty_on_cpu(self) -> dict[str, Any]:
        """The fields of `Certainty` by name."""
        values = {field.name: getattr(self, field.name) for field in fields(Certainty)}
        return {name: on_cpu(value) if isinstance(value, Tensor) else value for name, value in values.items()}


def on_cpu(vector: Tensor) -> Tensor:
    """A copy, in float64."""
    return vector.detach().to("cpu", torch.float64, copy=True)
