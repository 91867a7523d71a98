"""Averages, interpolations and differences of state dicts leave a layer that evaluates and trains on."""

import copy
import math

import pytest
import torch
from cases import noise
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import Tensor, nn

from runningbn import Horizon, PreciseBatchNorm2d, RunningBatchNorm, batchnormify
from runningbn.kernels import use_backend
from runningbn.layers.buffers import SETTLED

each_kind = pytest.mark.parametrize("to", ["running", "precise"])
State = dict[str, Tensor]


def images(seed: int, batch_size: int = 4) -> Tensor:
    return noise((batch_size, 3, 4, 4), seed) * (1 + seed % 3) + seed % 5


def client(to: str, seed: int, seeded: bool = True) -> nn.Module:
    """A converted layer after some steps; `seeded` by statistics from elsewhere."""
    layer = nn.BatchNorm2d(3)
    if seeded:
        layer.num_batches_tracked.fill_(50)
        layer.running_mean.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return train(batchnormify(layer, to, momentum=Horizon()), [images(seed), images(seed + 1)])


def weighted(states: list[State], weights: list[float]) -> State:
    """A sum as written in most federated loops: multiplied first, divided at the end, integers included."""
    total = sum(weights)
    return {name: sum(state[name] * w for state, w in zip(states, weights)) / total for name in states[0]}


def assert_usable(layer: nn.Module) -> None:
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert layer.samples.max() <= SETTLED
    assert layer.num_batches_tracked.dtype == torch.int64
    y = evaluate(layer, images(7))
    assert y.isfinite().all()
    for backend in ("cpu", "aten"):
        with use_backend(backend):
            other = train(copy.deepcopy(layer), [images(8), images(9)])
        assert all(buffer.isfinite().all() for buffer in other.buffers())
        assert (other.running_var > 0).all()


def weight_of_next_batch(layer: nn.Module, batch_size: int) -> Tensor:
    return layer.momentum.weight(batch_size, layer.samples, layer.steps)


@each_kind
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_two_rounds_of_weighted_averaging_leave_it_settled(to, assign):
    clients = [client(to, seed) for seed in (0, 4)]
    for round_ in range(2):
        average = weighted([c.state_dict() for c in clients], [100, 300])
        for c in clients:
            c.load_state_dict(average, assign=assign)
        for name in ("running_mean", "running_var", "sums", "count"):
            assert torch.equal(clients[0].get_buffer(name), average[name])
        torch.testing.assert_close(
            weight_of_next_batch(clients[0], 4), torch.full((3,), -math.expm1(-4 / 512)), rtol=1e-6, atol=0
        )
        for i, c in enumerate(clients):
            assert_usable(c)
            train(c, [images(10 + i + round_)])


@each_kind
def test_averaging_a_settled_layer_with_fresh_ones_leaves_it_settled(to):
    states = [client(to, 0).state_dict()] + [client(to, seed, seeded=False).state_dict() for seed in range(1, 20)]
    layer = client(to, 0)
    layer.load_state_dict(weighted(states, [1.0] * len(states)))
    assert_usable(layer)
    torch.testing.assert_close(weight_of_next_batch(layer, 512), torch.full((3,), -math.expm1(-1)), rtol=1e-6, atol=0)


@each_kind
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_interpolation(to, share):
    old, new = client(to, 0), client(to, 4)
    layer = copy.deepcopy(old)
    layer.load_state_dict(
        {k: torch.lerp(v.double(), new.state_dict()[k].double(), share) for k, v in old.state_dict().items()}
    )
    assert_usable(layer)
    if share in (0, 1):
        assert_identical(dict(layer.state_dict()), dict((new if share else old).state_dict()))


@each_kind
def test_an_exponential_average(to):
    model = client(to, 0)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in range(1, 6):
        train(model, [images(seed)])
        for name, value in model.state_dict().items():
            average[name].copy_(0.9 * average[name] + 0.1 * value)
    model.load_state_dict(average)
    assert_usable(model)
    assert (model.samples == SETTLED).all()


@each_kind
def test_a_difference_that_is_added_back_gives_the_state(to):
    base, tuned = client(to, 0), client(to, 4)
    difference = {name: value - base.state_dict()[name] for name, value in tuned.state_dict().items()}
    layer = copy.deepcopy(base)
    layer.load_state_dict({name: value + difference[name] for name, value in base.state_dict().items()})
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-5, atol=1e-4)
    assert_usable(layer)


@each_kind
def test_extrapolation_to_counts_that_no_data_have_seeds_the_state(to):
    base, tuned = client(to, 0, seeded=False), client(to, 4, seeded=False)
    train(base, [images(seed) for seed in range(20)])
    state = {name: value + 3 * (tuned.state_dict()[name] - value) for name, value in base.state_dict().items()}
    state["running_var"] = state["running_var"].abs()
    assert (state["samples"] < 0).all()
    state["count"] = -state["count"].abs()
    layer = client(to, 0)
    layer.load_state_dict(state)
    assert torch.equal(layer.running_mean, state["running_mean"])
    assert torch.equal(layer.shift, state["running_mean"])
    assert (layer.samples == SETTLED).all()
    assert_usable(layer)


@each_kind
@pytest.mark.parametrize("value", [math.inf, math.nan, torch.finfo(torch.float32).max, SETTLED * 400])
def test_what_is_not_finite_or_too_large_counts_as_settled(to, value):
    state = client(to, 0, seeded=False).state_dict()
    state["samples"] = torch.tensor([value, 24.0, value])
    layer = client(to, 4)
    layer.load_state_dict(state)
    assert layer.samples.tolist() == [SETTLED, 24, SETTLED]
    for name in ("shift", "sums", "sqrs", "count", "steps", "running_mean"):
        assert torch.equal(layer.get_buffer(name), state[name])
    assert_usable(layer)


@each_kind
def test_a_channel_without_a_finite_state_is_seeded_and_the_others_keep_their_bits(to):
    state = client(to, 0).state_dict()
    state["sqrs"][1] = math.nan
    layer = client(to, 4)
    layer.load_state_dict(state)
    assert torch.equal(layer.sqrs[[0, 2]], state["sqrs"][[0, 2]])
    assert layer.sqrs[1] == state["running_var"][1]
    assert_usable(layer)


def test_memories_of_training_that_are_no_numbers_are_cleared():
    state = client("running", 0).state_dict()
    state["noise"][0], state["sum_dy"][1], state["count_dy"][2] = -1.0, math.inf, -0.5
    layer = client("running", 4)
    layer.load_state_dict(state)
    assert [layer.noise[0], layer.last_mean[0], layer.sum_dy[1], layer.count_dy[1], layer.sum_dy[2]] == [0] * 5
    assert torch.equal(layer.noise[1:], state["noise"][1:])
    assert_usable(layer)


@each_kind
def test_fractions_of_batches_are_rounded(to):
    state = client(to, 0).state_dict()
    state["num_batches_tracked"] = torch.tensor(51.75)
    layer = client(to, 4)
    layer.load_state_dict(state, assign=True)
    assert layer.num_batches_tracked.dtype == torch.int64
    assert layer.num_batches_tracked == 52


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d])
def test_checkpoints_of_version_2_load(cls):
    layer = cls(3)
    layer.running_mean = torch.ones(3)
    state = layer.state_dict()
    assert state._metadata[""]["version"] == 3
    state["samples"] = torch.full((3,), torch.finfo(torch.float32).max)
    state._metadata[""]["version"] = 2
    other = cls(3)
    other.load_state_dict(state)
    assert_identical(buffers_of(other), buffers_of(layer))


@each_kind
def test_resuming_goes_on_bit_for_bit(to):
    layer, other = client(to, 0, seeded=False), client(to, 4)
    other.load_state_dict(layer.state_dict())
    assert_identical(training_step(other, images(6)), training_step(layer, images(6)))
    assert_identical(dict(other.state_dict()), dict(layer.state_dict()))
