"""The statistics as buffers of a module: registering, seeding, checkpoints, dtypes.

What the layers share and what has nothing to do with normalising. See `state.State` for the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..momentum import Momentum, check_momentum
from ..ops.derived_tensors import plain
from ..ops.pooling import GroupReference, check_synchronisation
from ..ops.state import GradientState, LayerState, NoiseState, State

# Samples that statistics taken over from elsewhere count for: more than any horizon needs to be at full length, also
# after some averaging with layers that have seen none. Small enough for sums and differences of many state dicts.
SETTLED = 2.0**40

# The statistics of nn.BatchNorm, which are a view of the state.
VIEW = ("running_mean", "running_var")
OWN_BUFFERS = tuple(name for name in State._fields if name not in (*VIEW, "num_batches_tracked"))

# Of no use beyond the backward pass that follows, so no part of a checkpoint.
PASSING = ("last_keep", "last_gain")
# What only training with ``gradient="running"`` reads.
TRAINING = (*NoiseState._fields, *GradientState._fields)
CHECKPOINTED = tuple(name for name in OWN_BUFFERS if name not in PASSING)

# Assigned statistics seed the rest of the state, which has no memory there, or is yet to be assigned.
_ON_META = (
    "a layer on the meta device takes statistics as a whole, by load_state_dict(..., assign=True), or after to_empty() "
    "and reset_running_stats(). Loaders that assign tensor by tensor, as from_pretrained of transformers, can load a "
    "model with torch's layers, and batchnormify converts it then"
)


class PooledStatistics(_BatchNorm):
    """The parameters and buffers of ``nn.BatchNorm``, and the linear state behind its statistics.

    - `running_mean` and `running_var` are a view of the state; assigning them (``layer.running_mean = t``) reseeds it.
    - Statistics taken over from elsewhere, by assignment or from a checkpoint of ``nn.BatchNorm``, seed the state: they
      are kept bit for bit until the first update, whose batch then weighs exactly its momentum. A mean of 0 and a
      variance of 1 with no batches tracked is no statistics, but a layer as after a reset.
    - The state is at least float32: ``half()``, ``bfloat16()`` and checkpoints in 16 bits leave it float32.
    """

    momentum: Momentum  # type: ignore[assignment]
    # Whether `running_var` has Bessel's correction, as in nn.BatchNorm.
    corrects_variance = True
    # What `replace_statistics` writes.
    statistics_names = (*CHECKPOINTED, *VIEW)
    # What the class has of `TRAINING`.
    training_buffers: tuple[str, ...] = ()
    # The class that batchnormify has to return a layer to.
    converted_from: type[nn.Module] | None = None
    # Whether to pool over the processes of a group in training.
    sync = False
    _group = GroupReference()
    # While torch assigns buffer after buffer, in a load or to a replica, statistics are set as they come.
    _assigns_all = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        check_momentum(momentum)
        check_synchronisation(sync, process_group)
        # Older releases of torch have no `bias` here, so it is taken out afterwards.
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        if not bias:
            self.register_parameter("bias", None)
        self.sync, self.process_group = sync, process_group
        if track_running_stats:
            self.install_state()

    def install_state(self) -> None:
        """Register an empty state beside `running_mean` and `running_var`."""
        for name in VIEW:
            self._buffers[name] = at_least_float32(self._buffers[name])
        mean = self._mean
        if self.num_batches_tracked is None:
            self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=mean.device)
        for name in OWN_BUFFERS:
            self.register_buffer(name, torch.zeros_like(mean), persistent=name not in PASSING)
        self.install_training_state()

    def install_training_state(self) -> None:
        """Register what only training reads and the class has, and remove what it does not have."""
        for name in TRAINING:
            self._buffers.pop(name, None)
        for name in self.training_buffers:
            self.register_buffer(name, torch.zeros_like(self._mean))

    def remove_state(self) -> None:
        """Leave the buffers of ``nn.BatchNorm``."""
        for name in (*OWN_BUFFERS, *TRAINING):
            if name in self._buffers:
                delattr(self, name)

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """What `sync` pools over; None for all processes."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: torch.distributed.ProcessGroup | None) -> None:
        self._group = GroupReference(group)

    @property
    def _mean(self) -> Tensor:
        mean = self._buffers["running_mean"]
        assert mean is not None
        return mean

    # Methods, not properties: torch.jit reads the properties of a module, and not every layer has these buffers.
    def _state(self) -> State:
        buffers = self._buffers
        return State(*[buffers[name] for name in State._fields])  # type: ignore[arg-type]

    def _layer_state(self, by_running_means: bool) -> LayerState:
        """The state, and where the backward goes by running means, what these need."""
        buffers = self._buffers
        if not by_running_means:
            return LayerState(self._state())
        noise, gradient = ([buffers[name] for name in part._fields] for part in (NoiseState, GradientState))
        return LayerState(self._state(), NoiseState(*noise), GradientState(*gradient))  # type: ignore[arg-type]

    @torch.no_grad()
    def seed(self) -> None:
        """Set the state to that of a population with the moments `running_mean` and `running_var`.

        A mean of 0 and a variance of 1 with no batches tracked leave an empty state instead.
        """
        state = self._state()
        if state.running_mean.is_meta:
            return
        if are_initial(state.running_mean, state.running_var, state.num_batches_tracked):
            self._clear(OWN_BUFFERS)
            return
        # Sums are zero about the mean itself. No weights are known, and count_sqrs = 0 says so.
        zero = torch.zeros_like(state.running_mean)
        self._write("shift", state.running_mean)
        self._write("sums", zero)
        self._write("sqrs", state.running_var)
        self._write("count", zero + 1)
        self._write("count_sqrs", zero)
        self._write("debias", zero + 1)
        self._write("samples", zero + SETTLED)
        self._write("steps", zero + state.num_batches_tracked)

    @torch.no_grad()
    def replace_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Give the state other moments, var in the convention of `running_var`, and leave its weights as they are.

        The next batch then weighs what it would have weighed. An empty state is seeded.
        """
        state = self._state()
        self._write("running_mean", mean.to(state.running_mean))
        self._write("running_var", var.to(state.running_var))
        if not state.count.all():
            self.seed()
            return
        correction = 1 - state.count_sqrs / state.count.square() if self.corrects_variance else 1
        self._write("sqrs", state.count * state.running_var * correction)
        self._write("shift", state.running_mean)
        self._write("sums", torch.zeros_like(state.sums))

    def _write(self, name: str, value: Tensor) -> None:
        """Set a buffer in place, or anew where a load with ``assign=True`` or pruning has changed what it is."""
        buffer = self._buffers[name]
        assert buffer is not None
        if (buffer.device, buffer.dtype, buffer.shape) == (value.device, value.dtype, value.shape):
            buffer.copy_(value)
        else:
            self._buffers[name] = value.clone()

    def _clear(self, names: tuple[str, ...]) -> None:
        for name in names:
            if self._buffers.get(name) is not None:
                self._write(name, torch.zeros_like(self._mean))

    def reset_running_stats(self) -> None:
        """Forget everything: mean 0, variance 1, an empty state, no batches tracked."""
        super().reset_running_stats()
        self._clear((*OWN_BUFFERS, *self.training_buffers))

    def __setattr__(self, name: str, value: Any) -> None:
        reseeds = name in VIEW and isinstance(value, Tensor) and "sums" in self._buffers
        if name in VIEW and value is None:
            # Without statistics, a layer has no state, and a state dict no part of one. None can be assigned again.
            for own in (*OWN_BUFFERS, *self.training_buffers):
                if own in self._buffers:
                    self._buffers[own] = None
        if name == "momentum":
            check_momentum(value)
        if not reseeds or self._assigns_all:
            super().__setattr__(name, value)
            return
        if not value.is_meta and any(buffer is not None and buffer.is_meta for buffer in self._buffers.values()):
            raise RuntimeError(f"{name}: {_ON_META}")
        if value.dim() != 1:
            raise ValueError(f"{name}: expected shape ({self.num_features},), got {tuple(value.shape)}")
        sums, assigned = self._buffers["sums"], plain(value.detach())
        dtype = at_least_float32(assigned).dtype if sums is None else sums.dtype
        super().__setattr__(name, assigned.to(dtype, copy=True))
        self._follow_assignment()

    def _replicate_for_data_parallel(self) -> Any:
        """As torch does. The replica on the device of the layer has its buffers, and so updates them."""
        replica = super()._replicate_for_data_parallel()
        replica._assigns_all = True
        return replica

    def _follow_assignment(self) -> None:
        """Seed the state by an assigned mean or variance.

        Pruning tools change the size of one after the other; in between there is nothing that the state could follow.
        """
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or var is None or mean.shape != var.shape:
            return
        sums = self._buffers["sums"]
        resized = sums is None or mean.shape != sums.shape
        self.num_features = len(mean)
        # Tensors of its own, for nn.DataParallel assigns to replicas that still share theirs with the original.
        for own in OWN_BUFFERS:
            self._buffers[own] = torch.zeros_like(mean)
        if resized:
            self.install_training_state()
        self.seed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        state = {id(self._buffers.get(name)) for name in (*State._fields, *TRAINING)}

        def keep_state_wide(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            # From the tensor as it was: its digits are already gone from `out`.
            return tensor.to(out.device, torch.float32) if id(tensor) in state and is_narrow(out) else out

        return super()._apply(keep_state_wide, recurse)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
            f"{', sync=True' if self.sync else ''}"
        )


def are_initial(mean: Tensor, var: Tensor, batches: Tensor) -> bool:
    """Whether these statistics are those of a layer after a reset; `batches` is `num_batches_tracked`."""
    return bool((batches == 0) & (mean == 0).all() & (var == 1).all())


def are_settled(samples: Tensor) -> Tensor:
    """Where statistics were taken over from elsewhere, by the number of samples of a state, (C,).

    It is then `SETTLED`, which averaging with other layers may have reduced. In training, a float32 of this size no
    longer grows by a batch of 256.
    """
    return (samples <= SETTLED / 256).logical_not()


def is_narrow(tensor: Tensor) -> bool:
    """Whether it holds floating-point numbers of fewer than 32 bits."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def at_least_float32(tensor: Any) -> Any:
    """A tensor of fewer bits as float32, and anything else as it is."""
    return tensor.float() if is_narrow(tensor) else tensor
