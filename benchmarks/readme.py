"""Write the tables and figures of the README and of docs/ from the committed results.

    python -m benchmarks.readme

A table is between ``<!-- NAME table: ... -->`` and ``<!-- end -->``. Each file in benchmarks/results names the command
that produced it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from runningbn.demo.command import results_figure, scores, training_notes
from runningbn.demo.experiment import TEST_IMAGES, Run, Situation

from .accuracy.figure_real import real_figure
from .accuracy.report_real import residual_net_cells, residual_net_table
from .accuracy.report_results import REAL_RESULTS, load_real
from .accuracy.report_tables import markdown
from .cases import COPY, FASTAI, OURS, PEER
from .gpu import report as gpu_report
from .layers_report import (
    Row,
    bandwidths,
    disturbed,
    figure,
    losses,
    losses_title,
    of_grid,
    page_faults,
    summary,
    worst_errors,
)
from .models import markdown_table
from .versions_report import environments_table, failures_list, load, results_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


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


def real_images() -> str:
    """Test accuracy of the residual net on Fashion-MNIST, by kind of batch and contender."""
    return residual_net_table(load_real(REAL_RESULTS))


def machine(contents: dict[str, Any]) -> str:
    """What results were measured on."""
    machine = contents["machine"]
    allocator = machine["allocator"]
    pages = "default allocator" if allocator == "default" else " ".join(f"{k}={v}" for k, v in allocator.items())
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {pages}"
    return f"{where}, {machine['date']}"


def layers(device: str = "cpu") -> tuple[list[Row], str]:
    """The rows of the layers' benchmark, and what they were measured on; no rows where there was no such device."""
    path = RESULTS / {"cpu": "layers.json", "cuda": "layers_cuda.json"}[device]
    if not path.exists():
        return [], ""
    contents = json.loads(path.read_text())
    rows: list[Row] = contents["cases"]
    on = contents["machine"]
    where = f"{on['processor']}, {on['threads']} threads"
    if device == "cuda":
        where = f"{rows[0]['device']}, cuDNN {rows[0]['cudnn']}"
    return rows, f"{where}, torch {on['torch']}, {on['date']}"


# What the README shows of the summary.
FIVE = (
    "training step, NCHW, float32", "training step, channels_last, float32", "evaluation",
    "training step, both compiled", "training step and a ReLU, both compiled",
)  # fmt: skip


def five_speeds() -> str:
    """Five lines of the summary, for the CPU."""
    rows, where = layers()
    lines = [line for line in summary(rows) if line.label in FIVE]
    table = [[line.label, *(line.cell(layer) for layer in OURS[:2])] for line in lines]
    return f"{markdown(['geometric mean (best to worst)', *OURS[:2]], table)}\n\n({where})"


def summary_markdown(rows: list[Row], by_kind: bool = False) -> str:
    """A line per kind of case."""
    header = ["geometric mean (best to worst)", "cases", *OURS]
    lines = [
        [line.label, str(len(line.rows)), *(line.cell(layer) for layer in OURS)] for line in summary(rows, by_kind)
    ]
    return markdown(header, lines)


def case_markdown(rows: list[Row]) -> str:
    """The cases of a grid; a loss is bold."""
    named = [name for name in (*OURS, FASTAI, COPY) if any(name in row["ratio"] | row["wrong"] for row in rows)]
    table = []
    for row in rows:
        cells = []
        for name in named:
            cell = f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "wrong result"
            cells.append(f"**{cell}**" if name in OURS and row["ratio"][name] > 1 else cell)
        described = [row["shape"].replace("x", "×"), row["family"], row["layout"], row["dtype"]]
        saved = [f"{row['saved bytes'][PEER] / 2**20:.2f}"] if row["saved bytes"] else ["–"]
        host = [f"{row['host milliseconds'][PEER]:.2f}", row["backend"]] if "host milliseconds" in row else []
        time, others = f"{row['milliseconds'][PEER]:.2f}", (bandwidths(row), page_faults(row))
        table.append([*described, time, *host, *cells, *others, *saved])
    host_header = ["of the host", "torch's kernels"] if "host milliseconds" in rows[0] else []
    header = [
        "shape", "", "layout", "dtype", f"{PEER}, ms", *host_header, *named, "GB/s", "page faults",
        "kept for backward, MiB",
    ]  # fmt: skip
    return markdown(header, table)


SPEED_INTRO = f"""# Speed

![Time of a training step relative to nn.BatchNorm](speed.png)

This page gives the time of every measured case. Times are relative to {PEER}1d, 2d or 3d, measured in the same
rounds of one process. Values above 1 are slower, and bold. Before timing, the output and the gradients of all
contenders were checked against float64. `python -m benchmarks.layers --write` measures, and
`python -m benchmarks.readme` writes this page.

- *training step*: forward and backward in eager mode. *forward*: in training mode, with gradients enabled.
  *evaluation*: in evaluation mode, without gradients. *compiled*: all contenders with `torch.compile`, relative to the
  compiled {PEER}. *compiled with ReLU*: each with a ReLU after it, which a compiler may join with the layer.
- *NCHW* stands for contiguous, in any number of dimensions. *half the channels*: x is one chunk of a larger tensor;
  *cropped*: its border is cut off; *dy channels_last*: the gradient has another memory format than x.
- The allocator keeps its pages (`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000`), except in *default allocator*.
  Page faults are per call, of {PEER} and of {", ".join(OURS)}.
- *{FASTAI}* is the class of the fastai course. "wrong result" means that it did not pass the check.
- *{COPY}* is `y.copy_(x)`, one read and one write of memory. If nothing stays in the cache, a training step reads or
  writes eight times, which is four copies; a forward in training three times, and an evaluation twice.
- *GB/s* is what so many reads and writes of x are, in bytes, divided by the time: of {PEER}, of {", ".join(OURS)}, and
  of the copy where it was measured. What is in the cache when it is read again can exceed the bandwidth of the memory.
- *kept for backward* is the memory that {PEER} keeps, including the input.
"""


MODELS_INTRO = """Forward, loss, backward and SGD, relative to the same model before `batchnormify`, measured by
`python -m benchmarks.models --write`. *norm layers* is their share of the plain step. Replacing them cannot give a
ratio below 1 minus that share; lower ratios are noise."""
RECALIBRATION_INTRO = """Relative to the forward passes in training mode that are needed anyway, in the same process,
measured by `python -m benchmarks.recalibration --write`. Most calls have two batches only, which shows the fixed cost.
It matters most for small batches."""


def speed_page() -> str:
    """Summary, losses and every case, for each device that was measured."""
    parts = [SPEED_INTRO]
    for device, title in {"cpu": "CPU", "cuda": "GPU"}.items():
        rows, where = layers(device)
        if not rows:
            continue
        about = f"{where}. {sentence(disturbed(rows))} {sentence(worst_errors(rows))}"
        parts.append(f"## {title}\n\n{about}\n\n{summary_markdown(rows, by_kind=True)}\n")
        lost = "\n".join(f"- {line}" for line in losses(rows))
        parts.append(f"### {title}: losses\n\n{sentence(losses_title(rows))}\n\n{lost}\n")
        for grid in dict.fromkeys(row["grid"] for row in rows):
            parts.append(f"### {title}: {grid}\n\n{case_markdown(of_grid(rows, grid))}\n")
    parts.append(f"## Whole training steps\n\n{MODELS_INTRO}\n\n{models()}\n")
    parts.append(f"## update_bn_stats\n\n{RECALIBRATION_INTRO}\n\n{recalibration_speed()}\n")
    return "\n".join(parts)


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


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


def models() -> str:
    """Whole training steps with the allocator that people have."""
    contents = json.loads((RESULTS / "models.json").read_text())
    return markdown_table({**contents, "cases": [case for case in contents["cases"] if case["allocator"] == "default"]})


EXAMPLES = ("pruning", "weight_averaging", "domain_shift")

# By page, the tables on it.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"real images": real_images, "speed": five_speeds},
    "docs/accuracy_demo.md": {"demo": demo_table},
    "docs/recalibration.md": {"population": population_candidates, "error bars": error_bars}
    | {name: partial(example_table, name) for name in EXAMPLES},
    "docs/versions.md": {
        "environments": lambda: environments_table(load()),
        "tests": lambda: results_table(load()),
        "failures": lambda: failures_list(load()),
    },
    "docs/gpus.md": {"host": gpu_report.host_table, "gpu": gpu_report.gpu_tables},
}


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables made anew."""
    for name, make in TABLES[page].items():
        begin, table = rf"<!-- {name} table: [^>]*-->", make()
        pattern = re.compile(rf"({begin})\n.*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"{page}: expected one {name} table, found {found}")
    return text


def main() -> None:
    """Rewrite the tables of all pages, docs/speed.md and the figures that are made of results."""
    (ROOT / "docs" / "speed.md").write_text(speed_page(), encoding="utf-8")
    figure(*layers()).savefig(ROOT / "docs" / "speed.png")
    results_figure(*demo_runs()).savefig(ROOT / "docs" / "demo.png")
    real_figure(load_real(REAL_RESULTS), residual_net_cells()).savefig(ROOT / "docs" / "real_images.png")
    for page in TABLES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
