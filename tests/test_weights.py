"""Centred weights: the formula, its gradients, the offset, and what stays as it was.

In files of their own: which layers are centred (test_weights_choice.py) and that finding it out leaves no trace
(test_weights_trace.py), the first forward pass that decides it (test_weights_first_pass.py), state dicts and the way
back (test_weights_state.py), compilers, copies (test_weights_elsewhere.py) and processes (test_weights_ranks.py).
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_near, noise
from models import pretrained
from steps import assert_identical, evaluate, training_step
from torch import Tensor, nn

from runningbn import RunningBatchNorm, batchnormify, center_weights
from runningbn.weights.layers import CENTERED, CenteredWeights

# --------------------------------------------------------------------------------------------------------- the layers


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer with O filters, to stand before a normalisation layer, and the shape of its input without the batch."""

    id: str
    constructor: Callable[..., nn.Module]
    arguments: tuple[int, ...]
    shape: tuple[int, ...]
    normalisation: Callable[..., nn.Module]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.constructor(*self.arguments, **self.kwargs, dtype=dtype)

    def model(self, fresh: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The layer and a normalisation layer, whose statistics are those of a new one, or others."""
        model = nn.Sequential(self.layer(dtype), self.normalisation(self.arguments[1], dtype=dtype))
        with torch.no_grad():
            model[0].weight.copy_(noise(model[0].weight.shape, seed) + 0.5)  # a mean that shows
        return model if fresh else pretrained(model, seed)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return noise((4, *self.shape), 0, dtype)


class Replicating(nn.Conv2d):
    """A subclass with another constructor and another padding, and torch's forward."""

    def __init__(self, inputs: int, filters: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(inputs, filters, 3, bias=False, dtype=dtype)
        self.margin = 1

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, [self.margin] * 4, "replicate"), weight, bias)


LAYERS = (
    LayerCase("linear", nn.Linear, (5, 6), (5,), nn.BatchNorm1d),
    LayerCase("linear-no-bias", nn.Linear, (5, 6), (5,), nn.BatchNorm1d, {"bias": False}),
    LayerCase("conv1d", nn.Conv1d, (3, 4, 3), (3, 6), nn.BatchNorm1d, {"padding": "same", "dilation": 2}),
    LayerCase("conv2d", nn.Conv2d, (3, 4, 3), (3, 5, 5), nn.BatchNorm2d, {"stride": 2}),
    LayerCase("conv2d-grouped", nn.Conv2d, (4, 6, 3), (4, 5, 5), nn.BatchNorm2d, {"groups": 2, "bias": False}),
    LayerCase("conv2d-subclass", Replicating, (3, 4), (3, 5, 5), nn.BatchNorm2d),
    LayerCase("conv3d", nn.Conv3d, (2, 3, 2), (2, 3, 3, 3), nn.BatchNorm3d),
    LayerCase("transposed1d", nn.ConvTranspose1d, (3, 4, 3), (3, 5), nn.BatchNorm1d, {"stride": 2}),
    LayerCase("transposed2d", nn.ConvTranspose2d, (3, 4, 3), (3, 4, 4), nn.BatchNorm2d, {"output_padding": 0}),
    LayerCase("transposed2d-grouped", nn.ConvTranspose2d, (4, 6, 2), (4, 3, 3), nn.BatchNorm2d, {"groups": 2}),
    LayerCase("transposed3d-grouped", nn.ConvTranspose3d, (6, 3, 2), (6, 2, 3, 2), nn.BatchNorm3d, {"groups": 3}),
)
each_layer = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)


def test_all_kinds_of_layers_are_in_the_table():
    assert {type(case.layer()) for case in LAYERS} == {*CENTERED, Replicating}


def small_net() -> nn.Sequential:
    """Two convolutions that feed normalisation layers, for images with 3 channels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
    )


# ---------------------------------------------------------------------------------------------------------- the formula


def filters(case: LayerCase) -> list[Tensor]:
    """For each output channel the mask of the weights that it depends on, by the derivative of the plain layer."""
    layer = case.layer()
    y = layer(case.input().abs() + 1).transpose(0, 1)
    masks = []
    for channel in y:
        (gradient,) = torch.autograd.grad(channel.sum(), layer.weight, retain_graph=True)
        masks.append(gradient != 0)
    return masks


def by_definition(case: LayerCase, weight: Tensor, offset: list[float]) -> Tensor:
    """v − mean(v) + offset, filter by filter, in float64."""
    out = weight.detach().double().clone()
    for mask, constant in zip(filters(case), offset):
        out[mask] += constant - out[mask].mean()
    return out


@each_layer
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "pretrained"])
def test_layer_works_with_its_filters_less_their_mean_plus_the_offset(case, fresh):
    model = case.model(fresh=fresh)
    plain = copy.deepcopy(model[0])
    center_weights(model, case.input())
    assert isinstance(model[0], CenteredWeights)
    own = [plain.weight.detach().double()[mask].mean().item() for mask in filters(case)]
    expected = by_definition(case, plain.weight, [0.0] * len(own) if fresh else own)
    assert_near(model[0].centered_weight(), expected, roundings=8)
    plain.weight.data = expected.float()
    assert_near(model[0](case.input()), plain(case.input()), roundings=32)


@each_layer
def test_every_filter_is_a_filter_and_none_is_left_out(case):
    masks = torch.stack(filters(case))
    assert len(masks) == case.model()[1].num_features
    assert (masks.sum(0) == 1).all()


@each_layer
def test_pretrained_model_computes_what_it_did(case):
    model = case.model(fresh=False)
    expected = evaluate(model, case.input())
    assert_near(evaluate(center_weights(model, case.input()), case.input()), expected, roundings=64)


@each_layer
def test_gradient_is_that_of_the_filters_without_its_mean(case):
    model = case.model()
    plain = copy.deepcopy(model[0])
    center_weights(model, case.input())
    plain.weight.data = model[0].centered_weight().detach().clone()
    x = case.input()
    found, expected = training_step(model[0], x), training_step(plain, x)
    gradient = by_definition(case, expected["dweight"], [0.0] * len(plain.weight.flatten()))
    assert_near(found["dweight"], gradient, roundings=64, scale=expected["dweight"].abs().max())
    assert_near(found["dx"], expected["dx"], roundings=64)
    if "dbias" in expected:
        assert_near(found["dbias"], expected["dbias"], roundings=64)


@each_layer
def test_first_and_second_derivatives_are_those_of_the_function(case):
    model = center_weights(case.model(dtype=torch.float64), case.input(dtype=torch.float64))
    names = [name for name, _ in model[0].named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model[0], dict(zip(names, parameters, strict=True)), (x,))

    arguments = case.input(dtype=torch.float64).requires_grad_(), *[p.detach() for p in model[0].parameters()]
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@each_layer
def test_mean_of_the_parameter_does_not_matter_and_does_not_train(case):
    model = center_weights(case.model(), case.input())
    before = model(case.input())
    with torch.no_grad():
        model[0].weight += 0.25
    assert_near(model(case.input()), before, roundings=256)
    means = model[0].weight.detach().sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training_step(model, case.input())
    optimizer.step()
    assert_near(model[0].weight.detach().sum(), means, roundings=64, scale=model[0].weight.detach().abs().sum())


def test_output_size_of_a_transposed_convolution_is_heeded():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 4, 4)
    center_weights(model, x)
    assert model[0](x).shape[2:] == (9, 9)
    assert model[0](x, output_size=(10, 10)).shape[2:] == (10, 10)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_padding_mode_is_heeded(mode):
    model = pretrained(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 4, 4)
    expected = evaluate(model, x)
    assert_near(evaluate(center_weights(model, x), x), expected, roundings=64)


# ------------------------------------------------------------------------------------------------------ fresh or not


NORMALISATIONS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "RunningBatchNorm": lambda: RunningBatchNorm(4),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
}
WITHOUT_STATISTICS = {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
    "BatchNorm2d without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
}


def before(normalisation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), normalisation)


@pytest.mark.parametrize("make", NORMALISATIONS.values(), ids=NORMALISATIONS)
@pytest.mark.parametrize("touched", [None, "running_mean", "running_var", "num_batches_tracked"])
def test_offset_is_zero_where_the_normalisation_layer_has_seen_nothing(make, touched):
    model = before(make())
    if touched:
        getattr(model[1], touched).add_(1)
    means = model[0].weight.detach().mean((1, 2, 3))
    center_weights(model, torch.randn(2, 3, 5, 5))
    torch.testing.assert_close(model[0].weight_offset, means if touched else torch.zeros(4), rtol=0, atol=0)


@pytest.mark.parametrize("make", WITHOUT_STATISTICS.values(), ids=WITHOUT_STATISTICS)
def test_offset_is_the_mean_where_there_are_no_running_statistics(make):
    model = before(make())
    means = model[0].weight.detach().mean((1, 2, 3))
    center_weights(model, torch.randn(2, 3, 5, 5))
    torch.testing.assert_close(model[0].weight_offset, means, rtol=0, atol=0)


def test_offset_is_the_mean_where_one_of_several_normalisation_layers_has_statistics():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pretrained(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.a(y) + self.b(y)

    model = Branches()
    means = model.conv.weight.detach().mean((1, 2, 3))
    center_weights(model, torch.randn(2, 3, 5, 5))
    torch.testing.assert_close(model.conv.weight_offset, means, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- what stays


@each_layer
def test_parameters_stay_the_same_objects_under_the_same_names(case):
    model = case.model()
    parameters, values = dict(model.named_parameters()), copy.deepcopy(dict(model.named_parameters()))
    center_weights(model, case.input())
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert_identical({k: v.detach() for k, v in found.items()}, {k: v.detach() for k, v in values.items()})


@each_layer
def test_layer_stays_an_instance_of_its_class(case):
    model = case.model()
    layer, cls = model[0], type(model[0])
    center_weights(model, case.input())
    assert model[0] is layer
    assert isinstance(layer, cls)


def test_optimizer_from_before_trains_the_filters():
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 3, 6, 6)
    batchnormify(model, center_weights=x)
    before = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_frozen_weights_stay_frozen():
    model, x = small_net(), torch.randn(4, 3, 6, 6)
    model[0].weight.requires_grad_(False)
    center_weights(model, x)
    model(x).square().mean().backward()
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None


def test_memory_format_of_the_weight_is_that_of_the_filters():
    model = small_net().to(memory_format=torch.channels_last)
    center_weights(model, torch.randn(4, 3, 6, 6))
    assert model[0].centered_weight().is_contiguous(memory_format=torch.channels_last)


def test_centring_twice_changes_nothing_more():
    model, x = small_net(), torch.randn(4, 3, 6, 6)
    pretrained(center_weights(model, x))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    center_weights(model, x)
    assert_identical(dict(model.state_dict()), before)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64])
def test_offset_follows_the_dtype_of_the_model(to):
    model = pretrained(small_net())
    x = torch.randn(4, 3, 6, 6)
    model = center_weights(model, x).to(to)
    assert model[0].weight_offset.dtype == to
    assert model(x.to(to)).dtype == to
