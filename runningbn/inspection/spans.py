"""Parts of files, read where and when they are needed, and never beyond their end."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import UnreadableError


@dataclass(frozen=True)
class Span:
    """A range of bytes in an open file.

    Files are not mapped into memory: a process that writes a file anew while it is mapped ends the one that reads.
    """

    file: BinaryIO
    start: int
    size: int

    @property
    def is_file(self) -> bool:
        """Whether it is the whole file."""
        return self.start == 0 and self.file.seek(0, os.SEEK_END) == self.size

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from there on.

        Raises:
            UnreadableError: where the span has fewer.
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
        """A range in this one.

        Raises:
            UnreadableError: where that is not inside.
        """
        if min(offset, size) < 0 or offset + size > self.size:
            raise UnreadableError("was cut off, or says that it is longer than it is")
        return Span(self.file, self.start + offset, size)


def span_of(contents: bytes) -> Span:
    """Bytes that are in memory already."""
    return Span(io.BytesIO(contents), 0, len(contents))


class Stream:
    """A span as a file for ``genops``. ``read(n)`` of a file of Python may reserve n bytes before it reads."""

    def __init__(self, span: Span) -> None:
        self._file: Any = span.file
        self._size = self._left = span.size
        span.file.seek(span.start)

    @property
    def position(self) -> int:
        """From the start of the span."""
        return self._size - self._left

    def read(self, size: int) -> bytes:
        """At most so many bytes."""
        found: bytes = self._file.read(min(size, self._left))
        self._left -= len(found)
        return found

    def readline(self) -> bytes:
        """Up to the end of a line, or of the span."""
        line: bytes = self._file.readline(self._left)
        self._left -= len(line)
        return line
