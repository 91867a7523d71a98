"""Why a checkpoint cannot be read, and how much memory reading it may take."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that cannot be read, or that has no statistics in it. The message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableError(Exception):
    """The reason alone; whoever knows the file makes a `CheckpointError` of it."""


def printable(text: str) -> str:
    """Text from a file as one that leaves a terminal alone: control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Budget:
    """The memory that reading may take: a constant, and a multiple of the size of the files.

    A file says itself how many objects and elements it has. What it declares is charged before it is made.
    """

    # Of ordinary files, a tensor of half precision becomes float64, and a short string a Python object: 4 to 12 times.
    PER_BYTE = 16
    LEAST = 128 << 20

    def __init__(self) -> None:
        self.limit, self.spent = self.LEAST, 0

    def extend(self, size: int) -> None:
        """A file of so many bytes is to be read, too."""
        self.limit += self.PER_BYTE * size

    def spend(self, size: int) -> None:
        """Account for so many bytes of memory.

        Raises:
            UnreadableError: if that is more than a file of this size can need.
        """
        self.spent += size
        if self.spent > self.limit:
            raise UnreadableError(
                f"declares more than fits into it: reading would take over {self.limit >> 20:,} MiB, "
                f"{self.PER_BYTE} times its size. It is damaged, or made to fill the memory"
            )
