"""What else forwards change in a model: buffers and attributes, however the call ends, are as before."""

import pytest
import torch
from cases import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from recalibration_models import (
    assert_same,
    assert_statistics,
    each_procedure,
    everything,
    is_statistic,
    picture_batches,
    pictures,
    shown,
)
from torch import Tensor, nn

from runningbn import precise_bn, update_bn_stats


class Unlucky(Exception):
    pass


# ---------------------------------------------------------------------------------------------------- states of neurons


class Spiking(nn.Module):
    """A leaky neuron with a reset: its potential goes on from call to call, in training and in evaluation.

    Where it is kept: in a buffer, in an attribute that first is a number, in a dict or in a list of the module.
    """

    def __init__(self, place: str, in_place: bool) -> None:
        super().__init__()
        self.place, self.in_place, self.shape = place, in_place, None
        if place == "buffer":
            self.register_buffer("v", torch.zeros(4, 3, 5, 5))
        elif place == "attribute":
            self.v = torch.zeros(4, 3, 5, 5) if in_place else 0.0
        else:
            start = torch.zeros(4, 3, 5, 5) if in_place else 0.0
            self.memories = {"v": start} if place == "dict" else [start]

    @property
    def key(self):
        return {"dict": "v", "list": 0}[self.place]

    def forward(self, x):
        v = self.v if self.place in ("buffer", "attribute") else self.memories[self.key]
        new = 0.5 * v + x
        new = new - (new > 1).to(new)
        self.shape = tuple(x.shape)
        if self.in_place:
            v.data.copy_(new)
        elif self.place in ("buffer", "attribute"):
            self.v = new
        else:
            self.memories[self.key] = new
        return (new > 0.5).to(new) + new

    def state(self):
        v = self.v if self.place in ("buffer", "attribute") else self.memories[self.key]
        return (id(v), v.clone(), self.shape) if isinstance(v, Tensor) else (v, v, self.shape)


PLACES = [("buffer", True), ("buffer", False), ("attribute", True), ("attribute", False), ("dict", True),
          ("dict", False), ("list", True), ("list", False)]  # fmt: skip
each_place = pytest.mark.parametrize(("place", "in_place"), PLACES)


def spiking(place: str, in_place: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), Spiking(place, in_place), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


@each_place
@each_procedure
@pytest.mark.parametrize("end", ["success", "undo", "failure", "precise_bn"])
def test_membrane_potentials_are_put_back(place, in_place, normalize, end):
    model = spiking(place, in_place)
    before, identity, value = everything(model, is_statistic), *model[1].state()[:2]
    if end == "precise_bn":
        with precise_bn(model):
            model(pictures(4))
    elif end == "failure":
        with pytest.raises(Unlucky):
            update_bn_stats(model, failing(2), normalize=normalize)
    else:
        report = update_bn_stats(model, picture_batches(), normalize=normalize)
        if end == "undo":
            report.undo()
    assert_same(everything(model, is_statistic), before)
    assert model[1].state()[0] == identity
    same = torch.equal(model[1].state()[1], value) if isinstance(value, Tensor) else model[1].state()[1] == value
    assert same
    # The rest of what such a module remembers goes with it.
    assert model[1].shape is None


def failing(n: int):
    yield from picture_batches(n)
    raise Unlucky


@each_place
def test_population_sees_the_potentials_that_evaluation_from_here_on_shows(place, in_place):
    model, batches = spiking(place, in_place), picture_batches()
    report = update_bn_stats(model, batches, normalize="population")
    assert max(layer.residual for layer in report.layers) <= 1e-4
    assert_statistics(model, shown(model, batches), 1e-4)


def test_counters_of_modules_without_tensors_and_what_hooks_collect_are_the_users():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    model = nn.Sequential(nn.BatchNorm2d(3), Counting())
    model.seen = []
    model[0].register_forward_hook(lambda _, args, y: model.seen.append(y))
    update_bn_stats(model, picture_batches(3), forward=lambda model, x: model(x))
    assert (model[1].calls, len(model.seen)) == (3, 3)


def test_caches_go_with_what_they_are_keyed_by():
    """A grid kept for a shape: tensor and key are put back together."""

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid, self.shape = torch.empty(0), None

        def forward(self, x):
            if self.shape != x.shape:
                self.grid, self.shape = torch.ones_like(x), x.shape
            return x + self.grid

    model = nn.Sequential(Grid(), nn.BatchNorm2d(3))
    update_bn_stats(model, picture_batches())
    assert (model[0].grid.shape, model[0].shape) == ((0,), None)
    assert model(pictures(4)).shape == (4, 3, 5, 5)


def test_buffers_registered_in_a_forward_are_gone():
    class Registers(nn.Module):
        def forward(self, x):
            self.register_buffer("last", x.mean())
            return x

    model = nn.Sequential(Registers(), nn.BatchNorm2d(3))
    update_bn_stats(model, picture_batches())
    assert list(model[0].state_dict()) == []


# ----------------------------------------------------------------------------------------------------- any model at all


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Stateful(nn.Module):
    """Changes buffers of any dtype and shape in every way that there is, and perhaps fails."""

    def __init__(self, ways: list[str], dtype: torch.dtype, fails_at: int | None) -> None:
        super().__init__()
        self.ways, self.fails_at, self.calls = ways, fails_at, [0]
        self.register_buffer("buffer", noise((3, 2), 1).to(dtype).t())  # not contiguous
        self.register_buffer("number", torch.tensor(3))
        self.register_buffer("flag", torch.tensor([True, False]), persistent=False)
        self.register_buffer("nothing", torch.tensor([float("nan"), 1.0]))
        self.attribute, self.inside = noise((2,), 2), {"a": noise((2,), 3), "b": 1}

    def forward(self, x):
        self.calls[0] += 1
        for way in self.ways:
            if way == "add":
                self.buffer.add_(1), self.number.add_(1)
            elif way == "data":
                self.buffer.data.mul_(2)
                if self.flag is not None:
                    self.flag.data.logical_not_()
            elif way == "rebind":
                self.number, self.attribute = self.number + 1, self.attribute + 1
            elif way == "resize":
                self.nothing.resize_(5).fill_(2)
            elif way == "inside":
                self.inside["a"] = self.inside["a"] * 2
                self.inside["c"] = x.detach().mean()
            elif way == "delete":
                self.flag = None
            elif way == "train":
                self.train()
        if self.calls[0] == self.fails_at:
            raise (Unlucky if self.calls[0] % 2 else KeyboardInterrupt)
        return x


def nested(depth: int, block: nn.Module, dtype: torch.dtype) -> nn.Module:
    for _ in range(depth):
        block = nn.Sequential(nn.BatchNorm2d(3, dtype=dtype), nn.ModuleDict({"b": block})["b"], nn.Dropout(0.5))
    return block


@settings(max_examples=60, deadline=None)
@given(
    ways=st.lists(st.sampled_from(["add", "data", "rebind", "resize", "inside", "delete", "train"]), max_size=4),
    dtype=st.sampled_from(DTYPES),
    depth=st.integers(1, 3),
    fails_at=st.none() | st.integers(1, 8),
    normalize=st.sampled_from(["batch", "population"]),
    channels_last=st.booleans(),
    training=st.booleans(),
    by_own_loop=st.booleans(),
)
def test_whatever_forwards_change_and_however_they_end(
    ways, dtype, depth, fails_at, normalize, channels_last, training, by_own_loop
):
    inner = Stateful(ways, dtype, fails_at)
    model = nested(depth, inner, dtype).train(training)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batches = [x.to(dtype, memory_format=layout) for x in picture_batches(3)]

    def inside() -> tuple:
        kept = inner.attribute, inner.inside["a"], inner.inside.get("c"), inner.inside["b"]
        return tuple(map(id, kept)), [t.clone() for t in kept[:2]]

    def run() -> object:
        if not by_own_loop:
            return update_bn_stats(model, batches, normalize=normalize)
        with precise_bn(model) as recalibration:
            for x in batches:
                model(x)
        return recalibration.report

    def whole(but=lambda name: False) -> dict:
        found = everything(model, but)
        # Memory that has grown lies elsewhere.
        return {name: value for name, value in found.items() if not (name.startswith("place") and "nothing" in name)}

    before, all_before, (places, values) = whole(is_statistic), whole(), inside()
    try:
        report = run()
    except (Unlucky, KeyboardInterrupt):
        assert fails_at is not None
        assert_same(whole(), all_before)
    else:
        assert_same(whole(is_statistic), before)
        report.undo()
        assert_same(whole(), all_before)
    assert inside()[0] == places
    assert all(torch.equal(a, b) for a, b in zip(inside()[1], values, strict=True))
