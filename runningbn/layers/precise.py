"""PreciseBatchNorm1d/2d/3d.

Shapes: N batch, C channels, `*` any trailing dimensions.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..ops.derived_tensors import is_derived, through_class
from ..ops.law import Law
from ..ops.spec import Mode, StepSpec
from ..ops.step import training_step
from .base import Layer


class PreciseBatchNorm(Layer):
    """What the three layers below share; only their input shapes differ."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (N, C, *): in training by the batch, which enters the state, else by the pooled statistics.

        `mask`, (N, *), is True where the input is real.
        """
        if type(input) is not Tensor and is_derived(input):
            return through_class(partial(PreciseBatchNorm.forward, self, mask=mask), self, input)
        if mask is None and (y := self._step_at_once(input)) is not None:
            return y
        self._check_input(input, mask)
        ranks = self._ranks()
        if not self._updates(input, ranks):
            return self._normalize_only(input, ranks, mask)
        # Of the other ranks' values nothing is known here without waiting for them on the host.
        if ranks is None and input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        weight, bias = self._weight_and_bias()
        return training_step(input, weight, bias, self._spec(), self._layer_state(False), ranks, mask)

    def _spec(self) -> StepSpec:
        return StepSpec(Mode.BATCH, self.eps, self.momentum, Law())


class PreciseBatchNorm1d(PreciseBatchNorm, nn.BatchNorm1d):
    r"""Batch normalisation that trains as ``nn.BatchNorm1d`` does and evaluates with exact pooled statistics.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    Training normalises by the mean and biased variance of the batch; outputs and gradients are those of
    ``nn.BatchNorm``. Evaluation normalises by `running_mean` and `running_var`: the moments of all elements seen, each
    with its weight w, the variance *between* batches included, with Bessel's correction for weighted elements:

    .. math::
        m = \frac{\sum w x}{\sum w}, \qquad
        v = \frac{\sum w (x - m)^2}{\sum w} \cdot \frac{1}{1 - \sum w^2 / (\sum w)^2}

    With ``momentum=None`` v is ``torch.var(everything seen, correction=1)``, however the data were split into batches;
    after one batch it is what ``nn.BatchNorm`` has with momentum 1.

    If the batch is not finite in a channel, that channel keeps its statistics, and its output is NaN, as in
    ``nn.BatchNorm``. An empty batch changes nothing. While a backward pass is running, as in a recomputation under
    activation checkpointing, the statistics are not updated. ``layer(x, mask)`` excludes padding, as in
    `RunningBatchNorm`.

    Args:
        num_features: number of channels, C.
        eps: added to the variance; > 0 in training.
        momentum: weight a of a new batch: a float, None for the cumulative average a = 1/t, or a rule (`Horizon`,
            `SquareRoot`).
        affine: whether to learn γ (`weight`) and β (`bias`).
        track_running_stats: if False, no statistics are kept, and each batch is normalised by its own statistics, in
            evaluation too.
        device, dtype: of parameters and statistics; the latter are at least float32.
        bias: if False, no β.
        sync, process_group: as in `RunningBatchNorm`. Outputs and gradients are then those of ``nn.SyncBatchNorm``.

    Shape:
        - Input: (N, C) or (N, C, L). Its dtype is that of the parameters; float32 parameters also take float16 and
          bfloat16 inputs.
        - Mask: (N,) or (N, L), bool, True where the input is real.
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError: for a wrong number of dimensions, one value per channel or eps ≤ 0 in training, a momentum outside
            [0, 1], a mask of another shape, or a `process_group` without `sync`. If a mask leaves one value per
            channel, or all processes together have one, no error is raised, since the check would have to wait for the
            device or for the other processes.
        TypeError: for a mask that is not bool, a momentum that is not a float, None or a rule, a `sync` that is not a
            bool, or a `process_group` that is not a group.
        RuntimeError: for a wrong number of channels, a dtype that does not fit the parameters, or a second
            derivative over several processes.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015; Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    arXiv:2105.07576, for exact population statistics.

    Example:
        >>> import torch
        >>> from runningbn import PreciseBatchNorm1d
        >>> layer, data = PreciseBatchNorm1d(3, momentum=None), torch.randn(96, 3)
        >>> for batch in data.split([32, 60, 4]):
        ...     _ = layer(batch)
        >>> torch.allclose(layer.running_var, data.var(0))
        True
    """


class PreciseBatchNorm2d(PreciseBatchNorm, nn.BatchNorm2d):
    """As `PreciseBatchNorm1d`, for ``nn.BatchNorm2d``.

    Shape:
        - Input: (N, C, H, W).
        - Mask: (N, H, W).
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError, TypeError, RuntimeError: as `PreciseBatchNorm1d`.

    Example:
        >>> import torch
        >>> from runningbn import PreciseBatchNorm2d
        >>> PreciseBatchNorm2d(16)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """


class PreciseBatchNorm3d(PreciseBatchNorm, nn.BatchNorm3d):
    """As `PreciseBatchNorm1d`, for ``nn.BatchNorm3d``.

    Shape:
        - Input: (N, C, D, H, W).
        - Mask: (N, D, H, W).
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError, TypeError, RuntimeError: as `PreciseBatchNorm1d`.

    Example:
        >>> import torch
        >>> from runningbn import PreciseBatchNorm3d
        >>> PreciseBatchNorm3d(4)(torch.randn(2, 4, 3, 8, 8)).shape
        torch.Size([2, 4, 3, 8, 8])
    """
