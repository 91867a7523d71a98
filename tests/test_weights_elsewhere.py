"""Centred weights under compilers and autocast, in copies and in averages; over processes in test_weights_ranks.py."""

import copy

import pytest
import torch
from cases import assert_near
from copies import each_copy
from models import pretrained
from steps import assert_identical, evaluate, training_step
from test_weights import LAYERS, LayerCase, each_layer, small_net
from test_weights_choice import centred
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from runningbn import RunningBatchNorm, bake_weights, batchnormify, center_weights


def images(seed: int = 0, batch_size: int = 4) -> Tensor:
    return torch.randn((batch_size, 3, 6, 6), generator=torch.Generator().manual_seed(seed))


def net(fresh: bool = False) -> nn.Sequential:
    return center_weights(small_net() if fresh else pretrained(small_net()), images())


def sgd_step(model: nn.Module, x: Tensor) -> None:
    """A step of SGD on (y − 1)²."""
    model.zero_grad()
    (model(x) - 1).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


# --------------------------------------------------------------------------------------------------------- compilers


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_layer
def test_compiled_layer_has_the_gradients_of_eager(case: LayerCase):
    model = center_weights(case.model(fresh=False), case.input())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = case.input() + seed
        found, expected = training_step(compiled, x), training_step(model, x)
        for name, value in expected.items():
            scale = max(value.abs().max(), expected["dx"].abs().max())
            assert_near(found[name.replace("d0.", "d_orig_mod.0.").replace("d1.", "d_orig_mod.1.")], value, 256, scale)


@pytest.mark.slow
def test_whole_model_compiles_in_one_graph_and_trains_as_eager():
    model = batchnormify(small_net(), center_weights=images())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for seed in range(3):
        sgd_step(model, images(seed))
        sgd_step(compiled, images(seed))
    for found, expected in zip(twin.parameters(), model.parameters()):
        assert_near(found.detach(), expected.detach(), roundings=1e3)


sees_changes = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="before torch 2.6, compiled code takes no notice of what is done to the model"
)


@sees_changes
def test_centring_after_compiling_holds_from_the_next_call():
    model = pretrained(small_net()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images())
    center_weights(model, images())
    with torch.no_grad():
        model[0].weight_offset.zero_()
        model[0].bias.zero_()
    assert_near(compiled(images(1)), model(images(1)), roundings=64)


@sees_changes
def test_compiled_model_can_be_given():
    model = small_net()
    center_weights(torch.compile(model, backend="aot_eager"), images())
    assert centred(model) == {"0", "3"}


@each_layer
def test_exported_program_computes_what_the_model_does(case: LayerCase):
    model = center_weights(case.model(fresh=False), case.input()).eval()
    program = torch.export.export(model, (case.input(),))
    assert_near(program.module()(case.input()), model(case.input()), roundings=32)


@each_layer
def test_functional_call_takes_parameters_and_offsets(case: LayerCase):
    x = case.input()
    model, other = (center_weights(case.model(fresh=False, seed=seed), x) for seed in (0, 1))
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    expected = evaluate(other, x)
    assert_near(torch.func.functional_call(model.eval(), state, (x,)), expected, roundings=8)


def test_per_sample_gradients_are_those_of_each_sample():
    model = center_weights(LAYERS[3].model(), LAYERS[3].input())[0]
    parameters, x = dict(model.named_parameters()), LAYERS[3].input()

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        (expected,) = torch.autograd.grad(loss(parameters, sample), [model.weight])
        assert_near(found["weight"][i].detach(), expected, roundings=64)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_centred_filters(dtype):
    model = net()[0]
    plain = bake_weights(copy.deepcopy(model))
    with torch.autocast("cpu", dtype):
        found, expected = model(images()), plain(images())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.float().sum().backward()
    assert model.weight.grad.dtype == torch.float32


def test_model_in_bfloat16_trains_as_in_float32_up_to_its_precision():
    model = net()[0]
    narrow = copy.deepcopy(model).bfloat16()
    found, expected = training_step(narrow, images().bfloat16()), training_step(model, images().bfloat16().float())
    assert_near(found["y"], expected["y"].bfloat16(), roundings=8)
    assert_near(found["dweight"], expected["dweight"].bfloat16(), roundings=16)


# ------------------------------------------------------------------------------------------------------------ copies


@each_layer
@each_copy
def test_copies_train_like_the_model_and_can_be_baked(case: LayerCase, duplicate):
    x = case.input()
    model = center_weights(case.model(fresh=False), x)
    training_step(model, x)
    twin = duplicate(model)
    assert_identical(training_step(twin, x), training_step(model, x))
    assert type(bake_weights(twin)[0]) is type(case.layer())


class Copying(nn.Conv2d):
    """A subclass that constructs its copies, with an attribute of a name that centred layers use for their class."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__(inputs, filters, 3)
        self.plain = True

    def __deepcopy__(self, memo: object) -> nn.Module:
        twin = type(self)(self.in_channels, self.out_channels)
        twin.load_state_dict(self.state_dict())
        return twin


@each_copy
def test_layers_with_their_own_way_of_copying_are_copied(duplicate):
    x = images()
    model = center_weights(nn.Sequential(Copying(3, 4), nn.BatchNorm2d(4)), x)
    twin = duplicate(model)
    assert_identical(training_step(twin, x), training_step(model, x))
    assert type(bake_weights(twin)[0]) is Copying


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "pretrained"])
def test_average_of_centred_models_has_the_average_of_their_filters(use_buffers, fresh):
    model = net(fresh)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    filters = []
    for seed in range(3):
        sgd_step(model, images(seed))
        averaged.update_parameters(model)
        filters.append(model[0].centered_weight().detach())
    assert_near(averaged.module[0].centered_weight().detach(), torch.stack(filters).mean(0), roundings=16)


# ------------------------------------------------------------------------------------------------------- with the rest


def test_running_layers_with_centred_weights_train_on_single_images():
    model = batchnormify(small_net(), center_weights=images())
    for seed in range(3):
        sgd_step(model, images(seed, batch_size=1))
    assert isinstance(model[1], RunningBatchNorm)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
