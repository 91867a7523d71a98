"""RunningBatchNorm.

Shapes: N batch, C channels, `*` any trailing dimensions; n = elements per channel of the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..momentum import Horizon, Momentum
from ..ops.derived_tensors import is_derived, through_class
from ..ops.law import MAX_LAG, Law
from ..ops.spec import Mode, StepSpec
from ..ops.step import training_step
from .base import Layer
from .buffers import TRAINING

Gradient = Literal["running", "exact"]
_MODES: dict[Gradient, Mode] = {"running": Mode.RUNNING, "exact": Mode.EXACT}


class RunningBatchNorm(Layer):
    r"""Batch normalisation by running statistics, in training as in evaluation: the batch size stops mattering.

    Per channel, with weights w over all elements seen so far, the current batch included,

    .. math::
        y = \frac{x - m}{\sqrt{v + \epsilon}} \gamma + \beta, \qquad
        m = \frac{\sum w x}{\sum w}, \qquad v = \frac{\sum w x^2}{\sum w} - m^2

    In training the batch enters the state first, and then is normalised by the state; evaluation is the same formula
    without the update. So the two use the same statistics, bit for bit, unless a `max_lag` is set. Before any training
    the layer evaluates as ``nn.BatchNorm`` does (mean 0, variance 1). The variance is biased, in `running_var` too: it
    is what the layer normalises by. While fewer than 20 samples have been seen, the current batch included, it is at
    least 0.01, unless the statistics were taken over from elsewhere.

    With dy = dL/dy, z = (x − m)·rstd and n elements per channel in the batch, `gradient` says what flows back through
    the statistics:

    - ``"running"``: dx = γ·rstd·[dy − s·(G0 + z·G1)], where G0 and G1 are running means of dy and dy·z. Forward and
      backward both see a large virtual batch. A batch weighs ρ = n_eff/(n_eff + 64) in these means, or what it does in
      the forward if that is more; n_eff is its effective number of elements, which the layer measures by how far the
      means of successive batches are apart: elements of one image, or of images of one class, are not independent.
      s ≤ 1 keeps ‖dx‖ ≤ 2·max|γ·rstd|·‖dy‖, whatever the statistics are. No double backward.
    - ``"exact"``: dx = γ·rstd·[dy − κ·(Σdy + z·Σdy·z)], the derivative of the forward as computed; κ = 1/n would be
      BatchNorm. Differentiable twice. It trains badly on small batches, see docs/accuracy.md: it is for second
      derivatives and for comparison. No `max_lag`.

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
        max_lag: how far m and v may lag behind a batch in training, in std, with running gradients; ``math.inf``, the
            default, for no limit. With d = `max_lag`·(1 + 512/n_eff), a batch comes out with a mean of at most d and a
            std of at most 1 + d; state and evaluation do not know of it.
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

    While a backward pass is running, as in a recomputation under activation checkpointing, the state is not updated:
    the recomputation takes the statistics of the last forward. So each checkpointed forward of the layer has to be
    followed by its backward; with several in flight, recomputed activations are normalised by the statistics of the
    last one.

    Source: fastai course 2019, part 2, lesson 10 (RunningBatchNorm); the running gradient is related to MABN, Yan et
    al., ICLR 2020.

    Example:
        >>> import torch
        >>> from runningbn import RunningBatchNorm
        >>> layer = RunningBatchNorm(16)
        >>> layer(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
        >>> layer.momentum, layer.gradient, layer.max_lag
        (Horizon(samples=512, start=8, fraction=0.1), 'running', inf)
    """

    gradient: Gradient
    max_lag: float = MAX_LAG
    training_buffers = TRAINING
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
        self.gradient, self.max_lag = gradient, max_lag

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (N, C, *); in training, let it enter the state first. `mask`, (N, *), is True where it is real."""
        if type(input) is not Tensor and is_derived(input):
            return through_class(partial(RunningBatchNorm.forward, self, mask=mask), self, input)
        if mask is None and (y := self._step_at_once(input)) is not None:
            self._note_dimensions(input)
            return y
        self._check_input(input, mask)
        self._note_dimensions(input)
        ranks = self._ranks()
        if not self._updates(input, ranks):
            return self._normalize_only(input, ranks, mask)
        spec = self._spec()
        weight, bias = self._weight_and_bias()
        state = self._layer_state(spec.mode is Mode.RUNNING)
        return training_step(input, weight, bias, spec, state, ranks, mask)

    def _note_dimensions(self, input: Tensor) -> None:
        if self.input_dim != input.dim() and not torch.compiler.is_compiling():
            self.input_dim = input.dim()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gradient":
            check_gradient(value)
        elif name == "max_lag":
            check_max_lag(value)
        super().__setattr__(name, value)

    def _spec(self) -> StepSpec:
        return StepSpec(_MODES[self.gradient], self.eps, self.momentum, Law(self.max_lag))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        limit = f", max_lag={self.max_lag}" if self.gradient == "running" else ""
        return f"{super().extra_repr()}, gradient={self.gradient!r}{limit}"


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
