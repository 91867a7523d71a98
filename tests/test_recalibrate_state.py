"""What else forwards change in a model, and what user code does to it meanwhile: all of it is as before afterwards."""

import contextlib
import copy

import pytest
import torch
import torch.ao.quantization as quantization
from cases import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from recalibration_models import (
    assert_same,
    assert_statistics,
    each_model,
    each_procedure,
    everything,
    in_rows,
    is_statistic,
    is_statistic_of_ours,
    mlp,
    moments,
    ours,
    picture_batches,
    pictures,
    recalibrated,
    reference,
    rows,
)
from torch import Tensor, nn

from runningbn import precise_bn, update_bn_stats


class Unlucky(Exception):
    pass


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


# ------------------------------------------------------------------------------------------ quantisation-aware training


def quantised(bits: int, slow: bool = False) -> nn.Module:
    """Two fused ConvBns of torch.ao with fake quantisation, whose observers also watch in evaluation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    observer = quantization.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    symmetric = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
    weight = quantization.FakeQuantize.with_args(observer=observer, quant_min=low, quant_max=high, **symmetric)
    activation = quantization.FakeQuantize.with_args(observer=observer, quant_min=0, quant_max=2**bits - 1)
    net.train().qconfig = quantization.QConfig(activation=activation, weight=weight)
    net = quantization.prepare_qat(quantization.fuse_modules_qat(net, [["0", "1", "2"], ["3", "4"]]))
    for module in (net[0], net[3]):
        module._enable_slow_path_for_better_numerical_stability = slow
        with torch.no_grad():
            module.bn.weight.uniform_(0.5, 2)
    for x in picture_batches(20):
        net(x)
    return net


def shown(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The moments of what each BatchNorm layer gets in evaluation, of a copy, correction 1."""
    twin, seen = copy.deepcopy(model).eval(), {}
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(in_rows(args[0])))
    with torch.no_grad():
        for x in batches:
            twin(x)
    return {name: moments(torch.cat(parts)) for name, parts in seen.items()}


each_width = pytest.mark.parametrize("bits", [8, 4])
with_observers = pytest.mark.parametrize("observers", [True, False], ids=["observers on", "observers off"])
# torch.ao is on its way to another package, which it says at every step.
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@deprecated
@each_width
@with_observers
@each_procedure
def test_observers_of_quantisation_are_put_back(bits, observers, normalize):
    model = quantised(bits)
    if not observers:
        model.apply(quantization.disable_observer)
    before, all_before = everything(model, is_statistic), everything(model)
    report = update_bn_stats(model, [2 * x + 1 for x in picture_batches()], normalize=normalize)
    assert_same(everything(model, is_statistic), before)
    assert len(report.layers) == 2
    report.undo()
    assert_same(everything(model), all_before)


@deprecated
@each_width
@each_procedure
@pytest.mark.parametrize("at", [0, 3])
def test_observers_of_quantisation_are_put_back_after_a_failure(bits, normalize, at):
    def loader():
        for i, x in enumerate(picture_batches()):
            if i == at:
                raise Unlucky
            yield x

    model = quantised(bits)
    before = everything(model)
    with pytest.raises(Unlucky):
        update_bn_stats(model, loader(), normalize=normalize)
    assert_same(everything(model), before)


@deprecated
@pytest.mark.parametrize("kind", ["per channel", "histogram", "never used"])
def test_observers_that_grow_are_put_back(kind):
    """From no element to one per channel, in place."""
    kinds = {
        "per channel": quantization.MovingAveragePerChannelMinMaxObserver,
        "histogram": quantization.HistogramObserver,
        "never used": quantization.PerChannelMinMaxObserver,
    }
    model = nn.Sequential(nn.BatchNorm2d(3), kinds[kind]())
    before = everything(model, is_statistic)
    update_bn_stats(model, picture_batches())
    assert_same(everything(model, is_statistic), before)


@deprecated
@each_width
@with_observers
def test_what_is_left_is_measured_with_the_new_statistics_in_the_buffers(bits, observers, caplog):
    model, batches = quantised(bits), [1.1 * x + 0.1 for x in picture_batches()]
    if not observers:
        model.apply(quantization.disable_observer)
    report = update_bn_stats(model, batches, normalize="population")
    left = {}
    for name, (mean, var) in shown(model, batches).items():
        layer = model.get_submodule(name)
        scale = var + layer.eps
        by_mean = (layer.running_mean - mean).abs() / scale.sqrt()
        left[name] = float(torch.maximum(by_mean, (layer.running_var - var).abs() / scale).max())
        assert report[name].residual == pytest.approx(left[name], rel=1e-3, abs=1e-6)
    worst = max(layer.residual for layer in report.layers)
    # What reads its own statistics, and rounds by them, has no exact ones.
    assert 1e-4 < left["0.bn"] < (0.05 if bits == 8 else 0.5)
    assert f"to within {worst:.1e}" in str(report)
    assert ("has not settled" in caplog.text) == (worst > 1e-4)


@deprecated
def test_statistics_by_which_a_module_scales_its_weights_are_exact_where_that_is_possible():
    """Unquantised, the fused module only multiplies and divides: population settles though it reads its statistics."""
    model, batches = quantised(8), picture_batches()
    model.apply(quantization.disable_fake_quant)
    report = update_bn_stats(model, batches, normalize="population")
    assert max(layer.residual for layer in report.layers) <= 1e-4
    for name, (mean, var) in shown(model, batches).items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-4, atol=0)


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


# --------------------------------------------------------------------------------------------------- train() and eval()


def trains(model: nn.Module, x: Tensor) -> None:
    model.train()
    model(x)


def evaluates(model: nn.Module, x: Tensor) -> None:
    model.eval()
    model(x)
    model.train()


each_switch = pytest.mark.parametrize("switch", [trains, evaluates])


@each_model
@each_procedure
@each_switch
def test_forward_that_switches_modes_and_fails_changes_nothing(build, normalize, switch):
    def forward(model, x):
        switch(model, x)
        calls.append(x)
        if len(calls) == 3:
            raise Unlucky

    model, calls = build(), []
    before = everything(model)
    with pytest.raises(Unlucky):
        update_bn_stats(model, picture_batches(), forward=forward, normalize=normalize)
    assert_same(everything(model), before)


@each_model
@each_procedure
@each_switch
def test_forward_that_switches_modes_leaves_only_statistics(build, normalize, switch):
    model = build()
    but = is_statistic_of_ours if hasattr(next(iter(report_layers(model))), "sums") else is_statistic
    before, all_before = everything(model, but), everything(model)
    report = update_bn_stats(model, picture_batches(), forward=switch, normalize=normalize)
    assert_same(everything(model, but), before)
    report.undo()
    assert_same(everything(model), all_before)


def report_layers(model: nn.Module):
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


@each_model
@each_switch
@pytest.mark.parametrize("fails", [True, False])
def test_precise_bn_in_which_modes_are_switched(build, switch, fails):
    model = build()
    but = is_statistic_of_ours if hasattr(next(iter(report_layers(model))), "sums") else is_statistic
    before, all_before = everything(model, but), everything(model)
    with contextlib.suppress(Unlucky), precise_bn(model) as recalibration:
        for x in picture_batches():
            switch(model, x)
        if fails:
            raise Unlucky
    assert_same(everything(model, but), before)
    if not fails:
        recalibration.report.undo()
    assert_same(everything(model), all_before)


@pytest.mark.parametrize("to", ["running", "precise"])
def test_train_in_forward_gives_our_layers_the_statistics_it_gives_torchs(to):
    expected, model = ours(to), ours(to)
    for each in (expected, model):
        each.head[0].p = 0.0
    update_bn_stats(expected, picture_batches())
    update_bn_stats(model, picture_batches(), forward=trains)
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------- loaders that use the model


def rollouts(model: nn.Module, n: int = 4):
    """Each batch after some calls of the model on quite other data."""
    for i in range(n):
        model(rows(16, seed=50 + i) + 100)
        yield rows(16, seed=i)


@each_procedure
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_calls_of_the_loader_are_not_counted(normalize, mode):
    model, twin = (getattr(mlp(), mode)() for _ in range(2))
    batches = [rows(16, seed=i) for i in range(4)]
    report = update_bn_stats(model, rollouts(model), normalize=normalize)
    assert report.batches == 4
    assert report["1"].elements == 64
    update_bn_stats(twin, batches, normalize=normalize)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_loader_sees_the_model_as_it_is():
    def loader():
        for i in range(3):
            seen.append((model.training, model[4].training, torch.is_grad_enabled(), "forward" in vars(model[1])))
            outputs.append(model(rows(8)).detach())
            model.zero_grad()
            model(rows(8)).sum().backward()
            yield rows(16, seed=i)

    model = mlp().train()
    model[4].eval()
    seen, outputs, expected = [], [], copy.deepcopy(model)(rows(8)).detach()
    update_bn_stats(model, loader())
    assert seen == [(True, False, True, False)] * 3
    torch.testing.assert_close(outputs[0], expected)


def test_loader_that_trains_in_between_changes_only_weights():
    def loader():
        for i in range(3):
            model.train()(rows(16, seed=30 + i) + 100).square().mean().backward()
            optimizer.step()
            model.eval()
            yield rows(16, seed=i)

    model = mlp().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    flags = [m.training for m in model.modules()]
    expected = reference(mlp(), [rows(16, seed=i) for i in range(3)])
    assert_statistics(recalibrated(model, loader()), expected)
    assert [m.training for m in model.modules()] == flags
    assert int(model[1].num_batches_tracked) == int(mlp()[1].num_batches_tracked)


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
                self.buffer.data.mul_(2), self.flag.data.logical_not_()
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
