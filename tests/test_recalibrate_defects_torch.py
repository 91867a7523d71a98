"""Defects of ``torch.optim.swa_utils.update_bn``, seen on torch 2.13, that update_bn_stats does not have."""

import collections

import pytest
import torch
from cases import noise
from recalibration_models import (
    assert_same,
    assert_statistics,
    everything,
    is_statistic,
    mlp,
    moments,
    recalibrated,
    reference,
    rows,
)
from torch import nn
from torch.optim.swa_utils import update_bn
from versions import needs_compiled_function_modes

from runningbn import update_bn_stats


class Unlucky(Exception):
    pass


def failing(n: int):
    for i in range(n):
        yield rows(8, seed=i)
    raise Unlucky


@pytest.fixture
def fvcore():
    return pytest.importorskip("fvcore.nn.precise_bn").update_bn_stats


def test_torch_5_exception_leaves_momentum_flags_and_half_of_the_statistics():
    other, model = mlp().eval(), mlp().eval()
    with pytest.raises(Unlucky):
        update_bn(failing(2), other)
    assert (other[1].momentum, other[1].training) == (None, True)
    before = everything(model)
    with pytest.raises(Unlucky):
        update_bn_stats(model, failing(2))
    assert_same(everything(model), before)


def test_torch_6_flags_per_module_are_flattened_and_frozen_layers_updated():
    def build() -> nn.Module:
        model = nn.Sequential(*mlp(), nn.Dropout(0.5)).train()
        model[4].eval()
        model[-1].eval()
        return model

    def but(name: str) -> bool:
        return is_statistic(name) and not name.startswith("4.")

    other, model = build(), build()
    flags = [module.training for module in model]
    update_bn([rows(16)], other)
    assert [module.training for module in other] != flags
    assert not torch.equal(other[4].running_mean, model[4].running_mean)
    before = everything(model, but)
    update_bn_stats(model, [rows(16)])
    assert_same(everything(model, but), before)
    assert [module.training for module in model] == flags


def test_torch_6_dropout_left_on_in_an_evaluating_model_is_turned_off():
    other, model = (nn.Sequential(*mlp(), nn.Dropout(0.5)).eval() for _ in range(2))
    for each in (other, model):
        each[-1].train()
    update_bn([rows(16)], other)
    expected = reference(model, [rows(16)])
    assert_statistics(recalibrated(model, [rows(16)]), expected)
    assert (other[-1].training, model[-1].training, model[1].training) == (False, True, False)


def test_torch_10_class_sorted_loader_loses_the_variance_between_classes():
    batches = [noise((64, 1), seed) + 3 * seed for seed in range(10)]
    other, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, other)
    update_bn_stats(model, batches)
    assert other.running_var < 1.2
    torch.testing.assert_close(model.running_var, torch.cat(batches).var(0), rtol=1e-5, atol=0)


def test_torch_10_batches_of_96_and_4_weigh_alike():
    batches = [noise((96, 1), 0), noise((4, 1), 1) + 50]
    other, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, other)
    update_bn_stats(model, batches)
    assert other.running_mean > 20
    torch.testing.assert_close(model.running_mean, torch.cat(batches).mean(0), rtol=1e-5, atol=0)


def test_torch_12_average_in_bfloat16_stagnates():
    batches = [(noise((32, 3), seed) * 0.1 + 0.3).bfloat16() for seed in range(400)]
    other, model = (nn.BatchNorm1d(3, dtype=torch.bfloat16) for _ in range(2))
    update_bn(batches, other)
    update_bn_stats(model, batches, None)
    mean, var = moments(torch.cat(batches).double())
    assert (other.running_mean < 0.27).all()
    assert torch.equal(model.running_mean, mean.bfloat16())
    assert ((model.running_var - var).abs() <= var * 2**-8).all()
    assert model.running_mean.dtype == torch.bfloat16


def test_torch_13_single_sample_tail_raises_and_leaves_the_model_broken():
    other, model, data = mlp(1).eval(), mlp(1).eval(), rows(33).split(8)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        update_bn(data, other)
    assert other[1].momentum is None
    expected = reference(model, [rows(33)])
    report = update_bn_stats(model, data)
    assert_statistics(model, expected)
    assert (report.batches, report["1"].elements) == (5, 33)


@pytest.mark.parametrize("mapping", [dict, collections.OrderedDict, collections.UserDict])
def test_torch_13_batch_that_is_a_mapping_is_a_type_error(mapping):
    other, model = mlp(1), mlp(1)
    with pytest.raises((TypeError, AttributeError)):
        update_bn([mapping(input=rows(8))], other)
    expected = reference(model, [rows(8)])
    assert_statistics(recalibrated(model, [mapping(input=rows(8))]), expected)


@pytest.mark.parametrize("system", ["fvcore", "torch"])
def test_fvcore_and_torch_dropout_stays_on_and_inflates_the_variance(system, fvcore):
    def build() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5)).train()

    other, model, data = build(), build(), rows(1000) + 10
    fvcore(other, [data], 1) if system == "fvcore" else update_bn([data], other)
    update_bn_stats(model, [data])
    assert (other[1].running_var > 2 * data.var(0)).all()
    torch.testing.assert_close(model[1].running_var, data.var(0), rtol=1e-4, atol=0)


def test_torch_has_no_limit_to_what_it_draws():
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            if len(drawn) > 1000:
                raise Unlucky
            yield rows(4)

    with pytest.raises(Unlucky):
        update_bn(endless(), nn.BatchNorm1d(5))
    drawn.clear()
    update_bn_stats(nn.BatchNorm1d(5), endless(), 3)
    assert len(drawn) == 3


@needs_compiled_function_modes
def test_torch_15_model_compiled_as_one_graph_is_a_compiler_error():
    other, model = (torch.compile(mlp(1), backend="eager", fullgraph=True).train() for _ in range(2))
    expected = {f"_orig_mod.{name}": moments for name, moments in reference(mlp(1), rows(40).split(8)).items()}
    with pytest.raises(Exception, match="data-dependent"):
        update_bn(rows(40).split(8), other)
    y = model(rows(8))
    report = update_bn_stats(model, rows(40).split(8))
    assert_statistics(model, expected)
    assert report.batches == 5
    assert torch.equal(model(rows(8)), y)
