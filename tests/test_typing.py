"""What a type checker tells a user of the public names: nothing where they are used rightly, and where they are not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

PROGRAM = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from runningbn import (
    Diagnosis, Horizon, MomentumRule, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm,
    SquareRoot, StatsReport, batchnormify, bn_summary, diagnose, get_bn_modules, merge_statistics, precise_bn,
    update_bn_stats,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = RunningBatchNorm(8, momentum=Horizon(samples=64, start=4), gradient="exact", bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(self.conv(x), mask)
        return y


layers: list[nn.Module] = [
    RunningBatchNorm(8, eps=1e-3, momentum=None, affine=False, device="cpu", dtype=torch.float64),
    RunningBatchNorm(8, momentum=SquareRoot(0.1), sync=False, process_group=None),
    PreciseBatchNorm1d(8, momentum=0.1),
    PreciseBatchNorm2d(8, momentum=None),
    PreciseBatchNorm3d(8, momentum=Horizon()),
]
layer = RunningBatchNorm(8)
assert_type(layer.forward(torch.ones(2, 8, 5), mask=torch.ones(2, 5, dtype=torch.bool)), Tensor)
assert_type(layer.momentum, float | MomentumRule | None)
assert_type(layer.running_mean, Tensor | None)
layer.momentum = 0.1

model = Net()
assert_type(batchnormify(model), Net)
assert_type(batchnormify(nn.BatchNorm2d(8), "precise"), nn.Module)
batchnormify(model, "precise", where=lambda name, module: name != "norm", momentum=None)
assert_type(batchnormify(model, lambda layer: nn.Identity()), nn.Module)

batches = [torch.ones(2, 3, 8)]
report = update_bn_stats(model, batches, num_iters=None, normalize="population", tolerance=0.01, prior=16.0)
assert_type(report, StatsReport)
assert_type(report["norm"].mean_shift, float)
assert_type([layer.mean for layer in report.layers], list[Tensor])
report.undo()
with update_bn_stats(model, iter(batches), 1, "tqdm", forward=lambda model, batch: model(batch)) as undone:
    assert_type(undone, StatsReport)
diagnosis = diagnose(model, batches, metric=lambda model: 0.5, normalize="population")
assert_type(diagnosis, Diagnosis)
assert_type(diagnosis["norm"].mean_off, Tensor)
assert_type(diagnosis.advice, tuple[str, ...])
with precise_bn(model, layers=lambda name, module: True) as recalibration:
    model(batches[0])
assert recalibration.report is not None
assert_type(recalibration.report.batches, int)
assert_type(get_bn_modules(model), list[nn.Module])
assert_type([row.name for row in bn_summary(model)], list[str])
assert_type(bn_summary(model.state_dict())[0].mean_std, float)
assert_type(merge_statistics([model.state_dict(), model.state_dict()], weights=[1, 0.5]), dict[str, Tensor])
"""

MISTAKES = {
    'RunningBatchNorm("8")': "arg-type",
    'RunningBatchNorm(8, momentum="horizon")': "arg-type",
    'RunningBatchNorm(8, gradient="full")': "arg-type",
    "RunningBatchNorm(8).forward(torch.ones(2, 8), mask=True)": "arg-type",
    'PreciseBatchNorm2d(8, gradient="exact")': "call-arg",
    "Horizon(sample=64)": "call-arg",
    "SquareRoot(None)": "arg-type",
    'batchnormify(nn.ReLU(), "runing")': "call-overload",
    'batchnormify("model")': "call-overload",
    'update_bn_stats(nn.ReLU(), [], normalize="batches")': "arg-type",
    "update_bn_stats(nn.ReLU(), [], num_iters=0.5)": "arg-type",
    "update_bn_stats(nn.ReLU(), []).report": "attr-defined",
    "precise_bn(nn.ReLU()).report": "attr-defined",
    'diagnose("model", [])': "arg-type",
    "diagnose(nn.ReLU(), [], metric=0.5)": "arg-type",
    "get_bn_modules([nn.ReLU()])": "arg-type",
    "bn_summary([nn.ReLU()])": "arg-type",
    "merge_statistics([nn.ReLU()])": "list-item",
}
# The first mistake stands on the second line.
MISTAKEN = "\n".join(
    ["import torch; from torch import nn; from runningbn import *  # imports of one line, to count from", *MISTAKES]
)


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> dict[str, list[tuple[int, str, str]]]:
    """File to (line, code, message) of every error that ``mypy --strict`` finds; one run, most of it torch's own."""
    folder = tmp_path_factory.mktemp("programs")
    files = {"program.py": PROGRAM, "mistaken.py": MISTAKEN}
    for name, text in files.items():
        (folder / name).write_text(text)
    # An installed package is taken as it is; the tree is here, and checked elsewhere under its own configuration.
    options = ["--strict", "--follow-imports=silent", "--python-version=3.10", "--config-file=", "--no-error-summary"]
    cache = ROOT / ".mypy_cache" / "user"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", cache, *files],
        cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, list[tuple[int, str, str]]] = {name: [] for name in files}
    for line in done.stdout.splitlines():
        if error := re.fullmatch(r"(\w+\.py):(\d+): error: (.*)  \[([\w-]+)\]", line):
            name, number, message, code = error.groups()
            found[name].append((int(number), code, message))
    return found


def test_a_program_without_mistakes_passes_strict_checks(complaints):
    assert complaints["program.py"] == []


def test_a_mistake_is_found_where_it_is_made(complaints):
    lines = dict(enumerate(MISTAKES, start=2))
    found = {lines[number]: code for number, code, _ in complaints["mistaken.py"]}
    assert found == MISTAKES


def test_types_are_shipped():
    assert (ROOT / "runningbn" / "py.typed").is_file()
