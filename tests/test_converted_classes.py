"""A converted layer is an instance of the class that it had, for freezing loops, optimizers' filters and pickles."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from cases import noise
from models import PLAIN, BatchNormAct2d, each_of_ours, pretrained, small_net
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import Tensor, nn

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, batchnormify, center_weights, get_bn_modules
from runningbn.conversion.classes import NormAct, RunningBatchNorm2d, RunningBatchNormAct
from runningbn.layers.precise import PreciseBatchNorm


class Tagged(nn.BatchNorm2d):
    """A subclass of torch's layer with a method, and a check, of its own."""

    def tag(self) -> str:
        return "mine"

    def _check_input_dim(self, input: Tensor) -> None:
        pass


CLASSES = (*PLAIN, nn.SyncBatchNorm, Tagged, BatchNormAct2d)
SHAPES = {nn.BatchNorm1d: (4, 3), nn.BatchNorm3d: (4, 3, 2, 2, 2)}
OURS = {"running": RunningBatchNorm, "precise": PreciseBatchNorm}
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def batch(cls: type[nn.Module], seed: int = 0) -> Tensor:
    return noise(SHAPES.get(cls, (4, 3, 2, 2)), seed)


@each_class
@each_of_ours
def test_it_is_an_instance_of_what_it_was_and_of_ours(cls, to):
    layer = batchnormify(cls(3), to)
    assert isinstance(layer, cls) or cls is nn.SyncBatchNorm  # which DDP refuses on CPUs
    assert isinstance(layer, OURS[to])
    assert type(layer) is not cls


@each_class
@each_of_ours
def test_its_name_says_both(cls, to):
    name = {"BatchNorm1d": "BatchNorm1d"}.get(cls.__name__, cls.__name__)
    assert repr(batchnormify(cls(3), to)).startswith(f"{to.capitalize()}{name}(")


@each_class
@each_of_ours
@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_trains_as_the_original_and_finds_its_way_back(cls, to, copied):
    layer = train(batchnormify(pretrained(cls(3)), to), [batch(cls)])
    other = copied(layer)
    assert type(other) is type(layer)
    assert_identical(training_step(other, batch(cls, 1)), training_step(layer, batch(cls, 1)))
    assert_identical(buffers_of(other), buffers_of(layer))
    assert type(batchnormify(other, "torch")) is cls


@each_class
@each_of_ours
def test_from_one_of_ours_to_the_other_it_stays_an_instance(cls, to):
    layer = batchnormify(cls(3), to)
    batchnormify(layer, "precise" if to == "running" else "running")
    assert isinstance(layer, cls) or cls is nn.SyncBatchNorm
    assert not isinstance(layer, OURS[to])
    assert type(batchnormify(layer, "torch")) is cls


@each_of_ours
def test_what_a_subclass_adds_stays(to):
    layer = batchnormify(Tagged(3), to)
    assert layer.tag() == "mine"
    assert layer(noise((4, 3, 2, 2, 2), 0)).shape == (4, 3, 2, 2, 2)  # its check takes any number of dimensions


@pytest.mark.slow
@each_of_ours
def test_a_pickle_loads_in_a_process_that_has_converted_nothing(to):
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    dumped = pickle.dumps(batchnormify(nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3)), to))
    found = subprocess.run([sys.executable, "-c", code], input=dumped, capture_output=True, check=True)
    assert f"{to.capitalize()}BatchNorm2d(" in found.stdout.decode()


def test_layers_that_are_constructed_are_as_they_were():
    assert type(RunningBatchNorm(3)).__mro__[1].__name__ == "Layer"
    assert not isinstance(RunningBatchNorm(3), PLAIN)
    assert type(PreciseBatchNorm2d(3)) is PreciseBatchNorm2d


# ----------------------------------------------------------------------------------------------------- who asks for it


def freeze_by_hand(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def freeze_as_fastai(model: nn.Module) -> None:
    """BnFreeze: evaluation where the parameters of a layer are frozen."""
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            layer.requires_grad_(False)
            layer.eval()


def freeze_as_lightning(model: nn.Module) -> None:
    pytest.importorskip("lightning").pytorch.callbacks.BaseFinetuning.freeze(model, train_bn=False)


@pytest.mark.parametrize("freeze", [freeze_by_hand, freeze_as_fastai, freeze_as_lightning])
@each_of_ours
def test_frozen_layers_keep_their_statistics(freeze, to):
    model = batchnormify(small_net(), to).train()
    freeze(model)
    before = buffers_of(model)
    model(noise((4, 3, 3, 3), 0))
    assert_identical(buffers_of(model), before)


class FrozenBatchNorm2d(nn.Module):
    """What timm.layers.FrozenBatchNorm2d does: an affine map by constants."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        self.register_buffer("scale", scale.detach())
        self.register_buffer("offset", (layer.bias - layer.running_mean * scale).detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None] + self.offset[:, None, None]


def freeze_as_timm(module: nn.Module) -> nn.Module:
    """The rule of timm.layers.freeze_batch_norm_2d; norm-act layers come first, for they are BatchNorm2d, too."""
    if isinstance(module, BatchNormAct2d):
        return nn.Sequential(FrozenBatchNorm2d(module), module.drop, module.act)
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return FrozenBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, freeze_as_timm(child))
    return module


@each_of_ours
def test_timm_freezes_layers_with_and_without_an_activation(to):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    batchnormify(pretrained(model), to)
    x = noise((4, 3, 3, 3), 0)
    expected = evaluate(model, x)
    frozen = freeze_as_timm(model)
    assert not get_bn_modules(frozen)
    torch.testing.assert_close(evaluate(frozen, x), expected, rtol=1e-4, atol=1e-4)


@each_of_ours
def test_timm_itself_freezes_them(to):
    layers = pytest.importorskip("timm.layers")
    model = pretrained(nn.Sequential(nn.BatchNorm2d(3), layers.BatchNormAct2d(3)))
    x = noise((4, 3, 3, 3), 0)
    expected = evaluate(batchnormify(model, to), x)
    frozen = layers.freeze_batch_norm_2d(model)
    assert [type(layer).__name__ for layer in frozen] == ["FrozenBatchNorm2d", "FrozenBatchNormAct2d"]
    torch.testing.assert_close(evaluate(frozen, x), expected, rtol=1e-4, atol=1e-4)


@each_of_ours
def test_a_filter_of_weight_decay_finds_them(to):
    model = batchnormify(small_net(), to)
    found = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
    assert found == {id(p) for i in (1, 3) for p in model[i].parameters()}


@each_of_ours
def test_convolution_and_layer_fuse_as_torch_does(to):
    conv, layer = small_net()[:2].eval()
    x = noise((4, 3, 3, 3), 0)
    expected = layer(conv(x))
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv, batchnormify(layer, to))
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


@each_of_ours
def test_torch_replaces_them_by_synchronised_layers(to):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(batchnormify(small_net(), to))
    assert [type(model[i]) for i in (1, 3)] == [nn.SyncBatchNorm, nn.SyncBatchNorm]


@each_of_ours
def test_centred_weights_find_the_layers(to):
    model = batchnormify(small_net(), to)
    centered = center_weights(model, noise((4, 3, 3, 3), 0))
    assert type(centered[0]).__name__ == "CenteredConv2d"


class Registered(nn.BatchNorm2d):
    """Takes no subclasses, as a registry that knows their names already."""

    def __init_subclass__(cls) -> None:
        raise KeyError(cls.__name__)


@each_of_ours
def test_a_layer_of_a_class_that_takes_no_subclasses_is_converted_to_ours(to):
    model = batchnormify(nn.Sequential(Registered(3), nn.BatchNorm2d(3)), to)
    assert type(model[0]) is type(model[1])
    assert type(batchnormify(model, "torch")[0]) is Registered


# ----------------------------------------------------------------------------------------------------- older pickles


def as_version_0_1_0(layer: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A layer as that version pickled it: of another class, and settled by the largest float32."""
    layer.__class__ = cls
    layer.samples.fill_(torch.finfo(torch.float32).max)
    return layer


@pytest.mark.parametrize(
    ("cls", "older"), [(nn.BatchNorm2d, RunningBatchNorm), (BatchNormAct2d, RunningBatchNormAct)], ids=["plain", "act"]
)
def test_a_pickled_layer_of_version_0_1_0_loads_and_is_brought_up_to_date(cls, older):
    expected = batchnormify(pretrained(cls(3)))
    layer = as_version_0_1_0(copy.deepcopy(expected), older)
    file = io.BytesIO(pickle.dumps(layer))
    loaded = pickle.load(file)
    assert type(loaded) is older
    assert_identical(buffers_of(loaded), buffers_of(expected))
    batchnormify(loaded)
    assert type(loaded) is type(expected)
    assert isinstance(loaded, NormAct) == (cls is BatchNormAct2d)
    for seed in range(2):
        assert_identical(training_step(loaded, batch(cls, seed)), training_step(expected, batch(cls, seed)))
    assert type(batchnormify(loaded, "torch")) is cls


# ------------------------------------------------------------------------------------------------- SyncBatchNorm, back


def synchronised() -> nn.Module:
    return pretrained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Flatten(), nn.SyncBatchNorm(36)))


def test_sync_batch_norm_becomes_the_batch_norm_of_its_input():
    model = synchronised()
    x, parameters = noise((4, 3, 3, 3), 0), list(model.parameters())
    expected, state = evaluate(model, x), model.state_dict()
    batchnormify(model, "torch")
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in model)
    assert_identical(dict(model.state_dict()), dict(state))
    model = pickle.loads(pickle.dumps(batchnormify(model, "torch")))
    assert torch.equal(evaluate(model, x), expected)
    assert [type(model[i]) for i in (1, 3)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert len(parameters) == len(list(model.parameters()))


def test_where_selects_among_synchronised_layers(caplog):
    model = synchronised()
    with caplog.at_level("INFO", logger="runningbn"):
        batchnormify(model, "torch", where=lambda name, _: name == "3")
    assert [isinstance(model[i], nn.SyncBatchNorm) for i in (1, 3)] == [True, False]
    assert caplog.messages == ["batchnormify: 1 layer converted to torch"]


def test_before_its_first_input_it_is_not_converted_to_ours(caplog):
    model = batchnormify(batchnormify(synchronised(), "torch"))
    assert not any(isinstance(layer, RunningBatchNorm) for layer in model)
    assert "1, 3 (its input dimensions are not known" in caplog.text
    model(noise((4, 3, 3, 3), 0))
    assert type(batchnormify(model)[1]) is RunningBatchNorm2d


def test_an_input_that_no_batch_norm_takes_is_refused():
    layer = batchnormify(nn.SyncBatchNorm(3), "torch")
    with pytest.raises(ValueError, match="expected an input of 2 to 5 dimensions"):
        layer(torch.zeros(3))
