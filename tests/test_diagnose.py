"""How far `diagnose` says that statistics are off, against numbers computed apart; the batches that it takes."""

import math

import pytest
import torch
from cases import noise
from recalibration_models import Residual, inputs_in_evaluation, mlp, moments, pictures, residual, rows
from torch import nn

from runningbn import batchnormify, diagnose, update_bn_stats

# --------------------------------------------------------------------------------------- how far the statistics are off


@pytest.mark.parametrize("size", [1, 2, 4, 40])
@pytest.mark.parametrize("to", ["torch", "running", "precise"])
def test_statistics_that_are_exact_for_evaluation_are_not_off_whatever_the_batches(size, to):
    model = batchnormify(residual(), to)
    batches = pictures(40).split(size)
    update_bn_stats(model, batches, None, normalize="population")
    for layer in diagnose(model, batches, None).layers:
        assert layer.mean_off.abs().max() < 2e-4
        assert layer.log_var_off.abs().max() < 2e-4


def test_distances_by_hand():
    layer = nn.BatchNorm1d(2, eps=0.5)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([2.0, 4.0]))
    data = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])  # means 2 and 4, variances 4 and 13
    (found,) = diagnose(layer, data[:, None]).layers
    assert found.mean_off.tolist() == pytest.approx([-1 / 4.5**0.5, -6 / 13.5**0.5])
    assert found.log_var_off.tolist() == pytest.approx([math.log(2.5 / 4.5), math.log(4.5 / 13.5)])
    assert (found.stored.batches, found.stored.elements, found.elements_per_batch) == (3, 3, 1)
    # Three batches of one element: the standard error of a mean of three.
    assert found.mean_off_error.tolist() == pytest.approx([(4 / 3 / 4.5) ** 0.5, (13 / 3 / 13.5) ** 0.5])


def test_statistics_of_another_domain_are_off_by_as_much_as_they_are():
    """Means by a known number of std, variances by a known factor: within two standard errors in 95 % of channels."""
    off = torch.linspace(-3, 3, 50, dtype=torch.float64)
    factor = torch.linspace(-1, 1, 50, dtype=torch.float64).exp()
    mean, std = torch.linspace(-5, 5, 50, dtype=torch.float64), torch.linspace(0.5, 4, 50, dtype=torch.float64)
    layer = nn.BatchNorm1d(50, eps=1e-12)
    layer.running_mean.copy_(mean + off * std)
    layer.running_var.copy_(std.square() * factor)
    z_mean, z_var = [], []
    for seed in range(6):
        data = noise((30, 32, 50), seed, torch.float64) * std + mean
        (found,) = diagnose(layer, data.float()).layers
        # The unit of `mean_off` is the std of the data, which has an error, too: back to the true one.
        z_mean.append((found.mean_off * found.stored.std / std - off) / found.mean_off_error)
        z_var.append((found.log_var_off - factor.log()) / found.log_var_off_error)
        assert found.stored.mean_standard_error == pytest.approx(1 / (30 * 32) ** 0.5, rel=0.1)
    for z in (torch.cat(z_mean), torch.cat(z_var)):
        assert 0.9 < float((z.abs() < 2).double().mean()) < 0.995
        assert z.abs().max() < 5


def test_the_first_layer_that_is_off_is_where_it_begins():
    model = residual()
    batches = pictures(64).split(8)
    update_bn_stats(model, batches, normalize="population")
    broken = model.blocks[0][1]
    broken.running_mean += 2 * broken.running_var.sqrt()
    before, at, after = diagnose(model, batches).layers
    assert before.mean_off.abs().max() < 1e-3
    torch.testing.assert_close(at.mean_off, torch.full((4,), 2.0, dtype=torch.float64), rtol=1e-2, atol=0)
    assert after.mean_off.abs().max() > 0.1  # it sees what the broken one gives


def test_moments_are_those_of_the_model_in_evaluation():
    model = residual()
    batches = list(pictures(30).split(8))
    expected = {name: moments(x) for name, x in inputs_in_evaluation(model, batches).items()}
    for layer in diagnose(model, batches).layers:
        mean, var = expected[layer.name]
        torch.testing.assert_close(layer.stored.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.stored.var, var, rtol=1e-5, atol=1e-5)


def test_recomputed_statistics_are_those_of_update_bn_stats_and_what_is_left_is_told():
    model, twin = residual(), residual()
    batches = pictures(32).split(4)
    update_bn_stats(twin, batches)
    seen = {name: moments(x) for name, x in inputs_in_evaluation(twin, batches).items()}
    for layer in diagnose(model, batches).layers:
        module = twin.get_submodule(layer.name)
        assert torch.equal(layer.recomputed.old_mean, module.running_mean.double())
        assert torch.equal(layer.recomputed.old_var, module.running_var.double())
        torch.testing.assert_close(layer.recomputed.mean, seen[layer.name][0], rtol=1e-5, atol=1e-5)
    left = max(x.recomputed.moved for x in diagnose(model, batches).layers)
    assert left > 1e-3
    assert max(x.recomputed.moved for x in diagnose(model, batches, normalize="population").layers) < 1e-3


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_of_all_forms_give_the_same():
    model, data = residual(), [pictures(8, seed=seed) for seed in range(4)]
    expected = diagnose(model, data).to_dict()
    labels = torch.zeros(8)
    for loader in (
        [(x, labels) for x in data],
        [[x, labels] for x in data],
        [{"x": x} for x in data],
        (x for x in data),
        torch.utils.data.DataLoader(torch.cat(data), batch_size=8),
        torch.stack(data),
    ):
        assert diagnose(model, loader).to_dict() == expected
    by_hand = diagnose(
        model, [{"image": x, "label": labels} for x in data], forward=lambda model, batch: model(batch["image"])
    )
    assert by_hand.to_dict() == expected


def test_generator_is_drawn_from_once_and_no_further_than_needed():
    drawn = []
    found = diagnose(mlp(1), (drawn.append(1) or rows(8, seed=seed) for seed in range(100)), 7)
    assert (len(drawn), found.batches) == (7, 7)
    assert diagnose(mlp(1), (rows(8, seed=seed) for seed in range(60))).batches == 50
    assert diagnose(mlp(1), (rows(8, seed=seed) for seed in range(60)), None).batches == 60


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_num_iters_out_of_range(wrong, freeze):
    model = mlp(1).train()
    model[1].train(not freeze)
    with pytest.raises(ValueError, match="num_iters: expected None or an integer of at least 1"):
        diagnose(model, [rows(8)], wrong)


class Movable:
    """A batch that knows where it was sent."""

    def __init__(self, x, device=None):
        self.x, self.device = x, device

    def to(self, device):
        return Movable(self.x, device)


def test_device_is_where_the_batches_go_every_time():
    devices = []

    def forward(model, batch):
        devices.append(batch.device)
        return model(batch.x)

    diagnose(mlp(1), [Movable(rows(8))] * 3, device="cpu", forward=forward)
    assert devices == [torch.device("cpu")] * 12


def test_wrapped_models_are_stepped_into():
    found = diagnose(nn.DataParallel(Residual()), [pictures(8, seed=seed) for seed in range(3)])
    assert [layer.name for layer in found.layers] == ["module.stem.1", "module.blocks.0.1", "module.blocks.0.4"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = mlp(2).to(dtype)
    found = diagnose(model, [rows(16, seed=seed, dtype=dtype) for seed in range(8)])
    expected = diagnose(mlp(2), [rows(16, seed=seed) for seed in range(8)])
    for a, b in zip(found.layers, expected.layers):
        assert a.stored.mean.dtype == torch.float64
        near = 0.05 if dtype == torch.bfloat16 else 1e-5
        assert a.stored.mean_shift == pytest.approx(b.stored.mean_shift, rel=near)
        assert a.between.design_effect == pytest.approx(b.between.design_effect, rel=near)
