"""batchnormify: what it finds in a model, what it keeps, and what it does when it is asked for the impossible.

The statistics it hands over are the subject of test_convert_statistics.py, special kinds of layers that of
test_convert_kinds.py.
"""

import itertools

import pytest
import torch
from cases import noise
from copies import each_copy
from models import CLASSES, PLAIN, TARGETS, each_of_ours, each_target, images, pretrained, small_net, tangle
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import nn
from versions import needs_batch_norm_without_bias, needs_state_dict_post_hooks

from runningbn import RunningBatchNorm, batchnormify

# ---------------------------------------------------------------------------------------------------- what it finds


@each_target
@pytest.mark.parametrize("dimensions", [1, 2, 3], ids=["1d", "2d", "3d"])
def test_root_layer_becomes_its_counterpart_and_stays_the_same_object(to, dimensions):
    layer = pretrained(PLAIN[dimensions - 1](3))
    assert batchnormify(layer, to) is layer
    assert type(layer) is CLASSES[to][dimensions - 1]


@each_of_ours
def test_every_name_of_every_layer_is_converted(to):
    model = batchnormify(tangle(), to)
    found = {
        name: type(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    one_d, two_d, _ = CLASSES[to]
    assert found == {
        "first": two_d, "again": two_d, "blocks.0.norm": two_d, "blocks.0.shared": two_d, "head.1": one_d
    }  # fmt: skip


@each_target
def test_shared_layer_stays_one_layer(to):
    model = batchnormify(tangle(), to)
    assert model.first is model.again
    assert model.first is model.blocks[0]["shared"]


@each_target
def test_plain_lists_of_layers_see_the_conversion(to):
    model = batchnormify(tangle(), to)
    assert model.aliases[0] is model.first
    assert model.aliases[1] is model.blocks[0]["norm"]


def test_other_modules_are_left_alone():
    norms = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.LayerNorm(4)]
    model = nn.Sequential(*norms, nn.Conv2d(3, 4, 1))
    before = [type(module) for module in model]
    batchnormify(model)
    assert [type(module) for module in model] == before


def test_model_without_batch_norm_is_returned():
    model = nn.Linear(2, 2)
    assert batchnormify(model) is model


def test_default_target_is_running():
    assert isinstance(batchnormify(nn.BatchNorm2d(3)), RunningBatchNorm)


# ---------------------------------------------------------------------------------------------------- what it keeps


@each_target
def test_parameters_stay_the_same_objects(to):
    model = tangle()
    before = dict(model.named_parameters(remove_duplicate=False))
    after = dict(batchnormify(model, to).named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


@each_target
def test_frozen_parameters_stay_frozen(to):
    model = small_net()
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in batchnormify(model, to).named_parameters()} == before


@each_of_ours
def test_frozen_parameters_get_no_gradient(to):
    model = small_net()
    model[1].weight.requires_grad_(False)
    train(batchnormify(model, to), [images()])
    assert model[1].weight.grad is None
    assert model[1].bias.grad is not None


@each_target
def test_training_flag_is_kept_per_layer(to):
    model = small_net().train()
    model[1].eval()
    batchnormify(model, to)
    assert [module.training for module in model] == [True, False, True, True]


@each_of_ours
def test_layer_in_evaluation_stays_frozen_while_the_others_train(to):
    model = batchnormify(small_net(), to)
    model[1].eval()
    before = buffers_of(model[1])
    training_step(model, images())
    assert_identical(buffers_of(model[1]), before)


@each_target
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
def test_eps_and_affine_are_kept(to, affine):
    layer = batchnormify(pretrained(nn.BatchNorm2d(3, eps=0.125, affine=affine)), to)
    assert (layer.eps, layer.affine, layer.weight is not None) == (0.125, affine, affine)


@needs_batch_norm_without_bias
@each_target
def test_missing_bias_is_kept(to):
    layer = batchnormify(pretrained(nn.BatchNorm2d(3, bias=False)), to)
    assert layer.bias is None
    assert layer.weight is not None


def test_attributes_of_the_users_are_kept():
    layer = nn.BatchNorm2d(3)
    layer.tag = "stage-1"
    for to in (*TARGETS, "running"):
        assert batchnormify(layer, to).tag == "stage-1"


def with_hooks(layer: nn.Module) -> tuple[list[str], list]:
    """A log of the hooks that ran, and the handles."""
    log: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: log.append("pre")),
        layer.register_forward_hook(lambda *_: log.append("forward")),
        layer.register_full_backward_pre_hook(lambda *_: log.append("backward pre")),
        layer.register_full_backward_hook(lambda *_: log.append("backward")),
        layer.register_state_dict_pre_hook(lambda *_: log.append("state_dict pre")),
        layer.register_state_dict_post_hook(lambda *_: log.append("state_dict post")),
        layer.register_load_state_dict_pre_hook(lambda *_: log.append("load pre")),
        layer.register_load_state_dict_post_hook(lambda *_: log.append("load post")),
    ]
    return log, handles


def use(layer: nn.Module) -> None:
    """Everything that a hook can be at."""
    training_step(layer, noise((4, 3, 2, 2), 0))
    layer.load_state_dict(layer.state_dict())


@needs_state_dict_post_hooks
@each_target
def test_hooks_still_run(to):
    layer = nn.BatchNorm2d(3)
    log, _ = with_hooks(layer)
    use(batchnormify(layer, to))
    assert log == [
        "pre", "forward", "backward pre", "backward", "state_dict pre", "state_dict post", "load pre", "load post"
    ]  # fmt: skip


@needs_state_dict_post_hooks
@each_target
def test_hooks_from_before_the_conversion_can_be_removed_after_it(to):
    layer = nn.BatchNorm2d(3)
    log, handles = with_hooks(layer)
    batchnormify(layer, to)
    for handle in handles:
        handle.remove()
    use(layer)
    assert log == []


@each_of_ours
def test_optimizer_from_before_the_conversion_trains_the_layers(to):
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batchnormify(model, to)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(images()).square().mean().backward()
    optimizer.step()
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # The bias of a convolution before a normalisation is subtracted again, so its gradient may be zero.
    assert set(unmoved) <= {"0.bias"}


@each_target
def test_device_is_kept_per_layer(to):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, device="meta"))
    batchnormify(model, to)
    for layer, device in zip(model, ("cpu", "meta")):
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {device}


# ------------------------------------------------------------------------------------------- again, and back and forth


@each_of_ours
def test_converting_twice_changes_nothing_more(to):
    model = train(batchnormify(tangle(), to), [images()])
    before, classes = buffers_of(model), [type(module) for module in model.modules()]
    assert_identical(buffers_of(batchnormify(model, to)), before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(("source", "to"), list(itertools.product(TARGETS, TARGETS)))
@pytest.mark.parametrize("steps", [0, 3], ids=["untrained", "trained"])
def test_evaluation_is_the_same_from_each_target_to_each_other(source, to, steps):
    model = train(batchnormify(tangle(), source), [images(seed=seed) for seed in range(steps)])
    expected = evaluate(model, images(seed=9))
    torch.testing.assert_close(evaluate(batchnormify(model, to), images(seed=9)), expected, rtol=1e-5, atol=1e-5)


def test_evaluation_is_the_same_along_a_walk_through_all_conversions_with_training_in_between():
    model, targets = tangle(), ("precise", "running", "torch", "running", "precise", "torch", "precise")
    for seed, to in enumerate(targets):
        train(model, [images(seed=seed)])
        expected = evaluate(model, images(seed=99))
        torch.testing.assert_close(evaluate(batchnormify(model, to), images(seed=99)), expected, rtol=1e-5, atol=1e-5)


@each_of_ours
def test_way_back_restores_names_shapes_and_dtypes_of_the_state_dict(to):
    model = tangle()
    before = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    train(batchnormify(model, to), [images()])
    after = {name: (value.shape, value.dtype) for name, value in batchnormify(model, "torch").state_dict().items()}
    assert list(after.items()) == list(before.items())


@each_of_ours
def test_way_back_without_training_restores_every_bit(to):
    model = tangle()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batchnormify(batchnormify(model, to), "torch")
    assert_identical(dict(model.state_dict()), before)


@each_of_ours
def test_way_back_leaves_no_attributes_behind(to):
    layer = nn.BatchNorm2d(3)
    before = set(vars(layer))
    train(batchnormify(layer, to), [noise((4, 3, 2, 2), 0)])
    assert set(vars(batchnormify(layer, "torch"))) == before


@each_of_ours
def test_layer_that_came_back_trains_as_batchnorm(to):
    layer = batchnormify(batchnormify(pretrained(nn.BatchNorm2d(3, momentum=0.1)), to), "torch")
    twin = pretrained(nn.BatchNorm2d(3, momentum=0.1))
    x = noise((4, 3, 2, 2), 0)
    assert_identical(training_step(layer, x), training_step(twin, x))
    assert_identical(buffers_of(layer), buffers_of(twin))


@each_of_ours
@each_copy
def test_copy_of_a_converted_model_trains_like_it(to, duplicate):
    model = train(batchnormify(tangle(), to), [images()])
    twin = duplicate(model)
    assert_identical(training_step(twin, images(seed=1)), training_step(model, images(seed=1)))


@each_of_ours
@each_copy
def test_copy_of_a_converted_model_finds_its_way_back(to, duplicate):
    twin = batchnormify(duplicate(batchnormify(tangle(), to)), "torch")
    assert [type(module) for module in twin.modules()] == [type(module) for module in tangle().modules()]
