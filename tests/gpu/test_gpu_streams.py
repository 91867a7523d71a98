"""Layers among other work on a GPU: on streams, in CUDA graphs, without waiting for the device, and in few launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from cases import LayerCase
from steps import assert_identical, buffers_of, training_step
from torch import Tensor, nn

from benchmarks.gpu.launches import kernels_of
from runningbn import PreciseBatchNorm2d, RunningBatchNorm, SquareRoot
from runningbn.kernels import triton

LAYERS = {
    "running": LayerCase("", RunningBatchNorm, (32, 14, 14)),
    "exact": LayerCase("", RunningBatchNorm, (32, 14, 14), {"gradient": "exact"}),
    "precise": LayerCase("", PreciseBatchNorm2d, (32, 14, 14)),
    "cumulative": LayerCase("", RunningBatchNorm, (32, 14, 14), {"momentum": None}),
    "square root": LayerCase("", PreciseBatchNorm2d, (32, 14, 14), {"momentum": SquareRoot(0.1)}),
}
each_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@each_layer
def test_no_step_waits_for_the_device(case: LayerCase, device: str) -> None:
    layer, x = case.layer().to(device), case.input(2).to(device)
    triton._plan_of.cache_clear()
    # The very first step neither, nor one with another momentum.
    with no_waiting(device):
        training_step(layer, x, x)
        layer.momentum = 0.25
        training_step(layer, x, x)
        layer.eval()(x)


@each_layer
def test_streams_do_not_disturb_each_other(case: LayerCase, gpu: str) -> None:
    batches = [case.input(16, seed).to(gpu) for seed in range(8)]
    layers = [case.layer().to(gpu) for _ in range(4)]
    expected = case.layer().to(gpu)
    wanted = [training_step(expected, x, x) for x in batches]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    found: list[list[dict[str, Tensor]]] = [[] for _ in layers]
    for x in batches:
        for stream, layer, steps in zip(streams, layers, found, strict=True):
            with torch.cuda.stream(stream):
                steps.append(training_step(layer, x, x))
    torch.cuda.synchronize()
    for layer, steps in zip(layers, found, strict=True):
        for one, other in zip(steps, wanted, strict=True):
            assert_identical(one, other)
        assert_identical(buffers_of(layer), buffers_of(expected))


def graph_of_a_step(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A captured training step, and the tensors that it leaves its results in; warmed up by three steps."""

    def step() -> dict[str, Tensor]:
        y = model(x)
        names = [name for name, _ in model.named_parameters()]
        dx, *gradients = torch.autograd.grad(y, (x, *model.parameters()), dy)
        return {"y": y.detach(), "dx": dx, **{f"d{name}": g for name, g in zip(names, gradients, strict=True)}}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@each_layer
def test_a_cuda_graph_replays_what_eager_steps_do(case: LayerCase, gpu: str) -> None:
    layer, expected = case.layer().to(gpu), case.layer().to(gpu)
    x, dy = case.input(4, 0).to(gpu).requires_grad_(), case.input(4, 1).to(gpu)
    for _ in range(3):
        training_step(expected, x, dy)
    graph, results = graph_of_a_step(layer, x, dy)
    for seed in range(2, 8):
        with torch.no_grad():
            x.copy_(case.input(4, seed))
        graph.replay()
        assert_identical(results, training_step(expected, x, dy))
        assert_identical(buffers_of(layer), buffers_of(expected))


def test_graphs_and_eager_steps_side_by_side(gpu: str) -> None:
    case = LAYERS["running"]
    x, dy = case.input(32, 0).to(gpu).requires_grad_(), case.input(32, 1).to(gpu)
    captured, eager, expected = (case.layer().to(gpu) for _ in range(3))
    graph, results = graph_of_a_step(captured, x, dy)
    for _ in range(3):
        training_step(expected, x, dy)
    alone = case.layer().to(gpu)
    wanted = [training_step(alone, x, dy) for _ in range(20)]
    stream, found = torch.cuda.Stream(), []
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(stream):
            graph.replay()
        found.append(training_step(eager, x, dy))
        last = training_step(expected, x, dy)
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        assert_identical(one, other)
    assert_identical(results, last)


@pytest.mark.parametrize("samples", [4, 4096])
@each_layer
def test_a_step_is_one_or_two_launches_each_way(case: LayerCase, samples: int, gpu: str) -> None:
    layer, x = case.layer().to(gpu), case.input(samples).to(gpu).requires_grad_()
    y = layer(x)
    dy = torch.ones_like(y)
    torch.autograd.grad(y, (x, *layer.parameters()), dy)
    parameters = (x, *layer.parameters())
    forward = kernels_of(lambda: layer(x))
    y = layer(x)
    backward = kernels_of(lambda: torch.autograd.grad(y, parameters, dy))
    launches = 1 if samples == 4 else 2
    assert [kernel.name for kernel in forward] == ["batch_statistics", "affine_map"][:launches]
    assert [kernel.name for kernel in backward] == ["gradient_statistics", "input_gradient"][:launches]


@each_layer
def test_memory_kept_for_backward_is_that_of_torch(case: LayerCase, gpu: str) -> None:
    x = case.input(64).to(gpu).requires_grad_()
    kept = {}
    for name, layer in {"ours": case.layer(), "torch": nn.BatchNorm2d(32)}.items():
        layer.to(gpu)(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = layer(x)
        torch.cuda.synchronize()
        kept[name] = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
        del y
    # Both keep x, which is there anyway, and vectors, in allocations of 512 bytes each.
    assert kept["ours"] <= kept["torch"] + 5 * 512
