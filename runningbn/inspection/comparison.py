"""Compare the statistics of two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..recalibration.report import LayerShift
from .layers import SavedLayer, StateDict


@dataclass(frozen=True)
class Movement(LayerShift):
    """The change from checkpoint A (old) to B (new), in the units of `update_bn_stats`."""

    @property
    def mean_shift_max(self) -> float:
        """|mean − old_mean| in std, of the channel that moved farthest."""
        return float(((self.mean - self.old_mean).abs() / self.std).max())

    @property
    def var_ratio_extreme(self) -> float:
        """var/old_var, each with eps, of the channel where it is farthest from 1, up or down."""
        ratio = self.std.square() / (self.old_var + self.eps)
        return float(ratio[ratio.log().abs().argmax()])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two state dicts, layer by layer.

    Attributes:
        place_a, place_b: the place of each in its file.
        prefix_a, prefix_b: prefix removed from all names, such as "module."; both are empty if some names are equal
            without removing one.
        wrappers_a, wrappers_b: name parts that torch inserts at any depth, such as "_orig_mod."; they are removed.
        layers: the layers in both, in the order of B, with B's names without its prefix.
        only_a, only_b: names of layers that are in only one of the two.
        other_shapes: layers with different numbers of channels: name, C in A, C in B.
        left_out_a, left_out_b: as in `StateDict`.
    """

    place_a: str
    place_b: str
    prefix_a: str
    prefix_b: str
    wrappers_a: tuple[str, ...]
    wrappers_b: tuple[str, ...]
    layers: tuple[Movement, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shapes: tuple[tuple[str, int, int], ...]
    left_out_a: tuple[tuple[str, str], ...]
    left_out_b: tuple[tuple[str, str], ...]


# Name parts that torch.compile, FullyShardedDataParallel and checkpoint_wrapper insert, at any depth.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Prefixes of all names: by DataParallel and AveragedModel, Lightning, averages of weights.
PREFIXES = ("module.", "model.", "ema.", "ema_model.", "shadow.")


def pairs(
    a: Sequence[StateDict], b: Sequence[StateDict],
    place_a: Callable[[str], str] = str, place_b: Callable[[str], str] = str,
) -> Iterator[tuple[StateDict, StateDict]]:  # fmt: skip
    """The state dicts to compare: those at the same place in both files, or if there are none, the first of each.

    `place_a` and `place_b` map a place in the file to a place in the part of it that is compared.
    """
    by_place = {place_b(state_dict.place): state_dict for state_dict in b}
    alike = [(one, by_place[place_a(one.place)]) for one in a if place_a(one.place) in by_place]
    yield from alike or [(_first(a), _first(b))]


def _first(state_dicts: Sequence[StateDict]) -> StateDict:
    return next(state_dict for state_dict in state_dicts if state_dict.layers)


@dataclass(frozen=True)
class _Names:
    """Layers by the names used in the comparison."""

    layers: dict[str, SavedLayer]
    wrappers: tuple[str, ...]

    @classmethod
    def of(cls, state_dict: StateDict) -> _Names:
        layers = {_unwrapped(layer.name): layer for layer in state_dict.layers}
        wrappers = tuple(each for each in WRAPPERS if any(each in f"{layer.name}." for layer in state_dict.layers))
        if len(layers) < len(state_dict.layers):  # two layers would have one name
            return cls({layer.name: layer for layer in state_dict.layers}, ())
        return cls(layers, wrappers)


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if f"{part}." not in WRAPPERS]
    return ".".join(parts)


def compare(a: StateDict, b: StateDict) -> Comparison:
    """Compare each layer of A with that of the same name in B."""
    names_a, names_b = _Names.of(a), _Names.of(b)
    prefix_a, prefix_b = _prefixes(list(names_a.layers), list(names_b.layers))
    layers_a = _without(prefix_a, names_a.layers, _without(prefix_b, names_b.layers))
    layers_b = _without(prefix_b, names_b.layers, _without(prefix_a, names_a.layers))
    both = [name for name in layers_b if name in layers_a]
    channels = [(name, layers_a[name].channels, layers_b[name].channels) for name in both]
    return Comparison(
        place_a=a.place,
        place_b=b.place,
        prefix_a=prefix_a,
        prefix_b=prefix_b,
        wrappers_a=names_a.wrappers,
        wrappers_b=names_b.wrappers,
        layers=tuple(movement(name, layers_a[name], layers_b[name]) for name, old, new in channels if old == new),
        only_a=tuple(name for name in layers_a if name not in layers_b),
        only_b=tuple(name for name in layers_b if name not in layers_a),
        other_shapes=tuple(entry for entry in channels if entry[1] != entry[2]),
        left_out_a=a.left_out,
        left_out_b=b.left_out,
    )


def movement(name: str, a: SavedLayer, b: SavedLayer) -> Movement:
    """The change from the statistics of one layer to those of another with the same number of channels."""
    return Movement(name, b.mean, b.var, a.mean, a.var, b.eps)


def _prefixes(a: Sequence[str], b: Sequence[str]) -> tuple[str, str]:
    """The prefixes to remove from A and from B so that most names agree; ("", "") if some names are equal already.

    Each may start with some of `PREFIXES`, and one of them may then have a further prefix of any kind.
    """
    if not a or not b or set(a) & set(b):
        return "", ""
    choices = []
    for one in _known(a):
        for other in _known(b):
            rest_a, rest_b = [name.removeprefix(one) for name in a], [name.removeprefix(other) for name in b]
            choices += [(one, other), (one + _before(rest_a, rest_b), other), (one, other + _before(rest_b, rest_a))]

    def shared(choice: tuple[str, str]) -> int:
        return len({name.removeprefix(choice[0]) for name in a} & {name.removeprefix(choice[1]) for name in b})

    best = max(choices, key=lambda choice: (shared(choice), -len(choice[0] + choice[1])))
    return best if shared(best) else ("", "")


def _known(names: Sequence[str]) -> list[str]:
    """The prefixes composed of `PREFIXES` that all names have, from the empty one to the longest."""
    found = [""]
    while inner := next((p for p in PREFIXES if all(name.startswith(found[-1] + p) for name in names)), ""):
        found.append(found[-1] + inner)
    return found


def _before(wrapped: Sequence[str], plain: Sequence[str]) -> str:
    """The prefix that the names of `plain` have in `wrapped`; "" if there is none."""
    before = {name.removesuffix(plain[0]) for name in wrapped if name.endswith("." + plain[0])}
    known = set(wrapped)
    return max(sorted(before), key=lambda prefix: sum(prefix + name in known for name in plain), default="")


def _without(
    prefix: str, layers: Mapping[str, SavedLayer], others: Container[str] | None = None
) -> dict[str, SavedLayer]:
    """Layers by name without the prefix; if `others` is given, it is removed only from names that are then in it."""
    short = {name: name.removeprefix(prefix) for name in layers}
    return {short[name] if others is None or short[name] in others else name: layer for name, layer in layers.items()}
