"""Calls of torch's batch_norm, seen from outside: taken over, or only noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

# The names of the arguments of the two functions that all of torch's own normalisation goes through.
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


class TakeOver(TorchFunctionMode):
    """Lets another function do what ``batch_norm`` is called for with a layer's own statistics.

    Attributes:
        reached: whether there was such a call.
        by_a_part: whether there was one with a view of the statistics instead.

    Args:
        running_mean: that of the layer.
        normalize: of the input, weight, bias and eps.
    """

    def __init__(
        self, running_mean: Tensor | None, normalize: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    ) -> None:
        super().__init__()
        self.running_mean, self.normalize = running_mean, normalize
        self.reached = self.by_a_part = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ARGUMENTS:
            call = dict(zip(_ARGUMENTS[func], args)) | (kwargs or {})
            if call["running_mean"] is self.running_mean:
                self.reached = True
                return self.normalize(call["input"], call.get("weight"), call.get("bias"), call.get("eps", 1e-5))
            self.by_a_part |= _share_memory(call["running_mean"], self.running_mean)
        return func(*args, **(kwargs or {}))


class Elsewhere(TorchFunctionMode):
    """Notes the layers whose `running_mean`, or a slice of it, is normalised by outside of the layer's forward.

    Args:
        layers: those that do not call ``batch_norm`` themselves while they are observed.
        found: where to add their numbers.
    """

    def __init__(self, layers: Sequence[_BatchNorm], found: set[int]) -> None:
        super().__init__()
        self.layers, self.found = layers, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ARGUMENTS:
            used = (dict(zip(_ARGUMENTS[func], args)) | (kwargs or {}))["running_mean"]
            self.found.update(n for n, layer in enumerate(self.layers) if _share_memory(used, layer.running_mean))
        return func(*args, **(kwargs or {}))


def _share_memory(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
