"""What `diagnose` says that a batch counts for, against an analysis of variance computed apart."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import noise
from models import pretrained
from recalibration_models import in_rows, inputs_in_evaluation, pictures, residual, rows
from torch import nn

from runningbn import diagnose, update_bn_stats


def design_effect(batches: list[np.ndarray], scale: np.ndarray) -> tuple[float, float, float]:
    """Share, correlation and design effect from the sample means (m, C) of the batches, in plain loops."""
    k, n = len(batches), sum(map(len, batches))
    shares, rests = [], []
    for c in range(len(scale)):
        grand = sum(x for batch in batches for x in batch[:, c]) / n
        between = sum(len(batch) * (batch[:, c].mean() - grand) ** 2 for batch in batches) / (k - 1)
        within = sum((x - batch[:, c].mean()) ** 2 for batch in batches for x in batch[:, c]) / (n - k)
        m0 = (n - sum(len(batch) ** 2 for batch in batches) / n) / (k - 1)
        shares.append((between - within) / m0 / scale[c])
        rests.append(within / scale[c])
    share, rest = np.mean(shares), np.mean(rests)
    correlation = share / (share + rest)
    return share, correlation, 1 + (sum(len(batch) ** 2 for batch in batches) / n - 1) * correlation


def sample_means(model: nn.Module, batches) -> dict[str, list[np.ndarray]]:
    """What every BatchNorm layer gets in evaluation, averaged over positions: by layer and batch, (m, C)."""
    seen: dict[str, list[np.ndarray]] = {}

    def note(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].double().flatten(2).mean(2).numpy())

    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        for x in batches:
            twin(x)
    return seen


def of_one_class(classes: int = 5, size: int = 6, batches: int = 30, seed: int = 0) -> list[torch.Tensor]:
    """Batches of pictures, all of a batch of one class; of two sizes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(classes, 3, 5, 5, generator=generator)
    return [
        kinds[torch.randint(classes, (), generator=generator)]
        + 0.7 * torch.randn(size if i % 3 else size // 2, 3, 5, 5, generator=generator)
        for i in range(batches)
    ]


def test_design_effect_of_batches_of_one_class_in_every_layer():
    model, twin = residual(), residual()
    batches = of_one_class()
    found = diagnose(model, batches)
    update_bn_stats(twin, batches)
    means, rows_seen = sample_means(twin, batches), inputs_in_evaluation(twin, batches)
    for layer in found.layers:
        scale = (rows_seen[layer.name].var(0) + 1e-5).numpy()
        share, correlation, effect = design_effect(means[layer.name], scale)
        assert layer.between.share == pytest.approx(share, rel=1e-4)
        assert layer.between.correlation == pytest.approx(correlation, rel=1e-4)
        assert layer.between.design_effect == pytest.approx(effect, rel=1e-4)
        assert (layer.between.batches, layer.between.samples) == (30, 150)
        assert layer.between.samples_per_batch == 5
        assert layer.between.effective_batch == pytest.approx(5 / effect, rel=1e-4)
        assert layer.between.effective_samples == pytest.approx(150 / effect, rel=1e-4)
        assert 2 < effect < 5.5


def test_jackknife_leaves_out_one_batch_at_a_time():
    batches = of_one_class(batches=7)
    layer = nn.BatchNorm2d(3)
    (found,) = diagnose(layer, batches).layers
    scale = (in_rows(torch.cat(batches)).var(0) + 1e-5).numpy()
    means = [x.double().mean((2, 3)).numpy() for x in batches]
    without = np.array([design_effect(means[:i] + means[i + 1 :], scale)[2] for i in range(7)])
    error = math.sqrt(6 / 7 * ((without - without.mean()) ** 2).sum())
    assert found.between.design_effect_error == pytest.approx(error, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels"), [(2, 8), (8, 8), (32, 3)])
def test_independent_samples_count_for_themselves(size, channels):
    """Over seeds, the design effect is 1 to within its standard error, and that is what its scatter says."""
    seeds, k = 60, 40
    layer = nn.BatchNorm1d(channels)
    found = [diagnose(layer, rows(k * size, channels, seed).split(size)).layers[0].between for seed in range(seeds)]
    effects = np.array([one.design_effect for one in found])
    error = effects.std(ddof=1) / math.sqrt(seeds)
    assert error < 0.03
    assert abs(effects.mean() - 1) < 3 * error + 1 / (k * size)  # a ratio of unbiased parts has a bias of that order
    # Of one draw, the effective size is that of the batches to within its error, which is the design effect's.
    inside = [
        abs(one.effective_samples / one.samples - 1) < 2 * one.design_effect_error / one.design_effect for one in found
    ]
    assert np.mean(inside) > 0.85
    assert np.mean([one.design_effect_error for one in found]) == pytest.approx(effects.std(ddof=1), rel=0.35)


@pytest.mark.slow
def test_share_of_independent_samples_is_zero_on_average_and_of_either_sign():
    shares = np.array([diagnose(nn.BatchNorm1d(2), rows(80, 2, s).split(4)).layers[0].between.share for s in range(60)])
    assert abs(shares.mean()) < 3 * shares.std(ddof=1) / math.sqrt(60)
    assert (shares > 0).any()
    assert (shares < 0).any()


def test_copies_of_one_sample_count_for_one():
    batches = [x.expand(8, -1) for x in rows(20).split(1)]
    (found,) = diagnose(nn.BatchNorm1d(5), batches).layers
    assert found.between.correlation == pytest.approx(1)
    assert found.between.design_effect == pytest.approx(8)
    assert found.between.effective_batch == pytest.approx(1)


def test_batches_with_one_of_each_class_count_for_more():
    centres = torch.tensor([[-10.0], [0.0], [10.0]])
    batches = [centres + noise((3, 1), seed) for seed in range(20)]
    (found,) = diagnose(nn.BatchNorm1d(1), batches).layers
    assert found.between.correlation < -0.4
    assert found.between.effective_batch > 20


def test_batches_of_one_sample_have_no_correlation_and_count_for_one():
    (found,) = diagnose(nn.BatchNorm2d(3), pictures(10).split(1)).layers
    assert math.isnan(found.between.correlation)
    assert (found.between.design_effect, found.between.effective_batch, found.between.samples_per_batch) == (1, 1, 1)
    assert found.elements_per_batch == 25


def test_one_value_per_batch_and_channel():
    """No batch has a variance; all of them together have."""
    model = pretrained(nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4)))
    data = rows(30)
    found = diagnose(model, data.split(1))
    torch.testing.assert_close(found["0"].stored.var, data.double().var(0), rtol=1e-5, atol=1e-6)
    assert found["3"].elements_per_batch == 1
    assert math.isfinite(found.batch.relative_rms)


def test_a_single_batch_has_moments_without_errors():
    (found,) = diagnose(nn.BatchNorm1d(5), [rows(20)]).layers
    assert found.mean_off.isfinite().all()
    assert found.mean_off_error.isnan().all()
    assert math.isnan(found.between.design_effect)
