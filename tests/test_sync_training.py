"""sync=True in a training loop: DDP, checkpointing, frozen inputs, double backward."""

import pytest
import torch
from cases import assert_near, each_dtype, noise
from processes import ranks
from steps import assert_identical, buffers_of, training_step
from test_autograd import RefuseHostSynchronisation
from test_sync import SIZES, each_basic_kind, layer_of, parts, whole
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

STEPS = 3


def net(kind: str, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = layer_of(kind, dtype, **kwargs), layer_of(kind, dtype, **kwargs)
    return nn.Sequential(nn.Conv2d(3, 3, 3, dtype=dtype), first, nn.Tanh(), nn.Conv2d(3, 3, 2, dtype=dtype), second)


def images(step: int, rank: int, batch_size: int = 4) -> Tensor:
    return (noise((batch_size, 3, 6, 6), 10 * step + rank) * (1 + rank) + rank).double()


def descend(model: nn.Module, inputs: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - 1).pow(2).mean().backward()
        optimizer.step()


def train_under_ddp(rank: int, kind: str) -> dict[str, Tensor]:
    model = net(kind, sync=True)
    descend(DistributedDataParallel(model), [images(step, rank) for step in range(STEPS)])
    return model.state_dict()


@each_basic_kind
def test_ddp_trains_as_one_process(kind):
    one_process = net(kind)
    descend(one_process, [torch.cat([images(step, rank) for rank in range(2)]) for step in range(STEPS)])
    first, second = ranks(2)(train_under_ddp, kind)
    assert_identical(second, first)
    # Pivots and sums about them depend on how the batch was split; what DDP scales the loss by is in the sums of dy.
    of_their_own = ("shift", "sums", "sqrs", "sum_dy", "sum_dy_xhat")
    for name, value in one_process.state_dict().items():
        if not name.endswith(of_their_own) and value.is_floating_point():
            assert_near(first[name], value, roundings=1e4)


# ------------------------------------------------------------------------------------------------------ checkpointing


class Segment(nn.Module):
    def __init__(self, body: nn.Module, **how) -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, **self.how) if self.how else self.body(x)


def train_checkpointed(rank: int, kind: str, use_reentrant: bool, dtype: torch.dtype) -> None:
    ways = ({}, {"use_reentrant": use_reentrant})
    plain, checkpointed = (Segment(net(kind, dtype, sync=True), **how) for how in ways)
    for step in range(2 * STEPS):
        # Some batches are wide and far from those before, and others small, so that limits bind.
        x = (images(step, rank, batch_size=(4, 0 if step == 1 else 2)[rank]) * (1, 1, 30, 0.1)[step % 4]).to(dtype)
        assert_identical(training_step(checkpointed, x), training_step(plain, x))
        assert_identical(buffers_of(checkpointed), buffers_of(plain))


@pytest.mark.parametrize("kind", ["running", "running-limited", "exact", "precise"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@each_dtype(torch.float32, torch.float64)
def test_checkpointed_ranks_train_bit_for_bit_as_plain_ones(dtype, kind, use_reentrant):
    ranks(2)(train_checkpointed, kind, use_reentrant, dtype)


# ----------------------------------------------------------------------------------------------------------- autograd


def train_with_a_frozen_input(rank: int, kind: str, compiled_on: tuple[int, ...]) -> dict[str, Tensor]:
    layer = layer_of(kind, torch.float64, sync=True)
    x, dy = parts(0, SIZES[0], torch.float64)[rank]
    model = torch.compile(layer, fullgraph=True, backend="aot_eager") if rank in compiled_on else layer
    model(x.requires_grad_(rank == 0)).backward(dy)
    dx = {} if x.grad is None else {"dx": x.grad}
    return {"dweight": layer.weight.grad, "dbias": layer.bias.grad, **dx}


@each_basic_kind
@pytest.mark.parametrize("compiled_on", [(), (1,)], ids=["eager", "compiled where it needs none"])
def test_a_rank_that_needs_no_input_gradient_helps_the_others_to_theirs(kind, compiled_on):
    first, second = ranks(2)(train_with_a_frozen_input, kind, compiled_on)
    expected = training_step(layer_of(kind, torch.float64), *whole(0, 2))
    assert "dx" not in second
    assert_near(first["dx"], expected["dx"][: SIZES[0][0]], roundings=300)
    for name in ("dweight", "dbias"):
        assert_near(first[name] + second[name], expected[name], roundings=300)


def differentiate_twice(rank: int, kind: str, dy_is_constant: bool) -> list[str]:
    layer = layer_of(kind, sync=True)
    x = parts(0, SIZES[0], torch.float32)[rank][0].requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum() if dy_is_constant else y.pow(3).sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        return [str(error), dx.detach().isfinite().all().item()]
    return []


@pytest.mark.parametrize(("kind", "advice"), [("exact", "sync=False"), ("precise", "sync=False"), ("running", "exact")])
@pytest.mark.parametrize("dy_is_constant", [True, False], ids=["linear loss", "cubic loss"])
def test_a_second_derivative_is_refused(kind, advice, dy_is_constant):
    for message, finite in ranks(2)(differentiate_twice, kind, dy_is_constant):
        assert "cannot be differentiated twice" in message
        assert advice in message
        assert finite


def train_without_host_synchronisation(rank: int, kind: str) -> None:
    layer = layer_of(kind, sync=True)
    for step in range(STEPS):
        x, dy = parts(step, SIZES[step], torch.float32)[rank]
        with RefuseHostSynchronisation():
            layer(x.requires_grad_()).backward(dy)


@each_basic_kind
def test_a_step_does_not_synchronise_with_the_host(kind):
    ranks(2)(train_without_host_synchronisation, kind)
