"""State dicts of the layers: what a load takes over, what it seeds, and what it repairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import forget_buffers
from ..ops.derived_tensors import plain
from ..ops.state import GradientState, NoiseState
from .buffers import CHECKPOINTED, PASSING, SETTLED, TRAINING, VIEW, PooledStatistics, at_least_float32, is_narrow


class LoadableStatistics(PooledStatistics):
    """`PooledStatistics` that load state dicts: their own, those of ``nn.BatchNorm``, what arithmetic made of them."""

    # 3: `samples` is at most SETTLED; before, the largest float32 stood for it.
    _version = 3

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if self._buffers.get("sums") is None:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        brought = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        own, training, view = (brought.intersection(names) for names in (CHECKPOINTED, TRAINING, VIEW))
        # Counts do not fit 16 bits; and a part of a state is none, nor is one without its view.
        narrow = any(is_narrow(state_dict[prefix + name]) for name in own)
        usable = len(own) == len(CHECKPOINTED) and len(view) == 2 and not narrow
        seeds = len(view) == 2 and not usable
        refused = set() if usable else own | training
        if len(view) == 1:
            refused |= view
        if not self.training_buffers:  # a RunningBatchNorm's, in a PreciseBatchNorm
            refused |= training
        for name in refused:
            del state_dict[prefix + name]
        for name in (own | training | view) - refused:
            state_dict[prefix + name] = at_least_float32(plain(state_dict[prefix + name]))
        if "num_batches_tracked" in brought:
            state_dict[prefix + "num_batches_tracked"] = _whole(state_dict[prefix + "num_batches_tracked"])
        if torch.__future__.get_swap_module_params_on_conversion():
            forget_buffers()
        before = {name: (buffer, buffer.clone()) for name, buffer in self._buffers.items() if buffer is not None}
        errors = len(error_msgs)
        self._assigns_all = True
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            del self._assigns_all
        if len(error_msgs) > errors:
            # torch loads what fits. Statistics of two sources would contradict each other, so here it is all or none.
            for name, (buffer, values) in before.items():
                self._buffers[name] = buffer.copy_(values)
            return
        # nn.BatchNorm has no state, PreciseBatchNorm nothing of `TRAINING` and version 0.1 no `NoiseState`: that is not
        # missing, but parts of it are.
        forgiven = {prefix + name for name in CHECKPOINTED if seeds and (narrow or not own)}
        absent = [
            part._fields for part in (NoiseState, GradientState) if not training.intersection(part._fields) - refused
        ]
        forgiven |= {prefix + name for part in absent for name in part if view and (narrow or not training & set(part))}
        missing_keys[:] = [key for key in missing_keys if key not in forgiven]
        if seeds:
            self.seed()
        elif usable:
            self._repair()
        if view:
            self._clear(PASSING)
            # What was remembered of another network's batches and gradients would only mislead.
            self._clear(tuple(name for part in absent for name in part))

    @torch.no_grad()
    def _repair(self) -> None:
        """Make a state usable that arithmetic on state dicts has made, channel by channel.

        Averages and interpolations are usable as they are. `samples` that is not finite, or as large as versions before
        3 had it, counts as settled. A state that no data can have, as extrapolation gives, is seeded instead; so is
        what training remembers cleared.
        """
        state = self._state()
        if state.shift.is_meta:
            return
        before = {name: getattr(state, name).clone() for name in CHECKPOINTED}
        before["samples"] = before["samples"].nan_to_num(SETTLED, SETTLED, 0).clamp(0, SETTLED)
        sound = torch.stack([value.isfinite() for value in before.values()]).all(0)
        for name in ("count", "count_sqrs", "debias", "steps"):
            sound &= before[name] >= 0
        if not sound.all():
            self.seed()
        for name, value in before.items():
            self._write(name, torch.where(sound, value, self._buffers[name]))  # type: ignore[arg-type]
        if self.training_buffers:
            training = self._layer_state(True)
            for part, weight in ((training.noise, "noise"), (training.gradient, "count_dy")):
                assert part is not None
                sound = torch.stack([buffer.isfinite() for buffer in part]).all(0) & (getattr(part, weight) >= 0)
                for buffer in part:
                    buffer.masked_fill_(~sound, 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of models that were pickled by version 0.1.0, which had another number for settled."""
        super().__setstate__(state)
        samples = self._buffers.get("samples")
        if samples is not None and not samples.is_meta:
            self._buffers["samples"] = samples.clamp(max=SETTLED)


def _whole(count: Any) -> Any:
    """A count of batches that averaging has made a fraction, as the integer that it is in the layer."""
    return count.nan_to_num(0).round().long() if isinstance(count, Tensor) and count.is_floating_point() else count
