"""Contents of the objects in a checkpoint: the state dict of a whole model, the attributes of any other object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import Budget
from .unpickling import Stub

# Attributes of a module that are saved in its state dict, and the attribute with its submodules.
_TENSORS, _MODULES = ("_parameters", "_buffers"), "_modules"
_SCRIPTED = "__torch__."
# Classes that are constructed from a dict or a list of pairs.
_MAPPINGS = frozenset(("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"))
_GRAPH_MODULE = ".reduce_graph_module"


def opened(item: Any, budget: Budget) -> Any:
    """The contents of an item, for `nested.walk`: a mapping, a list or a tuple; None if it has none."""
    if isinstance(item, (Mapping, list, tuple)):
        return item
    if not isinstance(item, Stub):
        return None
    if _is_module(item):
        return _state_dict(item, budget)
    if item.name in _MAPPINGS and item.arguments and not item.entries:
        return _as_mapping(item.arguments[-1])
    inside = {**_attributes(item), **item.entries}
    if item.elements:
        return {**inside, "": item.elements} if inside else item.elements
    return inside or item.arguments


def _as_mapping(source: Any) -> Any:
    if isinstance(source, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in source):
        return {key: value for key, value in source if isinstance(key, str)}
    return source if isinstance(source, Mapping) else None


def _attributes(item: Any) -> Mapping[Any, Any]:
    """The contents of the object's ``__dict__`` and slots, if it were created."""
    if not isinstance(item, Stub):
        return {}
    state = item.state
    if item.name.endswith(_GRAPH_MODULE) and item.arguments:
        (state, *_) = item.arguments
    parts = state if isinstance(state, tuple) else (state,)
    return {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}


def _is_module(item: Stub) -> bool:
    return item.name.startswith(_SCRIPTED) or {*_TENSORS, _MODULES} <= _attributes(item).keys()


def _entries(item: Any) -> Mapping[Any, Any]:
    """The entries of a dict, or of the OrderedDict of an older release."""
    if isinstance(item, Stub) and item.name in _MAPPINGS:
        return item.entries or (_as_mapping(item.arguments[-1]) if item.arguments else None) or {}
    return item if isinstance(item, Mapping) else {}


def _state_dict(module: Stub, budget: Budget) -> dict[str, Any]:
    """The result of ``module.state_dict()``, with shared modules once, plus the `eps` of each module that has one."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = [("", module)]
    while waiting:
        prefix, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        attributes = _attributes(item)
        if item.name.startswith(_SCRIPTED):
            own = children = attributes
        else:
            own = {name: value for part in _TENSORS for name, value in _entries(attributes.get(part)).items()}
            children = _entries(attributes.get(_MODULES))
        if isinstance(attributes.get("eps"), float):
            own = {**own, "eps": attributes["eps"]}
        for name, value in own.items():
            if isinstance(name, str) and not (isinstance(value, Stub) and _is_module(value)):
                budget.spend(len(prefix))
                found[prefix + name] = value
        inner = [(name, value) for name, value in children.items() if isinstance(name, str)]
        for name, value in reversed(inner):
            if isinstance(value, Stub) and _is_module(value):
                budget.spend(len(prefix) + len(name))
                waiting.append((f"{prefix}{name}.", value))
    return found
