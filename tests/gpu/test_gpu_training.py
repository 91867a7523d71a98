"""What people put around layers on a GPU: compilers, mixed precision, checkpointing, recalibration, NCCL."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import LayerCase, noise
from gpu_cases import assert_near_all, assert_same_buffers, in_float64
from steps import assert_identical, buffers_of, training_step
from test_gpu_layers import small_net
from torch import nn
from torch.utils.checkpoint import checkpoint

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, batchnormify, update_bn_stats
from runningbn.kernels import use_backend
from runningbn.ops.pooling import RankGroup

LAYERS = {
    "running": LayerCase("", RunningBatchNorm, (8, 6, 6)),
    "exact": LayerCase("", RunningBatchNorm, (8, 6, 6), {"gradient": "exact"}),
    "precise": LayerCase("", PreciseBatchNorm2d, (8, 6, 6)),
}
each_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
@each_layer
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_compiled_layer_trains_as_the_eager_one(case: LayerCase, mode: str, gpu: str) -> None:
    layer, expected = case.layer().to(gpu), case.layer().to(gpu)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(4):
        x, dy = case.input(4, seed).to(gpu), noise((4, *case.shape), seed).to(gpu)
        torch.compiler.cudagraph_mark_step_begin()
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        gradients = torch.autograd.grad(y, (leaf, *layer.parameters()), dy)
        found = [t.detach().clone() for t in (y, *gradients)]
        wanted = training_step(expected, x, dy).values()
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert_same_buffers(layer, expected.cpu(), 1e-5)


@each_layer
def test_a_compiled_model_of_many_layers_keeps_its_gradients(case: LayerCase, gpu: str) -> None:
    target, options = ("precise", {}) if case is LAYERS["precise"] else ("running", dict(case.kwargs))
    model = batchnormify(small_net(), target, **options).to(gpu)
    expected = copy.deepcopy(model)
    compiled = torch.compile(model)
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1)).to(gpu)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for _ in range(3):
            for net, call in ((model, compiled), (expected, expected)):
                net.zero_grad()
                call(x).square().mean().backward()
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_autocast_trains_near_float32(case: LayerCase, dtype: torch.dtype, device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), case.layer(), nn.ReLU()).to(device)
    expected = copy.deepcopy(model)
    for seed in range(3):
        x = noise((4, 3, 6, 6), seed).to(device)
        with torch.autocast(device, dtype):
            y = model(x)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        expected(x).square().mean().backward()
    assert all(buffer.dtype != dtype for buffer in model.buffers())
    of_model, of_reference = ([p.grad for p in net.parameters()] for net in (model, expected))
    for one, other in zip(of_model, of_reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(other.abs().max()))


@each_layer
def test_a_scaler_that_overflows_leaves_the_running_gradient(case: LayerCase, device: str) -> None:
    layer = case.layer().to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14)
    for seed, overflows in enumerate((False, True, False)):
        x = case.input(4, seed, torch.float16).to(device)
        before, parameters = buffers_of(layer), [p.detach().clone() for p in layer.parameters()]
        scale = scaler.get_scale()
        loss = layer(x).float().square().mean() * (1e30 if overflows else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (scaler.get_scale() < scale) == overflows
        assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), parameters)) == overflows
        if case is LAYERS["running"]:
            for name in ("sum_dy", "sum_dy_xhat", "count_dy"):
                assert torch.equal(getattr(layer, name), before[name]) == overflows, name
        assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@each_layer
def test_activation_checkpointing_changes_nothing(case: LayerCase, reentrant: bool, device: str) -> None:
    layer, expected = case.layer().to(device), case.layer().to(device)
    for seed in range(3):
        x, dy = case.input(4, seed).to(device), noise((4, *case.shape), seed).to(device)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y: Any = checkpoint(layer, leaf, use_reentrant=reentrant)
        y.backward(dy)
        wanted = training_step(expected, x, dy)
        for one, other in zip((y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad), wanted.values()):
            # A kernel without the update is compiled for itself, and may round in other places.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert_near_all(buffers_of(layer), buffers_of(expected.cpu()), 1e-4)


@pytest.mark.parametrize("procedure", ["batch", "population"])
@pytest.mark.parametrize("target", ["torch", "running", "precise"])
def test_recalibration_finds_what_it_does_in_float64(target: str, procedure: Any, device: str) -> None:
    model = small_net() if target == "torch" else batchnormify(small_net(), target)
    expected = in_float64(model)
    model.to(device)
    batches = torch.randn(4, 6, 3, 10, 10, generator=torch.Generator().manual_seed(2)) + 1
    with torch.backends.cudnn.flags(allow_tf32=False), use_backend("aten"):
        update_bn_stats(expected, list(batches.double()), normalize=procedure)
    with torch.backends.cudnn.flags(allow_tf32=False):
        report = update_bn_stats(model, list(batches), normalize=procedure, device=torch.device(device))
    names = [name for name in buffers_of(expected) if name.endswith(("running_mean", "running_var"))]
    assert len(names) == 6
    assert len(report.layers) == 3
    for name in names:
        torch.testing.assert_close(
            model.get_buffer(name).cpu().double(), expected.get_buffer(name), rtol=1e-4, atol=1e-4
        )


@pytest.fixture
def ranks(device: str) -> Iterator[RankGroup]:
    """A group of one process: NCCL has no two ranks on one GPU."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield RankGroup(1, torch.distributed.group.WORLD.group_name)
    torch.distributed.destroy_process_group()


@each_layer
def test_pooling_over_nccl_is_what_one_process_computes(
    case: LayerCase, device: str, ranks: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, expected = case.layer(sync=True).to(device), case.layer().to(device)
    # A single process has nothing to pool, so it is told that it has.
    monkeypatch.setattr(layer, "_ranks", lambda: ranks)
    for seed in range(3):
        x, dy = case.input(4, seed).to(device), noise((4, *case.shape), seed).to(device)
        found, wanted = training_step(layer, x, dy), training_step(expected, x, dy)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var", "count", "samples"):
        torch.testing.assert_close(getattr(layer, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_goes_to_the_gpu_and_back(device: str) -> None:
    case = LAYERS["running"]
    layer = case.layer().to(device)
    for seed in range(2):
        training_step(layer, case.input(4, seed).to(device))
    other = case.layer()
    other.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
    other.to(device)
    x = case.input(4, 5).to(device)
    assert_identical(training_step(other, x), training_step(layer, x))
    assert_identical(buffers_of(other), buffers_of(layer))
