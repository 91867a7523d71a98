"""normalize="population" by all batches joined: the same numbers as layer by layer, in two passes, where it can be."""

import collections
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import pretrained
from real_models_images import IMAGES
from recalibration_models import (
    BatchNorm,
    assert_same,
    assert_statistics,
    each_model,
    everything,
    inputs_in_evaluation,
    is_statistic,
    mlp,
    moments,
    picture_batches,
    residual,
    rows,
    statistics,
)
from torch import Tensor, nn

from runningbn import update_bn_stats
from runningbn.recalibration.joined import NotJoinedError, PeakMemory, check_joinable, joined, samples

DATA = rows(96)


def both_ways(build: Callable[[], nn.Module], batches: Any, **options: Any) -> list[tuple[nn.Module, Any]]:
    """The model and the report, by the pass of all batches joined and layer by layer."""
    found = []
    for limit in (2**30, 0):
        model = build()
        report = update_bn_stats(model, batches, normalize="population", memory_limit=limit, **options)
        found.append((model, report))
    return found


def assert_both_ways_agree(build: Callable[[], nn.Module], batches: Any, tolerance: float = 1e-5, **options: Any):
    """To rounding: the kernels add up one large batch in another order than several small ones."""
    (model, report), (other, expected) = both_ways(build, batches, **options)
    assert_statistics(model, statistics(other), tolerance)
    for one, two in zip(report.layers, expected.layers, strict=True):
        assert (one.name, one.batches, one.samples, one.elements) == (two.name, two.batches, two.samples, two.elements)
        assert (one.correction, one.computes_itself) == (two.correction, two.computes_itself)
        torch.testing.assert_close(one.mean_error, two.mean_error, rtol=1e-3, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(one.var_error, two.var_error, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert one.residual <= 1e-4
    assert (report.batches, report.not_finite, report.unused) == (
        expected.batches, expected.not_finite, expected.unused,
    )  # fmt: skip
    assert report.passes == 2
    assert expected.passes > 2 or len(expected.layers) == 1


@each_model
def test_each_model_gives_the_same_numbers_both_ways(build):
    assert_both_ways_agree(build, picture_batches())


# Every fourth stands for all where time is short.
MARKS = {case: () if case in IMAGES[::4] else pytest.mark.slow for case in IMAGES}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id, marks=MARKS[case]) for case in IMAGES])
def test_real_models_give_the_same_numbers_both_ways(case):
    (model, report), (other, _) = both_ways(case.model, case.batches(3))
    assert_statistics(model, statistics(other), 1e-3)
    assert max(layer.residual for layer in report.layers if not layer.feeds_itself) <= 1e-4
    assert report.passes == 2


@pytest.mark.parametrize("depth", [1, 2, 20])
@pytest.mark.parametrize("sizes", [(96,), (2,) * 48, (1, 95), (30, 30, 36)], ids=lambda sizes: str(sizes[:3]))
def test_two_passes_at_any_depth_and_split(depth, sizes):
    # A net of 20 random layers amplifies roundings.
    assert_both_ways_agree(lambda: mlp(depth), DATA.split(sizes), 1e-4, num_iters=None)


@pytest.mark.parametrize("depth", [1, 2, 20])
def test_samples_one_by_one(depth):
    """Layer by layer, some are left out at depth 20: normalised by what few samples have given, they overflow."""
    model = mlp(depth)
    report = update_bn_stats(model, DATA.split(1), None, normalize="population")
    assert (report.passes, report.batches) == (2, 96)
    expected = {name: moments(x) for name, x in inputs_in_evaluation(model, [DATA]).items()}
    assert_statistics(model, expected, 1e-4)


@pytest.mark.parametrize("options", [{"prior": 16.0}, {"layers": ["1", "7"]}, {"num_iters": 2}], ids=str)
def test_options(options):
    assert_both_ways_agree(lambda: mlp(4), DATA.split(16), **options)


def test_tolerance_limits_the_batches_and_costs_a_pass_more():
    (model, report), (other, expected) = both_ways(lambda: mlp(4), rows(3200).split(16), num_iters=None, tolerance=0.1)
    assert 8 <= report.batches == expected.batches < 200
    assert report.passes == 3
    assert_statistics(model, statistics(other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    batches = DATA.to(dtype).split(16)
    (model, report), (other, _) = both_ways(lambda: mlp(4, dtype=dtype), batches)
    assert_statistics(model, statistics(other), 1e-10 if dtype == torch.float64 else 0.05)
    assert report.passes == (2 if dtype == torch.float64 else report.passes)


def test_loader_that_can_be_read_once():
    model, other = mlp(4), mlp(4)
    report = update_bn_stats(model, iter(DATA.split(16)), normalize="population")
    assert report.passes == 2
    update_bn_stats(other, DATA.split(16), normalize="population", memory_limit=0)
    assert_statistics(model, statistics(other))


Pair = collections.namedtuple("Pair", "x y")
FORMATS = {
    "labels of any kind": (lambda x: (x, ["a"] * len(x), [{"box": len(x)}]), None),
    "list": (lambda x: [x], None),
    "mapping": (lambda x: {"input": x}, None),
    "pair, forward": (lambda x: Pair(x, torch.zeros(len(x))), lambda model, batch: model(batch.x)),
    "nested, forward": (lambda x: {"a": [x, None, 3], "b": ("c",)}, lambda model, batch: model(batch["a"][0])),
}


@pytest.mark.parametrize(("pack", "forward"), FORMATS.values(), ids=FORMATS)
def test_formats_of_batches(pack, forward):
    assert_both_ways_agree(lambda: mlp(3), [pack(x) for x in DATA.split(16)], forward=forward)


# ------------------------------------------------------------------------------- where it is impossible: layer by layer


class Different(nn.Module):
    """Does something that depends on the batch as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = mlp(2), nn.BatchNorm1d(8)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.between(self.net(x)))


class Centring(Different):
    def between(self, x):
        return x - x.mean(0)


class Refusing(Different):
    def between(self, x):
        if len(x) > 16:
            raise ValueError("too large")
        return x


class SwallowingErrors(Different):
    """An `except Exception` in a model does not keep it from going on layer by layer."""

    def between(self, x):
        try:
            return self.net[1](self.net[0](x[:, :5]))
        except Exception:
            return x


class Stateful(Different):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("potential", torch.zeros(8))

    def between(self, x):
        self.potential = self.potential * 0.5 + x.mean(0).detach()
        return x + self.potential


class Switching(Different):
    def between(self, x):
        return x if x[0, 0] > 0.7 else self.net[1](x)


class Repeating(Different):
    def between(self, x):
        return self.net[1](x)


class Resized(Different):
    def between(self, x):
        self.seen = x
        return x * self.seen.shape[0]


@pytest.mark.parametrize("kind", [Centring, Refusing, SwallowingErrors, Stateful, Switching, Repeating, Resized])
def test_models_whose_batches_are_more_than_their_samples(kind, caplog):
    caplog.set_level(logging.INFO, "runningbn")

    def build():
        torch.manual_seed(0)
        return pretrained(kind())

    (model, report), (other, expected) = both_ways(build, DATA.split(16))
    before = everything(build(), is_statistic)
    assert_same({k: v for k, v in everything(model, is_statistic).items() if "place" not in k},
                {k: v for k, v in before.items() if "place" not in k})  # fmt: skip
    assert statistics(model).keys() == statistics(other).keys()
    for name, (mean, var) in statistics(other).items():
        assert torch.equal(statistics(model)[name][0], mean)
        assert torch.equal(statistics(model)[name][1], var)
    assert report.passes >= expected.passes
    assert "layer by layer" in caplog.text


RAGGED = {
    "shapes": [torch.randn(4, 3, 6, 6), torch.randn(4, 3, 8, 8)],
    "dtypes": [torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6).double().float().to(torch.bfloat16)],
    "subclass": [nn.Parameter(torch.randn(4, 3, 6, 6)), torch.randn(4, 3, 6, 6)],
}


@pytest.mark.parametrize("kind", RAGGED)
def test_batches_that_cannot_be_joined(kind):
    with pytest.raises(NotJoinedError):
        check_joinable(RAGGED[kind])
    (model, report), (other, _) = both_ways(residual, RAGGED[kind], forward=lambda m, x: m(x.float()))
    assert report.passes > 2
    for name, (mean, var) in statistics(other).items():
        assert torch.equal(statistics(model)[name][0], mean)
        assert torch.equal(statistics(model)[name][1], var)


def test_batches_that_are_not_finite_are_left_out(caplog):
    batches = [*DATA.split(16)]
    batches[2] = batches[2] * float("inf")
    (model, report), (other, expected) = both_ways(lambda: mlp(3), batches)
    assert (report.batches, report.not_finite) == (expected.batches, expected.not_finite) == (5, 1)
    assert_statistics(model, statistics(other))


def test_batches_that_are_not_finite_in_a_deep_layer_are_left_out(caplog):
    class Overflowing(nn.Module):
        def forward(self, x):
            return torch.where(x.amax() > 1e30, torch.full_like(x, float("inf")), x)

    def build():
        return nn.Sequential(*mlp(2), nn.Linear(8, 8), Overflowing(), nn.BatchNorm1d(8))

    model = build()
    with torch.no_grad():
        model[6].weight[0, 0] = 1e20
    batches = [*DATA.split(16)]
    batches[1] = batches[1].clone().index_fill(0, torch.tensor([0]), 1e15)
    (one, report), (two, expected) = both_ways(build, batches)
    assert (report.batches, report.not_finite) == (expected.batches, expected.not_finite)
    assert_statistics(one, statistics(two))


def test_error_of_the_model_is_raised_as_it_is_and_changes_nothing():
    class Failing(Different):
        def between(self, x):
            raise ArithmeticError("of the model")

    model = pretrained(Failing())
    before = everything(model)
    with pytest.raises(ArithmeticError, match="of the model"):
        update_bn_stats(model, DATA.split(16), normalize="population")
    assert_same(everything(model), before)


@pytest.mark.parametrize("call", range(1, 9))
def test_interrupt_in_any_forward_changes_nothing(call):
    """The first is the probe, the second of all batches joined, and six follow."""
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        model(batch)
        if calls == call:
            raise KeyboardInterrupt

    model = mlp(3)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        update_bn_stats(model, DATA.split(16), forward=forward, normalize="population")
    assert calls == call
    assert_same(everything(model), before)


def test_batches_are_not_written_to():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.abs_()

    batches = [x.clone() for x in DATA.split(16)]
    update_bn_stats(nn.Sequential(InPlace(), *mlp(3)), batches, normalize="population")
    # The pass over the batches as they are does write, as any forward; but only the same once more.
    for x, y in zip(batches, DATA.split(16), strict=True):
        assert torch.equal(x, y.abs())


# -------------------------------------------------------------------------------------------------------------- memory


def test_peak_counts_what_is_alive_and_no_views():
    given = torch.zeros(1000)
    with PeakMemory() as memory:
        assert given.view(10, 100)[2:].t().shape == (100, 8)
        assert memory.peak == 0
        one = given + 1  # 4000
        two = one * 2  # 8000
        del one
        three = two.view(10, 100) + 1  # 8000
        three.add_(1)
        del two, three
        four = torch.empty(1500)  # 6000
    assert memory.peak == 8000
    assert four.shape == (1500,)


def test_the_compiler_is_not_imported():
    """It takes seconds, longer than many a recalibration."""
    code = """
        import sys, torch, runningbn
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        report = runningbn.update_bn_stats(model, torch.randn(4, 8, 3), normalize="population")
        assert report.passes == 2
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def needed(model: nn.Module, batches: list[Tensor]) -> float:
    with PeakMemory() as memory, torch.no_grad():
        model.eval()(batches[0].clone())
    return memory.peak * len(batches)


def test_estimate_is_what_the_joined_forward_needs():
    batches, model = picture_batches(6), residual().eval()
    with PeakMemory() as memory, torch.no_grad():
        model(torch.cat(batches))
    assert memory.peak == pytest.approx(needed(model, batches), rel=0.05)


def test_limit_decides():
    batches = list(DATA.split(16))
    rough = needed(mlp(4), batches)
    for limit, passes in ((rough / 4, 5), (rough * 4, 2), (float("inf"), 2), (0, 5)):
        report = update_bn_stats(mlp(4), batches, normalize="population", memory_limit=limit)
        assert report.passes == passes, limit


def test_estimate_grows_with_skip_connections():
    class Keeping(nn.Module):
        def __init__(self, keeps: bool) -> None:
            super().__init__()
            self.keeps, self.net = keeps, mlp(6, 5)

        def forward(self, x):
            kept = []
            for module in self.net:
                x = module(x)
                kept.append(x if self.keeps else None)
            return x if not self.keeps else sum(kept)

    batches = list(DATA.split(16))
    assert needed(Keeping(True), batches) > 3 * needed(Keeping(False), batches)


def test_estimate_is_scaled_by_the_samples_of_all_batches():
    few, many = DATA.split((8, 88)), DATA.split((88, 8))
    limit = needed(mlp(4), [DATA])
    for batches in (few, many):
        for factor, passes in ((0.25, 5), (4, 2)):
            report = update_bn_stats(mlp(4), batches, normalize="population", memory_limit=limit * factor)
            assert report.passes == passes


@pytest.mark.parametrize("wrong", [-1, float("nan"), None, True, "1 GiB"], ids=str)
def test_wrong_limit_is_refused(wrong):
    with pytest.raises(ValueError, match="memory_limit"):
        update_bn_stats(mlp(), DATA.split(16), memory_limit=wrong)


# ------------------------------------------------------------------------------------------------------------- joining


def test_joined_keeps_the_structure_and_copies():
    one = {"x": torch.ones(2, 3), "more": [Pair(torch.zeros(2), "name"), None, 4]}
    two = {"x": torch.zeros(3, 3), "more": [Pair(torch.ones(3), "name"), None, 4]}
    check_joinable([one, two])
    both = joined([one, two])
    assert torch.equal(both["x"], torch.cat((one["x"], two["x"])))
    assert torch.equal(both["more"][0].x, torch.tensor([0.0, 0, 1, 1, 1]))
    assert type(both["more"][0]) is Pair
    assert (both["more"][0].y, both["more"][1:]) == ("name", [None, 4])
    assert [samples(batch) for batch in (one, two, both)] == [2, 3, 5]
    alone = joined([one])
    assert alone["x"].data_ptr() != one["x"].data_ptr()


X = torch.zeros(2, 3)
NOT_ALIKE = {
    "structures": [{"x": X}, {"y": X}],
    "lengths of a list": [[X], [X, X]],
    "lengths within a batch": [(X, X[:1])] * 2,
    "no length": [torch.tensor(1.0)] * 2,
    "no tensor": [1, 1],
    "shapes": [X, torch.zeros(2, 4)],
    "dtypes": [X, X.double()],
    "layouts": [X, X.to_sparse()],
    "values": [(X, "a"), (X, "b")],
    "arrays": [(X, np.zeros(2))] * 2,
    "subclass": [nn.Parameter(X)] * 2,
    "a tensor and none": [(X, X), (X, None)],
}


@pytest.mark.parametrize("batches", NOT_ALIKE.values(), ids=NOT_ALIKE)
def test_what_cannot_be_joined(batches):
    with pytest.raises(NotJoinedError):
        check_joinable(batches)


def test_every_layer_was_counted():
    """Or else the tests here would show nothing."""
    assert sum(isinstance(module, BatchNorm) for module in mlp(20).modules()) == 20
