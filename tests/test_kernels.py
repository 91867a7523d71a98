"""The sweeps, in every layout and dtype, against float64 formulas written out here."""

from __future__ import annotations

import pytest
import torch
from cases import channels_last, each_pair, names_of, statistics_dtype
from torch import Tensor

from runningbn import kernels
from runningbn.kernels import aten, cpu, use_backend
from runningbn.ops.state import moments

EPS = 1e-5
SHAPES = {
    "rows": (33, 6),
    "one row": (1, 6),
    "sequence": (5, 6, 9),
    "image": (4, 6, 5, 7),
    "volume": (3, 6, 4, 3, 5),
    "six dimensions": (2, 6, 2, 3, 2, 4),
    "one position": (9, 6, 1, 1),
    "one channel": (9, 1, 4, 4),
    "several blocks": (3, 2, 500, 400),  # more elements than one block of the blocked sums, and a ragged last one
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "batch expanded": lambda x: x[:1].expand(x.shape),
    "transposed memory": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _two_threads():
    """Threads that meet are part of what is tested here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, params=["cpu", "aten"])
def backend(request):
    """The module under test. What it cannot take is skipped."""
    module = {"cpu": cpu, "aten": aten}[request.param]
    if module.unavailable() is not None:
        pytest.skip(module.unavailable())
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if not module.supports(torch.ones(1, 1, dtype=dtype), statistics_dtype(dtype)):
        pytest.skip(f"{request.param} does not take {dtype}")
    with use_backend(request.param):
        yield module


def tolerance(dtype: torch.dtype, scale: float = 4) -> dict[str, float]:
    """Results are rounded once to the dtype, after arithmetic that costs some roundings more."""
    eps = torch.finfo(dtype).eps
    return {"rtol": scale * eps, "atol": scale * eps}


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout]((torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1).to(dtype))


def spread(vector: Tensor, like: Tensor) -> Tensor:
    return vector.double().view(-1, *[1] * (like.dim() - 2))


def per_channel(x: Tensor) -> Tensor:
    """(C, n) in float64."""
    return x.double().transpose(0, 1).reshape(x.shape[1], -1)


def vectors(channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    names = ("mean", "var", "weight", "bias", "m0", "m1")
    drawn = {name: torch.rand(channels, generator=generator, dtype=torch.float64).add(0.5).to(dtype) for name in names}
    return {**drawn, "rstd": (drawn["var"] + EPS).rsqrt()}


def needs_no_layout(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> bool:
    return shape == SHAPES["several blocks"] and layout not in ("contiguous", "channels last")


grid = each_pair(shape=SHAPES, layout=names_of(*LAYOUTS), dtype=DTYPES, unless=needs_no_layout)


@grid
def test_batch_sums(shape, layout, dtype):
    x = make(shape, dtype, layout, 0)
    batch = kernels.batch_sums(x, statistics_dtype(dtype)).sums
    data = per_channel(x)
    n = data.shape[1]
    assert batch.count.tolist() == [n] * shape[1]
    assert all(part.dtype == statistics_dtype(dtype) for part in batch)
    close = {"rtol": 40 * torch.finfo(batch.sqrs.dtype).eps, "atol": 40 * torch.finfo(batch.sqrs.dtype).eps}
    mean = batch.shift.double() + batch.sums.double() / n
    torch.testing.assert_close(mean, data.mean(1), **close)
    sqrs = (data - batch.shift.double()[:, None]).square().sum(1)
    torch.testing.assert_close(batch.sqrs.double(), sqrs, rtol=close["rtol"], atol=close["atol"] * n)


@grid
def test_normalize(shape, layout, dtype):
    x = make(shape, dtype, layout, 0)
    v = vectors(shape[1], statistics_dtype(dtype))
    y = kernels.normalize(x, v["mean"], v["var"], v["weight"], v["bias"], EPS)
    expected = (x.double() - spread(v["mean"], x)) * spread(v["rstd"] * v["weight"], x) + spread(v["bias"], x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype, 16))


@grid
def test_gradient_sums(shape, layout, dtype):
    x, dy = make(shape, dtype, layout, 0), make(shape, dtype, layout, 1)
    v = vectors(shape[1], statistics_dtype(dtype))
    sum_dy, sum_dy_xhat = kernels.gradient_sums(dy, x, v["mean"], v["rstd"])
    z = per_channel((x.double() - spread(v["mean"], x)) * spread(v["rstd"], x))
    n = z.shape[1]
    assert sum_dy.dtype == sum_dy_xhat.dtype == statistics_dtype(dtype)
    # n terms of order 1 to 10, summed in the statistics' dtype.
    close = {"rtol": 0, "atol": 100 * n * torch.finfo(statistics_dtype(dtype)).eps}
    torch.testing.assert_close(sum_dy.double(), per_channel(dy).sum(1), **close)
    torch.testing.assert_close(sum_dy_xhat.double(), (per_channel(dy) * z).sum(1), **close)


@grid
def test_input_gradient(shape, layout, dtype):
    x, dy = make(shape, dtype, layout, 0), make(shape, dtype, layout, 1)
    v = vectors(shape[1], statistics_dtype(dtype))
    dx = kernels.input_gradient(dy, x, v["mean"], v["rstd"], v["weight"], v["m0"], v["m1"])
    z = (x.double() - spread(v["mean"], x)) * spread(v["rstd"], x)
    scale = spread(v["rstd"] * v["weight"], x)
    assert dx.dtype == dtype
    expected = scale * (dy.double() - spread(v["m0"], x) - z * spread(v["m1"], x))
    torch.testing.assert_close(dx.double(), expected, **tolerance(dtype, 64))


@grid
def test_batch_norm_gradients(shape, layout, dtype):
    x, dy = make(shape, dtype, layout, 0), make(shape, dtype, layout, 1)
    v = vectors(shape[1], statistics_dtype(dtype))
    dx, sum_dy, sum_dy_xhat = kernels.batch_norm_gradients(dy, x, v["mean"], v["rstd"], v["weight"])
    z = (x.double() - spread(v["mean"], x)) * spread(v["rstd"], x)
    n = x.numel() // x.shape[1]
    close = {"rtol": 0, "atol": 100 * n * torch.finfo(statistics_dtype(dtype)).eps}
    torch.testing.assert_close(sum_dy.double(), per_channel(dy).sum(1), **close)
    torch.testing.assert_close(sum_dy_xhat.double(), (per_channel(dy) * per_channel(z)).sum(1), **close)
    m0, m1 = per_channel(dy).mean(1), (per_channel(dy) * per_channel(z)).mean(1)
    expected = spread(v["rstd"] * v["weight"], x) * (dy.double() - spread(m0, x) - z * spread(m1, x))
    assert dx.dtype == dtype
    assert dx.shape == x.shape
    # torch's kernel adds channels_last data up one by one in the statistics' dtype: the roundings walk √n steps.
    scale = 64 + n**0.5 * (torch.finfo(statistics_dtype(dtype)).eps / torch.finfo(dtype).eps)
    torch.testing.assert_close(dx.double(), expected, **tolerance(dtype, 2 * scale))


@pytest.mark.parametrize("layout_dy", LAYOUTS)
@pytest.mark.parametrize("layout_x", LAYOUTS)
def test_layouts_of_x_and_dy_need_not_agree(layout_x, layout_dy):
    shape, dtype = SHAPES["image"], torch.float64
    x, dy = make(shape, dtype, layout_x, 0), make(shape, dtype, layout_dy, 1)
    v = vectors(shape[1], dtype)
    plain = kernels.input_gradient(dy.contiguous(), x.contiguous(), v["mean"], v["rstd"], v["weight"], v["m0"], v["m1"])
    mixed = kernels.input_gradient(dy, x, v["mean"], v["rstd"], v["weight"], v["m0"], v["m1"])
    torch.testing.assert_close(mixed, plain)
    for got, expected in zip(
        kernels.gradient_sums(dy, x, v["mean"], v["rstd"]),
        kernels.gradient_sums(dy.contiguous(), x.contiguous(), v["mean"], v["rstd"]),
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", ["rows", "sequence", "image", "volume", "six dimensions"])
def test_channels_last_stays_channels_last(shape):
    x = make(SHAPES[shape], torch.float32, "channels last", 0)
    v = vectors(6, torch.float32)
    y = kernels.normalize(x, v["mean"], v["var"], v["weight"], v["bias"], EPS)
    dx = kernels.input_gradient(x.contiguous(), x, v["mean"], v["rstd"], v["weight"], v["m0"], v["m1"])
    assert y.stride() == dx.stride() == x.stride()


def test_weight_and_bias_may_be_absent():
    x, dy = make((4, 6, 5), torch.float64, "contiguous", 0), make((4, 6, 5), torch.float64, "contiguous", 1)
    v = vectors(6, torch.float64)
    ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
    torch.testing.assert_close(
        kernels.normalize(x, v["mean"], v["var"], None, None, EPS),
        kernels.normalize(x, v["mean"], v["var"], ones, zeros, EPS),
    )
    torch.testing.assert_close(
        kernels.normalize(x, v["mean"], v["var"], v["weight"], None, EPS),
        kernels.normalize(x, v["mean"], v["var"], v["weight"], zeros, EPS),
    )
    torch.testing.assert_close(
        kernels.input_gradient(dy, x, v["mean"], v["rstd"], None, v["m0"], v["m1"]),
        kernels.input_gradient(dy, x, v["mean"], v["rstd"], ones, v["m0"], v["m1"]),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_variance_in_float32_does_not_suffer_from_the_mean(mean, layout):
    generator = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(16, 8, 24, 24, generator=generator) + mean)
    batch = kernels.batch_sums(x, torch.float32).sums
    expected = per_channel(x).var(1, correction=0)
    # x - p is exact, at most three bits cancel in the variance, and up to 4096 rows are added up one by one.
    torch.testing.assert_close(moments(batch)[1].double(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_pivot_is_near_the_mean_even_if_the_first_samples_are_outliers(layout):
    x = LAYOUTS[layout](make((16, 6, 5, 7), torch.float32, "contiguous", 0).clone())
    x[:2] += 1e4
    batch = kernels.batch_sums(x, torch.float32).sums
    expected = per_channel(x)
    offset = (expected.mean(1) - batch.shift.double()).abs() / expected.std(1, correction=0)
    assert offset.max() < 7**0.5 + 1e-3
    torch.testing.assert_close(moments(batch)[1].double(), expected.var(1, correction=0), rtol=1e-5, atol=0)


@grid
def test_normalizing_what_the_sums_left_is_normalizing_x(backend, shape, layout, dtype):
    x = make(shape, dtype, layout, 0)
    v = vectors(shape[1], statistics_dtype(dtype))
    _, centred = kernels.batch_sums(x, statistics_dtype(dtype))
    # The C backend keeps none. In torch 16-bit data are centred in float32, which is no memory for the output.
    assert (centred is None) == (backend is cpu or dtype.itemsize == 2)
    if centred is None:
        return
    plain = kernels.normalize(x, v["mean"], v["var"], v["weight"], v["bias"], EPS)
    y = kernels.normalize(x, v["mean"], v["var"], v["weight"], v["bias"], EPS, centred)
    assert y.stride() == plain.stride()
    torch.testing.assert_close(y, plain, **tolerance(dtype, 64))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_whatever_is_not_finite_shows_in_sqrs_of_its_channel_only(poison, layout):
    x = make((4, 6, 5, 7), torch.float32, layout, 0).clone()
    x[2, 3, 1, 1] = poison
    finite = torch.isfinite(kernels.batch_sums(x, torch.float32).sums.sqrs)
    assert finite.tolist() == [True, True, True, False, True, True]


def test_many_planes_of_one_element_are_added_up_pairwise():
    x = torch.randn(200_000, 2, 1, generator=torch.Generator().manual_seed(0))
    batch = kernels.batch_sums(x, torch.float32).sums
    torch.testing.assert_close(moments(batch)[1].double(), per_channel(x).var(1, correction=0), rtol=2e-6, atol=0)
