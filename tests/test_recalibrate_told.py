"""What was not updated, and why: frozen, skipped, used in part; how many batches of how many."""

import copy

import pytest
import torch
from cases import noise
from recalibration_models import assert_same, assert_statistics, everything, mlp, net, pictures, reference, rows
from torch import nn
from torch.nn import functional as F

from runningbn import batchnormify, diagnose, get_bn_modules, precise_bn, update_bn_stats

FROZEN = "frozen (in evaluation mode while the model is in training mode)"
NOT_TRACKING = "frozen (track_running_stats=False)"


# -------------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("to", [None, "running", "precise"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_that_do_not_track_are_frozen(to, mode):
    model = net() if to is None else batchnormify(net(), to)
    getattr(model, mode)()[1].track_running_stats = False
    model.eval()(pictures(4))  # in which RunningBatchNorm remembers the number of dimensions
    getattr(model, mode)()
    before = everything(model[:4])
    report = update_bn_stats(model, [pictures(4)])
    assert_same(everything(model[:4]), before)
    assert get_bn_modules(model) == [model[4]]
    assert report.skipped == {"1": NOT_TRACKING}
    assert [layer.name for layer in report.layers] == ["4"]
    assert f"{NOT_TRACKING}: 1" in str(report)


def test_lightnings_freeze():
    finetuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    model = net().train()
    finetuning.freeze(model[:2], train_bn=False)
    before = model[1].running_mean.clone(), model[1].running_var.clone()
    report = update_bn_stats(model, [pictures(4) + 5])
    assert torch.equal(model[1].running_mean, before[0])
    assert torch.equal(model[1].running_var, before[1])
    assert report.skipped == {"1": NOT_TRACKING}
    finetuning.make_trainable(model[:2])
    assert update_bn_stats(model, [pictures(4) + 5]).skipped == {}


def test_asking_for_a_layer_that_does_not_track_is_an_error():
    model = net()
    model[1].track_running_stats = False
    with pytest.raises(ValueError, match=r"get_bn_modules.*got '1'"):
        update_bn_stats(model, [pictures(4)], layers=["1"])


@pytest.mark.parametrize("call", ["update_bn_stats", "precise_bn"])
def test_all_frozen_is_said(call, caplog):
    model = net().train()
    model[1].eval(), model[4].eval()
    if call == "update_bn_stats":
        report = update_bn_stats(model, [pictures(4)])
    else:
        with precise_bn(model) as recalibration:
            model(pictures(4))
        report = recalibration.report
    assert report.skipped == {"1": FROZEN, "4": FROZEN}
    assert f"{call}: no layer is updated in Sequential:\n{FROZEN}: 1, 4" in caplog.text
    assert "there is no BatchNorm" not in caplog.text


# ------------------------------------------------------------------------------------------------------------- skipped


class Foreign(nn.Module):
    """A BatchNorm that is no nn.BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def test_whatever_has_statistics_and_was_not_updated_is_listed():
    model = nn.Sequential(Foreign(3), *net(), nn.InstanceNorm2d(4, track_running_stats=True), nn.InstanceNorm2d(4))
    others = nn.ModuleList([*model[:5], *model[6:]]).train()
    before = everything(others)
    report = update_bn_stats(model.train(), [pictures(4)], layers=["5"])
    assert report.skipped == {
        "0": "Foreign is not an nn.BatchNorm",
        "2": "not among the requested layers",
        "6": "InstanceNorm2d is not an nn.BatchNorm",
    }
    assert all(
        name in str(report)
        for name in ("Foreign is not an nn.BatchNorm: 0", "InstanceNorm2d is not an nn.BatchNorm: 6")
    )
    assert_same(everything(others), before)


def test_heterogeneous_batch_norm_of_torch_geometric():
    geometric = pytest.importorskip("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hetero, self.norm = geometric.HeteroBatchNorm(3, num_types=2), geometric.BatchNorm(3)

        def forward(self, x):
            return self.norm(self.hetero(x, torch.arange(len(x)) % 2))

    report = update_bn_stats(Net(), [noise((8, 3), 0)])
    assert report.skipped == {"hetero": "HeteroBatchNorm is not an nn.BatchNorm"}
    assert [layer.name for layer in report.layers] == ["norm.module"]


MODELS_THAT_CANNOT = {
    "scripted": (lambda m: torch.jit.script(m), "scripted: recalibrate the model before scripting it"),
    "traced": (lambda m: torch.jit.trace(m, pictures(4)), "scripted: recalibrate the model before scripting it"),
    "exported": (
        lambda m: torch.export.export(m, (pictures(4),)).module(),
        "exported: recalibrate the model before exporting it",
    ),
    "meta": (lambda m: m.to("meta"), "on the meta device: load its weights first; offloaded layers cannot be updated"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "reason"), MODELS_THAT_CANNOT.values(), ids=MODELS_THAT_CANNOT)
def test_models_that_cannot_be_recalibrated_say_why(make, reason, caplog):
    report = update_bn_stats(make(net().eval()), [pictures(4)])
    assert report.skipped == {"1": reason, "4": reason}
    assert f"{reason}: 1, 4" in caplog.text
    assert "there is no BatchNorm" not in caplog.text


def test_model_without_any_still_says_so(caplog):
    update_bn_stats(nn.Sequential(nn.Linear(3, 4)), [rows(4, 3)])
    assert "there is no BatchNorm layer to update in Sequential" in caplog.text


@pytest.mark.parametrize("buffers", [True, False])
def test_hooks_of_accelerate(buffers):
    accelerate = pytest.importorskip("accelerate")
    model, batches = net(), [pictures(4, seed=i) for i in range(3)]
    expected = reference(net(), batches)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    report = update_bn_stats(model, batches)
    if buffers:
        assert all(reason.startswith("on the meta device") for reason in report.skipped.values())
        assert list(report.skipped) == ["1", "4"]
    else:
        assert report.skipped == {}
        assert_statistics(model, expected)


# -------------------------------------------------------------------------------------------------------------- slices


class Supernet(nn.Module):
    """Normalises by a part of a layer's statistics, itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.other, self.width = nn.BatchNorm2d(6), nn.BatchNorm2d(3), width

    def forward(self, x):
        norm, k = self.norm, self.width
        parts = (t[:k] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return self.other(F.batch_norm(x.repeat(1, 2, 1, 1)[:, :k], *parts, norm.training)[:, :3])


@pytest.mark.parametrize("width", [3, 6])
def test_statistics_used_outside_of_the_layer_are_not_called_unused(width):
    model = Supernet(width).train()
    before = everything(model.norm)
    report = update_bn_stats(model, [pictures(4)] * 3)
    assert_same(everything(model.norm), before)
    reason = "code outside of the layer's forward normalises by its statistics, which is not observed"
    assert (report.skipped, report.unused) == ({"norm": reason}, [])
    assert [layer.name for layer in report.layers] == ["other"]


def test_model_of_nothing_but_such_layers():
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return F.batch_norm(x, self.norm.running_mean[:3], self.norm.running_var[:3])

    with pytest.raises(ValueError, match="code outside of their forward normalises by their statistics"):
        update_bn_stats(Only(), [pictures(4)])


def test_layer_that_takes_a_part_of_its_own_statistics_is_refused_by_name():
    class Slimmable(nn.BatchNorm2d):
        def forward(self, x):
            parts = (t[: x.shape[1]] for t in (self.running_mean, self.running_var, self.weight, self.bias))
            return F.batch_norm(x, *parts, self.training, self.momentum, self.eps)

    model = nn.Sequential(Slimmable(6))
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"0 \(Slimmable\) normalises by a part of running_mean"):
        update_bn_stats(model, [pictures(4)])
    assert_same(everything(model), before)


# ------------------------------------------------------------------------------------------------- how many, and of how


@pytest.mark.parametrize(
    ("limit", "text"), [(7, "7 of 20 batches"), (None, "from 20 batches"), (30, "from 20 batches")]
)
def test_share_of_the_batches_is_said(limit, text):
    report = update_bn_stats(mlp(1), [rows(8)] * 20, limit)
    assert report.available == 20
    assert text in str(report)


def test_share_with_tolerance_and_bad_batches():
    bad = torch.full((8, 5), torch.nan)
    report = update_bn_stats(mlp(1), [bad, *[rows(8, seed=i) for i in range(50)]], tolerance=1e9)
    assert (report.batches, report.not_finite, report.available) == (9, 1, 51)
    assert "9 of 51 batches" in str(report)


def test_loader_of_unknown_length():
    report = update_bn_stats(mlp(1), iter([rows(8)] * 20), 7)
    assert report.available is None
    assert "from 7 batches" in str(report)


def test_a_block_without_a_call_of_the_model():
    with pytest.raises(ValueError, match="the model was not called inside the block"), precise_bn(mlp()):
        pass


@pytest.mark.parametrize("convert", [False, True], ids=["torch", "running"])
@pytest.mark.parametrize("inner", [update_bn_stats, diagnose])
def test_inside_a_recalibration_of_the_same_layers_there_can_be_no_other(inner, convert):
    model = batchnormify(mlp()) if convert else mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="recalibrated or diagnosed already"), precise_bn(model):
        inner(model, [rows(8)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
