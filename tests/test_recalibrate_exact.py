"""update_bn_stats against moments computed apart from it, in float64: any kind of layer, any split of the data."""

import pytest
import torch
from cases import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from models import pretrained
from recalibration_models import (
    SIZES,
    ChannelsLastBatchNorm,
    DroppingBatchNormAct2d,
    OwnArithmetic,
    Rebinding,
    assert_statistics,
    correction_of,
    in_rows,
    inputs_by_batch,
    mlp,
    moments,
    pictures,
    recalibrated,
    reference,
    residual,
    rows,
    statistics,
)
from torch import Tensor, nn

from runningbn import (
    PreciseBatchNorm1d,
    PreciseBatchNorm2d,
    PreciseBatchNorm3d,
    RunningBatchNorm,
    batchnormify,
    update_bn_stats,
)

# ----------------------------------------------------------------------------------------------------- kinds of layers

FLAT, SERIES, IMAGES, VOLUMES = (4,), (4, 6), (4, 3, 5), (4, 2, 3, 2)
LAYERS = {
    "1d": (nn.BatchNorm1d, FLAT),
    "1d series": (nn.BatchNorm1d, SERIES),
    "2d": (nn.BatchNorm2d, IMAGES),
    "3d": (nn.BatchNorm3d, VOLUMES),
    "sync flat": (nn.SyncBatchNorm, FLAT),
    "sync": (nn.SyncBatchNorm, IMAGES),
    "act": (DroppingBatchNormAct2d, IMAGES),
    "own": (OwnArithmetic, IMAGES),
    "rebinding": (Rebinding, IMAGES),
    "precise1d": (PreciseBatchNorm1d, SERIES),
    "precise2d": (PreciseBatchNorm2d, IMAGES),
    "precise3d": (PreciseBatchNorm3d, VOLUMES),
    "running": (RunningBatchNorm, IMAGES),
    "running flat": (RunningBatchNorm, FLAT),
}
each_layer = pytest.mark.parametrize(("cls", "shape"), LAYERS.values(), ids=LAYERS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def inputs(shape: tuple[int, ...], sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    data = noise((sum(sizes), *shape), 0)
    scale = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    return list((data * scale + 3 * scale - 4).split(sizes))


@each_layer
@each_mode
def test_layer_gets_the_moments_of_its_input(cls, shape, training):
    layer = pretrained(cls(shape[0])).train(training)
    data = inputs(shape)
    mean, var = moments(in_rows(torch.cat(data)), correction_of(layer))
    update_bn_stats(layer, data)
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=0)


@each_layer
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no affine"])
def test_two_layers_in_a_row(cls, shape, affine):
    if cls in (OwnArithmetic, Rebinding) and not affine:
        pytest.skip("needs its weight")
    model = pretrained(nn.Sequential(cls(shape[0], affine=affine), nn.Tanh(), cls(shape[0], affine=affine)))
    data = inputs(shape)
    twin = nn.Sequential(plain(model[0]), nn.Tanh(), plain(model[2]))
    if cls is DroppingBatchNormAct2d:
        twin.insert(1, nn.ReLU())
    parts = [torch.cat(seen) for seen in inputs_by_batch(twin, data).values()]
    expected = {name: moments(seen, correction_of(model[0])) for name, seen in zip(("0", "2"), parts)}
    assert_statistics(recalibrated(model, data), expected)


def plain(layer: nn.Module) -> nn.Module:
    """nn.BatchNorm with the layer's parameters, which inputs_by_batch then computes."""
    twin = nn.BatchNorm1d(layer.num_features, eps=layer.eps, affine=layer.affine)
    twin.load_state_dict({name: value for name, value in layer.state_dict().items() if name in twin.state_dict()})
    return twin


def test_layer_that_permutes_gets_the_moments_per_last_dimension():
    layer = ChannelsLastBatchNorm(3)
    x = rows(60, 3).reshape(10, 6, 3)
    update_bn_stats(layer, x.split(4))
    mean, var = moments(rows(60, 3).double())
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=0)


class Casting(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(input=x.float()).to(x.dtype)


def test_layer_that_casts_and_passes_its_input_by_keyword():
    layer, x = Casting(3), rows(64, 3).bfloat16()
    update_bn_stats(layer, x.split(10))
    mean, var = moments(x.double())
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=0)


class Deaf(nn.BatchNorm1d):
    """Neither calls torch's batch_norm nor updates its buffers."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_layer_of_unknown_ways_is_refused_by_name_and_can_be_left_out():
    model = pretrained(nn.Sequential(Deaf(3), nn.BatchNorm1d(3)))
    before = statistics(model)
    with pytest.raises((ValueError, RuntimeError), match="Deaf"):
        update_bn_stats(model, [rows(8, 3)])
    update_bn_stats(model, [rows(8, 3)], layers=["1"])
    assert torch.equal(statistics(model)["0"][0], before["0"][0])
    assert not torch.equal(statistics(model)["1"][0], before["1"][0])


# -------------------------------------------------------------------------------------------------------- whole models


def uneven(data: Tensor) -> tuple[Tensor, ...]:
    return data.split([5, 3, 40, 2, len(data) - 50])


@each_mode
def test_every_layer_of_a_perceptron(training):
    model, data = mlp(4).train(training), uneven(rows(120))
    expected = reference(model, data)
    assert_statistics(recalibrated(model, data), expected)


@each_mode
def test_every_layer_of_a_residual_net_with_dropout(training):
    model, data = residual(blocks=2).train(training), uneven(pictures(64))
    expected = reference(model, data)
    assert_statistics(recalibrated(model, data), expected)


@pytest.mark.parametrize("to", ["running", "precise"])
def test_every_layer_of_a_converted_net_in_its_convention(to):
    model, data = residual(), uneven(pictures(64))
    seen = inputs_by_batch(model, data)
    batchnormify(model, to)
    expected = {name: moments(torch.cat(parts), 0 if to == "running" else 1) for name, parts in seen.items()}
    assert_statistics(recalibrated(model, data), expected)


def test_statistics_before_do_not_matter():
    data = uneven(rows(120))
    model, other = mlp(), mlp()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.fill_(77)
            module.running_var.fill_(1e-3)
    assert_statistics(recalibrated(model, data), statistics(recalibrated(other, data)), tolerance=0)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum_does_not_matter(momentum):
    layer = nn.BatchNorm1d(5, momentum=momentum)
    expected = reference(layer, [rows(30)])
    assert_statistics(recalibrated(layer, rows(30).split(10)), expected)
    assert layer.momentum == momentum


# ---------------------------------------------------------------------------------------------------- how data is split


@each_layer
@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1], (128,), (64, 64), (32,) * 4, (2,) * 64, (96, 4, 28)], ids=str)
def test_statistics_do_not_depend_on_the_split(cls, shape, sizes):
    data, layer = torch.cat(inputs(shape)), cls(shape[0])
    mean, var = moments(in_rows(data), correction_of(layer))
    update_bn_stats(layer, data.split(sizes))
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1), st.integers(0, 99))
def test_statistics_do_not_depend_on_any_split(sizes, seed):
    data = rows(sum(sizes), 3, seed)
    layer = recalibrated(nn.BatchNorm1d(3), data.split(sizes))
    assert_statistics(layer, {"": moments(data.double())})


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(8)), st.sampled_from([nn.BatchNorm2d, RunningBatchNorm]))
def test_statistics_do_not_depend_on_the_order_of_batches(order, cls):
    batches = [pictures(1 + i, 3, seed=i) for i in range(8)]
    one = recalibrated(cls(3), batches)
    other = recalibrated(cls(3), [batches[i] for i in order])
    assert_statistics(one, statistics(other), tolerance=1e-6)


def test_class_sorted_loader_keeps_the_variance_between_classes():
    classes = [rows(20, seed=i) + 30 * i for i in range(10)]
    layer = recalibrated(nn.BatchNorm1d(5), classes)
    expected = moments(torch.cat(classes).double())
    assert expected[1].min() > 5000
    assert_statistics(layer, {"": expected})


def test_batches_of_96_and_4_weigh_by_their_elements():
    batches = [rows(96), rows(4, seed=1) + 50]
    layer = recalibrated(nn.BatchNorm1d(5), batches)
    assert_statistics(layer, {"": moments(torch.cat(batches).double())})


def test_pictures_of_different_sizes_weigh_by_their_pixels():
    batches = [pictures(2, 3), pictures(3, 9, seed=1) + 4, pictures(1, 1, seed=2)]
    layer = recalibrated(nn.BatchNorm2d(3), batches)
    assert_statistics(layer, {"": moments(torch.cat([in_rows(x) for x in batches]))})
