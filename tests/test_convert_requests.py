"""batchnormify: the arguments. Which layers, which target, options, errors, and the line in the log."""

import logging

import pytest
import torch
from models import each_of_ours, each_target, pretrained, small_net, tangle
from steps import assert_identical, buffers_of
from torch import nn

from runningbn import Horizon, RunningBatchNorm, SquareRoot, batchnormify
from runningbn.conversion.classes import RunningBatchNorm2d

# ------------------------------------------------------------------------------------------------------------ where


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RunningBatchNorm)]


def test_where_selects_by_name():
    assert converted(batchnormify(tangle(), where=lambda name, _: name.startswith("blocks"))) == [
        "first", "blocks.0.norm"
    ]  # fmt: skip


def test_where_selects_by_module():
    model = tangle()
    assert converted(batchnormify(model, where=lambda _, module: module.num_features == 36)) == ["head.1"]


def test_where_is_asked_about_every_name_of_every_batch_norm_layer_and_about_nothing_else():
    asked = []
    batchnormify(tangle(), where=lambda name, _: asked.append(name))
    assert sorted(asked) == ["again", "blocks.0.norm", "blocks.0.shared", "first", "head.1"]


def test_where_is_asked_about_a_root_layer_by_the_empty_name():
    layer = nn.BatchNorm2d(3)
    batchnormify(layer, where=lambda name, module: name == "" and module is layer)
    assert isinstance(layer, RunningBatchNorm)


def test_where_selects_among_converted_layers_for_the_way_back():
    model = batchnormify(small_net())
    batchnormify(model, "torch", where=lambda name, _: name == "1")
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, RunningBatchNorm2d]


# ---------------------------------------------------------------------------------------------------------- callable


def group_norm(layer: nn.Module) -> nn.Module:
    return nn.GroupNorm(2, layer.num_features)


def test_callable_replaces_every_place_of_a_shared_layer_by_one_module():
    model = batchnormify(tangle(), group_norm)
    places = [model.first, model.again, model.blocks[0]["shared"]]
    assert all(type(place) is nn.GroupNorm for place in places)
    assert len(set(places)) == 1


def test_callable_is_called_once_for_each_layer():
    model, seen = tangle(), []
    batchnormify(model, lambda layer: seen.append(layer) or nn.Identity())
    assert len(seen) == 3
    assert len(set(seen)) == 3


def test_callable_replaces_the_root():
    new = batchnormify(nn.BatchNorm2d(4), group_norm)
    assert type(new) is nn.GroupNorm


def test_callable_may_wrap_the_layer():
    model = small_net()
    layer = model[1]
    batchnormify(model, lambda norm: nn.Sequential(norm, nn.Dropout(0.5)), where=lambda name, _: name == "1")
    assert model[1][0] is layer


def test_callable_may_keep_the_layer():
    model = small_net()
    layers = list(model)
    batchnormify(model, lambda layer: layer)
    assert all(after is before for after, before in zip(model, layers))


def test_callable_obeys_where():
    model = batchnormify(small_net(), group_norm, where=lambda name, _: name == "3")
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, nn.GroupNorm]


def test_callable_gets_layers_of_this_library_too():
    model = batchnormify(batchnormify(small_net()), group_norm)
    assert [type(model[1]), type(model[3])] == [nn.GroupNorm, nn.GroupNorm]


# ---------------------------------------------------------------------------------------------------------- options


def test_options_reach_the_layers():
    model = batchnormify(small_net(), momentum=SquareRoot(0.2), gradient="exact")
    assert {(model[i].momentum, model[i].gradient) for i in (1, 3)} == {(SquareRoot(0.2), "exact")}


def test_running_takes_its_default_rule_and_gradient():
    layer = batchnormify(nn.BatchNorm2d(3, momentum=0.3))
    assert (layer.momentum, layer.gradient) == (Horizon(), "running")


@pytest.mark.parametrize("momentum", [0.3, None], ids=["float", "none"])
def test_precise_keeps_the_momentum(momentum):
    assert batchnormify(nn.BatchNorm2d(3, momentum=momentum), "precise").momentum == momentum


def test_precise_takes_a_momentum():
    assert batchnormify(nn.BatchNorm2d(3), "precise", momentum=None).momentum is None


def test_precise_keeps_the_rule_of_a_running_layer():
    assert batchnormify(batchnormify(nn.BatchNorm2d(3)), "precise").momentum == Horizon()


@each_of_ours
@pytest.mark.parametrize("momentum", [0.3, None], ids=["float", "none"])
def test_torch_keeps_a_momentum_that_it_understands(to, momentum):
    layer = batchnormify(nn.BatchNorm2d(3), to, momentum=momentum)
    assert batchnormify(layer, "torch").momentum == momentum


@each_of_ours
@pytest.mark.parametrize("rule", [Horizon(), SquareRoot(0.3)], ids=repr)
def test_torch_makes_a_tenth_of_a_rule(to, rule):
    assert batchnormify(batchnormify(nn.BatchNorm2d(3), to, momentum=rule), "torch").momentum == 0.1


def test_layer_of_the_target_kind_takes_new_options():
    layer = batchnormify(nn.BatchNorm2d(3))
    batchnormify(layer, momentum=0.2, gradient="exact")
    assert (layer.momentum, layer.gradient) == (0.2, "exact")


def test_layer_of_the_target_kind_keeps_its_options_unless_told_otherwise():
    layer = RunningBatchNorm(3, momentum=0.2, gradient="exact")
    batchnormify(layer)
    assert (layer.momentum, layer.gradient) == (0.2, "exact")


# ----------------------------------------------------------------------------------------------------------- errors


def photograph(model: nn.Module) -> list:
    """Everything that a conversion could change: identities, classes, attributes; not the values of tensors."""
    tensors = ("_parameters", "_buffers", "_modules")
    return [
        (
            name,
            id(module),
            type(module),
            repr({key: value for key, value in vars(module).items() if key not in tensors}),
            {key: id(tensor) for key, tensor in (*module._parameters.items(), *module._buffers.items())},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def second_time_not_a_module():
    answers = iter([nn.Identity(), "not a module"])
    return lambda layer: next(answers)


def second_time_an_exception():
    answers = iter([nn.Identity()])
    return lambda layer: next(answers)


BAD_REQUESTS = {
    "unknown target": ({"to": "group"}, ValueError, "'running', 'precise', 'torch'.*'group'"),
    "no target": ({"to": None}, ValueError, "'running', 'precise', 'torch'.*None"),
    "target that cannot be hashed": ({"to": ["running"]}, ValueError, "'running', 'precise', 'torch'"),
    "unknown option": ({"moment": 0.1}, TypeError, "gradient, max_lag, momentum.*moment"),
    "option of another target": (
        {"to": "precise", "gradient": "exact"},
        TypeError,
        "takes momentum.*, sync, got gradient",
    ),
    "option for torch": ({"to": "torch", "momentum": 0.1}, TypeError, "takes no options, got momentum"),
    "option for a callable": ({"to": group_norm, "momentum": 0.1}, TypeError, "takes no options, got momentum"),
    "momentum out of range": ({"momentum": 1.5}, ValueError, "1.5"),
    "momentum of a wrong type": ({"momentum": "fast"}, TypeError, "'fast'"),
    "unknown gradient": ({"gradient": "sideways"}, ValueError, "'running', 'exact'.*'sideways'"),
    "where that raises": ({"where": lambda name, _: 1 / (name != "3")}, ZeroDivisionError, None),
    "callable that raises": (second_time_an_exception, StopIteration, None),
    "callable without a module": (second_time_not_a_module, TypeError, "'not a module'"),
}


@pytest.mark.parametrize("source", ["torch model", "converted model"])
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_is_refused_and_changes_nothing(source, arguments, error, message):
    model = small_net() if source == "torch model" else batchnormify(small_net())
    arguments = {"to": arguments()} if callable(arguments) else arguments
    before, tensors = photograph(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        batchnormify(model, **arguments)
    assert photograph(model) == before
    assert_identical(dict(model.state_dict()), tensors)


@pytest.mark.parametrize("model", [[nn.BatchNorm2d(3)], nn.BatchNorm2d, None], ids=["list", "class", "none"])
def test_what_is_not_a_module_is_named(model):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        batchnormify(model)


# -------------------------------------------------------------------------------------------------------------- log


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="runningbn")
    return caplog


@each_target
def test_one_line_says_what_was_done(log, to):
    model = batchnormify(tangle(), "precise" if to == "running" else "running")
    log.clear()
    batchnormify(model, to)
    assert log.record_tuples == [("runningbn", logging.INFO, f"batchnormify: 3 layers converted to {to}")]


@each_target
def test_layers_that_are_what_was_asked_for_are_not_counted(log, to):
    model = batchnormify(tangle(), to)
    log.clear()
    batchnormify(model, to)
    assert log.record_tuples == [("runningbn", logging.INFO, f"batchnormify: 0 layers converted to {to}")]


def test_layers_that_take_an_option_are_counted(log):
    model = batchnormify(tangle())
    log.clear()
    batchnormify(model, momentum=0.5)
    assert log.messages == ["batchnormify: 3 layers converted to running"]


def test_one_layer_is_singular(log):
    batchnormify(nn.BatchNorm2d(3))
    assert log.messages == ["batchnormify: 1 layer converted to running"]


def test_line_names_the_callable(log):
    batchnormify(small_net(), group_norm)
    assert log.messages == ["batchnormify: 2 layers converted to group_norm"]


def test_line_warns_of_layers_left_alone_by_name(log):
    model = pretrained(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    model.append(nn.BatchNorm2d(3, track_running_stats=False))
    batchnormify(model)
    assert log.record_tuples == [
        ("runningbn", logging.WARNING,
         "batchnormify: 2 layers converted to running, 1 left alone: 2 (it has no running statistics)")
    ]  # fmt: skip


def test_line_is_silent_about_layers_that_nobody_asked_for(log):
    batchnormify(nn.BatchNorm2d(3, track_running_stats=False), where=lambda *_: False)
    assert log.messages == ["batchnormify: 0 layers converted to running"]


def test_layers_that_nobody_asked_for_keep_every_bit():
    model = small_net()
    before = buffers_of(model)
    batchnormify(model, where=lambda name, _: name == "1")
    assert_identical(buffers_of(model[3]), {name[2:]: value for name, value in before.items() if name[0] == "3"})
    assert type(model[3]) is nn.BatchNorm2d


def test_converting_draws_no_random_numbers():
    model = small_net()
    before = torch.get_rng_state()
    batchnormify(batchnormify(model, "precise"), "running")
    assert torch.equal(torch.get_rng_state(), before)
