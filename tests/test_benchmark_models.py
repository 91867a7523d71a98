"""The benchmark of whole training steps measures what it says, on a network small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import models

pytest.importorskip("transformers")


@pytest.fixture
def case(monkeypatch):
    """A measured case of two stages with one block each."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, num_labels=models.CLASSES)
    monkeypatch.setitem(models.NETWORKS, "tiny", lambda: ResNetForImageClassification(config))
    return models.measure("tiny", 2, 32, "channels_last", "float32", seconds=0, rounds=2)


def test_a_case_has_every_variant_and_a_row_in_the_table(case):
    assert case["rounds"] == 2
    for column in ("milliseconds", "ratio", "ratio from and to", "saved MB", "page faults"):
        assert case[column].keys() == models.VARIANTS.keys()
    assert case["ratio"][models.PLAIN] == 1
    assert all(low <= case["ratio"][variant] <= high for variant, (low, high) in case["ratio from and to"].items())
    assert 0 < case["norm layers"] < 1
    assert models.table([case]).row_count == 1
    where = {"processor": "abacus", "threads": 1, "torch": "2", "date": "today"}
    written = models.markdown_table(json.loads(json.dumps({"cases": [case], "machine": where})))
    header, rule, row, _, note = written.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| tiny | 2 | channels_last | float32 |")
    assert note.startswith("(abacus, 1 threads")


def test_storages_are_counted_once_and_parameters_not_at_all():
    layer = torch.nn.Linear(3, 3, bias=False)
    x = torch.randn(5, 3)
    with models.storages_saved(layer) as saved:
        (layer(x).exp() * layer(x[:2]).sum()).sum().backward()  # x once for two products; exp's output; the sum
    assert sum(saved.values()) == 4 * (x.numel() + x.numel() + 1)


def test_the_plan_fits_what_it_is_for():
    assert {case["dtype"] for case in models.plan(quick=True, device="cpu")} == {"float32"}
    assert {case["name"] for case in models.plan(quick=False, device="cpu")} == models.NETWORKS.keys()
