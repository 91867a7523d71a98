"""The BatchNorm layers in a state dict, without the code of its model.

A layer is any prefix with a `running_mean` and a `running_var`; keys are not shortened, "module." included. An
InstanceNorm that tracks statistics has the same keys, so it is listed, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.buffers import CHECKPOINTED, TRAINING, VIEW, are_settled, is_narrow
from ..ops.state import Sums
from .summary import batches_tracked

AFFINE = ("weight", "bias")
# Tensors with one number per channel.
PER_CHANNEL = (*VIEW, *AFFINE, *CHECKPOINTED, *TRAINING)
RELEVANT_KEYS = (*PER_CHANNEL, "num_batches_tracked", "eps")
# A checkpoint of tensors does not hold a layer's eps. This is the default of nn.BatchNorm.
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SavedLayer:
    """One BatchNorm layer of a checkpoint. C channels; tensors are (C,), float64, on the CPU.

    Attributes:
        name: its prefix in the state dict, without the last dot; "" if the layer was saved by itself.
        dtype: of `running_mean` in the file.
        mean, var: `running_mean` and `running_var`.
        weight, bias: None if there is none.
        batches: `num_batches_tracked`, None if there is none.
        state: the pooled state of this library's layers; empty for all others.
        training_state: buffers that only RunningBatchNorm's training reads; empty for all others.
        unusable_state: whether the state is incomplete or in 16 bits; loading then ignores it.
        eps: what evaluation adds to the variance.
        least_var: the smallest positive number of the dtype of `running_var`.
    """

    name: str
    dtype: torch.dtype
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    batches: int | None
    state: Mapping[str, Tensor]
    training_state: Mapping[str, Tensor]
    unusable_state: bool
    eps: float = EPS
    least_var: float = 0.0

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def sums(self) -> Sums:
        """The linear state of a layer of this library."""
        return Sums(*(self.state[name] for name in Sums._fields))

    @property
    def effective_elements(self) -> Tensor:
        """The effective sample size in elements, (C,): (Σw)²/Σw², Kish 1965."""
        return self.state["count"].square() / self.state["count_sqrs"]

    @property
    def is_seeded(self) -> bool:
        """Whether the state was seeded from given statistics; their amount of data is then not known."""
        return bool(are_settled(self.state["samples"]).any())


@dataclass(frozen=True)
class StateDict:
    """The layers of one state dict.

    Attributes:
        place: its place in the file, such as "state_dict"; "" if it is the whole file.
        layers: in the order of the file; for safetensors, which has no order, by name.
        left_out: layers with a `running_mean` or `running_var` that cannot be checked: name and reason.
    """

    place: str
    layers: tuple[SavedLayer, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def channels(self) -> int:
        """Of all layers."""
        return sum(layer.channels for layer in self.layers)


def read_state_dict(place: str, tensors: Mapping[str, Any], eps: float | None = None) -> StateDict | None:
    """The layers among these tensors; None if there is no `running_mean` or `running_var`.

    An `eps` stored with the tensors of a layer is used, unless `eps` is given for all layers.
    """
    layers, left_out = [], []
    for prefix in _prefixes(tensors):
        entries = {name: tensors.get(prefix + name) for name in (*PER_CHANNEL, "num_batches_tracked")}
        parts = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
        name = prefix.removesuffix(".")
        if reason := _unfit(parts):
            left_out.append((name, reason))
        else:
            own = tensors.get(f"{prefix}eps")
            fallback = own if isinstance(own, float) and 0 <= own < math.inf else EPS
            layers.append(_layer(name, parts, fallback if eps is None else eps))
    return StateDict(place, tuple(layers), tuple(left_out)) if layers or left_out else None


def keys_of_layers(keys: Iterable[str]) -> list[str]:
    """The relevant keys of layers that have a `running_mean` or `running_var`."""
    keys = [key for key in keys if _leaf(key) in RELEVANT_KEYS]
    found = set(_prefixes(keys))
    return [key for key in keys if key.removesuffix(_leaf(key)) in found]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _prefixes(keys: Iterable[str]) -> list[str]:
    """The prefixes of `running_mean` or `running_var`, in the order of the keys."""
    return list(dict.fromkeys(key.removesuffix(_leaf(key)) for key in keys if _leaf(key) in VIEW))


def natural_order(key: str) -> list[tuple[bool, int, str]]:
    """A sort key that orders numbers in names by value: layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in key.split(".")]


def _unfit(parts: Mapping[str, Tensor]) -> str:
    """Why these are not the tensors of a layer; "" if they are."""
    missing = [name for name in VIEW if name not in parts]
    if missing:
        return f"it has no {missing[0]}"
    shape = parts["running_mean"].shape
    if len(shape) != 1 or shape[0] == 0:
        return f"running_mean has the shape {tuple(shape)}, expected (C,)"
    for name, value in parts.items():
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            return f"{name} holds no plain real numbers"
        if name in (*VIEW, *AFFINE) and value.shape != shape:
            return f"{name} has the shape {tuple(value.shape)}, and running_mean {tuple(shape)}"
    return ""


def _layer(name: str, parts: Mapping[str, Tensor], eps: float) -> SavedLayer:
    mean = parts["running_mean"]
    own = {part: parts[part] for part in CHECKPOINTED if part in parts}
    usable = len(own) == len(CHECKPOINTED) and all(t.shape == mean.shape and not is_narrow(t) for t in own.values())
    wide = {part: value.double() for part, value in parts.items() if value.shape == mean.shape}
    return SavedLayer(
        name=name,
        dtype=mean.dtype,
        mean=wide["running_mean"],
        var=wide["running_var"],
        weight=wide.get("weight"),
        bias=wide.get("bias"),
        batches=batches_tracked(parts.get("num_batches_tracked")),
        state={part: wide[part] for part in own} if usable else {},
        training_state={part: wide[part] for part in TRAINING if part in wide} if usable else {},
        # A normaliser of an RL library may have a `count`, too, which is not part of such a state.
        unusable_state=2 * len(own) >= len(CHECKPOINTED) and not usable,
        eps=eps,
        least_var=_least(parts["running_var"].dtype),
    )


def _least(dtype: torch.dtype) -> float:
    """The smallest positive number, denormal ones included."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
