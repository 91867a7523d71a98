"""Byte ranges of files, read on demand, with bounds checks."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import UnreadableError


@dataclass(frozen=True)
class Span:
    """A range of bytes in an open file.

    Files are not mapped into memory: if another process rewrote a mapped file, the reading process would crash.
    """

    file: BinaryIO
    start: int
    size: int

    @property
    def is_file(self) -> bool:
        """Whether it covers the whole file."""
        return self.start == 0 and self.file.seek(0, os.SEEK_END) == self.size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            UnreadableError: if the span has fewer.
        """
        if min(offset, size) < 0 or offset + size > self.size:
            raise UnreadableError(
                f"has a tensor of bytes {offset:,} to {offset + size:,} of a storage that has {self.size:,}"
            )
        self.file.seek(self.start + offset)
        found = self.file.read(size)
        if len(found) != size:
            raise UnreadableError("was cut off")
        return found

    def part(self, offset: int, size: int) -> Span:
        """A range inside this one.

        Raises:
            UnreadableError: if it is not inside.
        """
        if min(offset, size) < 0 or offset + size > self.size:
            raise UnreadableError("was cut off, or declares more bytes than it has")
        return Span(self.file, self.start + offset, size)


def span_of(contents: bytes) -> Span:
    """A span over bytes in memory."""
    return Span(io.BytesIO(contents), 0, len(contents))


class Stream:
    """A span as a file for ``genops``. Reads are limited to the span, since ``read(n)`` may allocate n bytes first."""

    def __init__(self, span: Span) -> None:
        self._file: Any = span.file
        self._size = self._left = span.size
        span.file.seek(span.start)

    @property
    def position(self) -> int:
        """The current position, relative to the start of the span."""
        return self._size - self._left

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        found: bytes = self._file.read(min(size, self._left))
        self._left -= len(found)
        return found

    def readline(self) -> bytes:
        """Read to the end of the line or of the span."""
        line: bytes = self._file.readline(self._left)
        self._left -= len(line)
        return line
