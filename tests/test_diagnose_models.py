"""What `diagnose` says about layers and models of all kinds, their outputs and metrics."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import noise
from models import pretrained
from recalibration_models import ChannelsLastBatchNorm, OwnArithmetic, in_rows, mlp, pictures, residual, rows
from test_diagnose_between import design_effect, of_one_class
from torch import nn

from runningbn import RunningBatchNorm, batchnormify, diagnose, update_bn_stats

# ------------------------------------------------------------------------------------------------------ kinds of layers


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
    assert found.skipped == {"instance": "InstanceNorm1d is not an nn.BatchNorm"}
    text = str(found)
    for line in (
        "frozen: frozen", "shared: shared (2 calls)", "unused: unused", "without statistics: batch_only",
        "not examined: InstanceNorm1d is not an nn.BatchNorm: instance",
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
    with pytest.raises(ValueError, match=r"; InstanceNorm2d is not an nn\.BatchNorm: 0$"):
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
    stored = torch.cat([copy.deepcopy(model).eval()(x).detach() for x in data])
    with update_bn_stats(model, data, normalize="population"):
        recomputed = torch.cat([copy.deepcopy(model).eval()(x).detach() for x in data])
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
