"""What `diagnose` measures: distances of statistics and what a batch counts for, against numbers computed apart."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import noise
from models import pretrained
from recalibration_models import (
    ChannelsLastBatchNorm,
    OwnArithmetic,
    Residual,
    in_rows,
    inputs_in_evaluation,
    mlp,
    moments,
    pictures,
    residual,
    rows,
)
from torch import nn

from runningbn import RunningBatchNorm, batchnormify, diagnose, update_bn_stats

# -------------------------------------------------------------------------------------- how far the statistics are off


@pytest.mark.parametrize("size", [1, 2, 4, 40])
@pytest.mark.parametrize("to", ["torch", "running", "precise"])
def test_statistics_that_are_exact_for_evaluation_are_not_off_whatever_the_batches(size, to):
    model = batchnormify(residual(), to)
    batches = pictures(40).split(size)
    update_bn_stats(model, batches, None, normalize="population")
    for layer in diagnose(model, batches, None).layers:
        assert layer.mean_off.abs().max() < 2e-4
        assert layer.log_var_off.abs().max() < 2e-4


def test_distances_by_hand():
    layer = nn.BatchNorm1d(2, eps=0.5)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([2.0, 4.0]))
    data = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])  # means 2 and 4, variances 4 and 13
    (found,) = diagnose(layer, data[:, None]).layers
    assert found.mean_off.tolist() == pytest.approx([-1 / 4.5**0.5, -6 / 13.5**0.5])
    assert found.log_var_off.tolist() == pytest.approx([math.log(2.5 / 4.5), math.log(4.5 / 13.5)])
    assert (found.stored.batches, found.stored.elements, found.elements_per_batch) == (3, 3, 1)
    # Three batches of one element: the standard error of a mean of three.
    assert found.mean_off_error.tolist() == pytest.approx([(4 / 3 / 4.5) ** 0.5, (13 / 3 / 13.5) ** 0.5])


def test_statistics_of_another_domain_are_off_by_as_much_as_they_are():
    """Means by a known number of std, variances by a known factor: within two standard errors in 95 % of channels."""
    off = torch.linspace(-3, 3, 50, dtype=torch.float64)
    factor = torch.linspace(-1, 1, 50, dtype=torch.float64).exp()
    mean, std = torch.linspace(-5, 5, 50, dtype=torch.float64), torch.linspace(0.5, 4, 50, dtype=torch.float64)
    layer = nn.BatchNorm1d(50, eps=1e-12)
    layer.running_mean.copy_(mean + off * std)
    layer.running_var.copy_(std.square() * factor)
    z_mean, z_var = [], []
    for seed in range(6):
        data = noise((30, 32, 50), seed, torch.float64) * std + mean
        (found,) = diagnose(layer, data.float()).layers
        # The unit of `mean_off` is the std of the data, which has an error, too: back to the true one.
        z_mean.append((found.mean_off * found.stored.std / std - off) / found.mean_off_error)
        z_var.append((found.log_var_off - factor.log()) / found.log_var_off_error)
        assert found.stored.mean_standard_error == pytest.approx(1 / (30 * 32) ** 0.5, rel=0.1)
    for z in (torch.cat(z_mean), torch.cat(z_var)):
        assert 0.9 < float((z.abs() < 2).double().mean()) < 0.995
        assert z.abs().max() < 5


def test_the_first_layer_that_is_off_is_where_it_begins():
    model = residual()
    batches = pictures(64).split(8)
    update_bn_stats(model, batches, normalize="population")
    broken = model.blocks[0][1]
    broken.running_mean += 2 * broken.running_var.sqrt()
    before, at, after = diagnose(model, batches).layers
    assert before.mean_off.abs().max() < 1e-3
    torch.testing.assert_close(at.mean_off, torch.full((4,), 2.0, dtype=torch.float64), rtol=1e-2, atol=0)
    assert after.mean_off.abs().max() > 0.1  # it sees what the broken one gives


def test_moments_are_those_of_the_model_in_evaluation():
    model = residual()
    batches = list(pictures(30).split(8))
    expected = {name: moments(x) for name, x in inputs_in_evaluation(model, batches).items()}
    for layer in diagnose(model, batches).layers:
        mean, var = expected[layer.name]
        torch.testing.assert_close(layer.stored.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.stored.var, var, rtol=1e-5, atol=1e-5)


def test_recomputed_statistics_are_those_of_update_bn_stats_and_what_is_left_is_told():
    model, twin = residual(), residual()
    batches = pictures(32).split(4)
    update_bn_stats(twin, batches)
    seen = {name: moments(x) for name, x in inputs_in_evaluation(twin, batches).items()}
    for layer in diagnose(model, batches).layers:
        module = twin.get_submodule(layer.name)
        assert torch.equal(layer.recomputed.old_mean, module.running_mean.double())
        assert torch.equal(layer.recomputed.old_var, module.running_var.double())
        torch.testing.assert_close(layer.recomputed.mean, seen[layer.name][0], rtol=1e-5, atol=1e-5)
    left = max(x.recomputed.moved for x in diagnose(model, batches).layers)
    assert left > 1e-3
    assert max(x.recomputed.moved for x in diagnose(model, batches, normalize="population").layers) < 1e-3


# ---------------------------------------------------------------------------------------------- what a batch counts for


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


# ----------------------------------------------------------------------------------------------------------- what else


def test_kinds_of_layers_are_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.shared, self.unused = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)
            self.batch_only = nn.BatchNorm1d(5, track_running_stats=False)
            self.instance = nn.InstanceNorm1d(5, track_running_stats=True)

        def forward(self, x):
            return self.batch_only(self.shared(self.shared(self.frozen(x))))

    model = Net().train()
    model.frozen.eval()
    found = diagnose(model, rows(40).split(8))
    assert [layer.name for layer in found.layers] == ["frozen", "shared"]
    assert [layer.frozen for layer in found.layers] == [True, False]
    assert [layer.calls for layer in found.layers] == [1, 2]
    assert found.unused == ("unused",)
    assert found.without_statistics == ("batch_only",)
    assert found.skipped == {"instance": "InstanceNorm1d is no nn.BatchNorm"}
    text = str(found)
    for line in (
        "frozen: frozen", "shared: shared (2 calls)", "unused: unused", "without statistics: batch_only",
        "not looked at: InstanceNorm1d is no nn.BatchNorm: instance",
    ):  # fmt: skip
        assert f"\n{line}\n" in text


def test_frozen_layers_keep_their_statistics_in_all_three_ways(caplog):
    model = mlp(1).train()
    model[1].eval()
    found = diagnose(model, rows(40).split(8))
    assert found["1"].frozen
    assert torch.equal(found["1"].recomputed.old_mean, found["1"].stored.old_mean)
    assert found.recomputed.relative_rms == found.batch.relative_rms == 0
    assert caplog.text == ""


def test_running_layers_do_not_normalise_by_their_batch():
    model = batchnormify(mlp(2))
    found = diagnose(model, rows(40).split(8))
    assert found.batch.relative_rms == 0
    assert found.recomputed.relative_rms > 0.1
    assert all(layer.relies_on_no_batch for layer in found.layers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite(value, buffer):
    model = mlp(3)
    getattr(model[4], buffer)[2] = value
    found = diagnose(model, rows(80).split(8))
    assert [layer.finite for layer in found.layers] == [True, False, True]
    assert math.isfinite(found["1"].stored.mean_shift)
    # The recomputed ones are as if nothing had been wrong, and what a batch counts for is known by them.
    assert all(math.isfinite(layer.recomputed.mean_shift) for layer in found.layers)
    assert all(math.isfinite(layer.between.design_effect) for layer in found.layers)
    assert "statistics not finite: 4" in str(found)
    assert found.findings[0].rule == "not_finite"


def test_a_negative_variance_is_no_variance():
    model = mlp(1)
    model[1].running_var[0] = -1
    assert diagnose(model, rows(40).split(8)).findings[0].rule == "not_finite"


def test_batches_that_are_not_finite_are_left_out_where_they_are_not():
    batches = [*rows(80).split(8)]
    batches[3] = batches[3].clone().fill_(math.nan)
    model = mlp(2)
    found, clean = diagnose(model, batches), diagnose(model, batches[:3] + batches[4:])
    for a, b in zip(found.layers, clean.layers):
        assert (a.not_finite, b.not_finite) == (1, 0)
        assert torch.equal(a.stored.mean, b.stored.mean)
        assert a.between == b.between
    assert (found.batches, found.recomputed.batches) == (10, 9)
    assert found.recomputed.relative_rms == clean.recomputed.relative_rms
    assert "input not finite: 1 (1 batch), 4 (1 batch)" in str(found)


def test_a_model_without_batchnorm_is_an_error_that_says_what_it_has():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match=r"no BatchNorm layer with running statistics in Sequential.*it has GroupNorm"):
        diagnose(model, [pictures(4)])
    with pytest.raises(ValueError, match="in evaluation, too: 0"):
        diagnose(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), [pictures(4)])
    with pytest.raises(ValueError, match=r"; InstanceNorm2d is no nn\.BatchNorm: 0$"):
        diagnose(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), [pictures(4)])
    with pytest.raises(ValueError, match=r"none can be at fault$"):
        diagnose(nn.Linear(3, 4), [rows(4)])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        diagnose("model", [pictures(4)])


@pytest.mark.parametrize("freeze", [False, True])
def test_no_data_is_an_error(freeze):
    model = mlp(1).train()
    model[1].train(not freeze)
    with pytest.raises(ValueError, match="gave no batch"):
        diagnose(model, [])
    unused = nn.Sequential(nn.Identity(), nn.BatchNorm1d(5)).train()
    unused[1].train(not freeze)
    with pytest.raises(ValueError, match="no batch reached any"):
        diagnose(unused, [rows(8)], forward=lambda model, x: model[0](x))


def test_padding_is_left_out():
    layer = RunningBatchNorm(5)
    lengths = torch.tensor([[5, 2, 7], [1, 7, 3], [4, 4, 6], [2, 6, 1]])
    data = [(noise((3, 5, 7), seed), torch.arange(7) < lengths[seed][:, None]) for seed in range(4)]
    (found,) = diagnose(layer, data, forward=lambda layer, batch: layer(*batch)).layers
    real = torch.cat([x.movedim(1, -1)[mask] for x, mask in data]).double()
    torch.testing.assert_close(found.stored.mean, real.mean(0), rtol=1e-5, atol=1e-6)
    means = [
        torch.stack([sample[:, :n].double().mean(1) for sample, n in zip(x, lengths[seed])]).numpy()
        for seed, (x, _) in enumerate(data)
    ]
    _, _, effect = design_effect(means, (real.var(0, correction=0) + layer.eps).numpy())
    assert found.between.design_effect == pytest.approx(effect, rel=1e-5)


@pytest.mark.parametrize("layer", [OwnArithmetic, nn.BatchNorm2d])
def test_layers_with_arithmetic_of_their_own(layer):
    torch.manual_seed(0)
    model = pretrained(nn.Sequential(nn.Conv2d(3, 4, 1), layer(4)))
    batches = of_one_class()
    (found,) = diagnose(model, batches).layers
    plain = pretrained(nn.Sequential(model[0], nn.BatchNorm2d(4)))
    (expected,) = diagnose(plain, batches).layers
    assert found.between.design_effect == pytest.approx(expected.between.design_effect, rel=1e-5)
    assert found.stored.mean_shift == pytest.approx(expected.stored.mean_shift, rel=1e-4)


def test_layers_that_permute_are_measured_where_they_normalise():
    data = noise((20, 6, 7, 5), 0)  # (batches, N, L, C)
    (found,) = diagnose(ChannelsLastBatchNorm(5), data).layers
    (expected,) = diagnose(nn.BatchNorm1d(5), data.transpose(2, 3)).layers
    assert found.between == expected.between
    assert torch.equal(found.stored.mean, expected.stored.mean)


def test_calls_of_a_shared_layer_are_averaged_sample_by_sample():
    """Two scales of the same pictures, as in a pyramid: their difference is no difference between samples."""

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x).mean(), self.norm(F.max_pool2d(x, 5) + 7).mean()

    batches = [pictures(6, seed=seed) for seed in range(12)]
    (found,) = diagnose(Pyramid(), batches).layers
    means = [((x.double().sum((2, 3)) + x.double().amax((2, 3)) + 7) / 26).numpy() for x in batches]
    everything = torch.cat([part for x in batches for part in (in_rows(x), in_rows(x.amax((2, 3)) + 7))])
    _, _, effect = design_effect(means, (everything.var(0) + 1e-5).numpy())
    assert found.between.design_effect == pytest.approx(effect, rel=1e-4)
    assert found.calls == 2


# --------------------------------------------------------------------------------------------------- outputs and metric


def test_outputs_change_as_they_do():
    model, data = residual(), [pictures(8, seed=seed) for seed in range(3)]
    found = diagnose(model, data)
    model.eval()
    with torch.no_grad():
        stored = torch.cat([model(x) for x in data])
        with update_bn_stats(model, data):
            recomputed = torch.cat([model(x) for x in data])
        batch = torch.cat([by_batch(model, x) for x in data])
    for change, other in ((found.recomputed, recomputed), (found.batch, batch)):
        assert change.relative_rms == pytest.approx(float((other - stored).norm() / stored.norm()), rel=1e-4)
        assert change.agreement == pytest.approx(float((other.argmax(1) == stored.argmax(1)).double().mean()))
        assert change.batches == 3


def by_batch(model, x):
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return twin(x)


def test_segmentation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))
    data = [pictures(2, 9, seed) for seed in range(10)]
    found = diagnose(model, data)
    assert found["1"].elements_per_batch == 2 * 81
    stored = torch.cat([model.eval()(x) for x in data]).argmax(1)
    with update_bn_stats(model, data):
        recomputed = torch.cat([model(x) for x in data]).argmax(1)
    assert found.recomputed.agreement == pytest.approx(float((stored == recomputed).double().mean()))
    assert 0.1 < found.recomputed.agreement < 1


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


WRAPPERS = {
    "tensor": lambda y: y,
    "mapping": lambda y: {"logits": y, "length": 3},
    "tuple": lambda y: (y, None),
    "dataclass": Answer,
    "nested": lambda y: [{"scores": (y,)}],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_outputs_of_any_form(wrap):
    data = rows(40).split(8)
    found = diagnose(mlp(2), data, forward=lambda model, x: wrap(model(x)))
    assert found.recomputed == diagnose(mlp(2), data).recomputed


@pytest.mark.parametrize("nothing", [None, "text", torch.tensor(3)], ids=repr)
def test_outputs_that_cannot_be_compared_are_not(nothing):
    def forward(model, x):
        model(x)
        return nothing

    found = diagnose(mlp(2), rows(40).split(8), forward=forward)
    assert math.isnan(found.recomputed.relative_rms)
    assert math.isnan(found.recomputed.agreement)
    assert "output, stored to recomputed statistics: cannot be compared" in str(found)


def test_outputs_of_other_shapes_are_not_compared():
    """As of detectors, which find more or fewer objects."""
    found = diagnose(mlp(2), rows(40).split(8), forward=lambda model, x: (y := model(x))[y > 0.3])
    assert found.recomputed.batches < 5


def test_metric_is_called_with_each_kind_of_statistics():
    model = mlp(2).train()
    data = rows(40).split(8)
    seen = []

    def metric(evaluated):
        assert evaluated is model
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(model(data[0]))
        return seen[-1].square().mean()

    found = diagnose(model, data, metric=metric)
    assert dataclasses.astuple(found.metric) == tuple(float(y.square().mean()) for y in seen)
    model.eval()
    with torch.no_grad():
        expected = [model(data[0])]
        with update_bn_stats(model, data):
            expected.append(model(data[0]))
        expected.append(nn.Sequential(*(copy.deepcopy(m).train() for m in model))(data[0]))
    for actual, right in zip(seen, expected):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    assert "metric: stored" in str(found)


@pytest.mark.parametrize("value", [None, "good", torch.zeros(3), {"accuracy": 1.0}], ids=repr)
def test_metric_that_gives_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="metric: expected a number, got"):
        diagnose(mlp(1), rows(40).split(8), metric=lambda model: value)


def test_random_numbers_are_the_same_in_all_three():
    """Dropout that stays on, as for Monte Carlo: the outputs differ by the statistics only."""
    model = mlp(2)
    update_bn_stats(model, [rows(40)])

    def forward(model, x):
        return F.dropout(model(x), 0.5, training=True)

    found = diagnose(model, [rows(40)], forward=forward)
    assert found.recomputed.relative_rms < 1e-5
    assert found.batch.relative_rms < 0.1


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_of_all_forms_give_the_same():
    model, data = residual(), [pictures(8, seed=seed) for seed in range(4)]
    expected = diagnose(model, data).to_dict()
    labels = torch.zeros(8)
    for loader in (
        [(x, labels) for x in data],
        [[x, labels] for x in data],
        [{"x": x} for x in data],
        (x for x in data),
        torch.utils.data.DataLoader(torch.cat(data), batch_size=8),
        torch.stack(data),
    ):
        assert diagnose(model, loader).to_dict() == expected
    by_hand = diagnose(
        model, [{"image": x, "label": labels} for x in data], forward=lambda model, batch: model(batch["image"])
    )
    assert by_hand.to_dict() == expected


def test_generator_is_drawn_from_once_and_no_further_than_needed():
    drawn = []
    found = diagnose(mlp(1), (drawn.append(1) or rows(8, seed=seed) for seed in range(100)), 7)
    assert (len(drawn), found.batches) == (7, 7)
    assert diagnose(mlp(1), (rows(8, seed=seed) for seed in range(60))).batches == 50
    assert diagnose(mlp(1), (rows(8, seed=seed) for seed in range(60)), None).batches == 60


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_num_iters_out_of_range(wrong, freeze):
    model = mlp(1).train()
    model[1].train(not freeze)
    with pytest.raises(ValueError, match="num_iters: expected None or an integer of at least 1"):
        diagnose(model, [rows(8)], wrong)


class Movable:
    """A batch that knows where it was sent."""

    def __init__(self, x, device=None):
        self.x, self.device = x, device

    def to(self, device):
        return Movable(self.x, device)


def test_device_is_where_the_batches_go_every_time():
    devices = []

    def forward(model, batch):
        devices.append(batch.device)
        return model(batch.x)

    diagnose(mlp(1), [Movable(rows(8))] * 3, device="cpu", forward=forward)
    assert devices == [torch.device("cpu")] * 12


def test_wrapped_models_are_stepped_into():
    found = diagnose(nn.DataParallel(Residual()), [pictures(8, seed=seed) for seed in range(3)])
    assert [layer.name for layer in found.layers] == ["module.stem.1", "module.blocks.0.1", "module.blocks.0.4"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = mlp(2).to(dtype)
    found = diagnose(model, [rows(16, seed=seed, dtype=dtype) for seed in range(8)])
    expected = diagnose(mlp(2), [rows(16, seed=seed) for seed in range(8)])
    for a, b in zip(found.layers, expected.layers):
        assert a.stored.mean.dtype == torch.float64
        near = 0.05 if dtype == torch.bfloat16 else 1e-5
        assert a.stored.mean_shift == pytest.approx(b.stored.mean_shift, rel=near)
        assert a.between.design_effect == pytest.approx(b.between.design_effect, rel=near)


# ------------------------------------------------------------------------------------------------ models of other kinds


def test_inputs_of_a_derived_class():
    class Image(torch.Tensor):
        pass

    data = of_one_class()
    found, expected = diagnose(residual(), [x.as_subclass(Image) for x in data]), diagnose(residual(), data)
    assert found.recomputed.relative_rms == pytest.approx(expected.recomputed.relative_rms, rel=1e-4)
    for a, b in zip(found.layers, expected.layers):
        assert a.stored.mean_shift == pytest.approx(b.stored.mean_shift, rel=1e-4)
        assert a.between.design_effect == pytest.approx(b.between.design_effect, rel=1e-4)


class Forces(nn.Module):
    """A potential that differentiates itself in its forward."""

    def __init__(self, func: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = pretrained(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 1)))
        self.func = func

    def forward(self, x):
        if self.func:
            return torch.func.grad(lambda x: self.net(x).sum())(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x)[0]


@pytest.mark.parametrize("func", [False, True])
def test_models_that_differentiate_in_their_forward(func):
    model, data = Forces(func), [rows(8, seed=seed) for seed in range(20)]
    found = diagnose(model, data)
    stored = torch.cat([model.eval()(x).detach() for x in data])
    with update_bn_stats(model, data):
        recomputed = torch.cat([model(x).detach() for x in data])
    expected = float((recomputed - stored).norm() / stored.norm())
    assert found.recomputed.relative_rms == pytest.approx(expected, rel=1e-4)
    # What torch.func wraps has moments, but its samples cannot be looked at.
    assert math.isnan(found["net.1"].between.design_effect) == func
    assert found["net.1"].stored.batches == 20


def test_layers_fused_for_quantisation():
    """Their weights are scaled by running_var: with other statistics in use, these have to be in the buffers."""
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    torch.manual_seed(0)
    model = nn.Sequential(ConvBn2d(3, 4, 3, qconfig=get_default_qat_qconfig("fbgemm")), nn.ReLU())
    data = [pictures(4, 7, seed=seed) for seed in range(10)]
    model.train()
    for x in data:
        model(x)
    pretrained(model)
    found = diagnose(model, data, normalize="population")
    stored = torch.cat([copy.deepcopy(model).eval()(x) for x in data])
    with update_bn_stats(model, data, normalize="population"):
        recomputed = torch.cat([copy.deepcopy(model).eval()(x) for x in data])
    expected = float((recomputed - stored).norm() / stored.norm())
    assert found.recomputed.relative_rms == pytest.approx(expected, rel=1e-3)


def test_layers_that_lightning_froze_are_frozen():
    model = mlp(2).train()
    model[1].track_running_stats = False
    found = diagnose(model, rows(40).split(8))
    assert [layer.frozen for layer in found.layers] == [True, False]
    assert torch.equal(found["1"].recomputed.old_mean, found["1"].stored.old_mean)


def test_layers_without_weights_yet_are_not_looked_at():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, device="meta"))
    found = diagnose(model, rows(40).split(8), forward=lambda model, x: model[0](x))
    assert [layer.name for layer in found.layers] == ["0"]
    assert "meta device" in found.skipped["1"]
    with pytest.raises(ValueError, match="not initialised yet"):
        diagnose(nn.Sequential(nn.BatchNorm1d(5), nn.LazyBatchNorm1d()), rows(40).split(8))
