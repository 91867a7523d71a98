"""``python -m runningbn diagnose``: paths, exit statuses, tables, JSON, messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runningbn import diagnose
from runningbn.__main__ import main
from runningbn.diagnosis.rules import RULES

ROOT = Path(__file__).parent.parent

PROJECT = """
import torch
from torch import nn
from runningbn import update_bn_stats

torch.manual_seed(0)
loader = torch.randn(40, 32, 3)
shifted = loader + 2
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
update_bn_stats(model, loader)
groups = nn.Sequential(nn.GroupNorm(1, 3))
number = 3


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*model)


class Data:
    train = loader


def make_model(depth=1):
    return model


def make_loader():
    yield from shifted


def needs_something(path):
    return model


def accuracy(model):
    return -model(shifted[0]).mean().abs()


def loss(model):
    return model


def by_name(model, batch):
    return model(batch["image"])


named = [{"image": x, "label": 0} for x in loader]


def fails():
    raise RuntimeError("out of luck")


def leaves():
    raise SystemExit(0)


def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture(name="project")
def _project(tmp_path, monkeypatch):
    """A package ``shop.net`` that can be imported."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("")
    (tmp_path / "shop" / "net.py").write_text(PROJECT)
    (tmp_path / "shop" / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "shop" / "leaves.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.mark.parametrize("model", ["model", "make_model", "Net"])
@pytest.mark.parametrize("loader", ["loader", "Data.train"])
def test_a_healthy_model_has_status_0_and_a_row_per_layer(model, loader, project, capsys):
    assert main(["diagnose", f"shop.net:{model}", f"shop.net:{loader}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("layer  samples")
    assert out[1].split()[:3] == ["1", "32", "32"]
    assert "std in 1 layer" in out[-1]
    assert out[-1].endswith("whether the model relies on its batches.")


def test_a_model_that_is_off_has_status_1(project, capsys):
    arguments = ["shop.net:model", "shop.net:make_loader", "--metric", "shop.net:accuracy"]
    assert main(["diagnose", *arguments]) == 1
    assert "Stored statistics are off in 1 of 1 layer" in capsys.readouterr().out


def test_warnings_alone_have_status_0(project, capsys):
    assert main(["diagnose", "shop.net:model", "shop.net:loader", "--num-iters", "1"]) == 0
    assert "A single batch has no error bars" in capsys.readouterr().out


def test_json_is_that_of_the_diagnosis(project, capsys):
    assert main(["diagnose", "shop.net:model", "shop.net:shifted", "--json", "--num-iters", "10"]) == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    net = sys.modules["shop.net"]
    assert printed == json.loads(json.dumps(diagnose(net.model, net.shifted, 10).to_dict()))
    assert printed["batches"] == 10


def test_forward_and_device(project, capsys):
    options = ["--forward", "shop.net:by_name", "--device", "cpu"]
    assert main(["diagnose", "shop.net:model", "shop.net:named", *options]) == 0


MISTAKES = {
    "no colon": (["shop.net", "shop.net:loader"], "shop.net: expected PACKAGE.MODULE:ATTRIBUTE"),
    "no attribute": (["shop.net:", "shop.net:loader"], "shop.net:: expected PACKAGE.MODULE:ATTRIBUTE"),
    "no package": (["nowhere.net:model", "shop.net:loader"], "nowhere.net:model: there is no module 'nowhere'"),
    "no module": (["shop.nets:model", "shop.net:loader"], "shop.nets:model: there is no module 'shop.nets'"),
    "unknown": (["shop.net:modle", "shop.net:loader"], "has no attribute 'modle'"),
    "needs arguments": (
        ["shop.net:needs_something", "shop.net:loader"],
        "shop.net:needs_something: cannot be called without arguments: missing a required argument: 'path'",
    ),
    "no model": (["shop.net:number", "shop.net:loader"], "shop.net:number: expected a torch.nn.Module, got int"),
    "no loader": (["shop.net:model", "shop.net:number"], "shop.net:number: expected something to loop over, got int"),
    "no metric": (
        ["shop.net:model", "shop.net:loader", "--metric", "shop.net:number"],
        "shop.net:number: expected a function, got int",
    ),
}


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_path_that_leads_nowhere_is_one_line_and_status_2(arguments, message, options, project, capsys):
    assert main(["diagnose", *arguments, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("runningbn diagnose: ")
    assert line.endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shop.net:fails", "shop.net:loader"], "RuntimeError: out of luck"),
        (["shop.net:leaves", "shop.net:loader"], "SystemExit: 0"),
        (["shop.leaves:model", "shop.net:loader"], "SystemExit: 0"),
        (["shop.broken:model", "shop.net:loader"], "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        (["shop.net:groups", "shop.net:loader"], "it has GroupNorm"),
        (["shop.net:model", "shop.net:named"], "give forward="),
        (["shop.net:model", "shop.net:loader", "--metric", "shop.net:loss"], "expected a number, got Sequential"),
    ],
)
def test_code_that_fails_shows_its_traceback_and_has_status_2(arguments, message, project, capsys):
    assert main(["diagnose", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Traceback")
    assert message in printed.err


def test_interrupted_has_status_130(project, capsys):
    assert main(["diagnose", "shop.net:interrupted", "shop.net:loader"]) == 130


@pytest.mark.parametrize("arguments", [[], ["a:b"], ["a:b", "c:d", "e:f"], ["a:b", "c:d", "--num-iters", "0"]])
def test_wrong_arguments_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", *arguments])
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_says_that_code_is_run_and_names_every_rule_and_status(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "imports and runs the code" in text
    assert all(f"{rule.name} ({rule.severity}): {rule.when} {rule.reason}" in text for rule in RULES)
    assert "Exit status: 0" in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "imports and runs your code" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_from_the_shell_modules_are_found_in_the_present_folder(project):
    done = subprocess.run(
        [sys.executable, "-m", "runningbn", "diagnose", "shop.net:model", "shop.net:shifted"],
        capture_output=True, text=True, cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "off in 1 of 1 layer" in done.stdout


def test_the_model_is_left_as_it_was(project, capsys):
    main(["diagnose", "shop.net:model", "shop.net:shifted"])
    net = sys.modules["shop.net"]
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    main(["diagnose", "shop.net:model", "shop.net:shifted"])
    assert all(torch.equal(value, before[name]) for name, value in net.model.state_dict().items())
