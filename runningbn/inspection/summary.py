"""bn_summary: a table of the statistics of every BatchNorm layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from ..recalibration.text import table
from .nested import walk

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class LayerSummary:
    """The mean and std, over the channels, of the statistics of one layer.

    Attributes:
        name: of the layer in the model.
        channels: the number of channels, C.
        mean_mean, mean_std: of `running_mean`; NaN if it has no values, as on the meta device.
        var_mean, var_std: the same of `running_var`.
        batches: `num_batches_tracked`; None if there is none.
    """

    name: str
    channels: int
    mean_mean: float
    mean_std: float
    var_mean: float
    var_std: float
    batches: int | None


class Summary(Sequence[LayerSummary]):
    """A list of `LayerSummary` that prints as a table."""

    def __init__(self, layers: Iterable[LayerSummary]) -> None:
        self._layers = list(layers)

    @overload
    def __getitem__(self, index: int) -> LayerSummary: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerSummary]: ...
    def __getitem__(self, index: int | slice) -> LayerSummary | list[LayerSummary]:
        """The summary of a layer by its index, or a list of summaries for a slice."""
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        """A table, in the order of the model."""
        header = ("layer", "channels", "running_mean", "running_var", "batches tracked")
        rows = [
            (
                row.name,
                str(row.channels),
                f"{row.mean_mean:.4g} ± {row.mean_std:.3g}",
                f"{row.var_mean:.4g} ± {row.var_std:.3g}",
                "-" if row.batches is None else f"{row.batches:,}",
            )
            for row in self._layers
        ]
        return table(header, rows)

    __repr__ = __str__


def bn_summary(model_or_state_dict: nn.Module | ExportedProgram | Mapping[str, Any]) -> Summary:
    """Mean and standard deviation, over the channels, of `running_mean` and `running_var` of every BatchNorm layer.

    `running_mean` is the mean of a layer's input per channel and `running_var` its variance; evaluation normalises by
    both. Every module with both is listed, of any class, so a scripted model is listed as the original one.

    Args:
        model_or_state_dict: a model, a result of ``torch.export.export`` or of ``state_dict()``, or a checkpoint with
            state dicts at any depth, whose keys are then part of the names.

    Returns:
        A sequence of `LayerSummary` that prints as a table.

    Raises:
        TypeError: for anything else.

    Example:
        >>> from torch import nn
        >>> from runningbn import bn_summary
        >>> print(bn_summary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))))
        layer  channels  running_mean  running_var  batches tracked
        1             8         0 ± 0        1 ± 0                0
    """
    # For an exported program, this is a dict, not a method. Its class is not checked: importing torch.export is slow.
    exported = getattr(model_or_state_dict, "state_dict", None)
    if isinstance(model_or_state_dict, nn.Module):
        found = _of_model(model_or_state_dict)
    elif isinstance(model_or_state_dict, Mapping):
        found = _of_checkpoint(model_or_state_dict)
    elif isinstance(exported, Mapping):
        found = _of_checkpoint(exported)
    else:
        raise TypeError(
            "bn_summary: expected a module or a state dict, or an exported program, "
            f"got {type(model_or_state_dict).__name__}"
        )
    return Summary(_summary(*row) for row in found)


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    for name, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        yield from _of_state_dict(own, name)


def _of_checkpoint(contents: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    for place, state in walk(contents):
        yield from _of_state_dict(state, str(place))


def _of_state_dict(state: Mapping[str, Any], place: str) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    for key, mean in state.items():
        if key.rpartition(".")[2] == "running_mean":
            prefix = key.removesuffix("running_mean")
            var = state.get(prefix + "running_var")
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                name = ".".join(part for part in (place, prefix.removesuffix(".")) if part)
                yield name, mean, var, state.get(prefix + "num_batches_tracked")


def _summary(name: str, mean: Tensor, var: Tensor, tracked: Any) -> LayerSummary:
    if mean.is_meta or var.is_meta:
        nothing = float("nan")
        return LayerSummary(name, mean.numel(), nothing, nothing, nothing, nothing, None)
    means, variances = (values.detach().to("cpu", torch.float64) for values in (mean, var))
    return LayerSummary(
        name, means.numel(), float(means.mean()), float(means.std(correction=0)),
        float(variances.mean()), float(variances.std(correction=0)), batches_tracked(tracked),
    )  # fmt: skip


def batches_tracked(tracked: Any) -> int | None:
    """`num_batches_tracked` as an integer; None if there is none, or if it is not a finite number.

    Averaging weights may have made it a fraction, which is truncated.
    """
    if not isinstance(tracked, Tensor) or tracked.is_meta or tracked.numel() != 1 or not tracked.isfinite().all():
        return None
    return int(tracked)
