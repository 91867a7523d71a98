"""The layers that `center_weights` creates; not meant to be constructed directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


def by_filter(layer: nn.Module) -> tuple[Tensor, list[int]]:
    """A view of the weight in which filters have separate axes, and the axes within a filter.

    The weight, (O, I/groups, *), is returned as it is. That of a transposed convolution, (I, O/groups, *), is viewed
    as (groups, I/groups, O/groups, *).
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, _ConvTransposeNd):
        weight = weight.unflatten(0, (layer.groups, -1))
        return weight, [1, *range(3, weight.dim())]
    return weight, list(range(1, weight.dim()))


def filter_means(layer: nn.Module) -> Tensor:
    """The mean of each filter over its inputs and positions, (O,)."""
    weight, axes = by_filter(layer)
    return weight.mean(axes).flatten()


class CenteredWeights(nn.Module):
    """A layer whose filters are v − mean(v) + offset, where v is the parameter `weight`.

    The mean is over the inputs and positions of each filter. The buffer `weight_offset`, (O,), has one value per
    filter. A checkpoint without it is from a plain layer: the offsets are then the means of its filters.
    """

    # The class of the same layer without centred filters.
    plain: ClassVar[type[nn.Module]]
    weight: Tensor
    weight_offset: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Layers change their class and are not constructed, except by code that makes copies with ``type(layer)(...)``.
        super().__init__(*args, **kwargs)
        self.register_buffer("weight_offset", filter_means(self).detach())

    def centered_weight(self) -> Tensor:
        """v − mean(v) + offset, in the shape of `weight`."""
        weight, axes = by_filter(self)
        shape = [1 if axis in axes else size for axis, size in enumerate(weight.shape)]
        # One reduction and one addition over the weight, forward and backward; the literal formula needs two of each.
        fan_in = weight.numel() // self.weight_offset.numel()
        shift = torch.add(self.weight_offset, weight.sum(axes).flatten(), alpha=-1 / fan_in)
        return (weight + shift.view(shape)).reshape(self.weight.shape)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        errors, offset = len(error_msgs), f"{prefix}weight_offset"
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if offset not in state_dict and f"{prefix}weight" in state_dict and len(error_msgs) == errors:
            if offset in missing_keys:
                missing_keys.remove(offset)
            means = filter_means(self).detach()
            # The means of a sharded weight are sharded, too, but the forward pass has the whole weight.
            self.weight_offset = means.full_tensor() if hasattr(means, "full_tensor") else means


class CenteredLinear(CenteredWeights, nn.Linear):
    """``nn.Linear`` with centred filters."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``, with the centred filters."""
        return F.linear(input, self.centered_weight(), self.bias)


class _CenteredConv(CenteredWeights):
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """That of the plain layer."""
        return self._conv_forward(input, self.centered_weight(), self.bias)


class CenteredConv1d(_CenteredConv, nn.Conv1d):
    """``nn.Conv1d`` with centred filters."""


class CenteredConv2d(_CenteredConv, nn.Conv2d):
    """``nn.Conv2d`` with centred filters."""


class CenteredConv3d(_CenteredConv, nn.Conv3d):
    """``nn.Conv3d`` with centred filters."""


class _CenteredConvTranspose(CenteredWeights, _ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """That of the plain layer."""
        dimensions, weight = len(self.kernel_size), self.centered_weight()
        geometry: Any = (self.stride, self.padding, self.kernel_size, dimensions, self.dilation)
        padding = self._output_padding(input, output_size, *geometry)
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        y: Tensor = function(input, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)
        return y


class CenteredConvTranspose1d(_CenteredConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with centred filters."""


class CenteredConvTranspose2d(_CenteredConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with centred filters."""


class CenteredConvTranspose3d(_CenteredConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with centred filters."""


CENTERED: dict[type[nn.Module], type[CenteredWeights]] = {
    nn.Linear: CenteredLinear,
    nn.Conv1d: CenteredConv1d,
    nn.Conv2d: CenteredConv2d,
    nn.Conv3d: CenteredConv3d,
    nn.ConvTranspose1d: CenteredConvTranspose1d,
    nn.ConvTranspose2d: CenteredConvTranspose2d,
    nn.ConvTranspose3d: CenteredConvTranspose3d,
}
for _plain, _centered in CENTERED.items():
    _centered.plain = _plain


def torch_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of torch that a class of layers is, or is derived from."""
    return next(plain for plain in CENTERED if issubclass(cls, plain))


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a subclass of torch's layer has replaced its forward, in which the filters are centred."""
    return cls.forward is not torch_class(cls).forward


def centered_class(cls: type[nn.Module]) -> type[CenteredWeights]:
    """The class with centred filters for layers of a class without a forward of its own.

    For a subclass of torch's layer, it is derived from that, too, so that its methods and ``isinstance`` still work.

    Raises:
        Exception: whatever a class raises that no other can be derived from.
    """
    base = torch_class(cls)
    if cls is base:
        return CENTERED[base]
    if cls not in _made:
        members = {"__module__": __name__, "__doc__": f"``{cls.__name__}`` with centred filters.", "plain": cls}
        _made[cls] = type(f"Centered{cls.__name__}", (CENTERED[base], cls), {**members, "__reduce_ex__": _reduced})
    return _made[cls]


_made: dict[type[nn.Module], type[CenteredWeights]] = {}


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """``__reduce_ex__`` for pickles and copies: the class is in no module, so it is created again on loading."""
    return _empty, (type(layer).plain,), layer.__getstate__() if hasattr(layer, "__getstate__") else dict(vars(layer))


def _empty(plain: type[nn.Module]) -> CenteredWeights:
    if has_own_forward(plain):
        raise TypeError(f"{plain.__name__} has a forward of its own now; layers of it with centred filters had none")
    cls = centered_class(plain)
    return cls.__new__(cls)
