"""Centred weights under DDP and FSDP2, against the same training in one process."""

import pytest
import torch
import torch.distributed as dist
from cases import assert_near
from models import pretrained
from processes import ranks
from steps import evaluate
from test_weights import small_net
from test_weights_choice import centred
from test_weights_elsewhere import images, net, sgd_step
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from runningbn import bake_weights, center_weights

SIZE, STEPS = 2, 3


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_alone(fresh: bool) -> dict[str, Tensor]:
    """One copy per process, gradients averaged."""
    models = [net(fresh) for _ in range(SIZE)]
    for step in range(STEPS):
        for model in models[1:]:
            for mine, first in zip(model.buffers(), models[0].buffers()):
                mine.copy_(first)
        for rank, model in enumerate(models):
            model.zero_grad()
            (model(images(SIZE * step + rank)) - 1).square().mean().backward()
        with torch.no_grad():
            for parameters in zip(*[model.parameters() for model in models]):
                gradient = sum(parameter.grad for parameter in parameters) / SIZE
                for parameter in parameters:
                    parameter -= 0.1 * gradient
    return state_of(models[0])


def train_ddp(rank: int, fresh: bool, waits: bool) -> dict[str, Tensor]:
    model = center_weights(small_net() if fresh else pretrained(small_net())) if waits else net(fresh)
    parallel = DistributedDataParallel(model)
    for step in range(STEPS):
        sgd_step(parallel, images(SIZE * step + rank))
    return state_of(model)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "pretrained"])
@pytest.mark.parametrize("waits", [True, False], ids=["first pass", "example batch"])
def test_ddp_trains_as_copies_with_averaged_gradients(fresh, waits):
    found, expected = ranks(SIZE)(train_ddp, fresh, waits), train_alone(fresh)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6)
    for name, value in found[0].items():
        if "running" not in name:
            torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


def center_wrapped(rank: int) -> list[set[str]]:
    found = []
    for waits in (True, False):
        parallel = DistributedDataParallel(small_net())
        # One process, so that the pass over the example would wait for the others for ever if it told them anything.
        if waits or rank == 0:
            center_weights(parallel, None if waits else images())
        if waits:
            sgd_step(parallel, images(rank))
        found.append(centred(parallel.module))
    dist.barrier()
    return found


def test_wrapped_model_can_be_given():
    found = ranks(SIZE)(center_wrapped)
    assert found == [[{"0", "3"}, {"0", "3"}], [{"0", "3"}, set()]]


def train_sharded(rank: int, fresh: bool) -> dict[str, Tensor]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    model = net(fresh)
    for layer in model:
        if list(layer.parameters(recurse=False)):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(images(SIZE * step + rank)) - 1).square().mean().backward()
        optimizer.step()
    return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in state_of(model).items()}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "pretrained"])
def test_fsdp_trains_as_ddp(fresh):
    found = ranks(SIZE)(train_sharded, fresh)[0]
    expected = ranks(SIZE)(train_ddp, fresh, False)[0]
    for name, value in expected.items():
        if "running" not in name:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def leave_sharded(rank: int) -> list[str]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    centered, plain = (fully_shard(model, mesh=mesh) for model in (net(), pretrained(small_net())))
    bake_weights(centered)
    center_weights(plain, images())
    return [type(model[i]).__name__ for model in (centered, plain) for i in (0, 3)]


def test_sharded_layers_are_neither_baked_nor_centred():
    found = ranks(SIZE)(leave_sharded)
    assert found == [["CenteredConv2d", "CenteredConv2d", "Conv2d", "Conv2d"]] * SIZE


def load_sharded(rank: int) -> list[Tensor]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    source, target = pretrained(small_net(), seed=1), fully_shard(net(), mesh=mesh)
    with torch.no_grad():
        source[0].weight += 1
    sharded = dict(source.state_dict())
    for name, value in target.state_dict().items():
        if isinstance(value, DTensor):
            sharded[name] = distribute_tensor(sharded[name], value.device_mesh, value.placements)
    target.load_state_dict(sharded)
    return [evaluate(target, images()), evaluate(source, images())]


def test_sharded_model_loads_a_plain_one():
    for found, expected in ranks(SIZE)(load_sharded):
        assert_near(found, expected, roundings=64)
