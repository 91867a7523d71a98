"""Models nobody here wrote: converted, evaluated, trained, saved, recalibrated, taken back, and none forgotten."""

import copy
import functools
import importlib.util
import io
import logging
import pathlib
import re

import pytest
import torch
from models import OURS
from processes import ranks
from real_models import RealModel, evaluated, gradients, outputs
from real_models_detection import DETECTION
from real_models_detection import FROZEN as FROZEN_DETECTION
from real_models_elsewhere import ELSEWHERE
from real_models_images import IMAGES
from real_models_sequences import SEQUENCES
from real_models_vision import DETECTORS, VISION, features
from real_models_vision import FROZEN as FROZEN_VISION
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runningbn import batchnormify, update_bn_stats

FROM_TRANSFORMERS = (*IMAGES, *SEQUENCES, *DETECTION)
ALL = {case.id: case for case in (*FROM_TRANSFORMERS, *ELSEWHERE, *VISION)}
# Their only BatchNorm layers are frozen ones, so there is nothing to train or recompute.
FROZEN = FROZEN_DETECTION | FROZEN_VISION
TRAINABLE = {id: case for id, case in ALL.items() if id not in FROZEN}

# Every eighth stands for all where time is short.
QUICK = tuple(ALL)[::8]


def each_of(cases: dict[str, RealModel]) -> pytest.MarkDecorator:
    marks = {id: () if id in QUICK else pytest.mark.slow for id in cases}
    return pytest.mark.parametrize("case", [pytest.param(case, id=id, marks=marks[id]) for id, case in cases.items()])


each_model, each_trainable = each_of(ALL), each_of(TRAINABLE)
each_of_ours = pytest.mark.parametrize("to", OURS)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit: evaluation runs the same kernel on the same statistics."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------ each of them


@each_model
def test_evaluation_is_the_same_from_each_target_to_each_other(case: RealModel):
    model, (batch,) = case.model(), case.batches()
    expected = evaluated(model, batch)
    for to in ("running", "torch", "precise", "running", "precise", "torch"):
        assert_same(evaluated(batchnormify(model, to), batch), expected)


@functools.cache
def reached(case: RealModel) -> set[str]:
    """The parameters that get a gradient in the unconverted model."""
    (batch,) = case.batches()
    return set(gradients(case.model(), batch))


@each_of_ours
@each_trainable
def test_trained_model_evaluates_the_same_from_its_file_and_as_torch(case: RealModel, to: str):
    model, (batch,) = batchnormify(case.model(), to), case.batches()
    found = gradients(model, batch)
    assert found.keys() == reached(case)
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []
    expected = evaluated(model, batch)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = batchnormify(case.model(), to)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(evaluated(fresh, batch), expected)
    assert_same(evaluated(batchnormify(model, "torch"), batch), expected)


@each_of_ours
@pytest.mark.parametrize("case", [case for case in VISION if case.id not in FROZEN], ids=lambda case: case.id)
@torch.no_grad()
def test_centred_filters_change_no_output_and_train(case: RealModel, to: str):
    model, (batch,) = case.model(), case.batches()
    compared = features if case.id in DETECTORS else outputs
    expected = compared(model.eval(), batch)
    batchnormify(model, to, center_weights=batch)
    assert any(type(module).__name__.startswith("Centered") for module in model.modules())
    for found, y in zip(compared(model, batch), expected, strict=True):
        # Filters differ by one rounding, which dozens of layers amplify.
        torch.testing.assert_close(found, y, rtol=0.0, atol=1e-3 * float(y.abs().max()))
    found = gradients(model, batch)
    assert found.keys() == reached(case)
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []
    expected = evaluated(model, batch)
    assert_same(evaluated(batchnormify(model, "torch"), batch), expected)
    assert not any(type(module).__name__.startswith("Centered") for module in model.modules())


@functools.cache
def recomputed(case: RealModel) -> tuple[nn.Module, dict[str, int]]:
    """The unconverted model with recomputed statistics, and how many elements each of its layers saw."""
    model = case.model()
    report = update_bn_stats(model, case.batches(3, seed=1))
    return model, {layer.name: layer.elements for layer in report.layers}


@each_of_ours
@each_trainable
def test_recomputed_statistics_are_those_of_the_unconverted_model(case: RealModel, to: str):
    converted = batchnormify(case.model(), to)
    report = update_bn_stats(converted, case.batches(3, seed=1))
    plain, elements = recomputed(case)
    assert {layer.name: layer.elements for layer in report.layers} == elements
    for name, n in elements.items():
        ours, theirs = converted.get_submodule(name), plain.get_submodule(name)
        # RunningBatchNorm keeps the biased variance.
        bessel = n / (n - 1) if to == "running" else 1.0
        std = theirs.running_var.sqrt() + theirs.eps**0.5
        # The activations on the way there differ by float32 roundings, which dozens of normalised layers amplify; a
        # layer left out, a batch missed or a wrong divisor (n ≤ 1000 in many layers) shows well above this.
        torch.testing.assert_close(ours.running_mean / std, theirs.running_mean / std, rtol=0.0, atol=1e-3)
        torch.testing.assert_close(bessel * ours.running_var / std**2, theirs.running_var / std**2, rtol=0.0, atol=1e-3)


# --------------------------------------------------------------------------------------------------- what is reported


def batch_norms(model: nn.Module) -> set[nn.Module]:
    """What somebody would call a BatchNorm: by type or by name, if it does not just hold another one."""
    found = {m for m in model.modules() if isinstance(m, _BatchNorm) or "BatchNorm" in type(m).__name__}
    return {m for m in found if found.isdisjoint(set(m.modules()) - {m})}


def said(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """How many layers the last line in the log calls converted and left alone."""
    line = caplog.messages[-1]
    converted = re.search(r"(\d+) layers? converted", line)
    left_alone = re.search(r"(\d+) left alone", line)
    return int(converted[1]), int(left_alone[1]) if left_alone else 0


@each_model
def test_every_batch_norm_is_converted_or_reported(case: RealModel, caplog):
    model = case.model()
    found = batch_norms(model)
    assert found
    with caplog.at_level(logging.INFO, logger="runningbn"):
        batchnormify(model)
    converted, left_alone = said(caplog)
    assert converted + left_alone == len(found)
    assert (converted == 0) == (case.id in FROZEN)


def test_frozen_layers_are_reported_together(caplog):
    batchnormify(ALL["timm-norm-acts"].model())
    assert "1 left alone: norms.0 (it is frozen; its statistics and affine parameters are constants)" in caplog.text


def test_a_norm_by_type_is_reported(caplog):
    batchnormify(ALL["pyg-hetero"].model())
    assert "1 left alone: norm_by_type (HeteroBatchNorm is not a subclass of nn.BatchNorm)" in caplog.text


def test_layers_that_cannot_be_selected_are_not_reported(caplog):
    selected = []
    with caplog.at_level(logging.INFO, logger="runningbn"):
        batchnormify(ALL["timm-norm-acts"].model(), where=lambda name, layer: not selected.append(name))
    assert (selected, said(caplog)) == (["norms.1", "norms.2"], (2, 0))


# --------------------------------------------------------------------------------------------- torch.compile, and DDP


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "to"),
    [("pp_lcnet", "running"), ("pyg-gin", "precise"), ("monai-unet-1d", "running"), ("monai-unet-1d", "precise")],
)
def test_compiled_training_takes_the_steps_of_eager(id: str, to: str):
    eager = batchnormify(ALL[id].model(), to)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for batch in ALL[id].batches(2):
        expected, actual = gradients(eager, batch), gradients(compiled, batch)
        # The scale of a gradient is that of the largest: biases before a norm have gradients of rounding only.
        scale = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4 * float(scale), msg=name)
    torch._dynamo.reset()


def parallel_step(rank: int, id: str, to: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients and the statistics of a step with `sync`, each rank on its own batch."""
    model = batchnormify(ALL[id].model(), to, sync=True)
    parallel = nn.parallel.DistributedDataParallel(model)
    found = gradients(parallel, ALL[id].batches(2)[rank])
    return found, {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


@pytest.mark.slow
@each_of_ours
@pytest.mark.parametrize("id", ["hgnet_v2", "monai-unet-3d"])
def test_ranks_agree_after_a_step(id: str, to: str):
    (first, statistics), (second, same_statistics) = ranks(2)(parallel_step, id, to)
    assert first.keys() == {f"module.{name}" for name in reached(ALL[id])}
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    torch.testing.assert_close(statistics, same_statistics, rtol=0.0, atol=0.0)
    assert all(gradient.isfinite().all() for gradient in first.values())


# ---------------------------------------------------------------------------------------------------- none forgotten

# Folders of transformers that make BatchNorm layers and are not in the tables, with the reason.
EXCLUDED = {"layoutlmv2": "its backbone is detectron2's, which is not on the registry"}


def test_every_architecture_of_transformers_with_batch_norm_is_in_the_tables():
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        pytest.skip("transformers is not installed")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "models"
    makes_batch_norm = re.compile(r"BatchNorm([123]d)?\(")
    found = {p.parent.name for p in folder.glob("*/modeling_*.py") if makes_batch_norm.search(p.read_text())}
    known = {case.id for case in FROM_TRANSFORMERS}
    assert known.isdisjoint(EXCLUDED)
    assert found == known | EXCLUDED.keys()
