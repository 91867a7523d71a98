"""What update_bn_stats tells: numbers, a table, a plot; `prior`; bn_summary."""

import builtins
import math
import warnings

import pytest
import torch
from models import pretrained
from recalibration_models import assert_statistics, mlp, moments, pictures, recalibrated, residual, rows, statistics
from torch import nn

from runningbn import RunningBatchNorm, StatsReport, batchnormify, bn_summary, update_bn_stats

BATCHES = rows(60).split([10, 30, 20])

# ------------------------------------------------------------------------------------------------------------- numbers


def test_counts_of_batches_samples_and_elements():
    report = update_bn_stats(residual(), pictures(20).split([8, 8, 4]))
    assert isinstance(report, StatsReport)
    for layer in report.layers:
        assert (layer.batches, layer.samples, layer.elements) == (3, 20, 20 * 25)
    assert (report.batches, report.not_finite, report.passes, report.unused) == (3, 0, 1, [])
    assert [layer.name for layer in report.layers] == ["stem.1", "blocks.0.1", "blocks.0.4"]


def test_movement_by_hand():
    layer = nn.BatchNorm1d(2, eps=0.5)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([2.0, 4.0]))
    data = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])  # means 2 and 4, variances 4 and 13
    found = update_bn_stats(layer, [data])[""]
    assert found.mean.tolist() == [2, 4]
    assert found.var.tolist() == pytest.approx([4, 13], rel=1e-6)
    assert found.old_mean.tolist() == [1, -2]
    assert found.old_var.tolist() == [2, 4]
    assert found.eps == 0.5
    assert found.std.tolist() == pytest.approx([4.5**0.5, 13.5**0.5])
    assert found.mean_shift == pytest.approx(((1 / 4.5 + 36 / 13.5) / 2) ** 0.5)
    ratios = 4.5 / 2.5, 13.5 / 4.5
    assert found.var_ratio == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    std_shift = math.sqrt(sum((math.log(r) / 2) ** 2 for r in ratios) / 2)
    assert found.std_shift == pytest.approx(std_shift)
    assert found.moved == pytest.approx(math.hypot(found.mean_shift, std_shift))
    assert all(t.dtype == torch.float64 for t in (found.mean, found.var, found.old_mean, found.mean_error))
    assert math.isnan(found.mean_standard_error)  # of a single batch
    assert math.isnan(found.residual)


def test_numbers_stay_when_the_model_trains_on():
    model = mlp()
    report = update_bn_stats(model, BATCHES)
    mean, old = report["1"].mean.clone(), report["1"].old_mean.clone()
    model[1].running_mean.fill_(99)
    assert torch.equal(report["1"].mean, mean)
    report.undo()
    assert torch.equal(report["1"].old_mean, old)
    assert torch.equal(model[1].running_mean.double(), old)


def test_second_recalibration_from_the_same_data_moves_nothing():
    model = recalibrated(mlp(), BATCHES)
    for layer in update_bn_stats(model, BATCHES).layers:
        assert layer.moved < 1e-12
        assert layer.var_ratio == pytest.approx(1, abs=1e-12)


def test_unknown_layer_is_a_key_error():
    with pytest.raises(KeyError, match="nowhere"):
        update_bn_stats(mlp(), BATCHES)["nowhere"]


# ---------------------------------------------------------------------------------------------------- table and plot


def test_table_is_sorted_by_movement():
    model = mlp(4)
    model[7].running_mean.fill_(50)
    model[4].running_mean.fill_(-9)
    report = update_bn_stats(model, BATCHES)
    lines = [line.split() for line in str(report).splitlines()]
    names = [line[0] for line in lines[1:5]]
    assert names[:2] == ["7", "4"]
    moved = [report[name].moved for name in names]
    assert moved == sorted(moved, reverse=True)
    assert lines[1][1:3] == ["3", "60"]
    assert "4 layers updated from 3 batches" in str(report)


def test_table_tells_of_unused_layers_and_batches_left_out(caplog):
    model = nn.ModuleDict({"used": nn.BatchNorm1d(5), "spare": nn.BatchNorm1d(5)})
    batches = [*BATCHES, BATCHES[0] * float("inf")]
    text = str(update_bn_stats(model, batches, forward=lambda model, x: model["used"](x)))
    assert "spare" in text
    assert "1 batch left out" in text


def test_plot_draws_every_layer_and_saves(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    report = update_bn_stats(mlp(5), BATCHES)
    figure = report.plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 1000
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [layer.name for layer in report.layers]
    assert matplotlib.get_backend() == before


def test_plot_of_a_single_batch_and_of_no_layer(tmp_path):
    pytest.importorskip("matplotlib")
    update_bn_stats(mlp(1), [rows(8)]).plot(tmp_path / "one.png")
    update_bn_stats(mlp(1), [rows(8)], layers=[]).plot(tmp_path / "none.png")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    plain_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("no matplotlib")
        return plain_import(name, *args, **kwargs)

    report = update_bn_stats(mlp(1), BATCHES)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"matplotlib.*pip install"):
        report.plot()


# --------------------------------------------------------------------------------------------------------------- prior


@pytest.mark.parametrize("prior", [0.0, 1, 16.0, 1e9])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, RunningBatchNorm])
def test_prior_is_a_mixture_with_so_many_samples_of_the_old_statistics(prior, cls):
    layer = pretrained(cls(5))
    ((m0, v0),) = statistics(layer).values()
    m1, v1 = moments(rows(60).double(), correction=1 if cls is nn.BatchNorm1d else 0)
    w = prior / (prior + 60)
    mean, var = w * m0 + (1 - w) * m1, w * v0 + (1 - w) * v1 + w * (1 - w) * (m0 - m1) ** 2
    assert_statistics(recalibrated(layer, BATCHES, prior=prior), {"": (mean, var)})


def test_prior_counts_samples_and_not_pixels():
    layer = pretrained(nn.BatchNorm2d(3))
    ((m0, v0),) = statistics(layer).values()
    data = pictures(10)
    m1, v1 = moments(data.double().movedim(1, -1).reshape(-1, 3))
    mean, var = (m0 + m1) / 2, (v0 + v1) / 2 + (m0 - m1) ** 2 / 4
    assert_statistics(recalibrated(layer, data.split(4), prior=10), {"": (mean, var)})


# ---------------------------------------------------------------------------------------------------------- bn_summary


def test_summary_of_a_model_and_of_its_state_dict_are_the_same():
    model = residual()
    model.blocks[0][1].num_batches_tracked.fill_(1234)
    rows_of_model, rows_of_state = bn_summary(model), bn_summary(model.state_dict())
    assert list(rows_of_model) == list(rows_of_state)
    assert str(rows_of_model) == str(rows_of_state)
    assert [row.name for row in rows_of_model] == ["stem.1", "blocks.0.1", "blocks.0.4"]
    row, layer = rows_of_model[1], model.blocks[0][1]
    assert (row.channels, row.batches) == (4, 1234)
    assert row.mean_mean == pytest.approx(float(layer.running_mean.mean()), rel=1e-5)
    assert row.mean_std == pytest.approx(float(layer.running_mean.std(correction=0)), rel=1e-5)
    assert row.var_mean == pytest.approx(float(layer.running_var.mean()), rel=1e-5)
    assert row.var_std == pytest.approx(float(layer.running_var.std(correction=0)), rel=1e-5)
    assert "1,234" in str(rows_of_model)


def test_summary_of_layers_of_all_kinds():
    without = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3), batchnormify(nn.BatchNorm2d(2)), without, nn.GroupNorm(1, 2))
    assert [row.name for row in bn_summary(model)] == ["0", "1"]
    assert [row.name for row in bn_summary(model.state_dict())] == ["0", "1"]
    assert [row.name for row in bn_summary(nn.BatchNorm2d(3))] == [""]
    assert len(bn_summary(nn.Linear(2, 2))) == 0
    assert isinstance(str(bn_summary({})), str)


def test_summary_of_a_model_in_another_form():
    model = residual().eval()
    x = torch.randn(2, 3, 8, 8)
    expected = str(bn_summary(model))
    exported = torch.export.export(model, (x,))
    assert str(bn_summary(exported)) == expected
    assert str(bn_summary(exported.module())) == expected
    assert str(bn_summary(torch.fx.symbolic_trace(model))) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert str(bn_summary(torch.jit.script(model))) == expected


def test_summary_of_a_layer_of_another_class():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.full((4,), 2.0))
            self.register_parameter("running_var", nn.Parameter(torch.full((4,), 3.0), requires_grad=False))

    model = nn.Sequential(Own(), nn.InstanceNorm1d(3, track_running_stats=True), nn.InstanceNorm1d(3))
    for summary in (bn_summary(model), bn_summary(model.state_dict())):
        assert [row.name for row in summary] == ["0", "1"]
        assert (summary[0].mean_mean, summary[0].var_mean, summary[0].batches) == (2, 3, None)


def test_summary_of_a_checkpoint_names_the_state_dicts_in_it():
    state = residual().state_dict()
    names = [row.name for row in bn_summary(state)]
    found = bn_summary({"state_dict": state, "epoch": 3, "ema": [{"shadow": residual().state_dict()}]})
    prefixed = [f"{place}.{name}" for place in ("state_dict", "ema.0.shadow") for name in names]
    assert [row.name for row in found] == prefixed
    assert [row.var_mean for row in found[: len(names)]] == [row.var_mean for row in bn_summary(state)]


def test_summary_of_statistics_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(3))
    for summary in (bn_summary(model), bn_summary(model.state_dict())):
        assert (summary[0].channels, summary[0].batches) == (3, None)
        assert math.isnan(summary[0].mean_mean)
        assert "nan" in str(summary)
    averaged = {**nn.BatchNorm1d(3).state_dict(), "num_batches_tracked": torch.tensor(math.nan)}
    assert bn_summary(averaged)[0].batches is None


@pytest.mark.parametrize(
    "thing", [None, "model.pt", [nn.BatchNorm1d(3)], nn.BatchNorm1d], ids=lambda x: type(x).__name__
)
def test_summary_of_anything_else_is_a_type_error(thing):
    with pytest.raises(TypeError, match="module or a state dict"):
        bn_summary(thing)
