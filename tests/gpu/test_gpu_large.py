"""More elements than 32 bits count, on a GPU that has the memory; a dry run has few of them."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runningbn import PreciseBatchNorm2d, RunningBatchNorm

SIZES = {"cuda": (33, 64, 1024), "cpu": (3, 4, 8)}  # samples, channels, height and width
BYTES_PER_ELEMENT = 2


@pytest.fixture
def _alone() -> Iterator[None]:
    """Tests run in several processes; two of these would not fit into the memory."""
    with (Path(tempfile.gettempdir()) / "runningbn-large-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("layer", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_more_than_two_to_the_31_elements(layer: type[torch.nn.Module], last: bool, device: str) -> None:
    samples, channels, side = SIZES[device]
    elements = samples * channels * side**2
    if device == "cuda":
        assert elements > 2**31
        free, _ = torch.cuda.mem_get_info()
        if free < 5 * BYTES_PER_ELEMENT * elements:
            pytest.skip("it takes more memory than is free")
    form = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    one = torch.randn((1, channels, side, side), device=device, generator=generator).bfloat16()
    one = one.contiguous(memory_format=form)
    x = one.expand(samples, -1, -1, -1).contiguous(memory_format=form).requires_grad_()
    fresh = layer(channels, momentum=1.0).to(device)
    y = fresh(x)
    # Every sample is the first: so are its results.
    mean, var = one.double().mean((0, 2, 3)), one.double().var((0, 2, 3), correction=0)
    n = samples * side**2
    bessel = n / (n - 1) if layer is PreciseBatchNorm2d else 1
    torch.testing.assert_close(fresh.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh.running_var.double(), var * bessel, rtol=1e-5, atol=0)
    expected = (one.double() - mean.view(1, -1, 1, 1)) * (var.view(1, -1, 1, 1) + 1e-5).rsqrt()
    torch.testing.assert_close(y[:1].double(), expected, rtol=2**-7, atol=1e-3)
    assert all(torch.equal(y[0], sample) for sample in y[1:])
    y.backward(x.detach())
    assert x.grad is not None
    assert all(torch.equal(x.grad[0], sample) for sample in x.grad[1:])
    sum_dy = one.double().sum((0, 2, 3)) * samples
    torch.testing.assert_close(fresh.bias.grad.double(), sum_dy, rtol=1e-4, atol=1e-5 * n)
