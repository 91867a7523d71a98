"""Pruning tools set the tensors of a layer one after the other: the state follows once they agree."""

import itertools

import pytest
import torch
from cases import noise
from models import each_of_ours, pretrained
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import Tensor, nn

from runningbn import batchnormify

KEPT = [0, 2, 5]
PARTS = ("num_features", "running_mean", "running_var", "weight", "bias")


def images(seed: int, channels: int) -> Tensor:
    return noise((4, channels, 3, 3), seed)


def prune(layer: nn.Module, order: tuple[str, ...]) -> nn.Module:
    for name in order:
        if name == "num_features":
            layer.num_features = len(KEPT)
        elif name in ("running_mean", "running_var"):
            setattr(layer, name, getattr(layer, name)[KEPT])
        else:
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[KEPT]))
    return layer


def wide(to: str) -> nn.Module:
    return train(batchnormify(pretrained(nn.BatchNorm2d(8)), to), [images(0, 8)])


@each_of_ours
@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)), ids="-".join)
def test_any_order_gives_the_layer_that_was_seeded_with_what_is_left(to, order):
    layer = wide(to)
    expected = batchnormify(nn.BatchNorm2d(len(KEPT)), to)
    expected.num_batches_tracked.copy_(layer.num_batches_tracked)
    for name in ("running_mean", "running_var"):
        setattr(expected, name, layer.get_buffer(name)[KEPT])
    for name in ("weight", "bias"):
        setattr(expected, name, nn.Parameter(getattr(layer, name).detach()[KEPT]))
    prune(layer, order)
    assert_identical(buffers_of(layer), buffers_of(expected))
    assert_identical(training_step(layer, images(1, 3)), training_step(expected, images(1, 3)))


@each_of_ours
def test_evaluation_is_that_of_the_channels_that_are_left(to):
    layer, x = wide(to), images(1, 8)
    expected = evaluate(layer, x)[:, KEPT]
    torch.testing.assert_close(evaluate(prune(layer, PARTS), x[:, KEPT]), expected)


@each_of_ours
def test_a_pruned_layer_goes_back_to_torch_and_through_a_checkpoint(to):
    layer, other = prune(wide(to), PARTS), prune(wide(to), PARTS[::-1])
    other.load_state_dict(train(layer, [images(2, 3)]).state_dict())
    x = images(3, 3)
    expected = evaluate(layer, x)
    assert torch.equal(evaluate(other, x), expected)
    torch.testing.assert_close(evaluate(batchnormify(other, "torch"), x), expected)


@each_of_ours
@pytest.mark.parametrize("way", ["attributes", "data"])
def test_a_layer_that_is_half_resized_says_so_and_changes_nothing(to, way):
    layer = wide(to)
    layer.num_features = 3
    layer.weight, layer.bias = (nn.Parameter(p.detach()[KEPT]) for p in (layer.weight, layer.bias))
    if way == "attributes":
        layer.running_mean = layer.running_mean[KEPT]
    else:
        layer.running_mean.data, layer.running_var.data = layer.running_mean[KEPT], layer.running_var[KEPT]
    before = buffers_of(layer)
    with pytest.raises(RuntimeError, match=r"assign running_mean and running_var as attributes, not their \.data"):
        layer(images(1, 3))
    assert_identical(buffers_of(layer), before)


@each_of_ours
def test_reset_follows_the_new_size(to):
    layer = prune(wide(to), PARTS)
    layer.reset_running_stats()
    assert {tuple(buffer.shape) for name, buffer in layer.named_buffers() if name != "num_batches_tracked"} == {(3,)}
    assert layer(images(1, 3)).isfinite().all()
