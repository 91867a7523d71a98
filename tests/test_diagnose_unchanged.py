"""`diagnose` changes nothing: statistics, other buffers, flags, hooks and the random state, also where it fails."""

import pytest
import torch
from cases import each_pair, names_of
from recalibration_models import (
    MODELS,
    assert_same,
    draw_everywhere,
    each_model,
    each_procedure,
    everything,
    mlp,
    picture_batches,
    random_states,
    rows,
)
from steps import train
from torch import nn

from runningbn import batchnormify, diagnose


class Unlucky(Exception):
    pass


ERRORS = {"exception": Unlucky, "interrupt": KeyboardInterrupt}


class Unchanged:
    """A model and the random state, compared with what they were on leaving."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = everything(self.model), random_states(), torch.is_grad_enabled()

    def __exit__(self, *exception: object) -> None:
        assert_same(everything(self.model), self.before[0])
        assert (random_states(), torch.is_grad_enabled()) == self.before[1:]


def drawing(model, x=None):
    draw_everywhere()
    return model(x)


@each_model
@each_procedure
def test_a_diagnosis(build, normalize):
    model = build()

    def loader():
        for x in picture_batches():
            draw_everywhere()
            yield x

    def metric(model):
        draw_everywhere()
        return model(picture_batches(1)[0]).mean()

    with Unchanged(model):
        found = diagnose(model, loader(), forward=drawing, metric=metric, normalize=normalize)
        str(found), found.to_dict()
    assert found.batches == 4


@each_pair(build=MODELS, error=ERRORS, at=names_of(*range(1, 17)))
def test_a_forward_that_fails(build, error, at):
    """In the recalibration (4 calls) or in one of the three runs of each batch (12)."""
    calls = []

    def forward(model, x):
        draw_everywhere()
        y = model(x)
        calls.append(1)
        if len(calls) == at:
            raise error
        return y

    model = build()
    with Unchanged(model), pytest.raises(error):
        diagnose(model, picture_batches(), forward=forward)
    assert len(calls) == at


@each_pair(build=MODELS, error=ERRORS, at=names_of(0, 2))
def test_a_loader_that_fails(build, error, at):
    def loader():
        for i, x in enumerate(picture_batches()):
            draw_everywhere()
            if i == at:
                raise error
            yield x

    model = build()
    with Unchanged(model), pytest.raises(error):
        diagnose(model, loader())


@each_pair(build=MODELS, error=ERRORS, at=names_of(1, 2, 3))
def test_a_metric_that_fails(build, error, at):
    calls = []

    def metric(model):
        calls.append(drawing(model, picture_batches(1)[0]))
        if len(calls) == at:
            raise error
        return 0.0

    model = build()
    with Unchanged(model), pytest.raises(error):
        diagnose(model, picture_batches(), metric=metric)
    assert len(calls) == at


@pytest.mark.parametrize("to", ["torch", "running", "precise"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_metric_that_trains(to, fails):
    """Nothing of what it does to the statistics stays, and each of the three begins with the right ones."""
    calls = []

    def metric(model):
        model.eval()
        calls.append(model(rows(8)))
        model.train()
        model(100 * rows(8))
        if fails and len(calls) == 3:
            raise Unlucky
        return 0.0

    model = train(batchnormify(mlp(2), to), [rows(8)])
    data = rows(40).split(8)
    with Unchanged(model):
        if fails:
            with pytest.raises(Unlucky):
                diagnose(model, data, metric=metric)
        else:
            diagnose(model, data, metric=metric)
    expected = []
    diagnose(model, data, metric=lambda model: expected.append(model(rows(8))) or 0.0)
    assert all(torch.equal(a, b) for a, b in zip(calls, expected, strict=True))


class Spiking(nn.Module):
    """A potential that each forward leaks and fills, in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("potential", torch.zeros(1))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        self.potential.mul_(0.5).add_(x.detach().mean())
        self.step = self.step + 1
        return x + self.potential


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_change_in_evaluation(fails):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Spiking(), nn.BatchNorm1d(4))
    steps = []

    def forward(model, x):
        y = model(x)
        steps.append(int(model[2].step))
        if fails and len(steps) == 10:
            raise Unlucky
        return y

    with Unchanged(model):
        if fails:
            with pytest.raises(Unlucky):
                diagnose(model, rows(40).split(8), forward=forward)
        else:
            diagnose(model, rows(40).split(8), forward=forward)


class ReadsStatistics(nn.Module):
    """Scales by `running_var` of a layer, as layers fused for quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(x * self.norm.running_var)


def test_recomputed_statistics_are_in_the_buffers_while_they_are_in_use():
    model, data = ReadsStatistics(), rows(40).split(8)
    seen = []
    with Unchanged(model):
        found = diagnose(model, data, forward=lambda m, x: seen.append(m.norm.running_var.double()) or m(x))
    recomputed = found["norm"].recomputed.old_var
    assert [torch.equal(var, recomputed) for var in seen[5:]] == [False, True, False] * 5
    assert all(torch.equal(var, found["norm"].stored.old_var) for var in (*seen[5::3], *seen[7::3]))
