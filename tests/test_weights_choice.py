"""Which layers center_weights finds to feed a normalisation layer, and what it reports."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import images
from test_weights import Replicating, small_net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, center_weights
from runningbn.weights.layers import CENTERED, CenteredWeights


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def conv(inputs: int = 3, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, 4, 3, padding=1, **kwargs)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def centred(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, CenteredWeights)}


# ------------------------------------------------------------------------------------------------------ what feeds what

# The function of the net, and its layers.
FEEDING = {
    "directly": (lambda net, x: net.norm(net.conv(x)), {}),
    "by keyword": (lambda net, x: net.norm(input=net.conv(input=x)), {}),
    "through Identity and Dropout": (
        lambda net, x: net.norm(net.between(net.conv(x))),
        {"between": nn.Sequential(nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.Dropout(inplace=True))},
    ),
    "with functions that return the tensor itself": (
        lambda net, x: net.norm(net.conv(x).contiguous().to(x.dtype).float()), {}
    ),
    "with its shape looked at": (
        lambda net, x: net.norm(y := net.conv(x)) * (y.shape[0] + y.dim() + y.size(1) + y.numel()), {}
    ),
    "with the normalised tensor added to the input": (lambda net, x: net.norm(net.conv(x)) + x.sum(), {}),
    "in two normalisation layers": (
        lambda net, x: net.norm(y := net.conv(x)) + net.other(y), {"other": nn.InstanceNorm2d(4)}
    ),
    "called twice": (lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv(-x)), {}),
    "called twice, before two layers": (
        lambda net, x: net.norm(net.conv(x)) + net.other(net.conv(-x)), {"other": nn.GroupNorm(2, 4)}
    ),
    "without __call__": (lambda net, x: net.norm.forward(net.conv.forward(x)), {}),
}  # fmt: skip


@pytest.mark.parametrize(("function", "layers"), FEEDING.values(), ids=FEEDING)
def test_layer_that_feeds_normalisation_layers_alone_is_centred(function, layers):
    model = Net(function, conv=conv(), norm=norm(), **layers)
    assert centred(center_weights(model, images())) == {"conv"}


KINDS = {
    "BatchNorm2d": norm,
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "RunningBatchNorm": lambda: RunningBatchNorm(4),
    "PreciseBatchNorm2d": lambda: PreciseBatchNorm2d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_normalisation_layers_of_these_kinds_count(make):
    assert centred(center_weights(nn.Sequential(conv(), make()), images())) == {"0"}


def test_layer_norm_does_not_count(caplog):
    center_weights(nn.Sequential(conv(), nn.LayerNorm([3, 3])), images())
    assert "0 (its output goes to native_layer_norm)" in caplog.text


# The function, its layers, and the reason that is given for conv.
NOT_FEEDING = {
    "activation": (lambda net, x: net.norm(net.conv(x).relu()), {}, "its output goes to relu"),
    "in-place activation": (
        lambda net, x: net.norm(F.relu(net.conv(x), inplace=True)), {}, "its output goes to relu, too"
    ),
    "residual stream": (lambda net, x: net.norm(net.conv(x) + x.mean()), {}, "its output goes to add"),
    "skip connection": (lambda net, x: net.norm(y := net.conv(x)) + y, {}, "its output goes to add, too"),
    "concatenated": (lambda net, x: torch.cat([net.norm(y := net.conv(x)), y]), {}, "its output goes to cat, too"),
    "given back": (lambda net, x: {"out": [net.norm(y := net.conv(x)), y]}, {}, "its output goes to the caller, too"),
    "kept": (
        lambda net, x: setattr(net, "kept", net.conv(x)) or net.norm(net.kept), {}, "its output goes to the caller, too"
    ),
    "a view of it": (lambda net, x: net.norm(net.conv(x).flatten(2)[..., None]), {}, "its output goes to view"),
    "dropped": (lambda net, x: (net.norm(net.stem(x)), net.conv(x))[0], {}, "its output goes to nothing"),
    "dropped once": (
        lambda net, x: (net.norm(net.conv(x)), net.conv(x))[0], {}, "its output goes to nothing, too"
    ),
    "activation in its second call": (
        lambda net, x: net.norm(net.conv(x)) + net.conv(x).relu(), {}, "its output goes to relu, too"
    ),
    "not called": (lambda net, x: net.norm(net.stem(x)), {}, "it was not called"),
    "weight used elsewhere": (
        lambda net, x: F.conv_transpose2d(net.norm(net.conv(x)), net.conv.weight), {},
        "its weight is also used by convolution",
    ),
    "a number read from it": (
        lambda net, x: net.norm(y := net.conv(x)) * y[0, 0, 0, 0].item(), {}, "its output goes to select, too"
    ),
    "normalised by a function": (
        lambda net, x: F.batch_norm(net.conv(x), torch.zeros(4), torch.ones(4)), {},
        "its output goes to native_batch_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "layers", "reason"), NOT_FEEDING.values(), ids=NOT_FEEDING)
def test_layer_whose_output_goes_elsewhere_is_left_alone_and_the_reason_given(function, layers, reason, caplog):
    caplog.set_level(logging.INFO, "runningbn")
    model = Net(function, stem=conv(), conv=conv(), norm=norm(), **layers)
    assert "conv" not in centred(center_weights(model, images()))
    assert f"conv ({reason})" in caplog.text or f"stem, conv ({reason})" in caplog.text


def test_blocks_of_pre_activation_are_centred_inside_and_not_where_they_are_added():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.conv1, self.norm2, self.conv2 = norm(), conv(4), norm(), conv(4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())

    model = nn.Sequential(conv(), Block(), Block(), norm())
    assert centred(center_weights(model, images())) == {"1.conv1", "2.conv1"}


def test_blocks_with_projections_are_centred_everywhere():
    class Block(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(inputs), norm(), nn.ReLU(inplace=True), conv(4), norm())
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4, 1), norm())

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) + self.shortcut(x), inplace=True)

    model = nn.Sequential(Block(3), Block(4), nn.Flatten(), nn.Linear(36, 2))
    found = centred(center_weights(model, images()))
    assert found == {f"{i}.{name}" for i in (0, 1) for name in ("body.0", "body.3", "shortcut.0")}


# ----------------------------------------------------------------------------------------------- what cannot be centred


class Subclass(nn.Conv2d):
    """With a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


class Keyed(nn.Conv2d):
    """Its subclasses have to give a key."""

    def __init_subclass__(cls, key: str) -> None:
        cls.key = key


class WithKey(Keyed, key="mine"):
    pass


class Fixed(nn.Conv2d):
    """Its class cannot be changed."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "__class__":
            raise TypeError("it is fixed")
        super().__setattr__(name, value)


class Doubled(nn.Conv2d):
    """Its weight is computed from the parameter."""

    def __getattr__(self, name: str) -> object:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class WithOffset(nn.Conv2d):
    """With an attribute of the name of the buffer."""

    weight_offset = 0.5


def with_own_forward() -> nn.Module:
    layer = conv()
    layer.forward = lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)
    return layer


def with_hook(register: str) -> nn.Module:
    layer = conv()
    getattr(layer, register)(lambda *arguments: None)
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(conv(), "weight", amount=0.5)


BUILT_OTHERWISE = {
    "subclass": (lambda: Subclass(3, 4, 3), "Subclass is a Conv2d with a forward of its own"),
    "class that cannot be derived from": (
        lambda: WithKey(3, 4, 3),
        "no class can be derived from WithKey: Keyed.__init_subclass__() missing 1 required positional argument: 'key'",
    ),
    "class that cannot be changed": (lambda: Fixed(3, 4, 3), "its class cannot be changed: it is fixed"),
    "computed weight": (lambda: Doubled(3, 4, 3), "its weight is not the parameter of that name"),
    "attribute of the name": (lambda: WithOffset(3, 4, 3), "it has an attribute weight_offset"),
    "own forward": (with_own_forward, "it has a custom forward"),
    "forward hook": (lambda: with_hook("register_forward_hook"), "it has hooks"),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), "it has hooks"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(conv()), "it is parametrised"),
    "weight_norm": (lambda: parametrizations.weight_norm(conv()), "it is parametrised"),
    "spectral_norm with hooks": (lambda: nn.utils.spectral_norm(conv()), "it has hooks"),
    "parametrised bias": (
        lambda: parametrize.register_parametrization(conv(), "bias", nn.ReLU()),
        "it is parametrised",
    ),
    "pruned": (pruned, "it has hooks"),
}


@pytest.mark.parametrize(("make", "reason"), BUILT_OTHERWISE.values(), ids=BUILT_OTHERWISE)
def test_layer_that_is_built_otherwise_is_left_alone_with_a_warning(make, reason, caplog):
    model = nn.Sequential(conv(), norm(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), make(), norm())
    cls = type(model[4])
    assert centred(center_weights(model, images())) == {"0", "2"}
    assert type(model[4]) is cls
    assert f"2 layers centred, 1 left alone: 4 ({reason})" in caplog.messages[-1]
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_centred_layer_of_a_subclass_is_still_one():
    model = nn.Sequential(Replicating(3, 4), norm())
    center_weights(model, images())
    assert isinstance(model[0], Replicating)
    assert isinstance(model[0], CENTERED[nn.Conv2d])
    assert (type(model[0]).__name__, model[0].margin) == ("CenteredReplicating", 1)
    assert type(center_weights(nn.Sequential(Replicating(3, 4), norm()), images())[0]) is type(model[0])


def test_tied_weights_are_left_alone(caplog):
    model = Net(lambda net, x: net.norm(net.a(x)) + net.norm(net.b(-x)), a=conv(), b=conv(), norm=norm())
    model.b.weight = model.a.weight
    assert centred(center_weights(model, images())) == set()
    assert "a, b (its weight is shared with another layer)" in caplog.text


def test_layer_under_two_names_is_one_layer():
    layer = conv()
    model = Net(lambda net, x: net.norm(net.again(x)), conv=layer, again=layer, norm=norm())
    center_weights(model, images())
    assert isinstance(model.conv, CenteredWeights)
    assert model.again is model.conv


SHAPES = {
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), "it is depthwise"),
    "depthwise with a multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4), "it is depthwise"),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), "it is depthwise"),
    "of one input and one position": (lambda: nn.Conv2d(1, 4, 1), "its filters have a single weight"),
}


@pytest.mark.parametrize(("make", "reason"), SHAPES.values(), ids=SHAPES)
def test_filters_that_see_too_little_are_left_alone(make, reason, caplog):
    caplog.set_level(logging.INFO, "runningbn")
    layer = make()
    model = nn.Sequential(conv(), norm(), nn.Conv2d(4, layer.in_channels, 1), layer, nn.BatchNorm2d(layer.out_channels))
    assert centred(center_weights(model, images())) == {"0"}
    assert f"3 ({reason})" in caplog.messages[-1]
    assert caplog.records[-1].levelno == logging.INFO


@pytest.mark.parametrize("name", ["depthwise", "depthwise with a multiplier", "depthwise transposed"])
def test_depthwise_convolutions_are_centred_if_told_so(name):
    layer = SHAPES[name][0]()
    model = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))
    center_weights(model, torch.randn(2, 4, 5, 5), depthwise=True)
    means = layer.centered_weight().mean((-2, -1))
    torch.testing.assert_close(means, torch.zeros_like(means), rtol=0, atol=1e-7)


def test_filters_with_a_single_weight_are_never_centred():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), norm())
    assert centred(center_weights(model, torch.randn(2, 4, 5, 5), depthwise=True)) == set()


def test_convolution_of_one_channel_is_not_depthwise():
    assert centred(center_weights(nn.Sequential(conv(1), norm()), torch.randn(2, 1, 5, 5))) == {"0"}


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()], ids=["convolution", "normalisation"])
def test_lazy_layers_are_an_error_that_leaves_them_lazy(lazy):
    model = nn.Sequential(conv(), lazy)
    before = type(lazy)
    with pytest.raises(RuntimeError, match=r"1\.weight is not initialised yet; run a batch through the model first"):
        center_weights(model, images())
    assert type(lazy) is before
    assert centred(model) == set()


# ---------------------------------------------------------------------------------------------------------- the report


def test_report_is_a_line_that_names_all_layers(caplog):
    caplog.set_level(logging.INFO, "runningbn")
    center_weights(nn.Sequential(small_net(), nn.Flatten(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)), images(2)
                   .repeat(1, 1, 2, 2))  # fmt: skip
    assert caplog.messages == [
        "center_weights: 2 layers centred, 2 left alone: 2 (its output goes to relu); 4 (its output goes to the caller)"
    ]
    assert caplog.records[0].levelno == logging.INFO


def test_report_is_a_warning_if_nothing_is_centred(caplog):
    center_weights(nn.Sequential(conv(), nn.ReLU()), images())
    assert caplog.messages == ["center_weights: 0 layers centred, 1 left alone: 0 (its output goes to relu)"]


def test_report_names_the_model_itself(caplog):
    center_weights(conv(), images())
    assert caplog.messages == [
        "center_weights: 0 layers centred, 1 left alone: the model itself (its output goes to the caller)"
    ]


# ------------------------------------------------------------------------------------------------------------ batches

BATCHES = {
    "tensor": (images(), None),
    "tuple": ((images(), torch.zeros(6)), None),
    "list": ([images(), torch.zeros(6)], None),
    "mapping": ({"x": images()}, None),
    "forward": ({"images": images(), "labels": torch.zeros(6)}, lambda model, batch: model(batch["images"])),
}


@pytest.mark.parametrize(("batch", "forward"), BATCHES.values(), ids=BATCHES)
def test_batches_are_those_of_update_bn_stats(batch, forward):
    model = Net(lambda net, x: net.norm(net.conv(x)), conv=conv(), norm=norm())
    assert centred(center_weights(model, batch, forward=forward)) == {"conv"}


def test_batch_of_one_will_do():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert centred(center_weights(model.train(), torch.randn(1, 3))) == {"0"}


def test_where_is_asked_about_every_name_of_layers_that_can_be_centred():
    layer, asked = conv(), []
    model = Net(
        lambda net, x: net.two(net.one(net.a(x))), a=layer, b=layer, one=norm(), two=nn.Sequential(conv(4), norm())
    )
    center_weights(model, images(), where=lambda name, module: asked.append(name) or name == "b")
    assert centred(model) == {"a"}
    assert asked == ["a", "b", "two.0"]


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match="expected an example batch or None, got True"):
        center_weights(small_net(), True)
    with pytest.raises(TypeError, match="forward= is for an example batch"):
        center_weights(small_net(), forward=lambda model, batch: None)
