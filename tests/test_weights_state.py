"""Centred weights: state dicts, baking, and what batchnormify does with them."""

import copy

import pytest
import torch
from cases import assert_near
from models import pretrained
from steps import assert_identical, evaluate
from test_weights import each_layer, small_net
from torch import Tensor, nn

from runningbn import RunningBatchNorm, bake_weights, batchnormify, center_weights
from runningbn.weights.layers import CenteredWeights

# ------------------------------------------------------------------------------------------------------- state dicts


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model.train()(x) - 1).square().mean().backward()
        optimizer.step()
    return model


def loaded(model: nn.Module, state: dict[str, Tensor], **kwargs) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, **kwargs)
    return model


each_way_to_load = pytest.mark.parametrize("kwargs", [{}, {"assign": True}], ids=["copied", "assigned"])


@each_layer
@each_way_to_load
def test_centred_model_loads_a_centred_one(case, kwargs):
    x = case.input()
    source = trained(center_weights(case.model(), x), x)
    target = loaded(center_weights(case.model(fresh=False, seed=1), x), source.state_dict(), **kwargs)
    torch.testing.assert_close(evaluate(target, x), evaluate(source, x), rtol=0, atol=0)


@each_layer
@each_way_to_load
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "pretrained"])
def test_centred_model_loads_a_plain_one_and_computes_what_that_does(case, kwargs, fresh):
    x = case.input()
    source = case.model(fresh=False, seed=1)
    target = loaded(center_weights(case.model(fresh=fresh), x), source.state_dict(), **kwargs)
    assert_near(evaluate(target, x), evaluate(source, x), roundings=64)


@each_layer
def test_centred_model_loads_a_baked_one(case):
    x = case.input()
    source = bake_weights(trained(center_weights(case.model(), x), x))
    target = loaded(center_weights(case.model(), x), source.state_dict())
    assert_near(evaluate(target, x), evaluate(source, x), roundings=64)


@each_layer
def test_plain_model_loads_a_baked_one(case):
    x = case.input()
    source = bake_weights(trained(center_weights(case.model(), x), x))
    assert_identical(dict(loaded(case.model(), source.state_dict()).state_dict()), dict(source.state_dict()))


def test_centred_state_dict_in_a_plain_model_is_an_error_that_names_the_offset():
    source = center_weights(small_net(), torch.randn(4, 3, 6, 6))
    with pytest.raises(RuntimeError, match="weight_offset"):
        small_net().load_state_dict(source.state_dict())


def test_filters_of_a_wrong_shape_are_an_error_that_leaves_the_offset():
    model = center_weights(pretrained(small_net()), torch.randn(4, 3, 6, 6))
    state, before = small_net().state_dict(), model[0].weight_offset.clone()
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(state)
    torch.testing.assert_close(model[0].weight_offset, before, rtol=0, atol=0)


def test_state_dict_without_the_layer_leaves_it_missing():
    model = center_weights(pretrained(small_net()), torch.randn(4, 3, 6, 6))
    before = model[0].weight_offset.clone()
    missing = model.load_state_dict({}, strict=False).missing_keys
    assert {"0.weight", "0.weight_offset"} <= set(missing)
    torch.testing.assert_close(model[0].weight_offset, before, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- baking


@each_layer
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "pretrained"])
def test_baked_model_computes_what_it_did_with_plain_layers(case, fresh):
    x = case.input()
    plain = case.model(fresh=fresh)
    model = trained(center_weights(copy.deepcopy(plain), x), x)
    weight, expected = model[0].weight, evaluate(model, x)
    assert bake_weights(model) is model
    torch.testing.assert_close(evaluate(model, x), expected, rtol=0, atol=0)
    assert model[0].weight is weight
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert vars(model[0]).keys() == vars(plain[0]).keys()


def test_baking_what_is_plain_changes_nothing():
    model = pretrained(small_net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_identical(dict(bake_weights(model).state_dict()), before)


def test_where_says_what_is_baked():
    model = center_weights(small_net(), torch.randn(4, 3, 6, 6))
    bake_weights(model, where=lambda name, module: name == "0")
    assert [isinstance(model[i], CenteredWeights) for i in (0, 3)] == [False, True]


def test_what_was_parametrised_later_is_not_baked_and_named(caplog):
    model = center_weights(small_net(), torch.randn(4, 3, 6, 6))
    nn.utils.parametrizations.weight_norm(model[0])
    bake_weights(model)
    assert "1 layer baked, 1 left alone: 0 (" in caplog.messages[-1]
    assert caplog.records[-1].levelname == "WARNING"


@pytest.mark.parametrize("function", [center_weights, bake_weights])
def test_something_that_is_no_module_is_an_error(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: expected a torch\.nn\.Module, got str"):
        function("model")


# ---------------------------------------------------------------------------------------------------- batchnormify


@pytest.mark.parametrize("to", ["running", "precise"])
def test_batchnormify_converts_and_centres(to):
    model, x = pretrained(small_net()), torch.randn(4, 3, 6, 6)
    expected = evaluate(model, x)
    model = batchnormify(model, to, center_weights=x)
    assert [isinstance(model[i], CenteredWeights) for i in (0, 3)] == [True, True]
    assert_near(evaluate(model, x), expected, roundings=64)


def test_way_back_bakes():
    model, x = batchnormify(small_net(), center_weights=torch.randn(4, 3, 6, 6)), torch.randn(4, 3, 6, 6)
    expected = evaluate(trained(model, x), x)
    batchnormify(model, "torch")
    assert [type(module) for module in model] == [type(module) for module in small_net()]
    assert_near(evaluate(model, x), expected, roundings=64)


def test_way_back_of_chosen_layers_leaves_the_weights():
    model = batchnormify(small_net(), center_weights=torch.randn(4, 3, 6, 6))
    batchnormify(model, "torch", where=lambda name, module: name == "1")
    assert [isinstance(model[i], CenteredWeights) for i in (0, 3)] == [True, True]


def test_with_where_only_what_feeds_a_converted_layer_is_centred():
    model = small_net()
    batchnormify(model, center_weights=torch.randn(4, 3, 6, 6), where=lambda name, module: name == "4")
    assert [isinstance(model[i], CenteredWeights) for i in (0, 3)] == [False, True]


@pytest.mark.parametrize("to", ["torch", lambda layer: nn.Identity()], ids=["torch", "callable"])
def test_other_targets_refuse_it_before_they_do_anything(to):
    model = batchnormify(small_net())
    with pytest.raises(TypeError, match="does not take center_weights"):
        batchnormify(model, to, center_weights=True)
    assert isinstance(model[1], RunningBatchNorm)


def test_pass_that_fails_leaves_the_layers_unconverted():
    model = small_net()
    with pytest.raises(RuntimeError, match="channels"):
        batchnormify(model, center_weights=torch.randn(2, 5, 6, 6))
    assert [type(module) for module in model] == [type(module) for module in small_net()]


@pytest.mark.parametrize("off", [None, False])
def test_nothing_is_centred_unless_asked_for(off):
    model = batchnormify(small_net(), center_weights=off)
    model(torch.randn(4, 3, 6, 6))
    assert not any(isinstance(module, CenteredWeights) for module in model)
