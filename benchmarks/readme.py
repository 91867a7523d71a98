"""Write the tables and figures of the README and of docs/ from the committed results.

    python -m benchmarks.readme

A table stands between ``<!-- NAME table: ... -->`` and ``<!-- end -->``. Each file in benchmarks/results names the
command that made it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

from runningbn.demo import results_figure, scores, training_notes
from runningbn.demo_experiment import TEST_IMAGES, Run, Situation

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_runs() -> tuple[list[Run], list[Situation]]:
    """The runs of the committed demo, and the situations they were in."""
    contents = json.loads((RESULTS / "demo.json").read_text())
    runs = [Run(**{**run, "loss": math.nan if run["loss"] is None else run["loss"]}) for run in contents["runs"]]
    return runs, [Situation(**situation) for situation in contents["situations"]]


def demo_table() -> str:
    """Accuracy by situation and contender, mean ± standard deviation over the seeds, and mean test loss."""
    runs, situations = demo_runs()
    notes = {situation.name: ", ".join(training_notes(situation)) for situation in situations}
    by_situation = scores(runs)
    contenders = list(next(iter(by_situation.values())))
    rows = []
    for name, entries in by_situation.items():
        best = max(score.mean for score in entries.values())
        cells = []
        for contender in contenders:
            score = entries[contender]
            accuracy = f"{100 * score.mean:.1f} ± {100 * score.std:.1f} %"
            loss = "not finite" if score.diverged else f"{fmean(score.losses):.2f}"
            cells.append(f"{f'**{accuracy}**' if score.mean == best else accuracy}, loss {loss}")
        rows.append([f"{name} ({notes[name]})", *cells])
    seeds = len({run.seed for run in runs})
    return markdown([f"accuracy on {TEST_IMAGES} test images, {seeds} seeds", *contenders], rows)


def speed() -> tuple[list[dict[str, Any]], list[str], str]:
    """The measured cases, our layers in them, and what they were measured on."""
    contents = json.loads((RESULTS / "training_step.json").read_text())
    cases: list[dict[str, Any]] = contents["cases"]
    layers = [name for name in cases[0]["ratio"] if name != "nn.BatchNorm2d"]
    return cases, layers, machine(contents)


def machine(contents: dict[str, Any]) -> str:
    """What results were measured on."""
    machine = contents["machine"]
    allocator = machine["allocator"]
    pages = "default allocator" if allocator == "default" else " ".join(f"{k}={v}" for k, v in allocator.items())
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {pages}"
    return f"{where}, {machine['date']}"


def speed_summary() -> str:
    """Per layout and dtype, the geometric mean of the ratios over the shapes, and the best and the worst."""
    cases, layers, where = speed()
    rows = []
    for kind in dict.fromkeys((case["layout"], case["dtype"]) for case in cases):
        ratios = [case["ratio"] for case in cases if (case["layout"], case["dtype"]) == kind]
        cells = []
        for layer in layers:
            values = [ratio[layer] for ratio in ratios]
            cells.append(f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        rows.append([", ".join(kind), *cells])
    header = [f"geometric mean over {len(cases) // len(rows)} shapes (best to worst)", *layers]
    return f"{markdown(header, rows)}\n\n({where}; each case in [docs/speed.md](docs/speed.md))"


def speed_page() -> str:
    """Every case."""
    cases, layers, where = speed()
    rows = [
        [
            case["shape"], case["layout"], case["dtype"], f"{case['milliseconds']['nn.BatchNorm2d']:.2f}",
            *[f"{case['ratio'][name]:.2f}" for name in layers],
            " / ".join(str(case["page faults"][name]) for name in ("nn.BatchNorm2d", *layers)),
        ]
        for case in cases
    ]  # fmt: skip
    header = ["shape", "layout", "dtype", "nn.BatchNorm2d, ms", *layers, "page faults per step, in this order"]
    return (
        "# A training step, case by case\n\n"
        "Forward and backward in eager mode; the time of each layer relative to nn.BatchNorm2d in the same rounds of\n"
        "one process; above 1 is slower. Made by `python -m benchmarks.readme` from what\n"
        f"`python -m benchmarks.training_step --write` measured: {where}.\n\n{markdown(header, rows)}\n"
    )


def recalibration_speed() -> str:
    """Seconds of the forward passes alone, and everybody's time relative to them."""
    contents = json.loads((RESULTS / "recalibration.json").read_text())
    systems = [name for name in contents["cases"][0]["ratio"] if name != "forward passes alone"]
    rows = [
        [
            case["model"], case["images"].replace(" x ", "×"), case["layout"],
            f"{case['seconds']['forward passes alone']:.2f} s", *[f"{case['ratio'][name]:.2f}" for name in systems],
        ]
        for case in contents["cases"]
    ]  # fmt: skip
    header = ["model", "images", "layout", "forward passes alone", *systems]
    return f"{markdown(header, rows)}\n\n({machine(contents)})"


def population_candidates() -> str:
    """The ways to statistics that are exact for evaluation."""
    contents = json.loads((RESULTS / "population.json").read_text())
    columns = {"passes": "g", "seconds": ".1f", "MB": ".0f", "error": ".0e"}
    rows = [
        [case["candidate"], *(f"{case[column]:{form}}" for column, form in columns.items())]
        for case in contents["cases"]
    ]
    header = ["", "passes over the data", "seconds", "memory, MB", "off by"]
    return f"{markdown(header, rows)}\n\n({machine(contents)})"


def error_bars() -> str:
    """How often the truth is within two standard errors, over all layers."""
    contents = json.loads((RESULTS / "error_bars.json").read_text())
    rows = []
    for batches in dict.fromkeys(case["batches"] for case in contents["cases"]):
        cases = [case for case in contents["cases"] if case["batches"] == batches]
        rows.append([str(batches), *(_range([case[which] for case in cases]) for which in ("mean", "var"))])
    return markdown(["batches", "mean within two standard errors", "variance within two"], rows)


def _range(parts: list[float]) -> str:
    return f"{fmean(parts):.1%} ({min(parts):.1%} to {max(parts):.1%} over the layers)"


def example_table(name: str) -> str:
    """What an example in docs/examples measured: mean ± standard deviation over the seeds, in percent."""
    contents = json.loads((RESULTS / "examples.json").read_text())[name]
    results: dict[str, dict[str, list[float]]] = contents["results"]
    rows = [
        [row, *(f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}" for values in cells.values())]
        for row, cells in results.items()
    ]
    return markdown([f"{contents['title']} in %", *next(iter(results.values()))], rows)


EXAMPLES = ("pruning", "weight_averaging", "domain_shift")

# By page, the tables on it.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo_table, "speed": speed_summary, "recalibration speed": recalibration_speed},
    "docs/recalibration.md": {"population": population_candidates, "error bars": error_bars}
    | {name: partial(example_table, name) for name in EXAMPLES},
}


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables made anew."""
    for name, make in TABLES[page].items():
        begin, table = rf"<!-- {name} table: [^>]*-->", make()
        pattern = re.compile(rf"({begin})\n.*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", text)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{page}: expected one {name} table, found {found}")
    return text


def main() -> None:
    """Rewrite the tables of all pages, docs/demo.png and docs/speed.md."""
    (ROOT / "docs" / "speed.md").write_text(speed_page(), encoding="utf-8")
    results_figure(*demo_runs()).savefig(ROOT / "docs" / "demo.png")
    for page in TABLES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
