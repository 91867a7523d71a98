"""center_weights without an example batch: the first forward pass of the model decides."""

import logging

import pytest
import torch
from copies import each_copy
from models import pretrained
from steps import assert_identical, training_step
from test_weights import small_net
from test_weights_choice import centred
from test_weights_trace import Restless
from torch import Tensor, nn

from runningbn import RunningBatchNorm, bake_weights, batchnormify, center_weights

PAIR = {"0", "3"}


def x(seed: int = 0) -> Tensor:
    return torch.randn((4, 3, 6, 6), generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules())


def waiting(**kwargs) -> nn.Sequential:
    return center_weights(pretrained(small_net()), **kwargs)


def test_nothing_is_changed_before_it():
    model, plain = center_weights(small_net()), small_net()
    assert [type(module) for module in model] == [type(module) for module in plain]
    assert_identical(dict(model.state_dict()), dict(plain.state_dict()))


def test_training_is_that_after_an_example_batch():
    model, expected = center_weights(small_net()), center_weights(small_net(), x())
    for seed in range(3):
        assert_identical(training_step(model, x(seed)), training_step(expected, x(seed)))
    assert centred(model) == PAIR
    assert_identical(dict(model.state_dict()), dict(expected.state_dict()))
    assert hooks(model) == 0


def test_pass_itself_counts_once():
    model = nn.Sequential(Restless(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    center_weights(model)
    model(torch.randn(2, 3, 4, 4))
    assert model[0].calls == 1
    assert model[2].num_batches_tracked == 1


def test_arguments_are_those_of_the_call():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, scale: float, *, images: dict[str, Tensor]) -> Tensor:
            images["seen"] = images.pop("images") * scale
            return self.net(images["seen"])

    model = center_weights(Net())
    model(2.0, images={"images": x()})
    assert centred(model) == {"net.0", "net.3"}


def test_pre_hooks_of_the_user_run_before_it_as_in_any_pass():
    model = small_net()
    model.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[:, None].expand(-1, 3, -1, -1),))
    center_weights(model)
    assert len(model(torch.randn(2, 2, 6, 6))) == 4
    assert centred(model) == PAIR


def test_what_happens_is_logged(caplog):
    caplog.set_level(logging.INFO, "runningbn")
    model = waiting()
    model(x())
    model(x())
    assert caplog.messages == [
        "center_weights: the first forward pass of the model decides which layers are centred",
        "center_weights: 2 layers centred",
    ]


def test_options_hold():
    model = small_net()
    model.extend([nn.Conv2d(5, 5, 2, groups=5), nn.BatchNorm2d(5)])
    center_weights(model, where=lambda name, module: name != "0", depthwise=True)
    model(x())
    assert centred(model) == {"3", "6"}


def test_layers_replaced_meanwhile_count():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(waiting())
    model[0] = nn.Conv2d(3, 4, 3)
    model.eval()(x())
    assert centred(model) == PAIR


def test_chosen_layers_replaced_meanwhile_do_not_count():
    model = waiting(where=lambda name, module: True)
    model[0] = nn.Conv2d(3, 4, 3)
    model(x())
    assert centred(model) == {"3"}


@pytest.mark.parametrize("to", ["running", "precise"])
def test_batchnormify_converts_at_once_and_centres_then(to):
    model = batchnormify(small_net(), to, center_weights=True)
    assert type(model[1]) is not nn.BatchNorm2d
    assert centred(model) == set()
    model(x())
    assert centred(model) == PAIR


def test_batchnormify_with_where_centres_what_feeds_a_converted_layer():
    model = batchnormify(small_net(), where=lambda name, module: name == "1", center_weights=True)
    model(x())
    assert centred(model) == {"0"}
    assert isinstance(model[1], RunningBatchNorm)


# ---------------------------------------------------------------------------------------------------------- failures


def test_pass_that_fails_changes_nothing_and_the_next_decides():
    model = waiting()
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 5, 6, 6))
    assert centred(model) == set()
    model(x())
    assert centred(model) == PAIR


keeps_messages = pytest.mark.skipif(torch.__version__ < (2, 5), reason="the compiler of torch 2.4 drops the message")


@keeps_messages
@pytest.mark.parametrize("fullgraph", [True, False], ids=["one graph", "several"])
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile", "a function around it"])
def test_compiled_first_pass_is_an_error_that_asks_for_a_batch(how, fullgraph):
    options = {"fullgraph": fullgraph, "backend": "aot_eager"}
    model = waiting()
    if how == "torch.compile":
        compiled = torch.compile(model, **options)
    elif how == "Module.compile":
        model.compile(**options)
        compiled = model
    else:
        compiled = torch.compile(lambda images: model(images).relu(), **options)
    with pytest.raises(Exception, match="give an example batch instead"):
        compiled(x())
    assert centred(model) == set()


@keeps_messages
def test_exported_first_pass_is_an_error_that_asks_for_a_batch():
    with pytest.raises(Exception, match="give an example batch instead"):
        torch.export.export(waiting().eval(), (x(),))


def test_traced_first_pass_is_an_error_that_asks_for_a_batch():
    with pytest.raises(RuntimeError, match="give an example batch instead"):
        torch.jit.trace(waiting().eval(), x())


def test_replica_is_an_error_that_asks_for_a_batch():
    with pytest.raises(RuntimeError, match="give an example batch instead"):
        waiting()._replicate_for_data_parallel()(x())


def test_functional_call_is_an_error_that_asks_for_a_batch():
    model = waiting()
    swapped = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="give an example batch instead"):
        torch.func.functional_call(model, swapped, (x(),))
    model(x())
    assert centred(model) == PAIR


# ------------------------------------------------------------------------------------------------- taking it back


@pytest.mark.parametrize("take_back", [bake_weights, lambda model: batchnormify(model, "torch")], ids=["bake", "torch"])
def test_waiting_can_be_ended(take_back):
    model = take_back(waiting())
    assert hooks(model) == 0
    model(x())
    assert centred(model) == set()


def test_later_call_takes_the_place_of_an_earlier_one():
    model = waiting(where=lambda name, module: name == "0")
    center_weights(model, where=lambda name, module: name == "3")
    model(x())
    assert centred(model) == {"3"}
    assert hooks(model) == 0


def test_example_batch_takes_the_place_of_the_first_pass():
    model = waiting(where=lambda name, module: name == "0")
    center_weights(model, x(), where=lambda name, module: name == "3")
    assert hooks(model) == 0
    assert centred(model) == {"3"}


def test_decision_about_a_model_takes_the_place_of_those_about_its_parts():
    part = center_weights(small_net(), where=lambda name, module: name == "0")
    model = nn.Sequential(part, nn.Flatten())
    center_weights(model, x(), where=lambda name, module: name == "0.3")
    assert hooks(model) == 0
    assert centred(model) == {"0.3"}


def test_failed_decision_leaves_the_waiting_one():
    model = waiting()
    with pytest.raises(RuntimeError, match="channels"):
        center_weights(model, torch.randn(2, 5, 6, 6))
    model(x())
    assert centred(model) == PAIR


# ---------------------------------------------------------------------------------------------------------- copies


@each_copy
def test_copies_decide_about_themselves(duplicate):
    model = waiting(where=lambda name, module: name == "3")
    twin = duplicate(model)
    twin(x())
    assert (centred(twin), hooks(twin)) == ({"3"}, 0)
    assert centred(model) == set()
    model(x())
    assert (centred(model), hooks(model)) == ({"3"}, 0)


@each_copy
def test_copies_can_stop_waiting(duplicate):
    model = waiting()
    twin = bake_weights(duplicate(model))
    assert hooks(twin) == 0
    assert hooks(model) > 0


# ---------------------------------------------------------------------------------------------------- where it happens


def test_first_pass_in_inference_mode_leaves_a_model_that_trains_and_loads():
    model = waiting()
    with torch.inference_mode():
        model(x())
    assert centred(model) == PAIR
    training_step(model, x())
    model.load_state_dict(center_weights(pretrained(small_net(), seed=1), x()).state_dict())


def test_first_pass_under_autocast_leaves_all_gradients():
    model, expected = (nn.Sequential(small_net(), nn.Flatten(), nn.Linear(20, 2)) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    center_weights(model)
    center_weights(expected, x())
    for net in (model, expected):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x()).float().square().mean()
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for found, wanted in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=0)
