"""The buffers as attributes: assigned, written in place, reset, cast, copied, averaged, swapped, on the meta device."""

import copy

import pytest
import torch
from cases import LAYERS, LayerCase, assert_near, each, each_dtype, noise
from copies import each_copy
from steps import assert_identical, buffers_of, evaluate, train, trained, training_step
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn

from runningbn import PreciseBatchNorm2d, RunningBatchNorm
from runningbn.ops.state import Sums, moments, unbiased

each_class = pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)


def images(batch_size: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise((batch_size, 3, 2, 2), seed, dtype) * 2 + 1


def trained_layer(cls: type[nn.Module], **kwargs) -> nn.Module:
    return train(cls(3, **kwargs), [images(seed=seed) for seed in range(3)])


def reference_evaluation(layer: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """y by the definition, float32 in and out."""
    mean, var, weight, bias = (v.detach()[:, None, None] for v in (mean, var, layer.weight, layer.bias))
    return (x - mean) / (var + layer.eps).sqrt() * weight + bias


# ------------------------------------------------------------------------------------------- assigned and written

MEAN, VAR = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25, 4.0, 1.0])


@each_class
def test_replaced_statistics_are_those_of_the_sums(cls):
    """So that the next batch is pooled with them; the variance in the convention of the layer."""
    layer = trained_layer(cls)
    layer.replace_statistics(MEAN, VAR)
    mean, var = moments(Sums(layer.shift, layer.sums, layer.sqrs, layer.count))
    if cls is not RunningBatchNorm:
        var = unbiased(var, layer.count, layer.count_sqrs)
    torch.testing.assert_close(mean, MEAN)
    torch.testing.assert_close(var, VAR)


def assign(layer: nn.Module) -> nn.Module:
    # Clones, since a layer goes on with the tensor that it is given, as torch's do.
    layer.running_mean, layer.running_var = MEAN.clone(), VAR.clone()
    return layer


@each_class
def test_assigned_statistics_are_what_evaluation_normalises_by(cls):
    layer = assign(trained_layer(cls))
    torch.testing.assert_close(evaluate(layer, images()), reference_evaluation(layer, images(), MEAN, VAR))


@each_class
def test_assigned_statistics_seed_the_state(cls):
    layer = assign(trained_layer(cls, momentum=0.25))
    train(layer, [images()])
    torch.testing.assert_close(layer.running_mean, 0.75 * MEAN + 0.25 * images().mean((0, 2, 3)))


@each_class
def test_assigning_one_statistic_keeps_the_other(cls):
    layer = trained_layer(cls)
    var = layer.running_var.clone()
    layer.running_mean = MEAN.clone()
    assert torch.equal(layer.running_mean, MEAN)
    assert torch.equal(layer.running_var, var)


@each_class
def test_assigned_tensor_is_cast_to_the_dtype_of_the_state(cls):
    layer = cls(3)
    layer.running_mean = MEAN.half()
    assert layer.running_mean.dtype == torch.float32


@each_class
def test_assigned_tensor_leaves_its_autograd_history_behind(cls):
    layer = cls(3)
    layer.running_var = VAR.clone().requires_grad_() * 2
    assert not layer.running_var.requires_grad


@each_class
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(), (3, 1)], ids=str)
def test_assigned_statistics_of_a_wrong_shape_are_refused_and_change_nothing(cls, name, shape):
    layer = trained_layer(cls)
    before = buffers_of(layer)
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(3,\)"):
        setattr(layer, name, torch.ones(shape))
    assert_identical(buffers_of(layer), before)


@each_class
def test_statistics_written_in_place_count_for_evaluation(cls):
    layer = trained_layer(cls)
    layer.running_mean.copy_(MEAN)
    layer.running_var.copy_(VAR)
    torch.testing.assert_close(evaluate(layer, images()), reference_evaluation(layer, images(), MEAN, VAR))


@each_class
def test_statistics_written_in_place_are_overwritten_by_the_next_training_step(cls):
    layer, untouched = trained_layer(cls), trained_layer(cls)
    layer.running_mean.copy_(MEAN)
    layer.running_var.copy_(VAR)
    assert_identical(training_step(layer, images(seed=9)), training_step(untouched, images(seed=9)))
    assert_identical(buffers_of(layer), buffers_of(untouched))


# ------------------------------------------------------------------------------------------------------------- reset


@each(LAYERS)
def test_reset_gives_the_buffers_of_a_new_layer(case: LayerCase):
    layer = trained(case)
    layer.reset_running_stats()
    assert_identical(buffers_of(layer), buffers_of(case.layer()))


@each(LAYERS)
def test_reset_layer_trains_as_a_new_one(case: LayerCase):
    layer, new = trained(case), case.layer()
    layer.reset_running_stats()
    for seed in (10, 11, 12):
        assert_identical(training_step(layer, case.input(4, seed)), training_step(new, case.input(4, seed)))
    assert_identical(buffers_of(layer), buffers_of(new))


@each_class
def test_a_layer_without_statistics_takes_new_ones(cls):
    layer, expected = cls(3), cls(3)
    training_step(layer, noise((8, 3, 4, 4), 0))
    mean, var = layer.running_mean, layer.running_var
    layer.running_mean = layer.running_var = None
    assert layer.state_dict().keys() == {"weight", "bias", "num_batches_tracked"}
    assert layer(noise((8, 3, 4, 4), 1)).isfinite().all()
    expected.num_batches_tracked.fill_(1)
    for new in (layer, expected):
        new.running_mean, new.running_var = mean, var
    assert_identical(dict(layer.state_dict()), dict(expected.state_dict()))
    for new in (layer, expected):
        new.zero_grad()
        training_step(new, noise((8, 3, 4, 4), 2))
    assert_identical(dict(layer.state_dict()), dict(expected.state_dict()))


@each_class
def test_reset_of_seeded_statistics_forgets_them(cls):
    layer = cls(3)
    assign(layer)
    layer.reset_running_stats()
    assert_identical(buffers_of(layer), buffers_of(cls(3)))


@each_class
def test_reset_without_statistics_does_nothing(cls):
    layer = cls(3, track_running_stats=False)
    layer.reset_running_stats()
    assert buffers_of(layer) == {}


# ------------------------------------------------------------------------------------------------------------ dtypes

HALVE = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "to-float16": lambda layer: layer.to(torch.float16),
    "to-bfloat16": lambda layer: layer.to(dtype=torch.bfloat16),
}
each_way_to_halve = pytest.mark.parametrize("halve", HALVE.values(), ids=HALVE)


@each_class
@each_way_to_halve
def test_halving_leaves_the_state_bit_for_bit(cls, halve):
    layer = trained_layer(cls)
    expected = buffers_of(layer)
    assert_identical(buffers_of(halve(layer)), expected)


@each_class
@each_way_to_halve
def test_halving_casts_the_parameters(cls, halve):
    assert all(parameter.element_size() == 2 for parameter in halve(cls(3)).parameters())


@each_class
def test_double_keeps_every_value_and_makes_the_state_float64(cls):
    layer = trained_layer(cls)
    expected = {name: b if name == "num_batches_tracked" else b.double() for name, b in buffers_of(layer).items()}
    assert_identical(buffers_of(layer.double()), expected)


@each_class
def test_double_and_back_keeps_every_bit(cls):
    layer = trained_layer(cls)
    expected = buffers_of(layer)
    assert_identical(buffers_of(layer.double().float()), expected)


@each_class
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_layer_gives_the_float32_result_rounded(cls, training, dtype):
    x = images(seed=9, dtype=dtype)
    layer, wide = trained_layer(cls).train(training), trained_layer(cls).train(training)
    y = layer.to(dtype)(x)
    assert y.dtype == dtype
    # weight 1 and bias 0 are the same numbers in all dtypes, so the last rounding is the only difference.
    torch.testing.assert_close(y.float(), wide(x.float()), rtol=torch.finfo(dtype).eps, atol=1e-5)


@each_class
@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_gradients_are_the_float32_ones_rounded(cls, dtype):
    x, dy = images(seed=9, dtype=dtype), noise((5, 3, 2, 2), seed=5, dtype=dtype)
    step = training_step(trained_layer(cls).to(dtype), x, dy)
    expected = training_step(trained_layer(cls), x.float(), dy.float())
    assert {value.dtype for value in step.values()} == {dtype}
    for name in ("dx", "dweight", "dbias"):
        # dx is a sum of three terms of about its own size, each rounded by itself.
        assert_near(step[name], expected[name], roundings=4)


@each_class
@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_training_advances_the_state_as_float32_does(cls, dtype):
    layer, wide = trained_layer(cls).to(dtype), trained_layer(cls)
    x = images(seed=9, dtype=dtype)
    layer(x)
    wide(x.float())
    for name, value in buffers_of(wide).items():
        torch.testing.assert_close(buffers_of(layer)[name], value, rtol=1e-5, atol=1e-5)


@each_class
def test_float32_layer_takes_half_precision_inputs(cls):
    layer = trained_layer(cls)
    y = layer(images(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ copies


@each(LAYERS)
@each_copy
def test_copy_right_after_a_training_forward_trains_like_its_original(case: LayerCase, duplicate):
    layer = trained(case)
    layer(case.input(4, 20).requires_grad_())  # a forward that no backward has followed yet
    twin = duplicate(layer)
    for seed in (10, 11):
        assert_identical(training_step(twin, case.input(4, seed)), training_step(layer, case.input(4, seed)))
    assert_identical(buffers_of(twin), buffers_of(layer))


@each_class
@each_copy
def test_copy_shares_no_buffer_with_its_original(cls, duplicate):
    layer = trained_layer(cls)
    twin = duplicate(layer)
    before = buffers_of(layer)
    train(twin, [images(seed=9)])
    assert_identical(buffers_of(layer), before)


# --------------------------------------------------------------------------------------------------- weight averaging


@each_class
def test_averaged_model_follows_the_buffers_of_the_model(cls):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), trained_layer(cls))
    average = AveragedModel(model, use_buffers=False)
    for seed in range(3):
        training_step(model, images(seed=seed))
        average.update_parameters(model)
    assert_identical(buffers_of(average.module), buffers_of(model))


@each_class
def test_averaged_model_averages_the_buffers_where_asked_to(cls):
    model = trained_layer(cls)
    average, snapshots = AveragedModel(model, use_buffers=True), []
    for seed in range(3):
        training_step(model, images(seed=seed))
        average.update_parameters(model)
        snapshots.append(buffers_of(model))
    for name in ("running_mean", "running_var", "sums", "sqrs", "count"):
        expected = torch.stack([snapshot[name] for snapshot in snapshots]).mean(0)
        torch.testing.assert_close(getattr(average.module, name), expected, rtol=1e-5, atol=1e-5)


@each_class
def test_averaged_buffers_of_a_seeded_layer_are_finite_and_train_on(cls):
    # A seeded layer counts as settled by a huge number of samples, of which averaging takes differences.
    model = assign(cls(3))
    average = AveragedModel(model, use_buffers=True)
    for seed in range(3):
        training_step(model, images(seed=seed))
        average.update_parameters(model)
    step = training_step(average.module, images(seed=9))
    assert all(value.isfinite().all() for value in (*step.values(), *buffers_of(average).values()))


@each_class
def test_update_bn_pools_the_statistics_of_the_loader(cls):
    layer, loader = trained_layer(cls), [images(n, seed) for seed, n in enumerate((5, 3, 8))]
    momentum = layer.momentum
    update_bn(loader, layer)
    var, mean = torch.var_mean(torch.cat(loader), (0, 2, 3), correction=0 if cls is RunningBatchNorm else 1)
    torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var), rtol=1e-5, atol=1e-5)
    assert layer.momentum == momentum


# --------------------------------------------------------------------------------------------------- functional calls


@each(LAYERS)
def test_functional_call_gives_what_the_layer_gives_and_updates_the_buffers_it_was_given(case: LayerCase):
    layer, twin, x = trained(case), trained(case), case.input(4, 20)
    before, buffers = buffers_of(layer), buffers_of(layer)
    y = functional_call(layer, {**dict(layer.named_parameters()), **buffers}, (x,))
    assert torch.equal(y, twin(x))
    assert_identical(buffers, buffers_of(twin))
    assert_identical(buffers_of(layer), before)


# ------------------------------------------------------------------------------------------------------- meta device


@each(LAYERS)
def test_layer_is_built_on_the_meta_device(case: LayerCase):
    layer = case.layer(device="meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


@each(LAYERS)
def test_layer_is_built_under_a_device_context(case: LayerCase):
    with torch.device("meta"):
        layer = case.constructor(case.channels, **case.kwargs)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


@each(LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_and_backward_run_on_the_meta_device(case: LayerCase, training):
    # Meta tensors hold no values: this fails wherever a step looks at one.
    layer = case.layer(device="meta").train(training)
    step = training_step(layer, case.input(4).to("meta"), case.input(4).to("meta"))
    assert step["y"].shape == step["dx"].shape == case.input(4).shape
    assert step["y"].is_meta


@each_class
def test_layer_leaves_the_meta_device_empty_and_is_reset_there(cls):
    layer = cls(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_identical(dict(layer.state_dict()), dict(cls(3).state_dict()))


@each_class
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_are_not_assigned_alone_to_a_layer_on_the_meta_device(cls, name):
    # What seeds the state from them would look at values that are not there.
    layer = cls(3, device="meta")
    with pytest.raises(RuntimeError, match=rf"{name}: .* as a whole, by load_state_dict"):
        setattr(layer, name, torch.ones(3))
    assert getattr(layer, name).is_meta
    setattr(layer, name, torch.ones(3, device="meta"))


def test_a_replica_of_data_parallel_leaves_the_original_alone():
    # nn.DataParallel shares the buffers with a replica and then assigns copies to it, one by one.
    layer = RunningBatchNorm(3)
    layer(noise((8, 3, 4), 0))
    before = copy.deepcopy(layer)
    replica = layer._replicate_for_data_parallel()
    for name, buffer in layer.named_buffers():
        setattr(replica, name, buffer.clone())
    for (name, buffer), expected, copied in zip(layer.named_buffers(), before.buffers(), replica.buffers()):
        assert torch.equal(buffer, expected), name
        assert torch.equal(copied, expected), name
