"""The layers: RunningBatchNorm and PreciseBatchNorm1d/2d/3d.

Shapes: N batch, C channels, `*` any trailing dimensions; n = elements per channel of the batch.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .buffers import PooledStatistics, is_narrow
from .distributed import RankGroup, ranks_of
from .masks import blank, check_mask, fill
from .momentum import Horizon, Momentum
from .statistics import GradientState

Gradient = Literal["running", "exact"]
# Settled by benchmarks/accuracy, see docs/accuracy.md.
MAX_LAG = 0.25


class _Layer(PooledStatistics):
    """What all layers do alike: refuse a bad input, and normalise where there is nothing to absorb."""

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        self._check_input_dim(x)
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
        if self.training and self.eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, got eps={self.eps}")
        if mask is not None:
            check_mask(mask, x)

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
        return ranks_of(self.process_group) if self.sync and self.training and self.num_features > 0 else None

    def _absorbs(self, x: Tensor, ranks: RankGroup | None) -> bool:
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
                step = functional.batch_step(x, torch.float32 if is_narrow(x) else x.dtype, ranks, mask)
                return functional.normalize(x, weight, bias, step, self.eps)
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        # torch's CPU kernel refuses 16-bit weights beside float32 statistics.
        weight = None if weight is None else weight.to(mean.dtype)
        bias = None if bias is None else bias.to(mean.dtype)
        if mask is not None:
            x = fill(x, mask, mean)
        # What F.batch_norm calls, without its way there, which is long for a small input.
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled)
        return y if mask is None else blank(y, mask)


class RunningBatchNorm(_Layer):
    r"""Batch normalisation by running statistics, in training as in evaluation: the batch size stops mattering.

    Per channel, with weights w over all elements seen so far, the current batch included,

    .. math::
        y = \frac{x - m}{\sqrt{v + \epsilon}} \gamma + \beta, \qquad
        m = \frac{\sum w x}{\sum w}, \qquad v = \frac{\sum w x^2}{\sum w} - m^2

    Training absorbs the batch, then normalises by the state; evaluation is the same formula without the update, so the
    two agree, but for `max_lag`. Before any training it evaluates as ``nn.BatchNorm`` does (mean 0, variance 1). The
    variance is biased, in `running_var` too: it is what the layer normalises by. While fewer than 20 samples have been
    seen, the current batch included, it is at least 0.01, unless the statistics were taken over from elsewhere.

    With dy = dL/dy, z = (x − m)·rstd and n elements per channel in the batch, `gradient` says what flows back through
    the statistics:

    - ``"running"``: dx = γ·rstd·[dy − G0 − z·G1], where G0 and G1 are running means of dy and dy·z, in which a batch
      weighs what it does in the forward, or n/(n + 64) if that is more. Forward and backward both see a large virtual
      batch. No double backward. Steps of the optimizer can move m faster than the memory of the statistics follows;
      so in training m is replaced by the nearest value that is at most `max_lag`·(n + 64)/n·√v from the batch's mean.
    - ``"exact"``: dx = γ·rstd·[dy − κ·(Σdy + z·Σdy·z)], the derivative of the forward as computed; κ = 1/n would be
      BatchNorm. Differentiable twice. No `max_lag`.

    A channel whose batch is not finite keeps its state and is normalised by it. An empty batch changes nothing. No
    step synchronises with the host.

    ``layer(x, mask)`` leaves padding out: positions where the mask is False count for nothing, in the statistics, in N
    and in the gradients, whatever stands there, and the output is 0 there.

    Args:
        num_features: how many channels, C.
        eps: added to the variance; > 0.
        momentum: weight a of a new batch: a rule (`Horizon`, `SquareRoot`), a float as in ``nn.BatchNorm``, or None for
            the cumulative average.
        affine: whether to learn γ (`weight`) and β (`bias`).
        track_running_stats: if False, no statistics are kept and each batch is normalised by its own, in evaluation
            too, as ``nn.BatchNorm`` does; with `sync`, that of all ranks in training, for which torch.compile breaks
            the graph.
        device, dtype: of parameters and statistics; the latter are at least float32.
        bias: if False, no β.
        gradient: ``"running"`` or ``"exact"``.
        max_lag: how far from the mean of a large batch m may be in training, in std; ``math.inf`` for no limit.
        sync: whether to pool over the processes of a group in training, see below.
        process_group: which ones; None for all. Needs ``sync=True``.

    Shape:
        - Input: (N, C, *), any number of trailing dimensions, also none; float16 and bfloat16 inputs may meet float32
          parameters.
        - Mask: (N, *), bool, True where the input is real.
        - Output: as the input, in its dtype and, if it is dense and torch has a name for that, its memory format.

    Raises:
        ValueError: for an input of fewer than two dimensions, an unknown `gradient`, a momentum outside [0, 1], a
            `max_lag` ≤ 0, eps ≤ 0 in training, a mask of another shape, or a `process_group` without `sync`.
        TypeError: for a mask that is not bool, a `max_lag` that is no number, a `sync` that is no bool or a
            `process_group` that is none.
        RuntimeError: for a wrong number of channels, a dtype that does not go with the parameters, or a second
            derivative with ``gradient="running"`` or over several processes.

    With ``sync=True`` and several processes, a training step is that of one process on the batches of all ranks
    together, with the sum of their losses: m, v, n, N in `momentum`, G0, G1 and the sums in dx are over all ranks, and
    all ranks hold the same statistics, bit for bit. What flows to γ and β is from the rank's own batch, for DDP to
    average. It takes one all_gather in forward and one in backward, on any backend. So all ranks have to run the same
    forwards and backwards in the same order, on an empty batch, too; one without a backward leaves the others waiting,
    as where nothing requires grad. A NaN on one rank makes that channel not finite on all. A pickled layer pools over
    all processes when it is loaded; `copy.deepcopy` keeps the group.

    While a backward pass is running, as in a recomputation under activation checkpointing, nothing is absorbed: the
    recomputation takes the statistics of the last forward. So each checkpointed forward of the layer has to be followed
    by its backward; with several in flight, recomputed activations are normalised by the statistics of the last one.

    Source: fastai course 2019, part 2, lesson 10 (RunningBatchNorm); the running gradient is related to MABN, Yan et
    al., ICLR 2020.

    Example:
        >>> import torch
        >>> from runningbn import RunningBatchNorm
        >>> layer = RunningBatchNorm(16)
        >>> layer(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
        >>> layer.momentum, layer.gradient
        (Horizon(samples=128, start=8, fraction=0.1), 'running')
    """

    gradient: Gradient
    max_lag: float = MAX_LAG
    gradient_buffers = GradientState._fields
    corrects_variance = False
    # Dimensions of the inputs, which say what nn.BatchNorm the layer stands for.
    input_dim: int | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = Horizon(),
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        gradient: Gradient = "running",
        max_lag: float = MAX_LAG,
        sync: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, sync=sync, process_group=process_group,
        )  # fmt: skip
        self.gradient, self.max_lag = check_gradient(gradient), check_max_lag(max_lag)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (N, C, *); in training, absorb it first. `mask`, (N, *), is True where the input is real."""
        self._check_input(input, mask)
        if self.input_dim != input.dim() and not torch.compiler.is_compiling():
            self.input_dim = input.dim()
        ranks = self._ranks()
        if not self._absorbs(input, ranks):
            return self._normalize_only(input, ranks, mask)
        gradient, max_lag = (None, math.inf) if self.gradient == "exact" else (self._gradient_state(), self.max_lag)
        weight, bias = self._weight_and_bias()
        return functional.running(
            input, weight, bias, self.eps, self._state(), gradient, self.momentum, ranks, mask, max_lag
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{super().extra_repr()}, gradient={self.gradient!r}, max_lag={self.max_lag}"


class PreciseBatchNorm(_Layer):
    """What the three layers below share; only their input shapes differ."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (N, C, *): in training by the batch, which is absorbed, in evaluation by the pooled statistics.

        `mask`, (N, *), is True where the input is real.
        """
        self._check_input(input, mask)
        ranks = self._ranks()
        if not self._absorbs(input, ranks):
            return self._normalize_only(input, ranks, mask)
        # Of the other ranks' values nothing is known here without waiting for them on the host.
        if ranks is None and input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        weight, bias = self._weight_and_bias()
        return functional.precise(input, weight, bias, self.eps, self._state(), self.momentum, ranks, mask)


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
    after one batch from a reset it is ``nn.BatchNorm``'s at momentum 1.

    A channel whose batch is not finite keeps its statistics; its output shows the NaN, as in ``nn.BatchNorm``. An empty
    batch changes nothing. While a backward pass is running, as in a recomputation under activation checkpointing, the
    statistics are not updated. ``layer(x, mask)`` leaves padding out, as in `RunningBatchNorm`.

    Args:
        num_features: how many channels, C.
        eps: added to the variance; > 0 in training.
        momentum: weight a of a new batch: a float, None for the cumulative average a = 1/t, or a rule (`Horizon`,
            `SquareRoot`).
        affine: whether to learn γ (`weight`) and β (`bias`).
        track_running_stats: if False, no statistics are kept and each batch is normalised by its own.
        device, dtype: of parameters and statistics; the latter are at least float32.
        bias: if False, no β.
        sync, process_group: as in `RunningBatchNorm`. Outputs and gradients are then those of ``nn.SyncBatchNorm``.

    Shape:
        - Input: (N, C) or (N, C, L); float16 and bfloat16 inputs may meet float32 parameters.
        - Mask: (N,) or (N, L), bool, True where the input is real.
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError: for a wrong number of dimensions, one value per channel or eps ≤ 0 in training, a momentum outside
            [0, 1], a mask of another shape, or a `process_group` without `sync`. With a mask or over several processes
            one value per channel is let pass, since only waiting for the device or the others would tell.
        TypeError: for a mask that is not bool, a `sync` that is no bool or a `process_group` that is none.
        RuntimeError: for a wrong number of channels, a dtype that does not go with the parameters, or a second
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
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError, RuntimeError: as `PreciseBatchNorm1d`.

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
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError, RuntimeError: as `PreciseBatchNorm1d`.

    Example:
        >>> import torch
        >>> from runningbn import PreciseBatchNorm3d
        >>> PreciseBatchNorm3d(4)(torch.randn(2, 4, 3, 8, 8)).shape
        torch.Size([2, 4, 3, 8, 8])
    """


def check_gradient(gradient: Any) -> Gradient:
    """Accept ``"running"`` or ``"exact"``.

    Raises:
        ValueError: for anything else.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient: expected one of {get_args(Gradient)}, got {gradient!r}")
    checked: Gradient = gradient
    return checked


def check_max_lag(max_lag: Any) -> float:
    """Accept a number above 0, infinity included.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number that is not above 0.
    """
    if isinstance(max_lag, bool) or not isinstance(max_lag, (int, float)):
        raise TypeError(f"max_lag: expected a number of standard deviations, got {max_lag!r}")
    if not max_lag > 0:
        raise ValueError(f"max_lag: expected a number of standard deviations above 0, got {max_lag!r}")
    return max_lag
