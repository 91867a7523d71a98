"""Layers on a GPU: right in every dtype and layout, the same bits every time, beside cuDNN and torch's own kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import LAYERS, LayerCase, channels_last, each, noise, statistics_dtype
from gpu_cases import (
    DTYPES,
    assert_near_all,
    assert_same_buffers,
    in_float64,
    reference_step,
    roundings,
)  # fmt: skip
from steps import assert_identical, buffers_of, training_step
from torch import Tensor, nn

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm, batchnormify
from runningbn.kernels import triton, use_backend

SIZES = (3, 1, 5)


def check(layer: nn.Module, batches: list[Tensor], relative: float) -> None:
    """Steps on the GPU against the same ones in float64."""
    expected = in_float64(layer)
    for seed, x in enumerate(batches):
        dy = noise(tuple(x.shape), seed).to(x.device, x.dtype) + 0.5
        wanted = reference_step(expected, x, dy)
        found = training_step(layer, x, dy)
        assert found["y"].dtype == found["dx"].dtype == x.dtype
        # dweight and dbias are sums over the batch.
        n = x.numel() / x.shape[1]
        for name, value in wanted.items():
            scale = n**0.5 if name in ("dweight", "dbias") else 1.0
            assert_near_all({name: found[name]}, {name: value}, relative * scale)
    assert_same_buffers(layer, expected, relative)


@each(LAYERS)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_layer_trains_as_in_float64(case: LayerCase, dtype: torch.dtype, last: bool, device: str) -> None:
    if last and len(case.shape) < 2:
        pytest.skip("rows have one layout")
    precise = case.constructor.__name__.startswith("Precise")
    # One value per channel is no batch to PreciseBatchNorm.
    sizes = (3, 2, 5) if precise else SIZES
    batches = [x.to(device) for x in case.batches(sizes, dtype)]
    layer = case.layer(statistics_dtype(dtype)).to(device)
    check(layer, [channels_last(x) for x in batches] if last else batches, roundings(dtype))


@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (2, 1, 1, 1), (1, 1, 7), (5, 37, 7, 7), (2, 3, 1, 129), (17, 130)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_and_odd_sizes(shape: tuple[int, ...], dtype: str, device: str) -> None:
    of_x = DTYPES[dtype]
    case = LayerCase("", RunningBatchNorm, shape[1:])
    check(case.layer().to(device), [case.input(shape[0], s, of_x).to(device) for s in range(2)], roundings(of_x))


@pytest.mark.parametrize("kind", ["misaligned", "sliced", "every other", "transposed", "expanded dy", "dy last"])
def test_inputs_that_are_not_dense_or_not_aligned(kind: str, device: str) -> None:
    case = LayerCase("", RunningBatchNorm, (4, 6, 8))
    layer, expected = case.layer().to(device), in_float64(case.layer())
    for seed in range(3):  # the first launch is compiled, later ones are prepared
        x = case.input(3, seed).to(device)
        dy = noise(tuple(x.shape), seed).to(device)
        if kind == "misaligned":
            memory = torch.empty(x.numel() + 1, device=device)
            x = memory[1:].view(x.shape).copy_(x)
            assert x.data_ptr() % 16
        elif kind == "sliced":
            x = torch.cat([x, x], 1)[:, 2:6]
        elif kind == "every other":
            x = x.repeat_interleave(2, 3)[..., ::2]
        elif kind == "transposed":
            x = x.transpose(0, 3).contiguous().transpose(0, 3)
        elif kind == "expanded dy":
            dy = torch.full((), 0.5, device=device).expand(x.shape)
        else:
            dy = channels_last(dy)
        wanted = reference_step(expected, x, dy)
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        dx, dweight, dbias = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), dy)
        found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
        assert_near_all(found, wanted, 16 * roundings(torch.float32))


def test_parameters_that_are_misaligned(device: str) -> None:
    case = LayerCase("", RunningBatchNorm, (5, 8))
    layer = case.layer().to(device)
    memory = torch.empty(16, device=device)
    for start, name in ((1, "weight"), (7, "bias")):
        view = memory[start : start + 5].copy_(getattr(layer, name).detach())
        setattr(layer, name, nn.Parameter(view))
    check(layer, [case.input(4, seed).to(device) for seed in range(3)], roundings(torch.float32))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("layer", [RunningBatchNorm, PreciseBatchNorm2d])
def test_every_run_gives_the_same_bits(layer: type[nn.Module], last: bool, device: str) -> None:
    big = device == "cuda"
    case = LayerCase("", layer, (24, 40, 40) if big else (3, 8, 9))
    batches = [x.to(device) for x in case.batches((16, 16) if big else (3, 2))]
    batches = [channels_last(x) for x in batches] if last else batches
    runs = []
    for _ in range(3):
        fresh = case.layer().to(device)
        steps = [training_step(fresh, x, x.cos()) for x in batches]
        runs.append({f"{i} {name}": t for i, step in enumerate(steps) for name, t in step.items()} | buffers_of(fresh))
    for other in runs[1:]:
        assert_identical(other, runs[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_keeps_its_state(value: float, device: str) -> None:
    case = LayerCase("", RunningBatchNorm, (4, 5, 6))
    layer, expected = case.layer().to(device), in_float64(case.layer())
    for seed in range(3):
        x = case.input(4, seed)
        if seed == 1:
            x[2, 1, 3, 3] = value
        dy = noise(tuple(x.shape), seed)
        reference_step(expected, x, dy)
        training_step(layer, x.to(device), dy.to(device))
    assert_same_buffers(layer, expected, roundings(torch.float32))


CLASSES = {
    (8, 16): (nn.BatchNorm1d, PreciseBatchNorm1d),
    (6, 16, 40): (nn.BatchNorm1d, PreciseBatchNorm1d),
    (4, 16, 9, 9): (nn.BatchNorm2d, PreciseBatchNorm2d),
    (2, 16, 4, 5, 6): (nn.BatchNorm3d, PreciseBatchNorm3d),
}


@pytest.mark.parametrize("cudnn", [True, False], ids=["cuDNN", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", CLASSES, ids=str)
def test_precise_layers_train_as_torchs_own(shape: tuple[int, ...], dtype: str, cudnn: bool, device: str) -> None:
    if device == "cpu" and dtype == "float16":
        pytest.skip("torch's CPU kernel is not what is compared with")
    of_torch, ours = CLASSES[shape]
    case = LayerCase("", ours, shape[1:])
    layer, peer = case.layer().to(device), LayerCase("", of_torch, shape[1:]).layer().to(device)
    for seed in range(2):
        x = case.input(shape[0], seed, DTYPES[dtype]).to(device)
        with torch.backends.cudnn.flags(enabled=cudnn):
            wanted = training_step(peer, x, x.sin())
        found = training_step(layer, x, x.sin())
        # Both round, and 16-bit results once more each.
        assert_near_all(found, {name: value.cpu() for name, value in wanted.items()}, 8 * roundings(DTYPES[dtype]))
    # The variance between batches is for test_a_layer_trains_as_in_float64; a first batch alone has none.
    fresh, peer = case.layer(momentum=1.0).to(device), LayerCase("", of_torch, shape[1:]).layer(momentum=1.0).to(device)
    x = case.input(shape[0], 5).to(device)
    fresh(x), peer(x)
    torch.testing.assert_close(fresh.running_var, peer.running_var, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh.running_mean, peer.running_mean, rtol=1e-5, atol=1e-6)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(8 * 6 * 6, 12), nn.BatchNorm1d(12),
    )  # fmt: skip


@pytest.mark.parametrize("center", [False, True], ids=["", "centred weights"])
@pytest.mark.parametrize("target", ["running", "precise", "torch"])
def test_a_converted_model_trains_and_evaluates_as_in_float64(target: str, center: bool, device: str) -> None:
    model = batchnormify(small_net(), "running" if target == "torch" else target, center_weights=center).to(device)
    expected = copy.deepcopy(model).cpu().double()
    images = torch.randn(2, 4, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
        for x in images:
            model(x.to(device))
            with use_backend("aten"):
                expected(x.double())
        if target == "torch":
            batchnormify(model, "torch"), batchnormify(expected, "torch")
            assert not any(isinstance(module, RunningBatchNorm) for module in model.modules())
        found, wanted = model.eval()(images[0].to(device)), expected.eval()(images[0].double())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-3, atol=1e-3)


def test_what_is_on_two_devices_is_refused_by_torch_and_not_read(gpu: str) -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match="expected an input on cpu, where the layer is"):
        RunningBatchNorm(4)(torch.randn(2, 4, device=gpu))
    layer = RunningBatchNorm(4).to(gpu)
    layer.weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match=r"device|cannot take"):
        layer(torch.randn(2, 4, device=gpu))


def test_a_prepared_launch_does_what_the_first_one_did(device: str) -> None:
    case = LayerCase("", RunningBatchNorm, (6, 4, 4))
    x = case.input(3).to(device)
    results = []
    for forget in (True, False, False):
        if forget:
            triton._plan_of.cache_clear()
        layer = case.layer().to(device)
        results.append({**training_step(layer, x), **buffers_of(layer)})
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])
