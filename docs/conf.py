"""For Sphinx: ``sphinx-build -W docs docs/_build`` makes a site of these pages and of the public names' docstrings."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from docutils.nodes import Element, SkipNode
from latex2mathml.converter import convert

import runningbn

# Of each framework some names are needed, and to import them all takes as long as to build the site.
FRAMEWORKS = {
    "lightning.pytorch": {"Callback": object},
    "transformers": {"TrainerCallback": object},
    "ignite.engine": {"Events": SimpleNamespace(EPOCH_COMPLETED="EPOCH_COMPLETED")},
    "ignite.distributed": {"get_rank": None},
    "fastai.learner": {"Callback": object, "Recorder": SimpleNamespace(order=0)},
}
for name, members in FRAMEWORKS.items():
    sys.modules[name] = SimpleNamespace(**members)

project = "runningbn"
version = release = runningbn.__version__
html_title = f"runningbn {release}"
html_theme = "furo"
html_show_copyright = False
# myst-nb's borders of cells are of one colour, too bright on a dark page.
html_theme_options = {"light_css_variables": {"mystnb-source-border-color": "var(--color-background-border)"}}
exclude_patterns = ["_build"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"  # the outputs are stored in the notebooks; tests/test_tutorials.py runs them
myst_enable_extensions = ["dollarmath"]  # the formulas, which GitHub shows, too
myst_heading_anchors = 2  # links to sections, as on GitHub
html_math_renderer = "mathml"  # shown by browsers without a network, which MathJax would be loaded from

autodoc_typehints = "none"  # what the docstrings say about an argument tells more
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Shape"]

# A name in single backticks is a link where there is something to link to. Public names have to be found. Arguments,
# attributes and modules are written alike and have no place of their own, as have the exceptions and classes of Python
# and torch.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"[a-z_.]+|PreciseBatchNorm1d/2d/3d"),
    # From a module other than theirs.
    (
        "py:obj",
        r"Diagnosis|LayerDiagnosis|LayerReport|LayerShift|LayerSummary|Recalibration|RecalibrationCallback|StatsReport",
    ),
    ("py:exc", r".*"),
]


def escape_stars(app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Of a shape (N, C, *), the star is a star: docstrings are to be read as plain text, too."""
    lines[:] = [line.replace(", *)", r", \*)") for line in lines]


def inline_formula(translator: Any, formula: Element) -> None:
    """Write a formula within a line as MathML."""
    translator.body.append(convert(formula.astext()))
    raise SkipNode


def displayed_formula(translator: Any, formula: Element) -> None:
    """Write a formula in a paragraph of its own as MathML; a wide one can be scrolled."""
    translator.body.append(f'<div style="overflow-x: auto">{convert(formula.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("autodoc-process-docstring", escape_stars)
