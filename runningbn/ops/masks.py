"""Padding: batches of which only some positions count.

Shapes: N batch, C channels, `*` any trailing dimensions; a mask is (N, *), True where the element is real. Sequences of
different lengths (N, C, L), say, have a mask (N, L).

The statistics are those of the real elements alone, and N counts the samples that have any. What stands at the other
positions does not matter, be it NaN: before the normalisation they are filled with the mean, so that they add nothing
to a gradient, and after it with 0. As both are ``torch.where``, autograd knows the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.layout import spread
from .derived_tensors import plain
from .state import Sums


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Accept a bool tensor of the shape of x without its channels.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or device.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, True where the input is real, got {mask.dtype}")
    shape = x.shape[:1] + x.shape[2:]
    if mask.shape != shape:
        raise ValueError(
            f"mask: expected shape {tuple(shape)} for an input of shape {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask: expected it on {x.device} as the input, got {mask.device}")


def real_sums(x: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Sums, Tensor]:
    """Sums of the real elements about their mean as it is in `dtype`; and N, (), the samples that have any."""
    mask = plain(mask)
    x, real = x.to(dtype), mask.unsqueeze(1)
    all_but_channels = [d for d in range(x.dim()) if d != 1]
    count = mask.sum().to(dtype)
    pivot = torch.where(real, x, 0).sum(all_but_channels) / count.clamp_min(1)
    centred = torch.where(real, x - spread(pivot, x), 0)
    sums = Sums(pivot, centred.sum(all_but_channels), centred.square().sum(all_but_channels), count.expand_as(pivot))
    return sums, mask.flatten(1).any(1).sum().to(dtype) if mask.dim() > 1 else count


def fill(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    """x with the mean, (C,), at the positions that are not real."""
    limits = torch.finfo(x.dtype)
    return torch.where(plain(mask).unsqueeze(1), x, spread(mean.clamp(limits.min, limits.max).to(x.dtype), x))


def blank(y: Tensor, mask: Tensor) -> Tensor:
    """y with 0 at the positions that are not real."""
    return torch.where(plain(mask).unsqueeze(1), y, 0)
