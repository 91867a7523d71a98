"""Intercept or record calls of torch's batch_norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..layers.base import Layer

# Argument names of the two functions that all of torch's own BatchNorm layers call.
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


class BatchNormInterceptor(TorchFunctionMode):
    """Replaces the calls of ``batch_norm`` that use the statistics of a layer.

    Attributes:
        intercepted: whether such a call was replaced.
        uses_slice: whether a call used a view of the statistics; it is not replaced.

    Args:
        layer: the layer.
        normalize: ``normalize(mask, input, weight, bias, eps)``, called in place of ``batch_norm``. The mask is that of
            a layer of this library, or None.
    """

    def __init__(self, layer: _BatchNorm, normalize: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.running_mean, self.normalize = layer, layer.running_mean, normalize
        self.intercepted = self.uses_slice = False
        self._mask: Tensor | None = None

    def __enter__(self) -> BatchNormInterceptor:
        # Only here it is known what is a mask: a subclass may call its ``super().forward`` with other arguments.
        if isinstance(self.layer, Layer):
            vars(self.layer)["_normalize_only"] = self._normalize_only
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        vars(self.layer).pop("_normalize_only", None)
        super().__exit__(*exception)

    def _normalize_only(self, x: Tensor, ranks: Any, mask: Tensor | None) -> Tensor:
        """In the place of the method of the layer: the same, with the mask known meanwhile."""
        self._mask = mask
        try:
            return Layer._normalize_only(self.layer, x, ranks, mask)  # type: ignore[arg-type]
        finally:
            self._mask = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ARGUMENTS:
            call = _by_name(func, args, kwargs)
            if call["running_mean"] is self.running_mean:
                self.intercepted = True
                affine = call.get("weight"), call.get("bias")
                return self.normalize(self._mask, call["input"], *affine, call.get("eps", 1e-5))
            self.uses_slice |= _share_memory(call["running_mean"], self.running_mean)
        return func(*args, **(kwargs or {}))


class OutsideUseRecorder(TorchFunctionMode):
    """Records the layers whose `running_mean`, or a slice of it, reaches ``batch_norm`` outside of their own forward.

    Args:
        layers: the observed layers; an `Observer` runs their forwards, so these do not call ``batch_norm``.
        found: the set to which the indices of the recorded layers are added.
    """

    def __init__(self, layers: Sequence[_BatchNorm], found: set[int]) -> None:
        super().__init__()
        self.layers, self.found = layers, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ARGUMENTS:
            used = _by_name(func, args, kwargs)["running_mean"]
            self.found.update(n for n, layer in enumerate(self.layers) if _share_memory(used, layer.running_mean))
        return func(*args, **(kwargs or {}))


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of ``batch_norm``."""
    return dict(zip(_ARGUMENTS[func], args)) | (kwargs or {})


def _share_memory(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
