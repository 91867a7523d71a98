"""How far the statistics moved from one checkpoint to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..report import LayerShift
from .criteria import EPS
from .layers import SavedLayer, StateDict


@dataclass(frozen=True)
class Movement(LayerShift):
    """From the checkpoint A (old) to B (new), in the units of `update_bn_stats`."""

    @property
    def mean_shift_max(self) -> float:
        """|mean − old_mean| in std, of the channel that moved farthest."""
        return float(((self.mean - self.old_mean).abs() / self.std).max())

    @property
    def var_ratio_extreme(self) -> float:
        """var/old_var, each with eps, of the channel where it is farthest from 1, up or down."""
        ratio = self.std.square() / (self.old_var + self.eps)
        return float(ratio[ratio.log().abs().argmax()])


@dataclass(frozen=True)
class Comparison:
    """Two state dicts, layer by layer.

    Attributes:
        place_a, place_b: where in its file each is.
        prefix_a, prefix_b: what all names of one have before those of the other, such as "module."; at most one is not
            empty, and none where any names are equal as they are.
        layers: those in both, in the order of B, by B's names without its prefix.
        only_a, only_b: names of layers that only one has.
        other_shapes: layers with other channels: name, C in A, C in B.
        left_out_a, left_out_b: as in `StateDict`.
    """

    place_a: str
    place_b: str
    prefix_a: str
    prefix_b: str
    layers: tuple[Movement, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shapes: tuple[tuple[str, int, int], ...]
    left_out_a: tuple[tuple[str, str], ...]
    left_out_b: tuple[tuple[str, str], ...]


def pairs(a: Sequence[StateDict], b: Sequence[StateDict]) -> Iterator[tuple[StateDict, StateDict]]:
    """The state dicts to compare: those at the same place in both files, or else the first of each."""
    by_place = {state_dict.place: state_dict for state_dict in b}
    alike = [(one, by_place[one.place]) for one in a if one.place in by_place]
    yield from alike or [(_first(a), _first(b))]


def _first(state_dicts: Sequence[StateDict]) -> StateDict:
    return next(state_dict for state_dict in state_dicts if state_dict.layers)


def compare(a: StateDict, b: StateDict) -> Comparison:
    """How far each layer moved from A to B."""
    names_a, names_b = ([layer.name for layer in state_dict.layers] for state_dict in (a, b))
    prefix_a, prefix_b = _wrapper(names_a, names_b), _wrapper(names_b, names_a)
    layers_a, layers_b = _by_name(a.layers, prefix_a, names_b), _by_name(b.layers, prefix_b, names_a)
    both = [name for name in layers_b if name in layers_a]
    channels = [(name, layers_a[name].channels, layers_b[name].channels) for name in both]
    return Comparison(
        place_a=a.place,
        place_b=b.place,
        prefix_a=prefix_a,
        prefix_b=prefix_b,
        layers=tuple(movement(name, layers_a[name], layers_b[name]) for name, old, new in channels if old == new),
        only_a=tuple(name for name in layers_a if name not in layers_b),
        only_b=tuple(name for name in layers_b if name not in layers_a),
        other_shapes=tuple(entry for entry in channels if entry[1] != entry[2]),
        left_out_a=a.left_out,
        left_out_b=b.left_out,
    )


def movement(name: str, a: SavedLayer, b: SavedLayer) -> Movement:
    """From the statistics of one layer to those of another of as many channels."""
    return Movement(name, b.mean, b.var, a.mean, a.var, EPS)


def _wrapper(wrapped: Sequence[str], plain: Sequence[str]) -> str:
    """What stands before the names of `plain` in `wrapped`, as DistributedDataParallel's "module."; "" if in doubt."""
    if not plain or set(wrapped) & set(plain):
        return ""
    before = {name.removesuffix(plain[0]) for name in wrapped if name.endswith("." + plain[0])}
    known = set(wrapped)
    return max(sorted(before), key=lambda prefix: sum(prefix + name in known for name in plain), default="")


def _by_name(layers: Iterable[SavedLayer], prefix: str, others: Sequence[str]) -> dict[str, SavedLayer]:
    """Layers by their names; less the prefix where that is a name among the others."""
    return {short if (short := layer.name.removeprefix(prefix)) in others else layer.name: layer for layer in layers}
