"""The benchmark of a GPU without one: its runner, its command line, and what its parts make of their work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import compiled, correctness, layers, models, runner
from benchmarks.gpu.launches import kernels_of
from benchmarks.gpu.networks import NETWORKS, UNet
from benchmarks.gpu.part import Work, check_device
from benchmarks.gpu.runner import FAILED, NOT_RUN, PASSED, TIMED_OUT, Part, run_parts

ROOT = Path(__file__).parents[1]
# Parts that end in every way there is.
PARTS = {
    "passes": "work.row({'n': 1}); work.row({'dry run': work.dry_run})",
    "fails": "work.row({'n': 2}); print('what went wrong'); sys.exit(3)",
    "raises": "raise ValueError('unexpected')",
    "hangs": "work.row({'n': 3}); print('still there', flush=True); time.sleep(600)",
    "is ended in a row": "open(work.path, 'a').write('{\"n\": 4}\\n{\"half'); sys.exit(1)",
    "leaves a process": "subprocess.Popen(['sleep', '600']); work.row({'n': 5})",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """By name; those that run have far more time than they take, on a busy machine, too."""
    beginning = "import subprocess, sys, time\nfrom benchmarks.gpu.part import Work\nwork = Work(None)\n"
    found = {}
    for name, body in PARTS.items():
        module = f"gpu_part_{name.replace(' ', '_')}"
        (tmp_path / f"{module}.py").write_text(beginning + body + "\n")
        found[name] = Part(name, module, 300)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return found


def run(parts: list[Part], path: Path, seconds: float = 1000, dry_run: bool = True) -> tuple[bool, dict[str, Any], str]:
    said = io.StringIO()
    passed = run_parts(parts, path, {"about": "this"}, seconds, dry_run, said)
    return passed, json.loads(path.read_text()), said.getvalue()


@pytest.mark.slow
def test_a_part_that_fails_stops_no_other_and_is_told(parts: dict[str, Part], tmp_path: Path) -> None:
    order = [parts[name] for name in ("fails", "raises", "is ended in a row", "passes")]
    passed, contents, said = run(order, tmp_path / "out" / "results.json")
    assert not passed
    assert contents["about"] == "this"
    outcomes = {name: part["outcome"] for name, part in contents["parts"].items()}
    assert outcomes == {"fails": FAILED, "raises": FAILED, "is ended in a row": FAILED, "passes": PASSED}
    by_name = contents["parts"]
    assert by_name["fails"]["rows"] == [{"n": 2}]
    assert by_name["fails"]["exit code"] == 3
    assert "what went wrong" in by_name["fails"]["output"]
    assert "ValueError: unexpected" in by_name["raises"]["output"]
    assert by_name["is ended in a row"]["rows"] == [{"n": 4}]
    assert by_name["passes"]["rows"] == [{"n": 1}, {"dry run": True}]
    assert "output" not in by_name["passes"]
    for text in ("what went wrong", "ValueError: unexpected", "fails: failed", "passes: passed"):
        assert text in said


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_and_its_rows_are_kept(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It writes its row before it hangs: wait for that, however busy the machine is.
    monkeypatch.setattr(runner, "GRACE", 60.0)
    begin = time.monotonic()
    passed, contents, said = run([parts["hangs"]._replace(seconds=1), parts["passes"]], tmp_path / "results.json")
    assert time.monotonic() - begin < 500
    assert not passed
    hung = contents["parts"]["hangs"]
    assert (hung["outcome"], hung["exit code"], hung["rows"]) == (TIMED_OUT, None, [{"n": 3}])
    assert "still there" in hung["output"]
    assert contents["parts"]["passes"]["outcome"] == PASSED
    assert "hangs: timed out" in said


@pytest.mark.slow
def test_what_a_part_leaves_behind_is_ended_too(parts: dict[str, Part], tmp_path: Path) -> None:
    passed, contents, _ = run([parts["leaves a process"]], tmp_path / "results.json")
    assert passed
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert contents["parts"]["leaves a process"]["rows"] == [{"n": 5}]
    assert "sleep 600" not in left.splitlines()


def test_parts_without_time_are_not_run_and_no_success(parts: dict[str, Part], tmp_path: Path) -> None:
    passed, contents, said = run([parts["passes"]], tmp_path / "results.json", seconds=3)
    assert not passed
    assert contents["parts"]["passes"] == {"outcome": NOT_RUN, "rows": []}
    assert "passes: not run, 3 s are left of 3" in said


def test_results_are_there_after_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, seen = tmp_path / "results.json", []

    def interrupted(part: Part, seconds: float, dry_run: bool) -> dict[str, Any]:
        seen.append(json.loads(path.read_text())["parts"])
        if part.name == "c":
            raise KeyboardInterrupt
        return {"outcome": PASSED, "seconds": 0.0, "rows": [part.name]}

    monkeypatch.setattr(runner, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([Part(name, "", 100) for name in "abc"], path)
    assert [part["outcome"] for part in seen[0].values()] == [NOT_RUN] * 3
    contents = json.loads(path.read_text())["parts"]
    assert contents["a"]["rows"] + contents["b"]["rows"] == ["a", "b"]
    assert contents["c"]["outcome"] == NOT_RUN


def test_all_parts_together_are_below_nine_minutes() -> None:
    assert command_line.SECONDS + runner.GRACE < 9 * 60 + 10
    names = [part.name for part in command_line.PARTS]
    assert names == ["correctness", "layers", "models", "accuracy", "compiled"]
    # The last one gets what is left, which has to be something.
    others = sum(part.seconds + runner.GRACE for part in command_line.PARTS[:-1])
    assert others < command_line.SECONDS - 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "torch found no CUDA device; --dry-run does without" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--out", str(tmp_path), "--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_only_some_parts_get_all_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command_line, "run_parts", lambda *arguments: asked.append(arguments) or True)
    monkeypatch.setattr(command_line, "check_device", lambda dry_run: None)
    assert command_line.main(["--out", str(tmp_path), "--only", "models", "layers", "--seconds", "100"]) == 0
    parts, path, about, seconds, dry_run = asked[0]
    assert [(part.name, part.seconds) for part in parts] == [("layers", 40.0), ("models", 40.0)]
    assert (path, seconds, dry_run) == (tmp_path / "results.json", 100, False)
    assert about["machine"]["torch"] == torch.__version__
    monkeypatch.setattr(command_line, "run_parts", lambda *arguments: False)
    assert command_line.main(["--out", str(tmp_path)]) == 1


def test_a_dry_run_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert check_device(dry_run=True) == "a dry run needs TRITON_INTERPRET=1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert check_device(dry_run=True) is None


# --------------------------------------------------------------------------------------------------------------- parts


def work(tmp_path: Path, *arguments: str) -> Work:
    return Work(None, ["--to", str(tmp_path / "rows"), *arguments])


def rows(work: Work) -> list[Any]:
    return [json.loads(line) for line in work.path.read_text().splitlines()]


def test_a_case_that_raises_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    found = work(tmp_path)
    assert found.each([1, 0, 2], lambda case: {"inverse": 1 / case}) == 1
    assert rows(found) == [
        {"inverse": 1.0},
        {"case": "0", "error": "ZeroDivisionError: division by zero"},
        {"inverse": 0.5},
    ]
    assert found.failures == ["0: division by zero"]


def test_cases_without_time_are_named(tmp_path: Path) -> None:
    found = work(tmp_path, "--seconds", "0")
    assert found.each(["a", "b"], lambda case: {}) == 0
    assert rows(found) == [{"left out for lack of time": ["a", "b"]}]


def test_a_summary_counts_every_test_once() -> None:
    def outcome(test: str, result: str, message: str = "") -> dict[str, Any]:
        return {"test": test, "outcome": result, "message": message, "seconds": 1.0}

    outcomes = [
        outcome("a", "passed"), outcome("b", "failed", "why"), outcome("c", "skipped", "no GPU"),
        outcome("d", "skipped", "no GPU"), outcome("e", "passed"), outcome("e", "failed", "in what cleans up"),
    ]  # fmt: skip
    counts, *failed = correctness.summary(outcomes)
    assert counts["tests"] == {"passed": 1, "failed": 2, "skipped": 2}
    assert counts["skipped because"] == {"no GPU": 2}
    assert [row["message"] for row in failed] == ["why", "in what cleans up"]


def test_outcomes_are_noted_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_c(): pass\n"
        "def test_d(): import os; os._exit(1)\n"
    )
    path = tmp_path / "outcomes"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUNNINGBN_OUTCOMES": str(path)}
    subprocess.run([*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, check=False)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [outcome["outcome"] for outcome in found] == ["passed", "failed", "skipped"]
    assert "assert 1 == 2" in found[1]["message"]
    assert "no GPU" in found[2]["message"]


def test_the_tests_for_a_gpu_are_in_what_is_run() -> None:
    command = correctness.command(dry_run=False)
    assert all((ROOT / path).exists() for path in correctness.TESTS)
    assert command[-len(correctness.TESTS) :] == list(correctness.TESTS)


def test_cases_come_in_the_order_of_their_importance() -> None:
    first = models.cases(dry_run=False)
    assert [(case.model, case.batch, case.way) for case in first[:4]] == [
        ("ResNet-50", 1, "eager"), ("ResNet-50", 1, "graph"), ("ResNet-50", 2, "eager"), ("ResNet-50", 2, "graph"),
    ]  # fmt: skip
    everything = {(case.model, case.batch, case.way) for case in first}
    assert everything == {(n, b, w) for n in NETWORKS for b in (1, 2, 8, 32) for w in ("eager", "graph")}
    assert len(first) == len(set(first))
    compilations = compiled.cases(dry_run=False)
    assert {(case.model, case.batch) for case, _ in compilations} == {(n, b) for n in NETWORKS for b in (1, 2, 8, 32)}
    assert len(compilations) == len(set(compilations)) == 3 * 4 * len(NETWORKS)
    assert {case.batch for case, _ in compilations[:6]} == {1, 2}


def test_layers_have_all_layouts_and_dtypes() -> None:
    found = layers.cases(dry_run=False)
    assert len(found) == len(set(map(str, found)))
    assert {(case.layout, case.dtype) for case in found} == set(layers.KINDS)
    assert all(case.layout == "NCHW" for case in found if len(case.shape.size) == 2)


def test_without_cudnn_a_layer_is_the_same() -> None:
    x, dy = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 5, 5)
    plain, wrapped = (layers.contender(name, (4, 3, 5, 5), "cpu") for name in (layers.PEER, layers.NATIVE))
    for one, other in zip(layers.training_step(wrapped, x, dy), layers.training_step(plain, x, dy), strict=True):
        torch.testing.assert_close(one, other)


def test_the_unet_keeps_the_size_of_its_images() -> None:
    model = UNet(2, 3)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 2, 16, 24)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 10


def test_on_a_cpu_nothing_is_launched() -> None:
    assert kernels_of(lambda: torch.ones(3) + 1) == []
