"""What a public repository has beside its code says the same as the code and `pyproject.toml`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import runningbn

yaml = pytest.importorskip("yaml")  # transformers, among the test's packages, brings it

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_citation_names_the_version_that_this_is():
    citation = read(ROOT / "CITATION.cff")
    assert (citation["title"], citation["version"]) == ("runningbn", runningbn.__version__)


def test_all_addresses_are_of_one_repository():
    told = re.search(r"^Homepage = \"(.*)\"$", PROJECT, re.MULTILINE)
    assert told is not None
    assert read(ROOT / "CITATION.cff")["repository-code"] == told[1]
    for name in ("SECURITY.md", "SUPPORT.md", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        addresses = re.findall(r"https://github\.com/[^\s)>\"]+", text)
        assert addresses, name
        assert [address for address in addresses if not address.startswith(told[1])] == []


def test_links_between_the_files_lead_somewhere():
    for name in ("SECURITY.md", "SUPPORT.md"):
        links = re.findall(r"\]\((?!https:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
        assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_unless_a_job_says_more(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["jobs"]


def test_workflows_call_what_is_there():
    assert [path.stem for path in WORKFLOWS] == ["docs", "tests", "wheels"]
    lines = [step.get("run", "") for path in WORKFLOWS for job in read(path)["jobs"].values() for step in job["steps"]]
    scripts = {name for line in lines for name in re.findall(r"\.ci/\w+", line)}
    assert scripts == {".ci/run", ".ci/oldest"}
    extras = {name for line in lines for name in re.findall(r"\.\[(\w+)\]", line)}
    assert extras == {"docs", "test"}
    assert all((ROOT / name).is_file() for name in scripts)
    assert all(re.search(rf"^{name} = \[", PROJECT, re.MULTILINE) for name in extras)


def test_workflows_cover_the_versions_of_python_that_are_promised():
    matrix = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    assert set(promised) <= set(matrix["python"])
    assert f'requires-python = ">={promised[0]}"' in PROJECT


def test_hooks_before_a_commit_are_the_checks_of_ci_and_download_nothing():
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    commands = [hook["entry"].replace(" --force-exclude", "") for hook in local["hooks"]]
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert commands == [
        command.removesuffix(" --check")
        for command in re.findall(r"^\.venv/bin/((?:ruff|mypy).*)$", checks, re.MULTILINE)
    ]
