"""normalize="population": statistics that are what evaluation shows to each layer, whatever the batch size."""

import itertools

import pytest
import torch
from models import pretrained
from recalibration_models import (
    Residual,
    assert_statistics,
    correction_of,
    everything,
    inputs_in_evaluation,
    is_statistic,
    mlp,
    moments,
    pictures,
    rows,
    statistics,
)
from torch import nn

from runningbn import batchnormify, update_bn_stats


def assert_evaluation_shows(model: nn.Module, batches, tolerance: float = 1e-4, only=()) -> None:
    """Every stored mean (in std) and variance (relative) is the moment of what the layer gets in evaluation."""
    seen = inputs_in_evaluation(model, batches)
    layers = dict(model.named_modules())
    expected = {name: moments(x, correction_of(layers[name])) for name, x in seen.items()}
    assert_statistics(model, expected, tolerance, only)


def worst(model: nn.Module, batches) -> float:
    seen, found = inputs_in_evaluation(model, batches), statistics(model)
    return max(float((found[name][1] / moments(x)[1] - 1).abs().max()) for name, x in seen.items())


@pytest.mark.parametrize("size", [2, 32, 64])
@pytest.mark.parametrize(("training", "bias"), [(True, True), (False, False)], ids=["training", "evaluation, no bias"])
def test_perceptron_20_layers_deep(size, training, bias):
    model, data = mlp(20, 16, bias=bias).train(training), rows(64)
    report = update_bn_stats(model, data.split(size), None, normalize="population")
    assert_evaluation_shows(model, [data])
    assert max(layer.residual for layer in report.layers) <= 1e-4
    assert report.passes <= 25


def test_batch_by_batch_statistics_of_a_deep_net_are_not_what_evaluation_shows():
    """Or else the tests here would show nothing."""
    model, data = mlp(20, 16), rows(256)
    update_bn_stats(model, data.split(4))
    assert worst(model, [data]) > 0.1


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    return pretrained(Residual(6, 3))


@pytest.mark.parametrize("size", [2, 32, 64])
@pytest.mark.parametrize("to", ["torch", "running", "precise"])
def test_residual_net_with_dropout(size, to):
    model, data = batchnormify(residual_net(), to).train(), pictures(64)
    update_bn_stats(model, data.split(size), normalize="population")
    assert_evaluation_shows(model, [data])


@pytest.mark.parametrize("sizes", [(96, 1), (1, 96), (32, 32, 1, 32), (1,) * 97], ids=lambda sizes: str(sizes[:4]))
def test_single_sample_tails(sizes):
    model, data = mlp(6), rows(97)
    update_bn_stats(model, data.split(sizes) if sum(sizes) == 97 else data.split(32), normalize="population")
    assert_evaluation_shows(model, [data])


def test_split_does_not_matter():
    data, found = rows(128), []
    for sizes in ((2, 2, 4, 8, 16, 32, 64), (128,), (3, 125)):
        update_bn_stats(model := mlp(8), data.split(sizes), normalize="population")
        found.append(statistics(model))
    for other in found[1:]:
        assert_statistics(model, other, tolerance=2e-4)
        assert_statistics(model, found[0], tolerance=2e-4)


def test_one_batch_gives_what_batch_gives_up_to_the_correction_of_the_variance():
    model, other, data = mlp(), mlp(), rows(4096)
    update_bn_stats(model, [data], normalize="population")
    update_bn_stats(other, [data], normalize="batch")
    assert_statistics(model, statistics(other), tolerance=2e-3)


def test_bfloat16_net_as_far_as_its_digits_allow():
    model, data = mlp(6, 16).bfloat16(), rows(256).bfloat16()
    update_bn_stats(model, data.split(16), normalize="population")
    # eps is 2^-7, and roundings of 6 layers add up.
    assert_evaluation_shows(model, [data], tolerance=0.05)


@pytest.mark.parametrize("kind", ["generator", "iterator", "DataLoader", "num_iters"])
def test_loader_is_read_once(kind):
    data, drawn = rows(64), []

    def loader():
        for x in data.split(8):
            drawn.append(x)
            yield x

    dataset = torch.utils.data.TensorDataset(data)
    source = {
        "generator": loader(),
        "iterator": iter(list(data.split(8))),
        "DataLoader": torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True),
        "num_iters": itertools.chain(loader(), itertools.repeat(rows(8, seed=5) * 100)),
    }[kind]
    model = mlp(6)
    update_bn_stats(model, source, 8, normalize="population")
    assert_evaluation_shows(model, [data])
    assert len(drawn) in (0, 8)


def test_random_augmentation_in_the_loader_is_the_same_in_every_pass():
    seen = []

    def loader():
        for x in rows(64).split(8):
            seen.append(x + torch.randn_like(x))
            yield seen[-1]

    update_bn_stats(model := mlp(6), loader(), normalize="population")
    assert_evaluation_shows(model, seen)


class Switching(nn.Module):
    """Goes one way or another, by its input or by what comes out of a normalisation: then batches may change sides."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.first, self.a, self.b, self.last = mlp(1, 8)[:2], mlp(1, 8, 8), mlp(2, 8, 8), mlp(1, 8, 8)

    def forward(self, x):
        z = self.first(x)
        seen = x[0, 0] + 1 if self.by == "input" else z[0, 0] - self.first[1].bias[0]
        return self.last(self.a(z) if seen > 0 else self.b(z))


@pytest.mark.parametrize("by", ["input", "normalised"])
@pytest.mark.parametrize("size", [2, 8])
def test_control_flow_that_depends_on_the_data(by, size):
    batches = [rows(size, seed=i) for i in range(24)]
    model = Switching(by)
    report = update_bn_stats(model, batches, normalize="population")
    assert len(report.layers) == 5
    assert_evaluation_shows(model, batches)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm, self.linear, self.after = mlp(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), mlp(2, 8, 8)

    def forward(self, x):
        x = self.before(x)
        for _ in range(3):
            x = self.linear(self.norm(x)).tanh()
        return self.after(x)


def test_layer_that_feeds_itself_is_exempt_and_reported():
    torch.manual_seed(0)
    model, data = Recurrent(), rows(128)
    report = update_bn_stats(model, data.split(16), normalize="population")
    assert [layer.name for layer in report.layers if layer.feeds_itself] == ["norm"]
    assert "norm is called several times per forward" in str(report)
    assert_evaluation_shows(model, [data], only=["before.1", "before.4", "after.1", "after.4"])


def test_residual_is_how_far_evaluation_is_from_what_is_stored():
    torch.manual_seed(0)
    model, data = Recurrent(), rows(128)
    report = update_bn_stats(model, data.split(16), normalize="population")
    seen, found = inputs_in_evaluation(model, [data]), statistics(model)
    for layer in report.layers:
        (mean, var), (true_mean, true_var) = found[layer.name], moments(seen[layer.name])
        by_mean = ((mean - true_mean).abs() / (true_var + 1e-5).sqrt()).max()
        by_var = ((var - true_var).abs() / (true_var + 1e-5)).max()
        assert layer.residual == pytest.approx(float(torch.maximum(by_mean, by_var)), rel=0.05, abs=1e-5)


def test_frozen_layers_and_layers_not_chosen_keep_their_statistics():
    model, data = mlp(5, 8).train(), rows(64)
    model[4].eval()
    before = everything(model, but=lambda name: is_statistic(name) and name.partition(".")[0] in ("1", "10", "13"))
    update_bn_stats(model, data.split(8), normalize="population", layers=["1", "10", "13"])
    after = everything(model, but=lambda name: is_statistic(name) and name.partition(".")[0] in ("1", "10", "13"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("value"))
    assert_evaluation_shows(model, [data], only=["1", "10", "13"])


def test_batches_that_are_not_finite_are_left_out_of_all_passes(caplog):
    batches = list(rows(64).split(8))
    batches[3] = batches[3] * float("nan")
    model = mlp(5)
    report = update_bn_stats(model, batches, normalize="population")
    assert (report.not_finite, report.batches) == (1, 7)
    assert_evaluation_shows(model, batches[:3] + batches[4:])


@pytest.mark.parametrize("prior", [10.0, 64.0])
def test_prior_is_mixed_into_every_layer(prior):
    model, data = mlp(4), rows(64)
    old = statistics(model)
    update_bn_stats(model, data.split(8), normalize="population", prior=prior)
    w = prior / (prior + 64)
    for name, x in inputs_in_evaluation(model, [data]).items():
        (m0, v0), (m1, v1) = old[name], moments(x)
        mean, var = statistics(model)[name]
        torch.testing.assert_close(mean, w * m0 + (1 - w) * m1, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(var, w * v0 + (1 - w) * v1 + w * (1 - w) * (m0 - m1) ** 2, rtol=2e-4, atol=0)


def test_model_that_is_random_in_evaluation_does_not_settle_and_says_so(caplog):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(*mlp(2), Noisy(), *mlp(2, 8, 8))
    update_bn_stats(model, rows(64).split(16), normalize="population")
    assert "not converged" in caplog.text
