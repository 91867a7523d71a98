"""Format text for reports: tables, counts with nouns, names grouped by reason."""

from __future__ import annotations

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


def by_reason(reasons: Mapping[str, str]) -> str:
    """Names grouped by reason, one reason per line."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "the model itself")
    return "\n".join(f"{reason}: {', '.join(those)}" for reason, those in names.items())
