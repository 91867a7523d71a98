"""Defects of ``fvcore.nn.precise_bn.update_bn_stats``, some of torch's as well, that update_bn_stats does not have.

Each was seen on torch 2.13. A test shows what holds here and, where that costs nothing, the defect as well.
"""

import pytest
import torch
from cases import noise
from recalibration_models import (
    assert_same,
    assert_statistics,
    everything,
    mlp,
    moments,
    pictures,
    recalibrated,
    reference,
    residual,
    rows,
    statistics,
)
from torch import nn
from torch.optim.swa_utils import update_bn

from runningbn import get_bn_modules, update_bn_stats


class Branches(nn.Module):
    """A layer that is used, one that is used twice, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.twice, self.unused = (nn.BatchNorm1d(5) for _ in range(3))

    def forward(self, x):
        return self.twice(2 * self.twice(self.used(x)) + 1)


class Tuned(nn.Module):
    """Without running statistics in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 5), nn.BatchNorm1d(5))

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def fvcore():
    return pytest.importorskip("fvcore.nn.precise_bn").update_bn_stats


# --------------------------------------------------------------------------------------------------------------- fvcore


def test_fvcore_1_short_loader_raises_and_leaves_the_model_broken_for_its_next_forward(fvcore):
    broken, model = mlp().train(), mlp().train()
    with pytest.raises(AssertionError, match="stops at 4"):  # of five
        fvcore(broken, rows(40).split(8), 6)
    with pytest.raises(AssertionError, match="reused"):
        broken(rows(8))
    assert broken[1].momentum == 1.0
    report = update_bn_stats(model, rows(40).split(8), 6)
    assert report.batches == 5
    assert model[1].momentum == 0.1
    for _ in range(2):
        model(rows(8))


@pytest.mark.parametrize("system", ["fvcore", "torch"])
def test_fvcore_and_torch_2_unused_layer_loses_its_statistics(system, fvcore):
    other, model = Branches().train(), Branches().train()
    other.twice = nn.Identity()
    for each in (other, model):
        each.unused.running_mean.fill_(3)
        each.unused.running_var.fill_(7)
        each.unused.num_batches_tracked.fill_(9)
    fvcore(other, [rows(8)], 1) if system == "fvcore" else update_bn([rows(8)], other)
    assert other.unused.running_mean.eq(0).all()
    before = everything(model.unused)
    report = update_bn_stats(model, [rows(8)])
    assert_same(everything(model.unused), before)
    assert report.unused == ["unused"]


def test_fvcore_3_reused_layer_raises_and_leaves_momentum_and_hooks(fvcore):
    broken, model = Branches().train(), Branches().train()
    with pytest.raises(AssertionError, match="reused"):
        fvcore(broken, [rows(8)], 1)
    assert (broken.twice.momentum, len(broken.twice._forward_pre_hooks)) == (1.0, 1)
    x = rows(64)
    z = moments(x.double(), correction=0)
    z = (x.double() - z[0]) / (z[1] + 1e-5).sqrt()
    again = moments(z, correction=0)
    again = 2 * (z - again[0]) / (again[1] + 1e-5).sqrt() + 1
    update_bn_stats(model, [x])
    mean, var = moments(torch.cat([z, again]))
    torch.testing.assert_close(model.twice.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.twice.running_var.double(), var, rtol=1e-5, atol=0)
    assert (model.twice.momentum, len(model.twice._forward_pre_hooks)) == (0.1, 0)


@pytest.mark.parametrize("centre", [1e2, 1e3, 1e4, 1e5])
def test_fvcore_4_variance_cancels_and_becomes_negative(centre, fvcore):
    batches = [noise((64, 4, 8, 8), seed) + centre for seed in range(50)]
    layer, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    fvcore(other, batches, 50)
    x = torch.cat(batches).double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    assert centre < 1e4 or (other.running_var - var).abs().max() > 1  # −16 for 1, say
    update_bn_stats(layer, batches)
    assert ((layer.running_var - var).abs() <= 1e-3 * var).all()
    assert ((layer.running_mean - mean).abs() <= centre * 1e-7).all()


def test_fvcore_7_model_in_evaluation_mode_is_silently_left_alone(fvcore):
    other, model, before = mlp().eval(), mlp().eval(), statistics(mlp())
    fvcore(other, [rows(8)], 1)
    assert_statistics(other, before, tolerance=0)
    expected = reference(model, [rows(8)])
    assert_statistics(recalibrated(model, [rows(8)]), expected)
    assert get_bn_modules(model) == [model[1], model[4], model[7]]
    assert not any(module.training for module in model.modules())


def test_fvcore_8_buffers_are_replaced_by_other_tensors(fvcore):
    other, model = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    alias, places = other.running_mean, [b.data_ptr() for b in model.buffers()]
    fvcore(other, [rows(8)], 1)
    assert other.running_mean is not alias
    buffers = [*model.buffers()]
    update_bn_stats(model, [rows(8)])
    assert [b.data_ptr() for b in model.buffers()] == places
    assert all(a is b for a, b in zip(buffers, model.buffers()))


def test_fvcore_8_num_batches_tracked_goes_on_counting(fvcore):
    other, model = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    fvcore(other, rows(32).split(8), 4)
    update_bn_stats(model, rows(32).split(8))
    assert (other.num_batches_tracked, model.num_batches_tracked) == (4, 0)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_fvcore_9_layer_without_running_statistics_is_a_type_error(mode, fvcore):
    other, model = Tuned(), Tuned().train(mode)
    with pytest.raises(TypeError):
        fvcore(other, [rows(8)], 1)
    assert other.net[2].momentum == 1.0
    assert get_bn_modules(model) == [model.net[2]]
    expected = reference(model, [rows(8)])["net.2"]
    assert_statistics(recalibrated(model, [rows(8)]), {"net.2": expected})
    assert model.net[0].running_mean is None


@pytest.mark.parametrize("system", ["fvcore", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fvcore_and_torch_11_one_batch_with_a_nan_poisons_everything(system, value, fvcore, caplog):
    batches = [rows(8, seed=seed) for seed in range(6)]
    batches[2][3, 1] = value
    good = batches[:2] + batches[3:]
    other, model = mlp().train(), mlp().train()
    fvcore(other, batches, 6) if system == "fvcore" else update_bn(batches, other)
    assert other[1].running_mean.isfinite().logical_not().any()
    expected = reference(model, good)
    report = update_bn_stats(model, batches)
    assert_statistics(model, expected)
    assert (report.batches, report.not_finite) == (5, 1)
    assert "not finite" in caplog.text


def test_fvcore_14_variance_is_biased_where_torch_and_the_paper_correct_it(fvcore):
    other, model, data = nn.BatchNorm1d(5), nn.BatchNorm1d(5), rows(12)
    fvcore(other, data.split(4), 3)
    update_bn_stats(model, data.split(4))
    torch.testing.assert_close(other.running_var, data.var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.running_var, data.var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.running_var, other.running_var * 12 / 11, rtol=1e-4, atol=0)


def test_fvcore_population_variance_in_benign_cases_is_ours_but_for_that(fvcore):
    other, model, data = residual().train(), residual(), pictures(64).split((2, 2, 4, 8, 16, 32))
    other.head[0].eval()
    fvcore(other, data, 6)
    elements = {layer.name: layer.elements for layer in update_bn_stats(model, data).layers}
    expected = {k: (mean, var * elements[k] / (elements[k] - 1)) for k, (mean, var) in statistics(other).items()}
    assert_statistics(model, expected, tolerance=1e-4)


@pytest.mark.parametrize("sizes", [(16,) * 4, (2, 2, 4, 8, 16, 32)], ids=str)
def test_fvcore_mean_of_batch_variances_is_variance_batch(sizes, monkeypatch, fvcore):
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    monkeypatch.setattr(precise_bn, "_PopulationVarianceEstimator", precise_bn._MeanOfBatchVarianceEstimator)
    other, model, data = residual().train(), residual(), pictures(64).split(sizes)
    other.head[0].eval()
    fvcore(other, data, len(sizes))
    update_bn_stats(model, data, variance="batch")
    assert_statistics(model, statistics(other), tolerance=1e-4)
