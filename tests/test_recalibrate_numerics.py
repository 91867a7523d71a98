"""update_bn_stats where plain sums lose their digits: large means, low precision, single samples, memory formats."""

import copy

import pytest
import torch
from cases import channels_last, noise
from recalibration_models import assert_statistics, in_rows, mlp, moments, pictures, recalibrated, reference, rows
from torch import nn

from runningbn import RunningBatchNorm, update_bn_stats

# Small, and large enough for what is chosen for large inputs.
SHAPES = {
    "rows": (64, 6),
    "many rows": (40000, 6),
    "series": (8, 6, 50),
    "images": (8, 6, 7, 7),
    "large images": (16, 6, 64, 64),
    "large channels": (8, 6, 300, 100),
    "volumes": (4, 6, 5, 5, 5),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def off_centre(shape: tuple[int, ...], centre: float, seed: int = 0) -> torch.Tensor:
    """Channels of spread 1 around the centre, on both sides of zero and at it."""
    signs = torch.tensor([1.0, -1.0, 0.0, 0.5, 2.0, 1.0]).view(-1, *[1] * (len(shape) - 2))
    return noise(shape, seed) + centre * signs


@each_shape
@pytest.mark.parametrize(("centre", "tolerance"), [(1e2, 3e-5), (1e3, 1e-4), (1e4, 1e-3), (1e5, 1e-2)])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_variance_of_data_far_from_zero(shape, centre, tolerance, last):
    if last and len(shape) < 4:
        pytest.skip("no such layout")
    batches = [off_centre(shape, centre, seed) for seed in range(3)]
    if last:
        batches = [channels_last(x) for x in batches]
    layer = recalibrated(NORMS[len(shape)](6), batches)
    mean, var = moments(torch.cat([in_rows(x) for x in batches]))
    assert ((layer.running_var - var).abs() <= tolerance * var).all()
    # Within some roundings of what went in.
    assert ((layer.running_mean - mean).abs() <= 4 * 2**-23 * mean.abs() + 1e-5).all()


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, RunningBatchNorm])
@pytest.mark.parametrize("size", [1, 2, 31])
def test_variance_of_small_batches_far_from_zero(cls, size):
    data = off_centre((62, 6, 2, 2), 1e4)
    layer = recalibrated(cls(6), data.split(size))
    var = moments(in_rows(data), correction=1 if cls is nn.BatchNorm2d else 0)[1]
    assert ((layer.running_var - var).abs() <= 1e-3 * var).all()


def test_batches_that_drift_far():
    batches = [noise((32, 3), seed) * 1e-2 + 100 * seed for seed in range(40)]
    assert_statistics(recalibrated(nn.BatchNorm1d(3), batches), {"": moments(torch.cat(batches).double())})


def test_first_batch_far_from_the_rest():
    """What a pivot is taken from must not matter."""
    batches = [noise((2, 3), 0) + 1e6, *(noise((500, 3), seed) for seed in range(1, 40))]
    assert_statistics(recalibrated(nn.BatchNorm1d(3), batches), {"": moments(torch.cat(batches).double())})


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_scale_does_not_matter(scale):
    batches = [x * scale for x in rows(100, 3).split(30)]
    assert_statistics(recalibrated(nn.BatchNorm1d(3), batches), {"": moments(torch.cat(batches).double())})


def test_constant_channel_has_variance_zero():
    layer = recalibrated(nn.BatchNorm2d(3), [torch.full((4, 3, 5, 5), 0.1)] * 5)
    assert layer.running_mean.eq(0.1).all()
    assert (layer.running_var.abs() < 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(32, 3), (8, 3, 8, 8)], ids=str)
def test_half_precision_average_of_400_batches_does_not_stagnate(dtype, shape):
    batches = [(noise(shape, seed) * 0.2 + 0.3).to(dtype) for seed in range(400)]
    layer = NORMS[len(shape)](3, dtype=dtype)
    update_bn_stats(layer, batches, None)
    mean, var = moments(torch.cat([in_rows(x) for x in batches]))
    assert torch.equal(layer.running_mean, mean.to(dtype))
    assert ((layer.running_var - var).abs() <= torch.finfo(dtype).eps / 2 * 1.01 * var).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_far_from_zero_is_exact_for_what_it_holds(dtype):
    batches = [(noise((64, 3), seed) * 8 + 1000).to(dtype) for seed in range(20)]
    layer = NORMS[2](3)
    update_bn_stats(layer.to(torch.float32), batches)
    mean, var = moments(torch.cat(batches).double())
    assert ((layer.running_mean - mean).abs() <= 1e-3 * var.sqrt()).all()
    assert ((layer.running_var - var).abs() <= 1e-3 * var).all()


@pytest.mark.parametrize("sizes", [(16, 16, 1), (1, 16, 16), (1, 1, 31), (16, 1, 16)], ids=str)
def test_single_samples_count_exactly(sizes):
    data = rows(33)
    report = update_bn_stats(model := mlp(1), data.split(sizes))
    assert_statistics(model, {"1": moments(mlp(1)[0](data).detach().double())})
    assert (report["1"].elements, report["1"].samples, report["1"].batches) == (33, 33, 3)


@pytest.mark.parametrize("tail", [1, 2])
def test_single_sample_reaches_deeper_layers_normalised_by_the_statistics_so_far(tail):
    model, data = mlp(2), rows(64 + tail)
    update_bn_stats(model, data.split([64, *[1] * tail]))
    mean, var = reference(mlp(2), [data[:64]])["1"]
    twin = mlp(2)
    with torch.no_grad():
        first = twin[0](data)
        mean, var = moments(first[:64].double(), correction=0)
        deeper = [twin[3](twin[1].train()(first[:64]).relu())]
        for i in range(64, 64 + tail):
            mean, var = moments(first[:i].double(), correction=0)
            z = (first[i : i + 1] - mean) / (var + 1e-5).sqrt() * twin[1].weight + twin[1].bias
            deeper.append(twin[3](z.float().relu()))
    assert_statistics(model, {"1": moments(first.double()), "4": moments(torch.cat(deeper).double())}, 1e-4)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided", "expanded"])
def test_memory_layout_does_not_matter(layout):
    plain = pictures(12, 6)
    x = {
        "channels last": plain.to(memory_format=torch.channels_last),
        "transposed": plain.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": plain.repeat_interleave(2, 3)[..., ::2],
        "expanded": plain[:1].expand(12, -1, -1, -1),
    }[layout]
    layer = recalibrated(nn.BatchNorm2d(3), x.split(5))
    assert_statistics(layer, {"": moments(in_rows(x))})


def test_input_is_not_written_to():
    data = [off_centre((16, 6, 64, 64), 1e4), off_centre((4, 6, 3, 3), 0)]
    before = [x.clone() for x in data]
    recalibrated(nn.BatchNorm2d(6), data)
    recalibrated(nn.BatchNorm2d(6), data, normalize="population")
    assert all(torch.equal(a, b) for a, b in zip(data, before))


@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_statistics_that_do_not_fit_the_dtype_of_a_layer_are_an_error(normalize):
    # A variance of 10⁶ is infinite in float16, and the layer would put out its bias only.
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6)).half()
    before = copy.deepcopy(model.state_dict())
    batches = [1000 * noise((64, 6), seed).half() for seed in range(3)]
    with pytest.raises(RuntimeError, match=r"0: a mean or variance of .* does not fit into torch\.float16"):
        update_bn_stats(model, batches, normalize=normalize)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.float()
    assert update_bn_stats(model, batches, normalize=normalize).layers[0].var.isfinite().all()


def test_old_statistics_that_are_not_finite_are_no_prior():
    layer = nn.BatchNorm1d(6)
    layer.running_var.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="with its old statistics mixed in by prior, its statistics are not finite"):
        update_bn_stats(nn.Sequential(layer), [noise((8, 6), 0)], prior=4)
    update_bn_stats(nn.Sequential(layer), [noise((8, 6), 0)])
    assert layer.running_var.isfinite().all()
