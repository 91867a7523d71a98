"""Text of reports and command lines: tables, counts with nouns, names grouped by reason, numbers as arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table as text, with the first column aligned to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in (header, *rows)
    )


def counted(number: int, noun: str) -> str:
    """A number and a noun, in the plural unless the number is 1."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def shown(name: str) -> str:
    """The name of a module, of which the root of a model has none."""
    return name or "the model itself"


def grouped(reasons: Mapping[str, str]) -> dict[str, str]:
    """For each reason the names of the modules that it applies to, separated by commas."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(shown(name))
    return {reason: ", ".join(those) for reason, those in names.items()}


def by_reason(reasons: Mapping[str, str]) -> str:
    """Names of modules grouped by reason, one reason per line."""
    return "\n".join(f"{reason}: {names}" for reason, names in grouped(reasons).items())


def positive_integer(text: str) -> int:
    """An argument of a command line that is a number of things; ``type=`` of ``argparse``."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return number
