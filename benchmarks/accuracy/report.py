"""Write docs/accuracy.md and its figures from the committed results only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..results_file import FOLDER
from . import report_digits, report_real
from .figure import figure
from .figure_real import real_figure
from .report_results import REAL_RESULTS, RealResults, load_real
from .report_tables import markdown
from .results import Results

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = FOLDER / "accuracy_published.json"

TITLE = """# Accuracy

Made by `python -m benchmarks.accuracy --report` from the files in `benchmarks/results`. There are two grids: one of
real images, and a quick one of small digits."""


def page(real: RealResults, digits: Results) -> str:
    """The whole of docs/accuracy.md."""
    parts = [TITLE, report_real.section(real), report_digits.section(digits)]
    if PUBLISHED.exists():
        parts.append(published(json.loads(PUBLISHED.read_text())))
    return "\n\n".join(parts) + "\n"


def published(contents: dict[str, Any]) -> str:
    """The published tables in small, as `published` measured them."""
    parts = ["## Two published tables, in small"]
    for table in contents["cases"]:
        rows = [[row, *cells] for row, cells in table["rows"].items()]
        parts.append(f"### {table['title']}\n\n{table['about']}\n\n{markdown(['', *table['columns']], rows)}")
    return "\n\n".join(parts)


def write_report(digits: Results) -> None:
    """Rewrite docs/accuracy.md and its figures, accuracy_real.png and accuracy.png; real images are read here."""
    real = load_real(REAL_RESULTS)
    (DOCS / "accuracy.md").write_text(page(real, digits), encoding="utf-8")
    if digits.cells():
        figure(digits).savefig(DOCS / "accuracy.png")
    if real.cells():
        real_figure(real).savefig(DOCS / "accuracy_real.png")
