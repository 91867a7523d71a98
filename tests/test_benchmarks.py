"""The benchmark of the layers: its cases are what they say, a run checks and times, its sums are right."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from cases import LayerCase, noise, with_random_affine
from reference import FastaiRunningBatchNorm as Reference
from steps import training_step

from benchmarks import clocks, layers, layers_report
from benchmarks.cases import COPY, FASTAI, GRIDS, OURS, PEER, RESNET_50, SHAPES, Case, Grid, Shape, cases, data
from benchmarks.fastai import FastaiRunningBatchNorm

SMALL = Shape("tiny", (4, 3, 5, 6), layouts=("NCHW", "channels_last", "cropped", "channels_last, dy NCHW"))


def small_case(dtype: str = "float32", layout: str = "NCHW", **grid) -> Case:
    return Case(Grid("training step", (SMALL,), **grid), SMALL, layout, dtype)


def test_resnet_50_has_its_53_layers():
    assert sum(RESNET_50.values()) == 53


def test_every_shape_is_there_once_and_fits_into_memory():
    assert len({(shape.size, shape.layouts) for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        batch, channels, *_ = shape.size
        assert batch >= 2
        assert channels > 0
        # x, dy, y and dx in float32
        assert 4 * 4 * math.prod(shape.size) < 2**30


def test_every_case_is_measured_in_one_process_or_the_other():
    measured = [case for faults in (False, True) for case in cases("cpu", faults)]
    assert {case.grid.name for case in measured} == {grid.name for grid in GRIDS}
    assert max(Counter(map(str, measured)).values()) == 1
    main = [case for case in measured if case.grid.name == "training step"]
    assert len(main) == sum(2 * len(shape.layouts) for shape in SHAPES)
    assert 0 < len(list(cases("cpu", False, quick=True))) < len(main) / 4


def test_a_gpu_has_no_page_faults_and_no_threads():
    assert not list(cases("cuda", True))
    assert not any(case.grid.one_thread for case in cases("cuda", False))


@pytest.mark.parametrize("layout", SMALL.layouts)
def test_data_have_the_layout_that_they_say(layout):
    x, dy = data(small_case(layout=layout), "cpu")
    last = torch.channels_last
    assert x.is_contiguous() == (layout == "NCHW")
    assert x.is_contiguous(memory_format=last) == layout.startswith("channels_last")
    assert dy.is_contiguous(memory_format=last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", layers.MODES)
def test_a_case_gives_a_row(mode, dtype):
    row = layers.measure(small_case(dtype, mode=mode, contenders=(*OURS, FASTAI, COPY)), seconds=0)
    everybody = {PEER, *OURS, FASTAI, COPY}
    assert row["rounds"] == clocks.FEWEST_ROUNDS
    assert set(row["milliseconds"]) == set(row["page faults"]) == everybody
    assert set(row["ratio"]) == everybody - {PEER}
    assert set(row["error"]) == everybody - {COPY}
    assert min(row["milliseconds"].values()) > 0
    if mode != "evaluation":
        # x, and at least a mean and a factor per channel
        assert row["saved bytes"][PEER] >= 4 * 3 * 5 * 6 * (4 if dtype == "float32" else 2) + 2 * 3 * 4


def test_a_wrong_contender_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: 1.001 * torch.nn.functional.batch_norm(
        x, None, None, self.weight, self.bias, True
    ))  # fmt: skip
    with pytest.raises(layers.WrongResultError, match=r"nn\.BatchNorm is off by"):
        layers.measure(small_case(), seconds=0)


def row(ratio: float, **also) -> dict:
    saved = dict.fromkeys((PEER, *OURS), 8)
    common = {"grid": "training step", "shape": "32x3x5x5", "layout": "NCHW", "dtype": "float32", "count": 1}
    return common | {"ratio": dict.fromkeys(OURS, ratio), "saved bytes": saved} | also


def test_means_are_geometric_and_weighted_by_the_layers_of_resnet_50():
    by_label = {line.label: line for line in layers_report.summary([row(0.5), row(4.0, count=2), row(1.0, count=0)])}
    assert by_label["training step, NCHW, float32"].cell(OURS[0]) == "1.26 (0.50 to 4.00)"
    assert by_label["ResNet-50 at batch 32, by number of layers"].cell(OURS[0]) == "2.00 (0.50 to 4.00)"


@pytest.mark.parametrize(("mode", "times_x"), [("training step", 8), ("forward", 3), ("evaluation", 2)])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_bandwidth_is_what_must_move_over_the_time(mode, times_x, dtype, width):
    # 1 GB in two seconds, and copied in one.
    milliseconds = dict.fromkeys((PEER, *OURS), 2000.0) | {COPY: 1000.0}
    of_case = row(1, mode=mode, dtype=dtype, shape=f"1000x{10**6 // width}", milliseconds=milliseconds)
    assert layers_report.bandwidth(of_case, PEER) == times_x / 2
    assert layers_report.bandwidth(of_case, COPY) == 2
    assert layers_report.bandwidths(of_case).split(" / ") == [*[f"{times_x / 2:.1f}"] * 4, "2.0"]
    assert set(layers_report.TRANSFERS) == set(layers.MODES)


def test_every_loss_is_named_the_worst_first():
    lost = layers_report.losses([row(1.1), row(0.9), row(1.2, shape="2x3")])
    assert [line.split(", ")[1] for line in lost] == ["2x3", "32x3x5x5"]


def test_the_fastai_class_is_its_formula():
    case = LayerCase("", FastaiRunningBatchNorm, (3, 4, 5))
    layer, expected = (with_random_affine(make(3).double()) for make in (FastaiRunningBatchNorm, Reference))
    for seed, size in enumerate((2, 3, 5, 8, 2, 16) * 3):
        x, dy = case.input(size, seed, torch.float64), noise((size, *case.shape), seed, torch.float64)
        for ours, theirs in zip(
            training_step(layer, x, dy).values(), training_step(expected, x, dy).values(), strict=True
        ):
            torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-11, atol=1e-11)
