"""`python -m benchmarks.versions` counts what pytest did, and its tables show every failure."""

import json
import platform

import pytest
import torch

from benchmarks import versions
from benchmarks.versions_report import OTHERS, environments_table, failures_list, group, load, results_table

MIXED = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.fixture
def untidy():
    yield
    raise RuntimeError

@pytest.mark.parametrize("i", range(3))
def test_passes(i): pass

def test_fails(): assert False

def test_fails_before(broken): pass

def test_fails_afterwards(untidy): pass

def test_skips(): pytest.skip("here")

@pytest.mark.xfail(reason="known", strict=True)
def test_is_known_to_fail(): assert False
"""


def counts(tmp_path, name: str, text: str, **kwargs) -> versions.Record:
    file = tmp_path / name
    file.write_text(text)
    return versions.outcomes(file, kwargs.pop("seconds", 300.0), ("--import-mode=importlib",))


@pytest.mark.slow
def test_each_outcome_is_counted_once(tmp_path):
    found = counts(tmp_path, "test_mixed.py", MIXED)
    assert found == {
        "passed": 3,
        "failed": 3,
        "skipped": 2,
        "failures": ["test_fails", "test_fails_before", "test_fails_afterwards"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "seconds", "expected"),
    [
        ("import no_such_module", 300.0, (0, ["(exit status 2)"])),
        ("def test_a(): pass\ndef test_b():\n  import os; os._exit(7)", 300.0, (1, ["(exit status 7)"])),
        ("def test_a():\n  import time; time.sleep(600)", 5.0, (0, ["(stopped after 5 s)"])),
    ],
    ids=["does not import", "crashes", "hangs"],
)
def test_what_does_not_end_well_is_a_failure(tmp_path, text, seconds, expected):
    found = counts(tmp_path, "test_bad.py", text, seconds=seconds)
    assert (found["passed"], found["failures"]) == expected
    assert found["failed"] == 1


def test_a_file_that_is_skipped_as_a_whole_counts_as_one(tmp_path):
    found = counts(tmp_path, "test_absent.py", "import pytest\npytest.importorskip('no_such_module')")
    assert found == {"passed": 0, "failed": 0, "skipped": 1, "failures": []}


def test_each_file_has_a_line_with_the_versions(tmp_path, monkeypatch):
    def outcomes(file, seconds, options):
        return {"passed": 1, "failed": int("bad" in file.name), "skipped": 0, "failures": []}

    monkeypatch.setattr(versions, "outcomes", outcomes)
    monkeypatch.setenv("RUNNINGBN_BACKEND", "aten")
    to = tmp_path / "results.jsonl"
    names = ["test_running.py", "test_autograd.py"]
    paths = [versions.ROOT / "tests" / name for name in names]
    assert versions.main([*map(str, paths), "--to", str(to)]) == 0
    (tmp_path / "test_bad.py").touch()
    assert versions.main([str(tmp_path / "test_bad.py"), "--to", str(to)]) == 1
    records = [json.loads(line) for line in to.read_text().splitlines()]
    assert [record["file"] for record in records] == ["tests/test_running.py", "tests/test_autograd.py", "test_bad.py"]
    about = records[0]["environment"]
    assert (about["python"], about["torch"]) == (platform.python_version(), torch.__version__)
    assert about["RUNNINGBN_BACKEND"] == "aten"


@pytest.mark.slow
def test_tests_can_be_selected(tmp_path):
    file, to = tmp_path / "test_mixed.py", tmp_path / "results.jsonl"
    file.write_text(MIXED)
    assert versions.run([file], to, 300.0, ["--import-mode=importlib"], "passes or skips")
    (found,) = map(json.loads, to.read_text().splitlines())
    assert (found["passed"], found["failed"], found["skipped"]) == (3, 0, 1)
    assert found["selection"] == "passes or skips"


def test_a_file_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        versions.main(["tests/test_no_such.py"])
    assert "there is no tests/test_no_such.py" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- tables

OLD = {"python": "3.10.1", "torch": "2.4.1", "system": "Linux x86_64"}
NEW = {"python": "3.13.0", "torch": "2.14.1", "timm": "1.0", "system": "Linux x86_64"}


def record(
    environment: dict[str, str], file: str, passed: int, failures=(), skipped: int = 0, code: str = "abc", **other
):
    found = {"environment": environment, "code": code, "date": "2026-01-01", "file": f"tests/test_{file}.py"}
    return {**found, "passed": passed, "failed": len(failures), "skipped": skipped, "failures": list(failures), **other}


@pytest.fixture
def environments(tmp_path):
    path = tmp_path / "results.jsonl"
    records = [
        record(OLD, "running", 5, ["test_x[1]"]),
        record(NEW, "running", 1, ["test_mended"]),
        record(NEW, "running", 2),
        record(NEW, "masks", 3, skipped=1, code="def"),
        record(NEW, "compile_checkpointing", 4),
        record(NEW, "never_heard_of", 6),
        record(OLD, "weights", 7, selection="state"),
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return load(path)


def test_newest_versions_come_first_with_their_last_results(environments):
    table = results_table(environments).splitlines()
    assert table[0] == "|  | Python 3.13.0, torch 2.14.1 | Python 3.10.1, torch 2.4.1 |"
    assert table[2:] == [
        "| layers, their state and gradients | 5 passed, 1 skipped | 5 passed, **1 failed** |",
        "| torch.compile and export | 4 passed | not run |",
        "| centred weights | not run | 7 passed (only `state`) |",
        "| others | 6 passed | not run |",
        "| all of these | 15 passed, 1 skipped | 12 passed, **1 failed** |",
    ]


def test_failures_are_named(environments):
    assert failures_list(environments) == "- Python 3.10.1, torch 2.4.1: `tests/test_running.py`, `test_x[1]`"


def test_versions_and_commits_are_named(environments):
    rows = environments_table(environments).splitlines()[2:]
    assert rows[0].endswith("| – | – | – | 1.0 | – | Linux x86_64 | 2026-01-01 | abc, def |")
    assert rows[1].endswith("| – | – | – | – | – | Linux x86_64 | 2026-01-01 | abc |")


def test_files_of_tests_have_a_group():
    assert group("tests/test_checkpointing.py") == "layers, their state and gradients"
    assert group("tests/test_checkpoint_hostile.py") == "checkpoint files and commands"
    assert group("tests/test_sync_compile.py") == "several processes"
    named = [group(path.name) for path in (versions.ROOT / "tests").glob("test_*.py")]
    assert named.count(OTHERS) < len(named) / 20
