"""Errors of reading a checkpoint, and the limit of memory for reading."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that cannot be read, or has no statistics in it. The message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableError(Exception):
    """The reason without the file; the caller that knows the file raises a `CheckpointError` from it."""


def printable(text: str) -> str:
    """Text from a file with control characters escaped, so that it is safe to print to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Budget:
    """The memory limit for reading: a constant plus a multiple of the size of the files.

    Numbers of objects and elements come from the file, so their memory is charged before they are allocated.
    """

    # Ordinary files need 4 to 12 times their size: float16 tensors become float64, short strings become Python objects.
    PER_BYTE = 16
    LEAST = 128 << 20

    def __init__(self) -> None:
        self.limit, self.spent = self.LEAST, 0

    def extend(self, size: int) -> None:
        """Raise the limit for a further file of `size` bytes."""
        self.limit += self.PER_BYTE * size

    def spend(self, size: int) -> None:
        """Charge `size` bytes of memory.

        Raises:
            UnreadableError: if the limit is exceeded.
        """
        self.spent += size
        if self.spent > self.limit:
            raise UnreadableError(
                f"declares more data than fits into it: reading would need more than {self.limit >> 20:,} MiB, "
                f"{self.PER_BYTE} times its size. It is damaged, or made to exhaust memory"
            )
