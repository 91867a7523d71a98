"""Layers with a forward of their own: what their `running_var` means, and evaluating them by given statistics.

What such a layer computes in training cannot be read off, so it is run on scratch buffers, and what its update makes of
them is compared with the moments of its input. C channels, n elements per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..layers.buffers import VIEW, is_narrow
from ..ops.state import moments

Moments = tuple[Tensor, Tensor]

# A share of the new batch below this leaves too few digits to tell what is shared.
_SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class InputMoments:
    """What a layer's statistics may be of.

    Attributes:
        mean, var: (C,); var is biased.
        n: elements per channel.
        dim: where the channels are in the input.
        narrow: whether the input has 16 bits, and so perhaps what the layer computes from it.
    """

    mean: Tensor
    var: Tensor
    n: int
    dim: int = 1
    narrow: bool = False


@dataclass(frozen=True)
class Convention:
    """What a layer keeps of its input.

    Attributes:
        dim: where the channels are in the input.
        correction: 1 where `running_var` has Bessel's correction, 0 where it is biased.
    """

    dim: int = 1
    correction: int = 1


class Arguments:
    """The arguments of a forward, copied, since a forward may write into its input."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))

    def copies(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Another copy of them."""
        args, kwargs = tree_map_only(Tensor, torch.clone, (self._args, self._kwargs))
        return args, kwargs


def candidates(layer: _BatchNorm, x: Tensor) -> list[InputMoments]:
    """The moments of x for each place that the channels may have: the second dimension, and the last."""
    if not x.is_floating_point():
        return []
    dims = [dim for dim in dict.fromkeys((1, x.dim() - 1)) if 0 < dim < x.dim() and x.shape[dim] == layer.num_features]
    n, narrow = x.numel() // layer.num_features, is_narrow(x)
    return [InputMoments(*moments_along(x, dim), n, dim, narrow) for dim in dims]


@torch.no_grad()
def moments_along(x: Tensor, dim: int) -> Moments:
    """Mean and biased variance of x, each (C,), for channels in this dimension."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums, _ = kernels.batch_sums(x.detach().movedim(dim, 1), wide)
    return moments(sums)


def batch_moments(x: Tensor, found: InputMoments) -> Moments:
    """Mean and biased variance of x, as `found` has them, with their gradients."""
    dims = [dim for dim in range(x.dim()) if dim != found.dim]
    wide = x.to(found.mean.dtype)
    return wide.mean(dims), wide.var(dims, correction=0)


@torch.no_grad()
def learned(
    layer: _BatchNorm, forward: Callable[..., Any], arguments: Arguments, found: Sequence[InputMoments]
) -> Convention | None:
    """The convention by which the layer's own update agrees with one of the moments; None if it does with none.

    An update is taken to be s' = (1 − a)·s + a·t, with a share a that nobody knows: `momentum` may be the share of the
    new batch or of the old, or be overruled by a schedule. So it is made from two s: from 0, which gives a·t, and from
    another, which gives a. t is to be the mean, and the variance with or without Bessel's correction: the nearer one.
    """
    for momentum in dict.fromkeys((1.0, 0.0, layer.momentum)):
        fits = [(error, c) for one in found for error, c in _fits(layer, forward, arguments, momentum, one)]
        if fits:
            return min(fits, key=lambda fit: fit[0])[1]
    return None


def _fits(
    layer: _BatchNorm, forward: Callable[..., Any], arguments: Arguments, momentum: float | None, x: InputMoments
) -> list[tuple[float, Convention]]:
    """The conventions that the update agrees with, each with the relative error of the variance."""
    narrow = x.narrow or (layer.running_var is not None and is_narrow(layer.running_var))
    rough, eps = (2**-5, 2**-9) if narrow else (1e-3, torch.finfo(torch.float32).eps)
    scale = x.mean.abs() + x.var.sqrt()
    starts = [torch.zeros_like(x.mean), torch.where(scale > 0, scale, 1)]
    starts_var = [torch.zeros_like(x.var), torch.where(x.var > 0, x.var, 1)]
    ends = [_updated(layer, forward, arguments, momentum, *start) for start in zip(starts, starts_var)]
    (mean, var), (other_mean, other_var) = ends
    share, share_var = 1 - (other_mean - mean) / starts[1], 1 - (other_var - var) / starts_var[1]
    if not bool((torch.minimum(share, share_var) > _SMALLEST_SHARE).all()):
        return []
    tolerated = rough * (x.var + layer.eps).sqrt() + 16 * eps * x.mean.abs()
    if not bool(((mean / share - x.mean).abs() <= tolerated).all()):
        return []
    # By E[x²] − E[x]², as some compute it, the variance is off by what cancels.
    tolerated = rough * (x.var + layer.eps) + 16 * eps * x.mean.square()
    fits = []
    for correction in (1, 0):
        off = (var / share_var - x.var * (x.n / (x.n - correction))).abs()
        if bool((off <= tolerated).all()):
            fits.append((float((off / (x.var + layer.eps)).max()), Convention(x.dim, correction)))
    return fits


def _updated(
    layer: _BatchNorm, forward: Callable[..., Any], arguments: Arguments, momentum: float | None,
    mean: Tensor, var: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a step of training makes of these statistics."""
    with replaced(layer, mean, var):
        # Past __setattr__, for a class may make a property of them.
        vars(layer).update(momentum=momentum, training=True)
        args, kwargs = arguments.copies()
        forward(*args, **kwargs)
        after_mean, after_var = layer.running_mean, layer.running_var
        if after_mean is None or after_var is None:
            return mean, var
        return after_mean.detach().to(mean, copy=True), after_var.detach().to(var, copy=True)


@contextmanager
def replaced(layer: _BatchNorm, mean: Tensor, var: Tensor) -> Iterator[None]:
    """The layer with other statistics, in the dtype of its own; its attributes and buffers are put back."""
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
