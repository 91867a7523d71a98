"""User code that switches modes, and loaders that use the model: what it does is not counted, and put back."""

import contextlib
import copy

import pytest
import torch
from recalibration_models import (
    assert_same,
    assert_statistics,
    each_model,
    each_procedure,
    everything,
    is_statistic,
    is_statistic_of_ours,
    mlp,
    ours,
    picture_batches,
    recalibrated,
    reference,
    rows,
)
from torch import Tensor, nn

from runningbn import precise_bn, update_bn_stats


class Unlucky(Exception):
    pass


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
