"""Observe a model with given statistics, and restore it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.buffers import VIEW
from ..ops.compat import is_functorch_wrapped_tensor
from ..recalibration.conventions import Moments
from ..recalibration.hooks import random_state_kept
from ..recalibration.model_state import state_kept
from ..recalibration.observer import Observer


class SampleMeans(NamedTuple):
    """For one call of a layer: the mean of each sample, (N, C), and its number of positions, (N, 1); float64."""

    mean: Tensor
    positions: Tensor


class Watcher(Observer):
    """An observer that also collects the mean of every sample that reaches a layer.

    Attributes:
        collects_sample_means: whether sample means are collected; it can be switched.
    """

    def __init__(
        self, layers: list[_BatchNorm], so_far: Callable[[int], Moments], names: Sequence[str] = ()
    ) -> None:  # fmt: skip
        super().__init__(layers, so_far, names)
        self.collects_sample_means = False
        self._samples: list[list[SampleMeans]] = [[] for _ in layers]
        self._in_masked_call = False

    def take_sample_means(self) -> dict[int, Tensor]:
        """Return and clear the sample means, (N, C), by the index of the layer.

        Several calls of a layer are averaged per sample if they have the same N; otherwise they are concatenated.
        """
        taken = {number: _averaged_over_calls(calls) for number, calls in enumerate(self._samples) if calls}
        self._samples = [[] for _ in self.layers]
        return taken

    def forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `Observer.forward`. For a layer without a ``batch_norm`` call, the first tensor is its input."""
        before, convention, means = len(self._samples[number]), self.conventions.get(number), None
        if self.collects_sample_means and convention is not None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            # Before the forward, which may write into it.
            means = None if x is None else _sample_means(x, convention.dim)
        y = super().forward(number, forward, *args, **kwargs)
        if means is not None and len(self._samples[number]) == before:
            self._samples[number].append(means)
        return y

    def normalize_real(self, number: int, mask: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Observer.normalize_real`."""
        self._collect(number, x, mask)
        self._in_masked_call = True
        try:
            return super().normalize_real(number, mask, x, *args, **kwargs)
        finally:
            self._in_masked_call = False

    def normalize(self, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Observer.normalize`."""
        if not self._in_masked_call:
            self._collect(number, x, None)
        return super().normalize(number, x, *args, **kwargs)

    def _collect(self, number: int, x: Tensor, mask: Tensor | None) -> None:
        means = _sample_means(x, 1, mask) if self.collects_sample_means else None
        if means is not None:
            self._samples[number].append(means)


@torch.no_grad()
def _sample_means(x: Tensor, dim: int, mask: Tensor | None = None) -> SampleMeans | None:
    """Sample means of x with its channels in dimension `dim`, over the elements in the mask; None if undefined."""
    # The observer raises for wrong shapes. Tensors wrapped by torch.func cannot be read.
    wrapped = is_functorch_wrapped_tensor(x)
    if wrapped or not 0 < dim < x.dim() or not x.numel() or not x.is_floating_point():
        return None
    x = x.as_subclass(Tensor).movedim(dim, 1).to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        mean = x.flatten(2).mean(2) if x.dim() > 2 else x.clone()
        positions = torch.full((len(x), 1), float(x[0, 0].numel()), dtype=torch.float64, device="cpu")
    else:
        real = mask.reshape(len(x), -1, 1)
        rows = x.movedim(1, -1).reshape(len(x), -1, x.shape[1])
        used = real.any(1).squeeze(1)
        mean = (rows.masked_fill(~real, 0).sum(1) / real.sum(1))[used]
        positions = real.sum(1)[used].to("cpu", torch.float64)
    # On the CPU: small, and not every device has float64.
    return SampleMeans(mean.to("cpu", torch.float64), positions)


def _averaged_over_calls(calls: list[SampleMeans]) -> Tensor:
    if len({len(call.mean) for call in calls}) > 1:
        return torch.cat([call.mean for call in calls])
    weight = torch.stack([call.positions for call in calls])
    return (torch.stack([call.mean for call in calls]) * weight).sum(0) / weight.sum(0)


@contextmanager
def replaced_statistics(layers: list[_BatchNorm], statistics: Mapping[int, Moments]) -> Iterator[None]:
    """Replace `running_mean` and `running_var` of the layers by other tensors; the original ones are not written to."""
    own = [{name: layer._buffers[name] for name in VIEW} for layer in layers]
    try:
        for number, moments in statistics.items():
            layers[number]._buffers.update(zip(VIEW, (moment.clone() for moment in moments)))
        yield
    finally:
        for layer, buffers in zip(layers, own):
            layer._buffers.update(buffers)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the state of the model and the random state on leaving, after an exception as well."""
    with random_state_kept(model), state_kept(model):
        yield
