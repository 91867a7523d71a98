"""``python -m runningbn demo``: run the experiment of `experiment` and show the results.

The table, the figure and the summary are computed from the runs; none of them assumes a result.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean, stdev

import sklearn
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .experiment import CONTENDERS, OURS, OURS_CENTERED, SITUATIONS, TEST_IMAGES, Run, Situation, run_experiment

CHANCE = 0.1  # ten digits, about as many of each

QUICK_STEPS = 250  # per run, with --quick

# Okabe and Ito's colours, distinguishable for colour-blind readers and, by lightness, in grey-scale print.
COLOURS = {"BatchNorm": "#999999", "GroupNorm": "#56b4e9", OURS: "#d55e00", OURS_CENTERED: "#e69f00"}
CAPTION_COLOUR = "#555555"


@dataclass(frozen=True)
class Score:
    """One contender in one situation, over its seeds. ``losses`` may hold NaN and infinity."""

    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation of the accuracy, NaN for a single seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan

    @property
    def diverged(self) -> int:
        """Runs whose test loss is not finite."""
        return sum(not math.isfinite(loss) for loss in self.losses)


Scores = dict[str, dict[str, Score]]  # situation -> contender -> score, both in the order of the runs


def scores(runs: Iterable[Run]) -> Scores:
    """The runs by situation and contender, in ascending order of seeds, so that scores can be compared by seed."""
    collected: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        collected.setdefault(run.situation, {}).setdefault(run.contender, []).append(run)
    return {where: {name: _score(some) for name, some in entries.items()} for where, entries in collected.items()}


def _score(runs: list[Run]) -> Score:
    runs = sorted(runs, key=lambda run: run.seed)
    return Score(tuple(run.accuracy for run in runs), tuple(run.loss for run in runs))


def _seeds(runs: Iterable[Run]) -> str:
    number = len({run.seed for run in runs})
    return "1 seed" if number == 1 else f"{number} seeds"


def training_notes(situation: Situation) -> tuple[str, str]:
    """The training settings of all contenders, in two short lines."""
    return situation.network, f"{situation.optimizer} at {situation.rate:g}, {situation.steps} steps"


def _percent(score: Score) -> str:
    spread = f" ± {100 * score.std:4.1f}" if len(score.accuracies) > 1 else ""
    return f"{100 * score.mean:5.1f} %{spread}"


def _loss(score: Score) -> str:
    """The mean, or the number of runs whose loss is not finite, if any."""
    if score.diverged:
        return f"not finite in {score.diverged} of {len(score.losses)}"
    return f"{fmean(score.losses):.2f}"


def results_table(runs: Sequence[Run], situations: Sequence[Situation]) -> Table:
    """Situation by contender: accuracy, mean ± standard deviation over the seeds, and loss. The best mean is bold."""
    notes = {situation.name: training_notes(situation) for situation in situations}
    table = Table(title=f"Accuracy on {TEST_IMAGES} test images, {_seeds(runs)}", title_justify="left")
    table.add_column("situation", no_wrap=True)
    table.add_column("normalised by", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("test loss", justify="right")
    for name, entries in scores(runs).items():
        best = max(score.mean for score in entries.values())
        first_column = iter((f"[bold]{name}", *(f"[dim]{note}" for note in notes[name])))
        for contender, score in entries.items():
            style = "bold" if score.mean == best else ""
            table.add_row(next(first_column, ""), contender, _percent(score), _loss(score), style=style)
        table.add_section()
    return table


def verdict(ours: Score, theirs: Score) -> int:
    """1 where ours is clearly better, -1 where it is clearly worse, else 0.

    Clear means: with the same sign for every seed, and on average by more than the standard error of the difference of
    two accuracies on `TEST_IMAGES` images.
    """
    differences = [a - b for a, b in zip(ours.accuracies, theirs.accuracies, strict=True)]
    variance = sum(mean * (1 - mean) / TEST_IMAGES for mean in (ours.mean, theirs.mean))
    if abs(fmean(differences)) <= math.sqrt(variance):
        return 0
    if min(differences) > 0:
        return 1
    return -1 if max(differences) < 0 else 0


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _against(opponent: str, by_situation: Scores) -> str:
    """The results against one opponent, as the continuation of a sentence that starts with our name."""
    phrases = {1: f"beat {opponent} with", 0: f"did about as well as {opponent} with", -1: f"lost to {opponent} with"}
    clauses = []
    for outcome, phrase in phrases.items():
        wheres = [
            f"{situation} ({100 * (entries[OURS].mean - entries[opponent].mean):+.1f})"
            for situation, entries in by_situation.items()
            if verdict(entries[OURS], entries[opponent]) == outcome
        ]
        if wheres:
            clauses.append(f"{phrase} {_listed(wheres)}")
    return _listed(clauses)


def summary_sentence(runs: Sequence[Run]) -> str:
    """The results in one sentence: differences in accuracy from each opponent, and diverged runs."""
    by_situation = scores(runs)
    opponents = [name for name in next(iter(by_situation.values())) if name not in (OURS, OURS_CENTERED)]
    diverged = [
        f"{score.diverged} of {len(score.losses)} {contender} runs with {situation}"
        for situation, entries in by_situation.items()
        for contender, score in entries.items()
        if score.diverged
    ]
    return (
        f"Over {_seeds(runs)}, and in points of mean test accuracy, {OURS} "
        + "; it ".join(_against(opponent, by_situation) for opponent in opponents)
        + (f"; the loss was not finite at the end of {_listed(diverged)}" if diverged else "")
        + "."
    )


def results_figure(runs: Sequence[Run], situations: Sequence[Situation]) -> Figure:
    """Bars of mean accuracy, a dot per seed, chance as a line. Without pyplot, whose global state is not changed."""
    by_situation = scores(runs)
    notes = {situation.name: training_notes(situation) for situation in situations}
    contenders = list(next(iter(by_situation.values())))
    width = 0.8 / len(contenders)
    figure = Figure(figsize=(9.6, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, contender in enumerate(contenders):
        positions = [group + (i - (len(contenders) - 1) / 2) * width for group in range(len(by_situation))]
        means = [100 * entries[contender].mean for entries in by_situation.values()]
        axes.bar(positions, means, 0.92 * width, color=COLOURS.get(contender), label=contender)
        for position, entries, mean in zip(positions, by_situation.values(), means, strict=True):
            points = [100 * accuracy for accuracy in entries[contender].accuracies]
            offsets = [position + 0.12 * width * (k - (len(points) - 1) / 2) for k in range(len(points))]
            axes.scatter(offsets, points, s=20, color="white", edgecolor="black", linewidth=0.8, zorder=3)
            axes.text(position, 3, f"{mean:.1f}", ha="center", va="bottom", fontsize=11)
    axes.axhline(100 * CHANCE, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
    axes.text(-0.55, 100 * CHANCE + 1, "chance", fontsize=8)
    axes.set_xticks(range(len(by_situation)), list(by_situation), fontsize=11, fontweight="bold")
    for group, name in enumerate(by_situation):
        text = "\n".join(notes[name])
        axes.annotate(
            text, (group, 0), (0, -20), textcoords="offset points", ha="center", va="top", color=CAPTION_COLOUR
        )
    axes.set_xlim(-0.55, len(by_situation) - 0.45)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 20), [f"{percent} %" for percent in range(0, 101, 20)])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(contenders), frameon=False, fontsize=11)
    figure.suptitle("Accuracy on handwritten digits after training with tiny batches", fontsize=14, fontweight="bold")
    dots = f"Bars: mean of {_seeds(runs)}, dots: each of them."
    caption = f"Same initial weights, batches and optimizer: only the normalisation differs. {dots}"
    figure.supxlabel(caption, fontsize=9, color=CAPTION_COLOUR)
    return figure


def results_as_json(situations: Sequence[Situation], runs: Sequence[Run]) -> str:
    """Settings, versions and numbers as JSON. A loss that is not finite is null, since JSON has no NaN."""
    numbers = [asdict(run) | {"loss": run.loss if math.isfinite(run.loss) else None} for run in runs]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    machine = {"platform": platform.platform(terse=True), "processors": os.cpu_count()}
    contents = {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": versions,
        "situations": [asdict(situation) for situation in situations],
        "runs": numbers,
    }
    return json.dumps(contents, indent=1) + "\n"


def run_demo(*, quick: bool, output: Path, seeds: int | None = None, json_output: Path | None = None) -> None:
    """Run the experiment, print table and summary, write the figure and, if `json_output` is given, the numbers."""
    console = Console()
    situations = [replace(s, steps=QUICK_STEPS) for s in SITUATIONS] if quick else list(SITUATIONS)
    seed_range = range(seeds or (1 if quick else 3))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(situations) * len(CONTENDERS) * len(seed_range))
        runs = run_experiment(situations, seed_range, lambda run: progress.update(task, advance=1))
    console.print(results_table(runs, situations))
    console.print(summary_sentence(runs), highlight=False)
    results_figure(runs, situations).savefig(output, format="png")
    console.print(f"figure: {output}", soft_wrap=True, markup=False, highlight=False)
    if json_output:
        json_output.write_text(results_as_json(situations, runs), encoding="utf-8")
        console.print(f"numbers: {json_output}", soft_wrap=True, markup=False, highlight=False)
