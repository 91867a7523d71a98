"""A reader of pickles that imports nothing and calls nothing.

A pickle is a program for a stack machine. Python's `pickle` imports and calls the names in the program, so the author
of a file decides what runs. Restricting ``find_class`` is hard to get right, since the machine calls methods of the
allowed objects (``__setstate__``, ``__init__``, ``__hash__``). The machine here, `_Machine`, never imports or calls. It
creates four kinds of objects:

- Python's numbers, strings, bytes, lists, tuples and dicts;
- `Global`, a name, in place of an imported object;
- `Stub`, in place of any other object: the name of the called function, its arguments, and what was added afterwards;
- `Reference`, a persistent id.

None of these has a method that a file can choose, so the name of a class never reaches an import, a call or an
attribute. Only numbers, strings, and tuples of these are hashed by value, so no key is nested deeply enough to exhaust
the C stack. There is no recursion, and allocated objects are charged to a `Budget`.

The opcodes are parsed by ``pickletools.genops``, which does not execute them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pickletools import genops
from typing import Any, NoReturn

from .errors import Budget, UnreadableError

DAMAGED = "not a checkpoint of torch.save, or a damaged one"


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """The name of a class or function, with its module."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class Stub:
    """A description of an object that was not created.

    Attributes:
        name: of the function or class that would be called, with its module; "" if it is not a `Global`.
        arguments: of the call.
        state: the argument of ``__setstate__``, or the update of ``__dict__``.
        entries: the items that would be assigned by ``object[key] = value``.
        elements: the elements that would be appended or added.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Reference:
    """A persistent id of the file; in files of torch, a reference to a storage."""

    id: Any


def unpickle(file: Any, budget: Budget) -> Any:
    """Read the pickle at the position of a file; the position is after its end afterwards.

    Args:
        file: has ``read`` and ``readline``; ``read(n)`` must not allocate more than the file has.
        budget: is charged for allocated memory.

    Raises:
        UnreadableError: if it is not a pickle, or damaged.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in a damaged string
            for opcode, argument, _ in genops(file):
                name = opcode.name
                budget.spend(_COSTS.get(name, 100))
                if name in _VALUES:
                    if isinstance(argument, (str, bytes, bytearray)):
                        budget.spend(len(argument))
                    machine.push(argument)
                elif name in _EFFECTS:
                    _EFFECTS[name](machine, argument)
                else:
                    _REST.get(name, _unknown)(machine)
        return machine.stack[-1]
    # Errors of damaged pickles: bad encodings, an empty stack, a key that is not in the memo.
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UnreadableError(DAMAGED) from error


class _Machine:
    """The stack, the stacks below open marks, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, item: Any) -> None:
        self.stack.append(item)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_mark(self) -> None:
        self.since_mark()

    def pop(self) -> None:
        if self.stack:
            del self.stack[-1]
        else:
            self.pop_mark()

    def pop_many(self, number: int) -> tuple[Any, ...]:
        if number > len(self.stack):
            raise IndexError
        items = tuple(self.stack[-number:])
        del self.stack[-number:]
        return items

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise ValueError
        self.push(Stub(function.name if isinstance(function, Global) else "", arguments))

    def build(self) -> None:
        state = self.stack.pop()
        _stub(self.stack[-1]).state = state

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target if isinstance(target, list) else _stub(target).elements).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target if isinstance(target, dict) else _stub(target).entries).update(_dict(items))

    def collect(self, name: str) -> None:
        self.push(Stub(name, elements=self.since_mark()))

    def instance(self) -> None:
        function, *arguments = self.since_mark()
        self.call(function, tuple(arguments))

    def stack_global(self) -> None:
        module, name = self.pop_many(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError
        self.push(Global(f"{module}.{name}"))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.push(self.memo[index])

    def reference(self, name: Any) -> None:
        self.push(Reference(name))


def _stub(target: Any) -> Stub:
    if not isinstance(target, Stub):
        raise ValueError
    return target


class _Key:
    """Replaces a key that must not be hashed by value, as a list or a tuple of tuples; equal only to itself."""


def _dict(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values):
        raise ValueError
    return {key if _hashable(key) else _Key(): value for key, value in zip(keys, values)}


def _hashable(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return all(isinstance(part, (str, bytes, int, float, Global, Stub, type(None))) for part in parts)


def _out_of_band(machine: _Machine) -> NoReturn:
    raise UnreadableError("is a pickle whose arrays are not in the file (out-of-band buffers of protocol 5)")


def _unknown(machine: _Machine) -> NoReturn:
    raise ValueError


# Opcodes whose argument is what they push.
_VALUES = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
        "BINUNICODE", "BINUNICODE8",
    )
)  # fmt: skip
# Opcodes with another argument.
_EFFECTS: dict[str, Callable[[_Machine, Any], None]] = {
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "PUT": _Machine.memoize,
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "GLOBAL": lambda machine, name: machine.push(Global(name.replace(" ", "."))),
    "INST": lambda machine, name: machine.call(Global(name.replace(" ", ".")), tuple(machine.since_mark())),
    # A code of the registry of copyreg, which is not used here.
    "EXT1": lambda machine, code: machine.push(Global(f"extension.{code}")),
    "EXT2": lambda machine, code: machine.push(Global(f"extension.{code}")),
    "EXT4": lambda machine, code: machine.push(Global(f"extension.{code}")),
    "PERSID": _Machine.reference,
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
}
# Opcodes without an argument.
_REST: dict[str, Callable[[_Machine], None]] = {
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "EMPTY_DICT": lambda machine: machine.push({}),
    "EMPTY_SET": lambda machine: machine.push(Stub("builtins.set")),
    "FROZENSET": lambda machine: machine.collect("builtins.frozenset"),
    "MARK": _Machine.mark,
    "LIST": lambda machine: machine.push(machine.since_mark()),
    "TUPLE": lambda machine: machine.push(tuple(machine.since_mark())),
    "DICT": lambda machine: machine.push(_dict(machine.since_mark())),
    "TUPLE1": lambda machine: machine.push(machine.pop_many(1)),
    "TUPLE2": lambda machine: machine.push(machine.pop_many(2)),
    "TUPLE3": lambda machine: machine.push(machine.pop_many(3)),
    "APPEND": lambda machine: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine: machine.update(list(machine.pop_many(2))),
    "SETITEMS": lambda machine: machine.update(machine.since_mark()),
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": lambda machine: machine.push(machine.stack[-1]),
    "MEMOIZE": lambda machine: machine.memoize(len(machine.memo)),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda machine: machine.call(*machine.pop_many(2)),
    "NEWOBJ": lambda machine: machine.call(*machine.pop_many(2)),
    "NEWOBJ_EX": lambda machine: machine.call(*machine.pop_many(3)[:2]),
    "OBJ": _Machine.instance,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine: machine.reference(machine.stack.pop()),
    "NEXT_BUFFER": _out_of_band,
    "READONLY_BUFFER": lambda machine: None,
    "STOP": lambda machine: None,
}
# Bytes allocated by an opcode. The default is 100: an object and its entry in a list or a dict.
_COSTS = {
    **dict.fromkeys(
        ("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "BININT1", "DUP", "GET", "BINGET", "LONG_BINGET"), 8
    ),
    **dict.fromkeys(("POP", "POP_MARK", "FRAME", "PROTO", "STOP", "READONLY_BUFFER"), 0),
    **dict.fromkeys(("BININT", "BININT2", "BINFLOAT"), 40),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"), 400),
}
