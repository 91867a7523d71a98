"""BatchNorm subclasses with a custom forward: detect their statistics convention, and run them with given statistics.

The update of such a layer is not known from its class. So the layer runs a training step on temporary buffers, and the
updated buffers are compared with the moments of its input. C channels, n elements per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import kernels
from ..layers.buffers import VIEW, is_narrow
from ..ops.compat import tree_map_only
from ..ops.state import moments

Moments = tuple[Tensor, Tensor]

# Smallest momentum (weight of the new batch) for which rounding leaves enough digits to identify the statistics.
_MIN_MOMENTUM = 1e-3


@dataclass(frozen=True)
class InputMoments:
    """Moments of the input of a layer, for one position of the channel dimension.

    Attributes:
        mean, var: (C,); var is biased.
        n: elements per channel.
        dim: the channel dimension of the input.
        narrow: whether the input has a 16-bit dtype; the layer may then compute in 16 bits, too.
    """

    mean: Tensor
    var: Tensor
    n: int
    dim: int = 1
    narrow: bool = False


@dataclass(frozen=True)
class Convention:
    """Which statistics of its input a layer stores.

    Attributes:
        dim: the channel dimension of the input.
        correction: 1 where `running_var` has Bessel's correction, 0 where it is biased.
    """

    dim: int = 1
    correction: int = 1


class Arguments:
    """A copy of the arguments of a forward, since a forward may write into its input."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))

    def copies(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Another copy of the arguments."""
        args, kwargs = tree_map_only(Tensor, torch.clone, (self._args, self._kwargs))
        return args, kwargs


def candidates(layer: _BatchNorm, x: Tensor) -> list[InputMoments]:
    """The moments of x for each possible channel dimension: the second and the last."""
    if not x.is_floating_point():
        return []
    dims = [dim for dim in dict.fromkeys((1, x.dim() - 1)) if 0 < dim < x.dim() and x.shape[dim] == layer.num_features]
    n, narrow = x.numel() // layer.num_features, is_narrow(x)
    return [InputMoments(*moments_along(x, dim), n, dim, narrow) for dim in dims]


@torch.no_grad()
def moments_along(x: Tensor, dim: int) -> Moments:
    """Mean and biased variance of x, each (C,), with the channels in dimension `dim`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums, _ = kernels.batch_sums(x.detach().movedim(dim, 1), wide)
    return moments(sums)


def batch_moments(x: Tensor, found: InputMoments) -> Moments:
    """Mean and biased variance of x, with gradients, in the channel dimension and dtype of `found`."""
    dims = [dim for dim in range(x.dim()) if dim != found.dim]
    wide = x.to(found.mean.dtype)
    return wide.mean(dims), wide.var(dims, correction=0)


@torch.no_grad()
def detect_convention(
    layer: _BatchNorm, forward: Callable[..., Any], arguments: Arguments, found: Sequence[InputMoments]
) -> Convention | None:
    """The convention for which the layer's own update agrees with one of the moments; None if there is no such one.

    The update is assumed to be s' = (1 − a)·s + a·t. The weight a of the new batch is unknown: `momentum` may be the
    weight of the new batch or of the old statistics, or a schedule may override it. So the update runs from two values
    of s: 0 gives a·t, and a second value gives a. t must be the mean, and the variance with or without Bessel's
    correction, whichever is nearer.
    """
    for momentum in dict.fromkeys((1.0, 0.0, layer.momentum)):
        fits = [(error, c) for one in found for error, c in _fits(layer, forward, arguments, momentum, one)]
        if fits:
            return min(fits, key=lambda fit: fit[0])[1]
    return None


def _fits(
    layer: _BatchNorm, forward: Callable[..., Any], arguments: Arguments, momentum: float | None, x: InputMoments
) -> list[tuple[float, Convention]]:
    """The conventions that agree with the update, each with the relative error of the variance."""
    narrow = x.narrow or (layer.running_var is not None and is_narrow(layer.running_var))
    rough, eps = (2**-5, 2**-9) if narrow else (1e-3, torch.finfo(torch.float32).eps)
    scale = x.mean.abs() + x.var.sqrt()
    starts = [torch.zeros_like(x.mean), torch.where(scale > 0, scale, 1)]
    starts_var = [torch.zeros_like(x.var), torch.where(x.var > 0, x.var, 1)]
    ends = [_after_training_step(layer, forward, arguments, momentum, *start) for start in zip(starts, starts_var)]
    (mean, var), (other_mean, other_var) = ends
    share, share_var = 1 - (other_mean - mean) / starts[1], 1 - (other_var - var) / starts_var[1]
    if not bool((torch.minimum(share, share_var) > _MIN_MOMENTUM).all()):
        return []
    tolerated = rough * (x.var + layer.eps).sqrt() + 16 * eps * x.mean.abs()
    if not bool(((mean / share - x.mean).abs() <= tolerated).all()):
        return []
    # Layers that compute the variance as E[x²] − E[x]² lose digits to cancellation.
    tolerated = rough * (x.var + layer.eps) + 16 * eps * x.mean.square()
    fits = []
    for correction in (1, 0):
        off = (var / share_var - x.var * (x.n / (x.n - correction))).abs()
        if bool((off <= tolerated).all()):
            fits.append((float((off / (x.var + layer.eps)).max()), Convention(x.dim, correction)))
    return fits


def _after_training_step(
    layer: _BatchNorm, forward: Callable[..., Any], arguments: Arguments, momentum: float | None,
    mean: Tensor, var: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The statistics after one training step that starts from `mean` and `var`."""
    with replaced(layer, mean, var):
        # Bypass __setattr__: a subclass may define these as properties.
        vars(layer).update(momentum=momentum, training=True)
        args, kwargs = arguments.copies()
        forward(*args, **kwargs)
        after_mean, after_var = layer.running_mean, layer.running_var
        if after_mean is None or after_var is None:
            return mean, var
        return after_mean.detach().to(mean, copy=True), after_var.detach().to(var, copy=True)


@contextmanager
def replaced(layer: _BatchNorm, mean: Tensor, var: Tensor) -> Iterator[None]:
    """Use these statistics in the layer, in the dtype of its buffers; then restore its attributes and buffers."""
    own, kept, buffers = vars(layer), dict(vars(layer)), dict(layer._buffers)
    stored, tracked = buffers["running_mean"], buffers.get("num_batches_tracked")
    assert stored is not None
    layer._buffers.update({name: value.to(stored, copy=True) for name, value in zip(VIEW, (mean, var))})
    if tracked is not None:
        layer._buffers["num_batches_tracked"] = torch.zeros_like(tracked)
    try:
        yield
    finally:
        layer._buffers.clear()
        layer._buffers.update(buffers)
        own.clear()
        own.update(kept)


def views(layer: _BatchNorm) -> Moments:
    """`running_mean` and `running_var` of a layer that has them."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    return mean, var


@torch.no_grad()
def write_views(layer: _BatchNorm, statistics: Moments) -> None:
    """Write `running_mean` and `running_var`, without the state of this library's layers."""
    for name, value in zip(VIEW, statistics):
        buffer = layer._buffers[name]
        assert buffer is not None
        buffer.copy_(value)
