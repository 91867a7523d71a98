"""The extension's `batch_norm`, by which a recalibration normalises: what it takes, and what it leaves to Python."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import channels_last, noise
from step_extension import counted, in_python
from torch import Tensor, nn

from runningbn import kernels, update_bn_stats
from runningbn.kernels import cpu, cpu_step

if cpu_step.unavailable() is not None:
    pytest.skip(f"the extension for steps: {cpu_step.unavailable()}", allow_module_level=True)

EPS = 1e-3
SHAPES = [(2, 4), (2, 4, 3, 3), (1, 1, 5, 7), (3, 1), (2, 3, 2, 2, 2), (2, 16, 80, 80)]


def vectors(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return noise((channels,), 1, dtype), noise((channels,), 2, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_way_through_python_bit_for_bit(shape, affine, layout, dtype):
    x = layout(noise(shape, 0, dtype)) * 3 + 1
    weight, bias = vectors(shape[1], dtype) if affine else (None, None)
    with torch.no_grad(), counted() as counts:
        found = kernels.batch_norm(x, weight, bias, EPS, dtype)
        expected = cpu.batch_norm(x, weight, bias, EPS, dtype)
    assert counts == {"batch_norm": 1}
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found[1].double(), exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2].double(), exact.var(1, correction=0), rtol=1e-5, atol=0)


DECLINED: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": Tensor.bfloat16,  # its statistics are of another dtype
    "sliced": lambda x: x[..., :-1],
    "negated": lambda x: torch._neg_view(x),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("change", DECLINED.values(), ids=DECLINED)
def test_what_it_does_not_take_goes_through_python(change):
    x = change(noise((2, 4, 3, 5), 0))
    assert cpu_step.extension().batch_norm(x, None, None, EPS) is None
    if x.numel():
        y, mean, var = kernels.batch_norm(x, None, None, EPS, torch.float32)
        expected = nn.functional.batch_norm(x.double(), None, None, training=True, eps=EPS)
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
        assert mean.dtype == var.dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "eps"),
    [(torch.ones(5), EPS), (torch.ones(4, dtype=torch.float64), EPS), (torch.ones(8)[::2], EPS), (None, 1)],
    ids=["length", "dtype", "stride", "integer eps"],
)
def test_vectors_that_do_not_fit_are_declined(weight, eps):
    assert cpu_step.extension().batch_norm(noise((2, 4, 3), 0), weight, None, eps) is None


def test_nothing_is_kept():
    x, (weight, bias) = noise((2, 4, 3, 3), 0), vectors(4, torch.float32)

    def counts() -> list[int]:
        gc.collect()
        tensors = sum(type(o) is Tensor for o in gc.get_objects())
        return [tensors, *map(sys.getrefcount, (x, weight, bias))]

    def calls(times: int) -> None:
        for _ in range(times):
            cpu_step.extension().batch_norm(x, weight, bias, EPS)
            cpu_step.extension().batch_norm(x, weight[:2], bias, EPS)
            with pytest.raises(TypeError):
                cpu_step.extension().batch_norm(x)

    calls(1)
    before = counts()
    calls(50)
    assert counts() == before


def test_a_recalibration_goes_by_it_with_the_same_result():
    def recalibrated(around: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
        with around as counts:
            update_bn_stats(model, noise((12, 3, 9, 9), 0).split(4))
        if counts is not None:
            # In the first batch, a function mode looks for code that uses the statistics outside of the layers.
            assert counts == {"batch_norm": 4}
        return tuple(buffer for buffer in model.buffers() if buffer.dim())

    for one, other in zip(recalibrated(counted()), recalibrated(in_python()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
