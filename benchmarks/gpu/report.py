"""The tables of docs/gpus.md, made from committed results, and the tables of a run on a GPU.

    python -m benchmarks.gpu.report DIR/results.json      print the tables of a run

benchmarks/results/gpu.json is the results.json of a complete run, if there has been one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report_tables import markdown
from benchmarks.results_file import FOLDER

GPU = FOLDER / "gpu.json"
NEVER = "No GPU was at hand yet, so there is nothing to show."


def host_table() -> str:
    """Microseconds of the host, without a GPU."""
    contents = json.loads((FOLDER / "host.json").read_text())
    rows = []
    for row in contents["cases"]:
        cells = [f"{row['microseconds'][name]:.0f}" for name in ("forward", "backward")]
        if "by Triton" in row:
            cells = [f"{cell} ({row['by Triton'][name]:.0f})" for cell, name in zip(cells, ("forward", "backward"))]
        launches = ", ".join(f"`{launch['kernel']}` {launch['arguments']}" for launch in row.get("launches", ()))
        rows.append([row["layer"], *cells, launches or "none"])
    on = contents["machine"]
    where = f"{on['processor']}, torch {on['torch']}, {on['date']}"
    header = ["", "forward, µs (by Triton's own launches)", "backward, µs (likewise)", "launches and their arguments"]
    return f"{markdown(header, rows)}\n\n({where})"


def gpu_tables() -> str:
    """Those of the committed run."""
    return tables(json.loads(GPU.read_text())) if GPU.exists() else NEVER


def tables(contents: dict[str, Any]) -> str:
    """What passed, then the layers, the models and the compiled models of a run."""
    parts = contents["parts"]
    gpu = contents.get("gpu", {"name": "CPU, interpreted"})
    on = contents["machine"]
    made = [f"{gpu['name']}, cuDNN {gpu.get('cudnn', 'none')}, torch {on['torch']}, {on['date']}, code {on['code']}."]
    rows = [[name, part["outcome"], str(part.get("seconds", "")), counts(part["rows"])] for name, part in parts.items()]
    made.append(markdown(["part", "outcome", "seconds", ""], rows))
    for name, make in (("layers", layers), ("models", models), ("compiled", compiled)):
        rows = [row for row in parts.get(name, {"rows": []})["rows"] if "milliseconds" in row]
        if rows:
            made.append(make(rows))
    return "\n\n".join(made)


def counts(rows: list[dict[str, Any]]) -> str:
    """How many tests passed, or how many cases were measured; what was left out or went wrong."""
    found = []
    for row in rows:
        if "tests" in row:
            found.append(", ".join(f"{count} {outcome}" for outcome, count in row["tests"].items()))
        elif "left out for lack of time" in row:
            found.append(f"{len(row['left out for lack of time'])} cases left out for lack of time")
        elif "not run" in row:
            found.append(row["not run"])
    measured = sum("milliseconds" in row or "accuracy" in row for row in rows)
    wrong = sum("error" in row and "case" in row for row in rows)
    found += [f"{measured} cases"] * bool(measured) + [f"{wrong} cases failed"] * bool(wrong)
    return "; ".join(found)


def layers(rows: list[dict[str, Any]]) -> str:
    """Times relative to nn.BatchNorm, launches and the share of a copy's bandwidth."""
    peer, *ours = rows[0]["launches"]
    lines = []
    for row in rows:
        share, launches = row["share of the bandwidth of a copy"], row["launches"]
        cells = [f"{row['ratio'][name]:.2f} ({share.get(name, 0):.0%}, {launches[name]})" for name in ours]
        described = [row["shape"].replace("x", "×"), row["layout"], row["dtype"], row[f"kernels of {peer}"]]
        lines.append([*described, f"{row['milliseconds'][peer]:.3f} ({launches[peer]})", *cells])
    titles = [f"{name} (of a copy's bandwidth, launches)" for name in ours]
    return markdown(["shape", "layout", "dtype", "torch took", f"{peer}, ms (launches)", *titles], lines)


def models(rows: list[dict[str, Any]]) -> str:
    """Times of whole steps relative to the plain network."""
    plain, *ours = rows[0]["ratio"]
    lines = [
        [row["model"], str(row["batch"]), row["way"], row["dtype"], f"{row['milliseconds'][plain]:.2f}",
         *(f"{row['ratio'][name]:.2f}" for name in ours), "/".join(map(str, row["launches"].values()))]
        for row in rows
    ]  # fmt: skip
    return markdown(["model", "batch", "", "dtype", f"{plain}, ms", *ours, "launches"], lines)


def compiled(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of whole compiled steps."""
    lines = [
        [row["model"], str(row["batch"]), row["variant"], f"{next(iter(row['milliseconds'].values())):.2f}",
         f"{row['compiled in seconds']:.0f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(["compiled model", "batch", "layers", "ms", "compiled in s"], lines)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
