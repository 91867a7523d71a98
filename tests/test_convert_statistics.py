"""batchnormify: the statistics it takes over, how much they weigh against later batches, and their dtypes."""

import math

import pytest
import torch
from cases import each_dtype, noise, statistics_dtype
from models import each_of_ours, pretrained, small_net
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import Tensor, nn

from runningbn import Horizon, RunningBatchNorm, SquareRoot, batchnormify

SEEN = 17  # batches that `pretrained` layers have tracked
# The momentum, and the weight of a batch of N samples t batches after the conversion.
WEIGHTS = {
    "float": (0.3, lambda n, t: 0.3),
    "none": (None, lambda n, t: 1 / (SEEN + t + 1)),
    "sqrt": (SquareRoot(0.1), lambda n, t: 1 - 0.9 / math.sqrt(n - 1)),
    # A layer that was trained elsewhere has its full horizon at once.
    "horizon": (Horizon(samples=64, start=2), lambda n, t: -math.expm1(-n / 64)),
}
each_rule = pytest.mark.parametrize(("momentum", "weight"), WEIGHTS.values(), ids=WEIGHTS)


def batches(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [noise((size, 3, 4, 4), seed, dtype) * 2 + 1 for seed, size in enumerate(sizes)]


def expected_statistics(
    layer: nn.Module, sizes: tuple[int, ...], weight, whole_batches: bool, bessel: bool
) -> tuple[Tensor, Tensor]:
    """Running mean and variance of the layer after these batches, by the moments of a mixture.

    The past counts as if it had been batches of the first one's size, so after the first batch, which weighs its
    momentum a, a batch of n elements has the share a·n / ((1 − a)·n_first + a·n), or a where batches weigh as a whole.
    """
    mean, var = layer.running_mean.double().clone(), layer.running_var.double().clone()
    count, count_sqrs = 16.0 * sizes[0], 0.0
    for t, x in enumerate(batches(sizes)):
        a, n = weight(len(x), t), 16 * len(x)
        gain = a * count / n if whole_batches else a
        share = gain * n / ((1 - a) * count + gain * n)
        batch_var, batch_mean = torch.var_mean(x, (0, 2, 3), correction=0)
        var = (1 - share) * var + share * batch_var + share * (1 - share) * (batch_mean - mean) ** 2
        mean = (1 - share) * mean + share * batch_mean
        count, count_sqrs = (1 - a) * count + gain * n, (1 - a) ** 2 * count_sqrs + gain**2 * n
    return mean, var / (1 - count_sqrs / count**2) if bessel else var


@each_of_ours
@each_rule
@pytest.mark.parametrize("sizes", [(5,), (5, 3), (5, 3, 8)], ids=["first batch", "second batch", "third batch"])
def test_batches_after_the_conversion_weigh_their_momentum(to, momentum, weight, sizes):
    layer = pretrained(nn.BatchNorm2d(3, dtype=torch.float64))
    mean, var = expected_statistics(layer, sizes, weight, isinstance(momentum, Horizon), bessel=to == "precise")
    train(batchnormify(layer, to, momentum=momentum), batches(sizes))
    # float64 rounding of some dozen operations on numbers around 1
    torch.testing.assert_close(layer.running_mean, mean, rtol=0.0, atol=1e-14)
    torch.testing.assert_close(layer.running_var, var, rtol=0.0, atol=1e-13)


@each_of_ours
@each_rule
def test_first_batch_after_the_conversion_weighs_exactly_its_momentum_in_the_mean(to, momentum, weight):
    layer = pretrained(nn.BatchNorm2d(3, dtype=torch.float64))
    before, (x,) = layer.running_mean.clone(), batches((5,))
    train(batchnormify(layer, to, momentum=momentum), [x])
    share = (layer.running_mean - before) / (x.mean((0, 2, 3)) - before)
    torch.testing.assert_close(share, torch.full_like(share, weight(5, 0)), rtol=1e-12, atol=0.0)


@each_of_ours
def test_conversion_keeps_the_statistics_bit_for_bit(to):
    layer = pretrained(nn.BatchNorm2d(3))
    expected = buffers_of(layer)
    batchnormify(layer, to)
    assert_identical({name: buffers_of(layer)[name] for name in expected}, expected)


def test_running_layer_normalises_its_first_training_batch_by_what_it_took_over():
    # A momentum of 0 leaves the statistics as they are, so training has to give what evaluation gives.
    layer = batchnormify(pretrained(nn.BatchNorm2d(3, dtype=torch.float64)), momentum=0.0)
    (x,) = batches((5,))
    expected = evaluate(layer, x)
    torch.testing.assert_close(training_step(layer, x)["y"], expected, rtol=0.0, atol=1e-13)


def test_taken_over_variance_is_not_clamped():
    layer = nn.BatchNorm2d(3)
    layer.running_var.fill_(1e-4)
    batchnormify(layer, momentum=0.1)
    train(layer, [torch.zeros(1, 3, 4, 4)])
    # The batch has variance 0 and weighs 0.1, and both means are 0.
    torch.testing.assert_close(layer.running_var, torch.full((3,), 0.9e-4))


@each_of_ours
@pytest.mark.parametrize("momentum", [0.1, None, Horizon()], ids=repr)
def test_fresh_batchnorm_becomes_a_fresh_layer(to, momentum):
    layer = batchnormify(nn.BatchNorm2d(3), to, momentum=momentum)
    fresh = type(layer)(3, momentum=momentum)
    assert_identical(buffers_of(layer), buffers_of(fresh))


@each_of_ours
def test_fresh_batchnorm_trains_as_a_fresh_layer(to):
    layer = batchnormify(nn.BatchNorm2d(3), to)
    fresh = type(layer)(3, momentum=layer.momentum)
    for x in batches((5, 3, 8), torch.float32):
        assert_identical(training_step(layer, x), training_step(fresh, x))
    assert_identical(buffers_of(layer), buffers_of(fresh))


@each_of_ours
def test_statistics_at_their_defaults_are_taken_over_once_a_batch_was_tracked(to):
    layer = nn.BatchNorm2d(3, momentum=0.1)
    layer.num_batches_tracked.fill_(1)
    (x,) = batches((5,), torch.float32)
    train(batchnormify(layer, to, momentum=0.1), [x])
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)))


def test_running_and_precise_hand_each_other_their_whole_state():
    layer = train(batchnormify(pretrained(nn.BatchNorm2d(3))), batches((5, 3), torch.float32))
    shared = ("shift", "sums", "sqrs", "count", "count_sqrs", "debias", "samples", "steps")
    expected = {name: buffers_of(layer)[name] for name in shared}
    batchnormify(layer, "precise")
    assert_identical({name: buffers_of(layer)[name] for name in shared}, expected)


def test_running_layer_starts_its_backward_sums_anew():
    # The sums belong to gradients that another layer's training does not go on with.
    layer = train(batchnormify(nn.BatchNorm2d(3)), batches((5, 3), torch.float32))
    batchnormify(batchnormify(layer, "precise"), "running")
    for name in ("sum_dy", "sum_dy_xhat", "count_dy"):
        torch.testing.assert_close(getattr(layer, name), torch.zeros(3), rtol=0.0, atol=0.0)


# ----------------------------------------------------------------------------------------------------------- dtypes


@each_of_ours
@each_dtype(torch.float16, torch.bfloat16, torch.float32, torch.float64)
def test_statistics_are_at_least_float32_and_parameters_stay_as_they_are(to, dtype):
    layer = batchnormify(nn.BatchNorm2d(3, dtype=dtype), to)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {b.dtype for name, b in layer.named_buffers() if name != "num_batches_tracked"} == {statistics_dtype(dtype)}


@each_of_ours
@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_layer_evaluates_as_before(to, dtype):
    layer, x = pretrained(nn.BatchNorm2d(3, dtype=dtype)), noise((4, 3, 2, 2), 0, dtype)
    expected = evaluate(layer, x)
    # Both kernels work in float32 on the same numbers and round to 16 bits once, at worst to either side.
    torch.testing.assert_close(evaluate(batchnormify(layer, to), x), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@each_of_ours
def test_each_layer_of_a_mixed_model_returns_to_its_own_dtype(to):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    model = nn.Sequential(*[nn.BatchNorm2d(3, dtype=dtype) for dtype in dtypes])
    batchnormify(batchnormify(model, to), "torch")
    assert [(layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype) for layer in model] == [
        (dtype,) * 3 for dtype in dtypes
    ]


@each_of_ours
def test_statistics_return_in_the_dtype_of_the_weight_after_the_model_was_halved(to):
    layer = train(batchnormify(pretrained(nn.BatchNorm2d(3)), to), batches((5,), torch.float32))
    batchnormify(layer.half(), "torch")
    assert (layer.running_mean.dtype, layer.running_var.dtype) == (torch.float16, torch.float16)


@each_of_ours
def test_statistics_without_a_weight_return_in_their_own_dtype(to):
    layer = nn.BatchNorm2d(3, affine=False, dtype=torch.float64)
    batchnormify(batchnormify(layer, to), "torch")
    assert (layer.running_mean.dtype, layer.running_var.dtype) == (torch.float64, torch.float64)


@each_of_ours
def test_plain_batchnorm_is_not_cast_by_a_conversion_to_torch(to):
    # Mixed precision by hand: half parameters beside float32 statistics are the user's choice.
    layer = pretrained(nn.BatchNorm2d(3))
    layer.weight.data, layer.bias.data = layer.weight.half(), layer.bias.half()
    assert batchnormify(layer, "torch").running_mean.dtype == torch.float32


def test_conversion_to_torch_leaves_torchs_layers_bit_for_bit():
    model = small_net()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    batchnormify(model, "torch")
    assert_identical(dict(model.state_dict()), expected)
    assert model[1].momentum == 0.1


@each_of_ours
def test_converted_running_batchnorm_is_not_a_parameter_short(to):
    model = batchnormify(small_net(), to)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in small_net().named_parameters()]


def test_native_layer_seeds_like_a_converted_one():
    converted = batchnormify(pretrained(nn.BatchNorm2d(3)))
    native = RunningBatchNorm(3)
    native.load_state_dict(pretrained(nn.BatchNorm2d(3)).state_dict())
    assert_identical(buffers_of(native), buffers_of(converted))


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_buffers_made_in_inference_mode_are_no_inference_tensors(to, dtype):
    layer, other = (pretrained(nn.BatchNorm2d(3, dtype=dtype)) for _ in range(2))
    x = noise((4, 3, 5, 5), 0, dtype)
    with torch.inference_mode():
        batchnormify(layer, to)
    batchnormify(other, to)
    layer.load_state_dict(layer.state_dict())
    assert_identical(training_step(layer, x), training_step(other, x))
    assert_identical(buffers_of(layer), buffers_of(other))
    with torch.inference_mode():
        batchnormify(layer, "torch")
    assert not any(buffer.is_inference() for buffer in layer.buffers())
