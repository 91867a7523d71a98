"""What torchvision and timm themselves do with BatchNorm: act, freeze, synchronise, average and quantise."""

import copy
import functools

import pytest
import torch
from cases import noise
from models import each_of_ours, pretrained
from steps import assert_identical, buffers_of, evaluate, training_step
from torch import Tensor, nn

from runningbn import RunningBatchNorm, batchnormify, get_bn_modules, update_bn_stats

IMAGES = (4, 3, 5, 5)


@pytest.fixture
def layers():
    return pytest.importorskip("timm.layers")


def net(layers) -> nn.Sequential:
    """One plain layer, and timm's with an activation, without one, and with a drop."""
    torch.manual_seed(0)
    norm_acts = (
        layers.BatchNormAct2d(4, act_layer="silu"),
        layers.BatchNormAct2d(4, apply_act=False),
        layers.BatchNormAct2d(4, drop_layer=functools.partial(nn.Dropout2d, p=0.5)),
    )
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)]
    for norm_act in norm_acts:
        body += [nn.Conv2d(4, 4, 3, padding=1), norm_act]
    return pretrained(nn.Sequential(*body)).train()


def activations(model: nn.Module) -> list[str]:
    """The drop and activation of each norm-act layer."""
    return [f"{m.drop} {m.act}" for m in model.modules() if hasattr(m, "act")]


# ----------------------------------------------------------------------------------------------- timm's norm-act layers


@each_of_ours
def test_norm_act_layers_keep_activation_and_drop(layers, to):
    model, x = net(layers), noise(IMAGES, 0)
    expected, acts = evaluate(model, x), activations(model)
    batchnormify(model, to)
    assert activations(model) == acts
    assert_identical({"y": evaluate(model, x)}, {"y": expected})
    assert all(isinstance(m, layers.BatchNormAct2d) for m in model if hasattr(m, "act"))
    model(x)
    expected = evaluate(model, x)
    assert_identical({"y": evaluate(batchnormify(model, "torch"), x)}, {"y": expected})
    assert [type(m).__name__ for m in model[3::2]] == ["BatchNormAct2d"] * 3


def test_precise_norm_act_layers_train_as_timms(layers):
    plain, x = net(layers), noise(IMAGES, 0)
    model = batchnormify(copy.deepcopy(plain), "precise")
    found = {}
    for name, m in (("plain", plain), ("ours", model)):
        torch.manual_seed(1)  # of the drop
        found[name] = training_step(m, x)
    for name, value in found["plain"].items():
        if name == "y" or name.startswith("d"):
            torch.testing.assert_close(found["ours"][name], value, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- frozen layers


@each_of_ours
def test_layers_can_be_frozen_unfrozen_and_converted_again(layers, to):
    model, x = batchnormify(net(layers), to), noise(IMAGES, 0)
    model(x)
    expected, acts = evaluate(model, x), activations(model)
    frozen = layers.freeze_batch_norm_2d(model)
    assert not get_bn_modules(frozen)
    torch.testing.assert_close(evaluate(frozen, x), expected, rtol=1e-4, atol=1e-4)
    model = batchnormify(layers.unfreeze_batch_norm_2d(frozen), to)
    assert len(get_bn_modules(model)) == 4
    assert activations(model) == acts
    torch.testing.assert_close(evaluate(model, x), expected, rtol=1e-4, atol=1e-4)


@each_of_ours
@pytest.mark.parametrize(
    ("package", "name"), [("timm.layers", "FrozenBatchNormAct2d"), ("torchvision.ops", "FrozenBatchNorm2d")]
)
def test_frozen_layers_are_left_alone(package, name, to, caplog):
    frozen = getattr(pytest.importorskip(package), name)(3)
    model, x = pretrained(nn.Sequential(frozen, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), noise(IMAGES, 0)
    constants, expected = copy.deepcopy(model[0].state_dict()), evaluate(model, x)
    with caplog.at_level("INFO", logger="runningbn"):
        batchnormify(model, to)
    assert "1 layer converted" in caplog.text
    assert "1 left alone: 0 (it is frozen" in caplog.text
    assert torch.equal(evaluate(model, x), expected)
    report = update_bn_stats(model, [x, x + 1])
    assert [layer.name for layer in report.layers] == ["2"]
    assert_identical(dict(model[0].state_dict()), dict(constants))


# -------------------------------------------------------------------------------------------------------- SyncBatchNorm


@each_of_ours
def test_what_timm_synchronises_becomes_ours_with_sync(layers, to):
    model, x = net(layers), noise(IMAGES, 0)
    expected, acts = evaluate(model, x), activations(model)
    model = batchnormify(layers.convert_sync_batchnorm(model), to)
    norms = get_bn_modules(model)
    assert len(norms) == 4
    assert all(norm.sync for norm in norms)
    assert activations(model) == acts
    assert_identical({"y": evaluate(model, x)}, {"y": expected})
    model(x)
    expected = evaluate(model, x)
    other = "precise" if to == "running" else "running"
    for target in ("torch", to, other, "torch"):
        assert_identical({"y": evaluate(batchnormify(model, target), x)}, {"y": expected})
        assert activations(model) == acts


def test_synchronised_norm_act_layers_drop_once(layers):
    """In training, too: half of the channels stay, and a second drop would leave a quarter of them, times four."""
    plain = layers.BatchNormAct2d(64, apply_act=False, drop_layer=functools.partial(nn.Dropout2d, p=0.5))
    x = noise((32, 64, 2, 2), 0)
    expected = batchnormify(copy.deepcopy(plain), "precise")
    model = batchnormify(layers.convert_sync_batchnorm(nn.Sequential(plain)), "precise")
    found = []
    for m in (expected, model):
        torch.manual_seed(0)
        found.append(m(x))
    assert 0.4 < (found[0] == 0).float().mean() < 0.6
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@each_of_ours
def test_timm_replaces_ours_by_synchronised_layers_that_can_be_converted_again(layers, to):
    model, x = batchnormify(net(layers), to), noise(IMAGES, 0)
    model(x)
    expected, acts = evaluate(model, x), activations(model)
    model = layers.convert_sync_batchnorm(model)
    assert [type(m).__name__ for m in model[1::2]] == ["SyncBatchNorm", *["SyncBatchNormAct"] * 3]
    assert activations(model) == acts
    if to == "running":  # whose momentum, a rule, is none for torch's layer
        with pytest.raises(TypeError, match="Horizon"):
            evaluate(model, x)
    else:
        torch.testing.assert_close(evaluate(model, x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluate(batchnormify(model, to), x), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- averages


@each_of_ours
def test_average_of_timm_evaluates_by_averaged_statistics(layers, to):
    utils = pytest.importorskip("timm.utils")
    model, x = batchnormify(net(layers), to), noise(IMAGES, 0)
    ema = utils.ModelEmaV3(model, decay=0.75)
    before = buffers_of(model)
    model(x)
    ema.update(model)
    after, averaged = buffers_of(model), buffers_of(ema.module)
    for name, buffer in averaged.items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(buffer, torch.lerp(before[name], after[name], 0.25), rtol=1e-5, atol=1e-6)
    assert evaluate(ema.module, x).isfinite().all()
    # Recalibrated, it has the statistics of a plain model with these weights.
    plain, batches = batchnormify(copy.deepcopy(ema.module), "torch"), [noise(IMAGES, i) for i in range(3)]
    update_bn_stats(ema.module, batches)
    update_bn_stats(plain, batches)
    torch.testing.assert_close(evaluate(ema.module, x), evaluate(plain, x), rtol=0.05, atol=0.05)
    for found, norm in zip(get_bn_modules(ema.module), get_bn_modules(plain), strict=True):
        torch.testing.assert_close(found.running_mean, norm.running_mean, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------- our layers as norm_layer


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision_builds_with_running_layers(name):
    models = pytest.importorskip("torchvision.models")
    if name == "densenet121":  # takes no norm_layer
        model = batchnormify(models.densenet121(weights=None, num_classes=3))
    else:
        model = getattr(models, name)(weights=None, num_classes=3, norm_layer=RunningBatchNorm)
    norms = get_bn_modules(model)
    assert norms
    assert all(isinstance(norm, RunningBatchNorm) for norm in norms)
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert evaluate(model, torch.randn(2, 3, 64, 64)).isfinite().all()


# --------------------------------------------------------------------------------------------------------- quantisation


def quantisable(name: str) -> nn.Module:
    """A model of torchvision prepared for quantisation-aware training: fused, with observers."""
    from torch.ao import quantization

    models = pytest.importorskip("torchvision.models.quantization")
    torch.manual_seed(0)
    model = pretrained(getattr(models, name)(weights=None, num_classes=3, quantize=False)).train()
    model.fuse_model(is_qat=True)
    model.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
    return quantization.prepare_qat(model, inplace=True)


def small_images(seed: int) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large"])
@each_of_ours
def test_quantisable_models_of_torchvision(name, to):
    from torch.ao import quantization

    model = quantisable(name)
    fused = len(get_bn_modules(model))
    assert fused > 0
    model(small_images(0))  # the observers see a batch
    model.apply(quantization.disable_observer)
    expected = evaluate(model, small_images(1))
    model.train()
    batchnormify(model, to)
    assert sum(type(m).__name__.startswith(to.capitalize()) for m in model.modules()) == fused
    assert torch.equal(evaluate(model, small_images(1)), expected)
    model.train()
    model(small_images(2)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert len(update_bn_stats(model, [small_images(3), small_images(4)]).layers) == fused
    expected = evaluate(model, small_images(1))
    assert torch.equal(evaluate(batchnormify(model, "torch"), small_images(1)), expected)
    # What is quantised in integers computes about that.
    integers = quantization.convert(model.eval())
    assert not get_bn_modules(integers)
    found = integers(small_images(1))
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()
