"""What all layers do alike: refuse a bad input, and normalise where the state is not updated.

Shapes: N batch, C channels, `*` any trailing dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..ops.compat import is_observed
from ..ops.masks import blank, check_mask, fill
from ..ops.pooling import RankGroup, ranks_of
from ..ops.spec import StepSpec
from ..ops.step import normalize_by_batch, step_at_once
from .buffers import is_narrow
from .state_dicts import LoadableStatistics


class Layer(LoadableStatistics):
    """The checks and the evaluation of every layer; a training step is for its subclasses."""

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        # In the order of torch, whose table of wrong inputs has several faults at once.
        self._check_input_dim(x)
        if self.eps <= 0:
            self._check_eps()
        if x.shape[1] != self.num_features:
            raise RuntimeError(f"expected {self.num_features} channels in dimension 1, got shape {tuple(x.shape)}")
        reference = self._own("weight")
        if reference is None:
            reference = self._own("running_mean")
        dtype = x.dtype
        expected = dtype if reference is None else reference.dtype
        if (dtype != expected and not (expected == torch.float32 and is_narrow(x))) or not dtype.is_floating_point:
            also = " or of 16 bits" if expected == torch.float32 else ""
            raise RuntimeError(f"expected a floating-point input of {expected}{also} as in the layer, got {dtype}")
        if mask is not None:
            check_mask(mask, x)

    def _spec(self) -> StepSpec:
        """What a training step is to do."""
        raise NotImplementedError

    def _step_at_once(self, x: Tensor) -> Tensor | None:
        """A training step where nothing is out of the ordinary; None, with nothing changed, elsewhere."""
        if not self.training or self.sync or not (x.is_cpu and kernels.is_ordinary()):
            return None
        self._check_input_dim(x)
        return step_at_once(self, x)

    def _check_eps(self) -> None:
        """For an eps that is not positive: evaluation by statistics takes 0, nothing takes less."""
        if self.training or self._own("running_mean") is None:
            raise ValueError(f"batch_norm eps must be positive during training, got eps={self.eps}")
        if self.eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, got eps={self.eps}")

    def _own(self, name: str) -> Tensor | None:
        """``getattr(self, name)`` of a parameter or buffer, for which nn.Module looks everywhere else first."""
        if name in self._parameters:
            return self._parameters[name]
        if name in self._buffers:
            return self._buffers[name]
        # Parametrised, or a replica of nn.DataParallel.
        value: Tensor | None = getattr(self, name)
        return value

    def _weight_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._own("weight"), self._own("bias")
        for name, parameter in (("weight", weight), ("bias", bias)):
            # functional_call passes on whatever it is given, and kernels take it for C numbers.
            if parameter is not None and parameter.numel() != self.num_features:
                raise RuntimeError(f"{name}: expected shape ({self.num_features},), got {tuple(parameter.shape)}")
        return weight, bias

    def _ranks(self) -> RankGroup | None:
        """The ranks to pool this forward over."""
        if not (self.sync and self.training and self.num_features > 0):
            return None
        return ranks_of(self.process_group, self._buffers.get("last_keep"))

    def _updates(self, x: Tensor, ranks: RankGroup | None) -> bool:
        if not (self.training and self.track_running_stats and self._own("running_mean") is not None):
            return False
        # With others to wait for it, a rank takes part whatever it has.
        return x.numel() > 0 or ranks is not None

    def _normalize_only(self, x: Tensor, ranks: RankGroup | None, mask: Tensor | None) -> Tensor:
        """Normalise by the running statistics, or by the batch where ``nn.BatchNorm`` would, and update nothing."""
        mean, var = self._own("running_mean"), self._own("running_var")
        weight, bias = self._weight_and_bias()
        if mean is None or (self.training and not self.track_running_stats):
            if ranks is not None or mask is not None:
                dtype = torch.float32 if is_narrow(x) else x.dtype
                return normalize_by_batch(x, weight, bias, self.eps, dtype, ranks, mask)
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        # torch's CPU kernel refuses 16-bit weights beside float32 statistics. A `to` without effect takes time, too.
        if weight is not None and weight.dtype != mean.dtype:
            weight = weight.to(mean.dtype)
        if bias is not None and bias.dtype != mean.dtype:
            bias = bias.to(mean.dtype)
        if mask is not None:
            x = fill(x, mask, mean)
        if _is_recorded(x, weight, bias):
            # A training step before the backward writes to the buffers, which autograd would report as an error.
            mean, var = mean.clone(), None if var is None else var.clone()
        # What F.batch_norm calls, without its way there, which is long for a small input.
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled)
        return y if mask is None else blank(y, mask)


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd, and nothing else, records an operation on these; compiled and traced code needs the buffers."""
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return False
    return not is_observed()
