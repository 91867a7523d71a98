"""Quantisation-aware training: observers are put back, and what is left is measured in evaluation."""

import pytest
import torch
import torch.ao.quantization as quantization
from recalibration_models import assert_same, each_procedure, everything, is_statistic, picture_batches, shown
from torch import nn

from runningbn import update_bn_stats


class Unlucky(Exception):
    pass


# ------------------------------------------------------------------------------------------ quantisation-aware training


def quantised(bits: int, slow: bool = False) -> nn.Module:
    """Two fused ConvBns of torch.ao with fake quantisation, whose observers also watch in evaluation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    observer = quantization.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    symmetric = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
    weight = quantization.FakeQuantize.with_args(observer=observer, quant_min=low, quant_max=high, **symmetric)
    activation = quantization.FakeQuantize.with_args(observer=observer, quant_min=0, quant_max=2**bits - 1)
    net.train().qconfig = quantization.QConfig(activation=activation, weight=weight)
    net = quantization.prepare_qat(quantization.fuse_modules_qat(net, [["0", "1", "2"], ["3", "4"]]))
    for module in (net[0], net[3]):
        module._enable_slow_path_for_better_numerical_stability = slow
        with torch.no_grad():
            module.bn.weight.uniform_(0.5, 2)
    for x in picture_batches(20):
        net(x)
    return net


each_width = pytest.mark.parametrize("bits", [8, 4])
with_observers = pytest.mark.parametrize("observers", [True, False], ids=["observers on", "observers off"])
# torch.ao is on its way to another package, which it says at every step.
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@deprecated
@each_width
@with_observers
@each_procedure
def test_observers_of_quantisation_are_put_back(bits, observers, normalize):
    model = quantised(bits)
    if not observers:
        model.apply(quantization.disable_observer)
    before, all_before = everything(model, is_statistic), everything(model)
    report = update_bn_stats(model, [2 * x + 1 for x in picture_batches()], normalize=normalize)
    assert_same(everything(model, is_statistic), before)
    assert len(report.layers) == 2
    report.undo()
    assert_same(everything(model), all_before)


@deprecated
@each_width
@each_procedure
@pytest.mark.parametrize("at", [0, 3])
def test_observers_of_quantisation_are_put_back_after_a_failure(bits, normalize, at):
    def loader():
        for i, x in enumerate(picture_batches()):
            if i == at:
                raise Unlucky
            yield x

    model = quantised(bits)
    before = everything(model)
    with pytest.raises(Unlucky):
        update_bn_stats(model, loader(), normalize=normalize)
    assert_same(everything(model), before)


@deprecated
@pytest.mark.parametrize("kind", ["per channel", "histogram", "never used"])
def test_observers_that_grow_are_put_back(kind):
    """From no element to one per channel, in place."""
    kinds = {
        "per channel": quantization.MovingAveragePerChannelMinMaxObserver,
        "histogram": quantization.HistogramObserver,
        "never used": quantization.PerChannelMinMaxObserver,
    }
    model = nn.Sequential(nn.BatchNorm2d(3), kinds[kind]())
    before = everything(model, is_statistic)
    update_bn_stats(model, picture_batches())
    assert_same(everything(model, is_statistic), before)


@deprecated
@each_width
@with_observers
def test_what_is_left_is_measured_with_the_new_statistics_in_the_buffers(bits, observers, caplog):
    model, batches = quantised(bits), [1.1 * x + 0.1 for x in picture_batches()]
    if not observers:
        model.apply(quantization.disable_observer)
    report = update_bn_stats(model, batches, normalize="population")
    left = {}
    for name, (mean, var) in shown(model, batches).items():
        layer = model.get_submodule(name)
        scale = var + layer.eps
        by_mean = (layer.running_mean - mean).abs() / scale.sqrt()
        left[name] = float(torch.maximum(by_mean, (layer.running_var - var).abs() / scale).max())
        assert report[name].residual == pytest.approx(left[name], rel=1e-3, abs=1e-6)
    worst = max(layer.residual for layer in report.layers)
    # What reads its own statistics, and rounds by them, has no exact ones.
    assert 1e-4 < left["0.bn"] < (0.05 if bits == 8 else 0.5)
    assert f"to within {worst:.1e}" in str(report)
    assert ("has not converged" in caplog.text) == (worst > 1e-4)


@deprecated
def test_statistics_by_which_a_module_scales_its_weights_are_exact_where_that_is_possible():
    """Unquantised, the fused module only multiplies and divides: population settles though it reads its statistics."""
    model, batches = quantised(8), picture_batches()
    model.apply(quantization.disable_fake_quant)
    report = update_bn_stats(model, batches, normalize="population")
    assert max(layer.residual for layer in report.layers) <= 1e-4
    for name, (mean, var) in shown(model, batches).items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-4, atol=0)
