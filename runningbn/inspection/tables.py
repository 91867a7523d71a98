"""The tables of ``python -m runningbn inspect`` and ``diff``.

On a terminal, or if COLUMNS is set, lines have at most that width: names wrap at their dots, numbers do not wrap. In a
pipe every layer is one line, which can be searched and sorted.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..recalibration.text import counted
from .comparison import Comparison, Movement
from .criteria import CRITERIA, ERROR, Criterion, Finding, Judged, mean_over_std, spread
from .errors import printable
from .layers import SavedLayer, StateDict

# Number of layers listed per finding; --json has all.
LISTED = 8

GAP = 2  # spaces between two columns of a table
MIN_NAME_WIDTH = 12  # of the column of names; a table may be wider than a narrower terminal
NO_LIMIT = 100_000  # width of lines in a pipe


def print_inspection(path: Path, state_dict: StateDict, judged: Judged) -> None:
    """Print the layers of one state dict, then the findings by criterion."""
    console = _console()
    contents = f"{counted(len(judged), 'layer')}, {counted(state_dict.channels, 'channel')}"
    _print(console, f"{_whole(path, state_dict.place)}: {contents}", style="bold")
    header = ("layer", "channels", "batches", "mean/std", "max", "var min", "median", "max")
    _print_table(console, header, [_inspection_row(layer, found) for layer, found in judged])
    _print(console, f"mean/std: median and largest |running_mean| / sqrt(running_var + eps), {_eps(state_dict)}")
    _print_states(console, state_dict)
    for name, reason in state_dict.left_out:
        _print(console, f"left out: {_shown(name)}: {reason}", style="yellow")
    console.print()
    for criterion in CRITERIA:
        _print_finding(console, criterion, judged)
    if not any(found for _, found in judged):
        _print(console, "no findings", style="green")


def print_comparison(path_a: Path, path_b: Path, comparison: Comparison) -> None:
    """Print how far the layers moved, the farthest first, then the layers that could not be compared."""
    console = _console()
    _print(console, f"A: {_whole(path_a, comparison.place_a)}", style="bold")
    _print(console, f"B: {_whole(path_b, comparison.place_b)}", style="bold")
    sides = (("A", comparison.wrappers_a, comparison.prefix_a), ("B", comparison.wrappers_b, comparison.prefix_b))
    for side, wrappers, prefix in sides:
        for part in (*wrappers, *([prefix] if prefix else [])):
            _print(console, f"{part!r} is removed from the names in {side}")
    if comparison.layers:
        header = ("layer", "channels", "mean moved/std", "max", "var B/A", "extreme")
        _print_table(console, header, map(_movement_row, sorted(comparison.layers, key=_farthest_first)))
        _print(console, "over the channels: root mean square and largest; geometric mean and farthest from 1")
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        for name in names:
            _print(console, f"only in {side}: {_shown(name)}", style="yellow")
    for name, channels_a, channels_b in comparison.other_shapes:
        text = f"not compared: {_shown(name)} has {channels_a:,} channels in A, {channels_b:,} in B"
        _print(console, text, style="yellow")
    for side, left_out in (("A", comparison.left_out_a), ("B", comparison.left_out_b)):
        for name, reason in left_out:
            _print(console, f"left out of {side}: {_shown(name)}: {reason}", style="yellow")


def print_unpaired(path: Path, places: Iterable[str]) -> None:
    """Print the state dicts of one file without a counterpart in the other."""
    for place in places:
        _print(_console(), f"not compared: {_whole(path, place)}", style="yellow")


# ------------------------------------------------------------------------------------------------- rows and findings


def _inspection_row(layer: SavedLayer, found: Iterable[Finding]) -> tuple[Sequence[str], str]:
    far, var = spread(mean_over_std(layer)), spread(layer.var)
    numbers = (far["median"], far["max"], var["min"], var["median"], var["max"])
    batches = "-" if layer.batches is None else f"{layer.batches:,}"
    wrong = any(finding.criterion.severity == ERROR for finding in found)
    return (layer.name, f"{layer.channels:,}", batches, *map(_short, numbers)), "red" if wrong else ""


def _print_states(console: Console, state_dict: StateDict) -> None:
    """Print the amount of data of the statistics, which only RunningBatchNorm and PreciseBatchNorm store."""
    ours = [layer for layer in state_dict.layers if layer.state]
    samples = [layer.state["samples"].max().item() for layer in ours if not layer.is_seeded]
    if samples:
        least, most = f"{min(samples):,.0f}", f"{max(samples):,.0f}"
        seen = least if least == most else f"{least} to {most}"
        _print(console, f"{counted(len(samples), 'layer')} with pooled sums, of {seen} samples seen")
    if len(ours) > len(samples):
        _print(console, f"{counted(len(ours) - len(samples), 'layer')} with pooled sums seeded from given "
                        "statistics, of an unknown number of samples")  # fmt: skip


def _print_finding(console: Console, criterion: Criterion, judged: Judged) -> None:
    """Print one criterion, with all layers for which it holds."""
    concerned = [
        (layer, len(finding.indices)) for layer, found in judged for finding in found if finding.criterion is criterion
    ]
    if not concerned:
        return
    number = sum(number for _, number in concerned)
    style = "bold red" if criterion.severity == ERROR else "bold yellow"
    _print(console, f"{criterion.severity}: {criterion.name}, {counted(number, 'channel')}", style=style)
    _print(console, criterion.sentence)
    if len(concerned) > 1 and number == sum(layer.channels for layer, _ in judged):
        _print(console, "all channels of all layers")
    else:
        listed = [f"{_shown(layer.name)} ({number:,} of {layer.channels:,})" for layer, number in concerned]
        more = [f"{counted(len(listed) - LISTED, 'more layer')}: see --json"] if len(listed) > LISTED else []
        _print(console, ", ".join([*listed[:LISTED], *more]))
    console.print()


def _movement_row(layer: Movement) -> tuple[Sequence[str], str]:
    ratios = (f"{layer.var_ratio:.3f}", f"{layer.var_ratio_extreme:.3g}")
    cells = (layer.name, f"{len(layer.mean):,}", f"{layer.mean_shift:.3f}", f"{layer.mean_shift_max:.3f}", *ratios)
    return cells, "" if math.isfinite(layer.moved) else "red"


def _farthest_first(layer: Movement) -> float:
    """A sort key: layers that are not finite first, then by how far they moved, the farthest first."""
    return -layer.moved if math.isfinite(layer.moved) else -math.inf


# -------------------------------------------------------------------------------------------------- text and tables


class _Console(Console):
    """rich's console, except that the command line handles a closed pipe."""

    def on_broken_pipe(self) -> None:
        """Re-raise; rich calls this while it handles the BrokenPipeError."""
        raise


def _console() -> Console:
    console = _Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = NO_LIMIT
    return console


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(printable(text), style=style)


def _print_table(console: Console, header: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> None:
    """Print rows of cells, each with a style. The first cell is a name."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(header, *(cells for cells, _ in rows))]
    name_width = max(MIN_NAME_WIDTH, console.width - sum(width + GAP for width in widths[1:]))
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for (name, *numbers), style in rows:
        table.add_row(_wrapped(printable(_shown(name)), name_width), *numbers, style=style)
    console.print(table)


def _wrapped(name: str, width: int) -> str:
    """A name wrapped to this width after dots."""
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _shown(name: str) -> str:
    return name or "(itself)"


def _whole(path: Path, place: str) -> str:
    return f"{path}, {place}" if place else str(path)


def _eps(state_dict: StateDict) -> str:
    values = sorted({layer.eps for layer in state_dict.layers})
    return f"eps = {values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else "") if values else ""


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
