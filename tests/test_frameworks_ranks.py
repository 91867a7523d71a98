"""DDP and FSDP2 against the same training in one process: a copy of the model per rank, gradients averaged."""

import pytest
import torch
import torch.distributed as dist
from cases import assert_near
from processes import ranks
from steps import assert_identical, evaluate
from test_sync import each_basic_kind
from test_sync_training import Segment, images, net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

SIZE, STEPS = 2, 3
# Pivots and sums about them depend on how a batch was split, the sums of dy on how its loss was divided.
OF_THEIR_OWN = ("shift", "sums", "sqrs", "sum_dy", "sum_dy_xhat")
each_accumulation = pytest.mark.parametrize("accumulates", [False, True], ids=["one batch a step", "accumulated"])
each_sync = pytest.mark.parametrize("sync", [False, True], ids=["each its own", "sync"])


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).pow(2).mean()


def batches(step: int, rank: int, accumulates: bool) -> list[Tensor]:
    """The micro-batches of a step. The first has one: torch 2.13 fails under no_sync before a static graph is known."""
    return [images(2 * step + i, rank) for i in range(2 if accumulates and step > 0 else 1)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those of no checkpoint too."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


# ------------------------------------------------------------------------------------------- what it has to be equal to


def average_gradients(models: list[nn.Module]) -> None:
    for parameters in zip(*[model.parameters() for model in models]):
        mean = sum(parameter.grad / len(models) for parameter in parameters)
        for parameter in parameters:
            parameter.grad = mean.clone()


def copy_buffers(models: list[nn.Module]) -> None:
    """Give all the buffers of the first, as DDP does before the first forward of a step."""
    for model in models[1:]:
        for mine, first in zip(model.buffers(), models[0].buffers()):
            mine.copy_(first)


def train_copies(kind: str, broadcast_buffers: bool, accumulates: bool) -> list[dict[str, Tensor]]:
    """A copy of the model for each rank, with statistics of its own: what DDP without sync amounts to."""
    models = [net(kind) for _ in range(SIZE)]
    optimizers = [sgd(model) for model in models]
    for step in range(STEPS):
        if broadcast_buffers:
            copy_buffers(models)
        for rank, model in enumerate(models):
            model.zero_grad()
            for x in batches(step, rank, accumulates):
                loss_of(model, x).backward()
        average_gradients(models)
        for optimizer in optimizers:
            optimizer.step()
    return [whole_state(model) for model in models]


def train_one(kind: str, accumulates: bool) -> dict[str, Tensor]:
    """One model on the batches of all ranks together: what sync=True amounts to."""
    model = net(kind)
    optimizer = sgd(model)
    for step in range(STEPS):
        model.zero_grad()
        for parts in zip(*[batches(step, rank, accumulates) for rank in range(SIZE)]):
            loss_of(model, torch.cat(parts)).backward()
        optimizer.step()
    return whole_state(model)


def assert_as_one(states: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """All ranks with the same bits, and up to roundings those of one process."""
    assert_identical(states[1], states[0])
    for name, value in expected.items():
        if not name.endswith(OF_THEIR_OWN) and value.is_floating_point():
            assert_near(states[0][name], value, roundings=1e4)


# ------------------------------------------------------------------------------------------------------------------ DDP

WAYS = {"default": {}, "no broadcast": {"broadcast_buffers": False}, "static graph": {"static_graph": True}}
each_way = pytest.mark.parametrize("way", WAYS)


def train_ddp(rank: int, kind: str, sync: bool, way: str, accumulates: bool) -> dict[str, Tensor]:
    model = net(kind, sync=sync)
    parallel = DistributedDataParallel(model, **WAYS[way])
    optimizer = sgd(parallel)
    for step in range(STEPS):
        parallel.zero_grad()
        *others, last = batches(step, rank, accumulates)
        with parallel.no_sync():
            for x in others:
                loss_of(parallel, x).backward()
        loss_of(parallel, last).backward()
        optimizer.step()
    return whole_state(model)


@each_basic_kind
@each_way
@each_accumulation
def test_ddp_trains_bit_for_bit_as_copies_with_averaged_gradients(kind, way, accumulates):
    found = ranks(SIZE)(train_ddp, kind, False, way, accumulates)
    expected = train_copies(kind, WAYS[way].get("broadcast_buffers", True), accumulates)
    for rank in range(SIZE):
        assert_identical(found[rank], expected[rank])


@each_basic_kind
@each_way
@each_accumulation
def test_ddp_with_sync_trains_as_one_process(kind, way, accumulates):
    assert_as_one(ranks(SIZE)(train_ddp, kind, True, way, accumulates), train_one(kind, accumulates))


def train_checkpointed(rank: int, kind: str, sync: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    states = []
    for how in ({}, {"use_reentrant": True}):
        model = Segment(net(kind, sync=sync), **how)
        parallel = DistributedDataParallel(model, static_graph=True)
        optimizer = sgd(parallel)
        for step in range(STEPS):
            parallel.zero_grad()
            loss_of(parallel, images(step, rank).requires_grad_()).backward()
            optimizer.step()
        states.append(whole_state(model))
    return states[0], states[1]


@each_basic_kind
@each_sync
def test_ddp_with_a_static_graph_and_reentrant_checkpointing_trains_bit_for_bit_as_without(kind, sync):
    for plain, checkpointed in ranks(SIZE)(train_checkpointed, kind, sync):
        assert_identical(checkpointed, plain)


# ---------------------------------------------------------------------------------------------------------------- FSDP2


def sharded(model: nn.Module, **options) -> nn.Module:
    """The convolutions each in a group of their own and the rest, with the normalisation layers, in another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model:
        if isinstance(part, nn.Conv2d):
            fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """`whole_state` of a sharded model."""
    parameters = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return {**parameters, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def take_steps(model: nn.Module, rank: int, accumulates: bool = False) -> nn.Module:
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        *others, last = batches(step, rank, accumulates)
        model.set_requires_gradient_sync(False)
        for x in others:
            loss_of(model, x).backward()
        model.set_requires_gradient_sync(True)
        loss_of(model, last).backward()
        optimizer.step()
    return model


def train_fsdp(rank: int, kind: str, sync: bool, accumulates: bool) -> dict[str, Tensor]:
    return gathered(take_steps(sharded(net(kind, sync=sync)), rank, accumulates))


@each_basic_kind
@each_accumulation
def test_fsdp_trains_as_copies_with_statistics_of_their_own(kind, accumulates):
    found = ranks(SIZE)(train_fsdp, kind, False, accumulates)
    expected = train_copies(kind, False, accumulates)
    for rank in range(SIZE):
        for name, value in expected[rank].items():
            if value.is_floating_point():
                assert_near(found[rank][name], value, roundings=1e4)


@each_basic_kind
@each_accumulation
def test_fsdp_with_sync_trains_as_one_process(kind, accumulates):
    assert_as_one(ranks(SIZE)(train_fsdp, kind, True, accumulates), train_one(kind, accumulates))


def evaluated_after_fsdp(rank: int, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = take_steps(sharded(net(kind)), 0)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), evaluate(model, images(9, 0))


@each_basic_kind
def test_a_full_state_dict_of_fsdp_loads_strictly_and_evaluates_the_same(kind):
    (state, y), _ = ranks(SIZE)(evaluated_after_fsdp, kind)
    model = net(kind)
    model.load_state_dict(state)
    assert torch.equal(evaluate(model, images(9, 0)), y)


def train_from_the_meta_device(rank: int, kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = net(kind)
    sharded(model).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if rank == 0 else {}, options=options)
    return gathered(take_steps(model, rank))


def train_on(rank: int, kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    model = net(kind)
    model.load_state_dict(state)
    return gathered(take_steps(sharded(model), rank))


@each_basic_kind
def test_fsdp_from_the_meta_device_trains_on_bit_for_bit_as_without(kind):
    state = net(kind)
    loss_of(state, images(8, 0)).backward()
    found = ranks(SIZE)(train_from_the_meta_device, kind, state.state_dict())
    expected = ranks(SIZE)(train_on, kind, state.state_dict())
    for rank in range(SIZE):
        assert_identical(found[rank], expected[rank])


def train_in_bfloat16(rank: int, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = take_steps(sharded(net(kind).float(), mp_policy=policy), rank)
    return gathered(model), evaluate(model, images(9, 0))


def train_bfloat16_copies(kind: str) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Parameters in float32, of which each rank takes a copy in bfloat16 for its step; buffers as they are."""
    parameters = net(kind).float()
    copies = [net(kind).float().bfloat16() for _ in range(SIZE)]
    optimizer = sgd(parameters)
    for step in range(STEPS):
        for rank, model in enumerate(copies):
            round_parameters(parameters, model)
            model.zero_grad()
            loss_of(model, images(2 * step, rank).bfloat16()).backward()
        for parameter, *theirs in zip(parameters.parameters(), *[model.parameters() for model in copies]):
            parameter.grad = sum(their.grad.float() for their in theirs) / SIZE
        optimizer.step()
    outcomes = []
    for model in copies:
        round_parameters(parameters, model)
        y = evaluate(model, images(9, 0).bfloat16())
        outcomes.append((dict(parameters.named_parameters()) | dict(model.named_buffers()), y))
    return outcomes


@torch.no_grad()
def round_parameters(parameters: nn.Module, model: nn.Module) -> None:
    for mine, exact in zip(model.parameters(), parameters.parameters()):
        mine.copy_(exact)


@each_basic_kind
def test_fsdp_in_bfloat16_trains_as_copies_in_bfloat16_with_statistics_in_float32(kind):
    found, expected = ranks(SIZE)(train_in_bfloat16, kind), train_bfloat16_copies(kind)
    for (state, y), (expected_state, expected_y) in zip(found, expected):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected_y)
        for name, value in expected_state.items():
            if value.is_floating_point():
                assert state[name].dtype == torch.float32, name
                assert_near(state[name], value, roundings=0)
