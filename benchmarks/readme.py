"""Write the README's tables and figure from the committed results.

    python -m benchmarks.readme

A table stands between ``<!-- NAME table: ... -->`` and ``<!-- end -->``. The results come from
``python -m runningbn demo --json benchmarks/results/demo.json`` and ``python -m benchmarks.training_step --write``.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, geometric_mean
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
    machine = contents["machine"]
    allocator = machine["allocator"]
    pages = "default allocator" if allocator == "default" else " ".join(f"{k}={v}" for k, v in allocator.items())
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {pages}"
    return cases, layers, f"{where}, {machine['date']}"


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


TABLES = {"demo": demo_table, "speed": speed_summary}


def with_tables(readme: str) -> str:
    """The README's text with its tables made anew."""
    for name, make in TABLES.items():
        begin, table = rf"<!-- {name} table: [^>]*-->", make()
        pattern = re.compile(rf"({begin})\n.*?(<!-- end -->)", re.DOTALL)
        readme, found = pattern.subn(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", readme)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"README.md: expected one {name} table, found {found}")
    return readme


def main() -> None:
    """Rewrite README.md, docs/demo.png and docs/speed.md."""
    (ROOT / "docs" / "speed.md").write_text(speed_page(), encoding="utf-8")
    results_figure(*demo_runs()).savefig(ROOT / "docs" / "demo.png")
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
