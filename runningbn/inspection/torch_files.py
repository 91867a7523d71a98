"""Files of ``torch.save``, of either format, and plain pickles.

Since torch 1.6 a file is an uncompressed zip archive: a pickle ``data.pkl``, and a member for every storage. Older
files are a sequence of five pickles (a magic number, a version, properties of the machine, the contents, and the list
of the keys of the storages), followed by the storages, each after its length.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import Budget, UnreadableError
from .spans import Span, Stream, span_of
from .tensors import Tensors, storage_width
from .unpickling import DAMAGED, Reference, Stub, unpickle

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip archive: signature, lengths of name and extra field


@dataclass(frozen=True)
class Pickled:
    """The contents of a file: the objects of its pickle, and the converter of their tensors."""

    contents: Any
    tensors: Tensors


def read_zip(span: Span, budget: Budget) -> Pickled:
    """Read a zip archive of ``torch.save``, or of ``torch.jit.save``, whose code is not read.

    Raises:
        UnreadableError: for another kind of archive, or a damaged one.
    """
    whole = span.file if span.is_file else io.BytesIO(span.read(0, span.size))
    try:
        with zipfile.ZipFile(whole) as archive:
            members = {member.filename: member for member in archive.infolist()}
    # Errors of zipfile for a damaged directory.
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UnreadableError(DAMAGED) from error
    name = next((name for name in members if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if name is None and any(member.endswith("/archive_format") for member in members):
        raise UnreadableError(
            "is a program of torch.export.save. Save its tensors: torch.save(torch.export.load(PATH).state_dict, OTHER)"
        )
    if name is None:
        raise UnreadableError("is a zip archive without a data.pkl, so it is not one of torch.save")
    folder = name.removesuffix("data.pkl")
    contents = unpickle(_stream(_member(span, members[name]), budget), budget)
    storages = _Members(span, members, f"{folder}data/")
    order = b"little"
    if f"{folder}byteorder" in members:
        order = (found := _member(span, members[f"{folder}byteorder"])).read(0, min(found.size, 8))
    return Pickled(contents, Tensors(storages, order != sys.byteorder.encode(), nested(budget)))


class _Members(Mapping[str, Span]):
    """The storages of a zip archive, by their keys."""

    def __init__(self, span: Span, members: dict[str, zipfile.ZipInfo], folder: str) -> None:
        self._span, self._members, self._folder = span, members, folder

    def __getitem__(self, key: str) -> Span:
        return _member(self._span, self._members[self._folder + key])

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._folder + key in self._members

    def __iter__(self) -> Any:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def _member(span: Span, member: zipfile.ZipInfo) -> Span:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise UnreadableError("has compressed members, which torch.save does not write: unpack it and pack it anew")
    if member.header_offset < 0:
        raise UnreadableError(DAMAGED)
    header = span.part(member.header_offset, _LOCAL_HEADER.size).read(0, _LOCAL_HEADER.size)
    signature, name, extra = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise UnreadableError(DAMAGED)
    return span.part(member.header_offset + _LOCAL_HEADER.size + name + extra, member.file_size)


def _stream(span: Span, budget: Budget) -> Any:
    """The bytes of a span in memory, which is faster to read from than a file."""
    budget.spend(span.size)
    return io.BytesIO(span.read(0, span.size))


def read_pickle(span: Span, budget: Budget) -> Pickled:
    """Read a file of ``torch.save`` before torch 1.6, or any other pickle.

    Raises:
        UnreadableError: if it is not a pickle, or damaged.
    """
    return _read_pickle(span, budget, nested(budget))


def _read_pickle(span: Span, budget: Budget, inner: Any) -> Pickled:
    stream = Stream(span)
    first = unpickle(stream, budget)
    if first != MAGIC_NUMBER:
        return Pickled(first, Tensors({}, False, inner))
    _, machine, contents, keys = (unpickle(stream, budget) for _ in range(4))
    little = not isinstance(machine, dict) or machine.get("little_endian") is not False
    swapped = little != (sys.byteorder == "little")
    storages = _storages(span, stream.position, contents, keys, "little" if little else "big")
    return Pickled(contents, Tensors(storages, swapped, inner))


def nested(budget: Budget) -> Any:
    """A reader for the files of ``torch.save`` inside a plain pickle, one per storage; these must not be nested."""

    def refuse(contents: bytes) -> Any:
        raise UnreadableError(DAMAGED)

    def read(contents: bytes) -> tuple[Any, Tensors]:
        budget.spend(len(contents))
        pickled = _read_pickle(span_of(contents), budget, refuse)
        return pickled.contents, pickled.tensors

    return read


def _storages(span: Span, position: int, contents: Any, keys: Any, order: Any) -> dict[str, Span]:
    """The span of each storage. The size of its elements is taken from the references to it in the contents."""
    if not isinstance(keys, list):
        raise UnreadableError(DAMAGED)
    widths = _widths(contents)
    found = {}
    for key in keys:
        if not isinstance(key, str) or key not in widths:
            raise UnreadableError("has storages of unknown kinds before the storages to be read")
        number = int.from_bytes(span.part(position, 8).read(0, 8), order, signed=True)
        found[key] = span.part(position + 8, number * widths[key])
        position += 8 + found[key].size
    return found


def _widths(contents: Any) -> dict[str, int]:
    """Bytes per element of every storage, from all references in the contents."""
    widths: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [contents]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Reference):
            if isinstance(item.id, tuple) and len(item.id) >= 5 and isinstance(item.id[2], str):
                width = storage_width(item.id)
                if width is not None:
                    widths[item.id[2]] = width
        elif isinstance(item, (dict, list, tuple, Stub)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Stub):
                waiting += [item.arguments, item.state, item.entries, item.elements]
            else:
                waiting += item.values() if isinstance(item, dict) else item
                waiting += item if isinstance(item, dict) else []
    return widths
