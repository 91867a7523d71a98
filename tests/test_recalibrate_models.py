"""update_bn_stats on models of all sorts: shared, unused and frozen layers, wrappers, dtypes; and precise_bn."""

import copy
import logging

import pytest
import torch
from models import pretrained
from recalibration_models import (
    DroppingBatchNormAct2d,
    assert_statistics,
    in_rows,
    inputs_by_batch,
    mlp,
    moments,
    pictures,
    recalibrated,
    reference,
    residual,
    rows,
    statistics,
)
from torch import nn
from torch.nn.utils import prune

from runningbn import batchnormify, get_bn_modules, precise_bn, update_bn_stats

BATCHES = rows(60).split([10, 30, 20])

# --------------------------------------------------------------------------------------------- which layers, how often


class Choosing(nn.Module):
    """Sends large batches one way and small ones another."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.never = (nn.BatchNorm1d(5) for _ in range(3))

    def forward(self, x):
        return self.large(x) if len(x) > 15 else self.small(x)


def test_layer_used_now_and_then_has_the_moments_of_what_reached_it():
    model = pretrained(Choosing())
    before = statistics(model)
    report = update_bn_stats(model, BATCHES)
    assert_statistics(
        model,
        {
            "large": moments(torch.cat(BATCHES[1:]).double()),
            "small": moments(BATCHES[0].double()),
            "never": before["never"],
        },
    )
    assert torch.equal(model.never.running_var.double(), before["never"][1])
    assert ([layer.name for layer in report.layers], report.unused) == (["large", "small"], ["never"])
    assert (report["large"].batches, report["small"].batches, report.batches) == (2, 1, 3)


def test_nothing_reached_any_layer():
    with pytest.raises(ValueError, match="never"):
        update_bn_stats(Choosing(), BATCHES, layers=["never"])


@pytest.mark.parametrize("calls", [2, 5])
@pytest.mark.parametrize("variance", ["population", "batch"])
def test_reused_layer_pools_its_calls(calls, variance):
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(5), nn.Linear(5, 5)

        def forward(self, x):
            for _ in range(calls):
                x = self.linear(self.norm(x)).tanh()
            return x

    torch.manual_seed(0)
    model = pretrained(Repeated())
    seen = inputs_by_batch(model, BATCHES)["norm"]
    assert len(seen) == 3 * calls
    mean, var = moments(torch.cat(seen))
    if variance == "batch":
        # As torch and fvcore count: every call a batch of its own.
        mean, var = (torch.stack(parts).mean(0) for parts in zip(*(moments(x) for x in seen)))
    report = update_bn_stats(model, BATCHES, variance=variance)
    assert_statistics(model, {"norm": (mean, var)})
    assert (report["norm"].batches, report["norm"].elements) == (3, 60 * calls)


def test_block_that_is_used_twice_in_a_sequence():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())
    model = pretrained(nn.Sequential(block, nn.Linear(5, 5), block))
    expected = reference(model, BATCHES)
    assert_statistics(recalibrated(model, BATCHES), expected)


def test_block_that_is_used_inside_an_earlier_part_too():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())
    model = pretrained(nn.Sequential(nn.Sequential(block, nn.BatchNorm1d(5)), block))
    expected = reference(model, BATCHES)
    assert_statistics(recalibrated(model, BATCHES), expected)


@pytest.mark.parametrize("frozen", ["1", "4", "7"])
def test_frozen_layer_normalises_by_its_own_statistics_and_keeps_them(frozen):
    model = mlp().train()
    model[int(frozen)].eval()
    before = statistics(model)
    twin = copy.deepcopy(model)
    x = rows(40)
    for name, module in model.named_children():
        by_batch = isinstance(module, nn.BatchNorm1d) and name != frozen
        twin[int(name)].train(by_batch)
        if by_batch:
            before[name] = moments(x.detach().double())
        x = twin[int(name)](x)
    assert_statistics(recalibrated(model, [rows(40)]), before)
    assert [*get_bn_modules(model)] == [m for n, m in model.named_children() if n in ("1", "4", "7") and n != frozen]
    assert torch.equal(model[int(frozen)].running_mean.double(), before[frozen][0])


def test_all_layers_frozen_in_a_training_model_are_left_alone():
    model = mlp().train()
    for layer in (model[1], model[4], model[7]):
        layer.eval()
    before = statistics(model)
    report = update_bn_stats(model, BATCHES)
    assert_statistics(model, before, tolerance=0)
    assert (report.layers, get_bn_modules(model)) == ([], [])


def test_model_without_batch_norm_is_left_alone_with_a_warning(caplog):
    model = nn.Sequential(nn.Linear(5, 5), nn.GroupNorm(1, 5), nn.InstanceNorm1d(5, track_running_stats=True))
    report = update_bn_stats(model, BATCHES)
    assert (report.layers, report.batches) == ([], 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    report.undo()
    assert isinstance(str(report), str)


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, lambda: nn.LazyLinear(5)], ids=["norm", "linear"])
def test_lazy_module_is_refused_until_it_has_seen_a_batch(lazy):
    model = nn.Sequential(nn.Linear(5, 5), lazy(), nn.BatchNorm1d(5))
    with pytest.raises(ValueError, match="not initialised"):
        update_bn_stats(model, BATCHES)
    model(BATCHES[0])
    expected = reference(model, BATCHES)
    assert_statistics(recalibrated(model, BATCHES), expected)


def test_get_bn_modules_lists_each_layer_once_in_the_order_of_the_model():
    model = residual()
    model.again = model.stem
    act = DroppingBatchNormAct2d(4)
    model.late = nn.ModuleList([act, nn.BatchNorm1d(3, track_running_stats=False)])
    batchnormify(model.blocks, "running")
    expected = [model.stem[1], model.blocks[0][1], model.blocks[0][4], act]
    assert all(a is b for a, b in zip(get_bn_modules(model), expected, strict=True))
    assert isinstance(get_bn_modules(model), list)


# ------------------------------------------------------------------------------------------------------------ wrappers


def test_data_parallel_model():
    model = nn.DataParallel(mlp())
    expected = {f"module.{name}": moments for name, moments in reference(mlp(), BATCHES).items()}
    assert_statistics(recalibrated(model, BATCHES), expected)
    assert "forward" not in vars(model)


def test_model_compiled_in_parts():
    model = mlp()
    model[0].compile(backend="eager")
    model.append(torch.compile(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), backend="eager"))
    expected = reference(copy.deepcopy(mlp()), BATCHES)
    assert_statistics(recalibrated(model, BATCHES), expected | {"9._orig_mod.1": statistics(model)["9._orig_mod.1"]})
    seen = torch.cat(inputs_by_batch(nn.Sequential(*mlp(), model[9]._orig_mod), BATCHES)["9.1"])
    torch.testing.assert_close(model[9]._orig_mod[1].running_var.double(), moments(seen)[1], rtol=1e-4, atol=0)


def test_averaged_model():
    model = torch.optim.swa_utils.AveragedModel(mlp())
    expected = {f"module.{name}": moments for name, moments in reference(mlp(), BATCHES).items()}
    assert_statistics(recalibrated(model, BATCHES), expected)
    assert model.n_averaged == 0


@pytest.mark.parametrize("by", ["prune", "parametrize"])
def test_pruned_and_parametrised_weights(by):
    model, plain = mlp(), mlp()
    if by == "prune":
        for layer, twin in ((model[3], plain[3]), (model[1], plain[1])):
            prune.l1_unstructured(layer, "weight", amount=0.5)
            twin.weight.data.copy_(layer.weight)
    else:
        nn.utils.parametrizations.weight_norm(model[3])
        model[3].parametrizations.weight.original0.data.mul_(2)
        plain[3].weight.data.mul_(2)
    expected = reference(plain, BATCHES)
    assert_statistics(recalibrated(model, BATCHES), expected)


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_written_in_the_dtype_of_the_buffers(dtype):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).to(dtype)
    batches = [x.to(dtype) for x in BATCHES]
    mean, var = moments(torch.cat([model[0](x).detach() for x in batches]).double())
    update_bn_stats(model, batches)
    assert torch.equal(model[1].running_mean, mean.to(dtype)) or dtype == torch.float64
    torch.testing.assert_close(model[1].running_mean, mean.to(dtype))
    assert ((model[1].running_var.double() - var).abs() <= torch.finfo(dtype).eps * var * 2 + 1e-12).all()
    assert model[1].running_var.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_net_of_float32_statistics(dtype):
    """What mixed training makes: everything but the normalisation in half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    model[1].float()
    batches = [pictures(8, seed=i).to(dtype) for i in range(3)]
    mean, var = moments(torch.cat([in_rows(model[0](x)) for x in batches]))
    update_bn_stats(model, batches)
    torch.testing.assert_close(model[1].running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, var.float(), rtol=1e-5, atol=0)


def test_autocast():
    model = residual()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update_bn_stats(model, [pictures(32)])
        y = model.stem[0](pictures(32))
    assert y.dtype == torch.bfloat16
    mean, var = moments(in_rows(y))
    torch.testing.assert_close(model.stem[1].running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.stem[1].running_var, var.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_gradient_mode(mode):
    model = mlp()
    with mode():
        recalibrated(model, BATCHES)
    assert_statistics(model, reference(mlp(), BATCHES))
    assert not any(b.requires_grad or b.is_inference() for b in model.buffers())


# ---------------------------------------------------------------------------------------------------------- precise_bn


@pytest.mark.parametrize("variance", ["population", "batch"])
def test_precise_bn_with_a_loop_of_ones_own_is_update_bn_stats(variance):
    model, twin = residual(), residual()
    batches = [pictures(4, seed=i) for i in range(3)]
    with precise_bn(model, variance=variance, layers=["stem.1", "blocks.0.4"], prior=3) as recalibration:
        for i, x in enumerate(batches):
            assert not model(x).requires_grad
            assert recalibration.batches == i + 1
        assert recalibration.report is None
    report = update_bn_stats(twin, batches, variance=variance, layers=["stem.1", "blocks.0.4"], prior=3)
    assert_statistics(model, statistics(twin), tolerance=0)
    assert str(recalibration.report) == str(report)


def test_precise_bn_gives_the_output_by_the_batch():
    model, x = mlp(1), rows(16)
    with precise_bn(model):
        y = model(x)
    torch.testing.assert_close(y, mlp(1).train()(x), rtol=1e-4, atol=1e-5)
    assert model(x).requires_grad


def test_precise_bn_counts_calls_of_parts_of_the_model_too():
    model = mlp()
    with precise_bn(model) as recalibration:
        model[:3](BATCHES[1])
    assert ([layer.name for layer in recalibration.report.layers], recalibration.report.unused) == (["1"], ["4", "7"])
    mean, var = reference(mlp(), [BATCHES[1]])["1"]
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), var, rtol=1e-5, atol=0)
