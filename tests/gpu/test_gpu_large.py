"""More elements than 32 bits count, on a GPU that has the memory."""

from __future__ import annotations

import pytest
import torch

from runningbn import PreciseBatchNorm2d, RunningBatchNorm

SAMPLES, CHANNELS, SIDE = 33, 64, 1024
BYTES_PER_ELEMENT = 2


@pytest.mark.parametrize("layer", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_more_than_two_to_the_31_elements(layer: type[torch.nn.Module], last: bool, gpu: str) -> None:
    elements = SAMPLES * CHANNELS * SIDE**2
    assert elements > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * BYTES_PER_ELEMENT * elements:
        pytest.skip("it takes more memory than is free")
    generator = torch.Generator(gpu).manual_seed(0)
    one = torch.randn((1, CHANNELS, SIDE, SIDE), device=gpu, generator=generator).bfloat16()
    if last:
        one = one.to(memory_format=torch.channels_last)
    x = one.expand(SAMPLES, -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    fresh = layer(CHANNELS, momentum=1.0).to(gpu)
    x.requires_grad_()
    y = fresh(x)
    # Every sample is the first: so are its results.
    mean = one.double().mean((0, 2, 3))
    var = one.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(fresh.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh.running_var.double(), var, rtol=1e-5, atol=0)
    expected = (one.double() - mean.view(1, -1, 1, 1)) * (var.view(1, -1, 1, 1) + 1e-5).rsqrt()
    torch.testing.assert_close(y[:1].double(), expected, rtol=2**-7, atol=1e-3)
    assert all(torch.equal(y[0], sample) for sample in y[1:])
    y.backward(x.detach())
    assert x.grad is not None
    assert all(torch.equal(x.grad[0], sample) for sample in x.grad[1:])
    sum_dy = one.double().sum((0, 2, 3)) * SAMPLES
    torch.testing.assert_close(fresh.bias.grad.double(), sum_dy, rtol=1e-4, atol=1e-5 * SAMPLES * SIDE**2)
