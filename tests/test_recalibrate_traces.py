"""What update_bn_stats leaves behind: the statistics, and nothing else; and how undo() takes them back."""

import random

import numpy as np
import pytest
import torch
from models import TARGETS
from recalibration_models import (
    assert_same,
    draw_everywhere,
    each_model,
    each_procedure,
    everything,
    is_statistic,
    mlp,
    ours,
    picture_batches,
    pictures,
    random_states,
    residual,
    rows,
    statistics,
)
from steps import train
from torch import nn

from runningbn import PreciseBatchNorm2d, batchnormify, precise_bn, update_bn_stats


class Unlucky(Exception):
    pass


# -------------------------------------------------------------------------------------------------------------- success


def written(model: nn.Module):
    """Which tensors may differ afterwards: the statistics of the layers updated."""
    of_ours = ("sums", "sqrs", "shift", "count", "debias")

    def may_differ(name: str) -> bool:
        layer, _, buffer = name.rpartition(".")
        return is_statistic(name) or (hasattr(model.get_submodule(layer), "sums") and buffer in of_ours)

    return may_differ


@each_model
@each_procedure
def test_success_changes_only_the_statistics_and_them_in_place(build, normalize):
    def loader():
        for x in picture_batches():
            draw_everywhere()
            yield x

    model = build()
    before, random_before, old = everything(model, but=written(model)), random_states(), statistics(model)
    update_bn_stats(model, loader(), normalize=normalize)
    assert_same(everything(model, but=written(model)), before)
    assert random_states() == random_before
    assert any(not torch.equal(mean, old[name][0]) for name, (mean, _) in statistics(model).items())


@each_model
def test_precise_bn_changes_only_the_statistics_and_them_in_place(build):
    model = build()
    before, old = everything(model, but=written(model)), statistics(model)
    with precise_bn(model):
        for x in picture_batches():
            model(x)
    assert_same(everything(model, but=written(model)), before)
    assert any(not torch.equal(mean, old[name][0]) for name, (mean, _) in statistics(model).items())


def test_gradients_of_the_running_sums_of_our_layers_are_kept():
    model = ours("running")
    before = {name: b.clone() for name, b in model.named_buffers() if "dy" in name}
    assert before
    update_bn_stats(model, picture_batches())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)


def test_views_of_the_buffers_see_the_new_statistics():
    model = residual()
    view, state = model.stem[1].running_mean[:2], model.state_dict()
    update_bn_stats(model, picture_batches())
    assert torch.equal(view, model.stem[1].running_mean[:2])
    assert torch.equal(state["stem.1.running_var"], model.stem[1].running_var)


def test_user_hooks_see_every_forward():
    model, seen = residual(), []
    model.stem[1].register_forward_hook(lambda module, args, y: seen.append((len(args[0]), y.requires_grad)))
    update_bn_stats(model, picture_batches(3))
    assert seen == [(4, False)] * 3


def test_own_forward_of_an_instance_is_kept_and_respected():
    model = residual()
    plain = model.stem[1].forward
    model.stem[1].forward = forward = lambda x: plain(2 * x)
    update_bn_stats(model, picture_batches())
    assert vars(model.stem[1])["forward"] is forward
    doubled = torch.cat([2 * model.stem[0](x) for x in picture_batches()])
    torch.testing.assert_close(model.stem[1].running_mean, doubled.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_generators_are_as_if_no_one_had_drawn_from_them():
    model = residual()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    dataset = torch.utils.data.TensorDataset(pictures(12))
    update_bn_stats(model, torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


# ----------------------------------------------------------------------------------------------------------------- undo


@each_model
@each_procedure
def test_undo_restores_every_bit(build, normalize):
    model = build()
    before = everything(model)
    report = update_bn_stats(model, picture_batches(), normalize=normalize)
    assert statistics(model).keys()
    report.undo()
    assert_same(everything(model), before)
    report.undo()
    assert_same(everything(model), before)


@each_model
def test_report_as_a_context_manager_undoes_on_leaving(build):
    model = build()
    before, old = everything(model), statistics(model)
    with update_bn_stats(model, picture_batches()) as report:
        assert any(not torch.equal(mean, old[name][0]) for name, (mean, _) in statistics(model).items())
        assert report.batches == 4
    assert_same(everything(model), before)


def test_report_as_a_context_manager_undoes_after_an_exception():
    model = residual()
    before = everything(model)
    with pytest.raises(Unlucky), update_bn_stats(model, picture_batches()):
        raise Unlucky
    assert_same(everything(model), before)


def test_undo_of_precise_bn():
    model = residual()
    before = everything(model)
    with precise_bn(model) as recalibration:
        model(pictures(4))
    recalibration.report.undo()
    assert_same(everything(model), before)


def test_undo_after_training_on_takes_back_the_statistics_only():
    model = mlp().train()
    old = statistics(model)
    report = update_bn_stats(model, [rows(16)])
    train(model, [rows(8, seed=1)])
    with torch.no_grad():
        model[0].weight.add_(1)
    weight, tracked = model[0].weight.clone(), model[1].num_batches_tracked.clone()
    report.undo()
    assert all(torch.equal(a, b) for name in old for a, b in zip(statistics(model)[name], old[name]))
    assert torch.equal(model[0].weight, weight)
    assert model[1].num_batches_tracked == tracked


def test_two_reports_undone_in_reverse():
    model = mlp()
    before = everything(model)
    first = update_bn_stats(model, [rows(16)])
    middle = everything(model)
    second = update_bn_stats(model, [rows(16, seed=1)])
    second.undo()
    assert_same(everything(model), middle)
    first.undo()
    assert_same(everything(model), before)


@pytest.mark.parametrize(
    ("before", "to", "message"),
    [("precise", "torch", "no longer"), ("torch", "precise", "to Precise"), ("torch", "running", "to Running")],
)
def test_undo_refuses_after_a_conversion_of_the_layers(before, to, message):
    model = batchnormify(residual(), before)
    report = update_bn_stats(model, picture_batches())
    batchnormify(model, to)
    after = everything(model)
    with pytest.raises(RuntimeError, match=message):
        report.undo()
    assert_same(everything(model), after)


@pytest.mark.parametrize("to", TARGETS)
def test_undo_refuses_before_it_restores_anything_if_one_layer_was_resized(to):
    model = batchnormify(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), to)
    report = update_bn_stats(model, picture_batches())
    model[1].running_mean, model[1].running_var = torch.zeros(2), torch.ones(2)
    after = everything(model)
    with pytest.raises(RuntimeError, match=r"no longer has all of .*, of 3 channels"):
        report.undo()
    assert_same(everything(model), after)


def test_layer_of_ours_trained_on_after_undo_goes_on_as_without():
    model, twin = (train(PreciseBatchNorm2d(3), [pictures(4)]) for _ in range(2))
    with update_bn_stats(model, picture_batches()):
        pass
    for each in (model, twin):
        train(each, [pictures(4, seed=5)])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


# ---------------------------------------------------------------------------------------------------- training goes on


def trained_on(build, recalibrate):
    """Three epochs of a model with dropout, `recalibrate(model, loader)` after each; and all that training left."""
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.utils.data.TensorDataset(pictures(24), torch.arange(24) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    for _ in range(3):
        for x, label in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            optimizer.step()
        recalibrate(model, loader)
    buffers = [state["momentum_buffer"] for state in optimizer.state_dict()["state"].values()]
    return model, buffers, random_states()


NOTHING_READS_STATISTICS = {"torch": residual, "precise": lambda: batchnormify(residual(), "precise")}


@pytest.mark.parametrize("build", NOTHING_READS_STATISTICS.values(), ids=NOTHING_READS_STATISTICS)
@each_procedure
def test_training_goes_on_bit_for_bit_after_recalibrations_between_epochs(build, normalize):
    def recalibrate(model, loader):
        model.zero_grad()
        reports.append(update_bn_stats(model, loader, normalize=normalize))

    reports = []
    model, momenta, states = trained_on(build, recalibrate)
    twin, momenta_of_twin, states_of_twin = trained_on(build, lambda model, loader: model.zero_grad())
    assert len(reports) == 3
    assert all(layer.moved > 0 for layer in reports[-1].layers)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(momenta, momenta_of_twin, strict=True))
    assert states == states_of_twin
    tracked = [(a, b) for (n, a), b in zip(model.named_buffers(), twin.buffers()) if n.endswith("num_batches_tracked")]
    assert all(a == b == 9 + 17 for a, b in tracked)


@pytest.mark.parametrize("to", ["torch", "running", "precise"])
def test_training_goes_on_bit_for_bit_after_recalibrations_undone(to):
    def build():
        return batchnormify(residual(), to)

    def recalibrate(model, loader):
        with update_bn_stats(model, loader):
            pass

    (model, *rest), (twin, *rest_of_twin) = trained_on(build, recalibrate), trained_on(build, lambda *_: None)
    assert rest[1] == rest_of_twin[1]
    state, state_of_twin = model.state_dict(), twin.state_dict()
    assert all(torch.equal(state[name], value) for name, value in state_of_twin.items())


def test_gradients_waiting_for_a_step_are_kept():
    model = residual().train()
    model(pictures(4)).sum().backward()
    before = everything(model, but=is_statistic)
    assert any(name.startswith("gradient") for name in before)
    update_bn_stats(model, picture_batches())
    assert_same(everything(model, but=is_statistic), before)
