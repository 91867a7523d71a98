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
    r"""Batch normalisation by running statistics, in training as in evaluation. It works at batch size 1.

    Per channel, with sums over all elements x seen so far, the current batch included, and their weights w,

    .. math::
        y = \frac{x - m}{\sqrt{v + \epsilon}} \gamma + \beta, \qquad
        m = \frac{\sum w x}{\sum w}, \qquad v = \frac{\sum w x^2}{\sum w} - m^2

    In training, the statistics are updated by the batch first, and the batch is normalised by the updated statistics.
    Evaluation uses the same formula without the update. So both use the same statistics, bit for bit, unless a
    `max_lag` is set. Before any training, the layer evaluates as ``nn.BatchNorm`` does (mean 0, variance 1). The
    variance is biased, in `running_var` too, because the layer normalises by it. While fewer than 20 samples have been
    seen, the current batch included, it is at least 0.01, unless the statistics were taken over from a trained model.

    With dy = dL/dy, z = (x − m)·rstd and n elements per channel in the batch, `gradient` selects the gradient through
    the statistics:

    - ``"running"``: dx = γ·rstd·[dy − s·(G0 + z·G1)], where G0 and G1 are running means of dy and dy·z. Forward and
      backward both use a large virtual batch. In these means, a batch has the weight ρ = n_eff/(n_eff + 64), or its
      weight in the forward pass if that is larger. n_eff is the effective number of elements of the batch: elements of
      one image, or of images of one class, are not independent. The layer estimates it from the distance between the
      means of successive batches. s ≤ 1 ensures that ‖dx‖ ≤ 2·max|γ·rstd|·‖dy‖ for any statistics. No double backward.
    - ``"exact"``: dx = γ·rstd·[dy − κ·(Σdy + z·Σdy·z)], the derivative of the forward pass, with κ = g/Σw, where g is
      the weight of an element of this batch; κ = 1/n gives ``nn.BatchNorm``. Differentiable twice. It trains badly on
      small batches (docs/accuracy.md): use it for second derivatives and for comparison. `max_lag` is not used.

    If the batch is not finite in a channel, that channel keeps its state and is normalised by it. An empty batch
    changes nothing. No step synchronises with the host.

    ``layer(x, mask)`` excludes padding: positions where the mask is False are not counted in the statistics, in N and
    in the gradients, whatever values they hold, and the output is 0 there.

    Args:
        num_features: number of channels, C.
        eps: added to the variance; > 0.
        momentum: weight a of a new batch: a rule (`Horizon`, `SquareRoot`), a float as in ``nn.BatchNorm``, or None for
            the cumulative average.
        affine: whether to learn γ (`weight`) and β (`bias`).
        track_running_stats: if False, no statistics are kept, and each batch is normalised by its own statistics, in
            evaluation too, as by ``nn.BatchNorm``. With `sync`, training then uses the statistics of the batches of all
            ranks, for which torch.compile breaks the graph.
        device, dtype: of parameters and statistics; the latter are at least float32.
        bias: if False, no β.
        gradient: ``"running"`` or ``"exact"``.
        max_lag: with running gradients, how far m and v may lag behind a batch in training, in std; ``math.inf``, the
            default, for no limit. With d = `max_lag`·(1 + 512/n_eff), the normalised batch has a mean of at most d and
            a std of at most 1 + d. State and evaluation are not affected.
        sync: whether to pool over the processes of a group in training, see below.
        process_group: the group; None for all processes. Requires ``sync=True``.

    Shape:
        - Input: (N, C, *), any number of trailing dimensions, also none. Its dtype is that of the parameters; float32
          parameters also take float16 and bfloat16 inputs.
        - Mask: (N, *), bool, True where the input is real.
        - Output: shape and dtype of the input. A contiguous, channels_last or channels_last_3d input has
          an output of the same memory format.

    Raises:
        ValueError: for an input of fewer than two dimensions, an unknown `gradient`, a momentum outside [0, 1], a
            `max_lag` ≤ 0, eps ≤ 0 in training, a mask of another shape, or a `process_group` without `sync`.
        TypeError: for a mask that is not bool, a momentum that is not a float, None or a rule, a `max_lag` that is not
            a number, a `sync` that is not a bool, or a `process_group` that is not a group.
        RuntimeError: for a wrong number of channels, a dtype that does not fit the parameters, a second
            derivative with ``gradient="running"`` or over several processes, or a training step under ``torch.export``
            or ``torch.jit.trace``.

    With ``sync=True`` and several processes, a training step equals that of one process on the batches of all ranks
    together, with the sum of their losses: m, v, n, N in `momentum`, G0, G1 and the sums in dx are over all ranks, and
    all ranks have the same statistics, bit for bit. The gradients of γ and β are those of the rank's own batch, which
    DDP averages. A step takes one all_gather in forward and one in backward, with any backend. So all ranks must run
    the same forwards and backwards in the same order, also on an empty batch; a rank that runs no backward, for example
    because nothing requires grad, leaves the others waiting. A NaN on one rank makes that channel not finite on all. A
    pickled layer pools over all processes when it is loaded; `copy.deepcopy` keeps the group.

    While a backward pass is running, as in a recomputation under activation checkpointing, the state is not updated:
    the recomputation uses the statistics of the last forward. So the backward of each checkpointed forward of the layer
    must run before its next forward; otherwise recomputed activations are normalised by the statistics of a later one.

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
    # Dimensions of the inputs, which determine the nn.BatchNorm to convert back to.
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
        """Normalise (N, C, *), in training after an update by it. `mask`, (N, *), is True where the input is real."""
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
