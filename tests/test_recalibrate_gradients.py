"""Models that differentiate in their forward: forces from energies, penalties on gradients, second derivatives."""

import copy

import pytest
import torch
from cases import noise
from recalibration_models import (
    OwnArithmetic,
    assert_same,
    assert_statistics,
    everything,
    inputs_in_evaluation,
    is_statistic,
    moments,
    ours,
    picture_batches,
)
from torch import Tensor, nn

from runningbn import batchnormify, precise_bn, update_bn_stats


class Potential(nn.Module):
    """Forces −dE/dr of an energy with BatchNorm in it, or |dE/dr|² differentiated once more; then one more layer."""

    def __init__(self, order: int, functional: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Conv2d(3, 4, 1), norm(4), nn.Tanh(), nn.Conv2d(4, 4, 1), norm(4), nn.Tanh(), nn.Conv2d(4, 1, 1)]
        self.energy, self.head = nn.Sequential(*blocks), nn.BatchNorm2d(3)
        self.order, self.functional = order, functional

    def forward(self, r: Tensor) -> Tensor:
        return self.head(self.forces(r))

    def forces(self, r: Tensor) -> Tensor:
        def energy(r: Tensor) -> Tensor:
            return self.energy(r).sum()

        if self.functional:
            squared = lambda r: torch.func.grad(energy)(r).square().sum()  # noqa: E731
            return -torch.func.grad(energy if self.order == 1 else squared)(r).detach()
        with torch.enable_grad():
            r = r.detach().requires_grad_()
            (force,) = torch.autograd.grad(energy(r), r, create_graph=self.order == 2)
            if self.order == 2:
                (force,) = torch.autograd.grad(force.square().sum(), r)
        return -force.detach()


def build(order: int, to: str | None, functional: bool = False, norm: type[nn.Module] = nn.BatchNorm2d) -> Potential:
    model = Potential(order, functional, norm)
    if to is not None:
        batchnormify(model, to).eval()(data()[0])  # of which RunningBatchNorm remembers the number of dimensions
    return model.train()


def data(n: int = 4) -> list[Tensor]:
    return [x + noise(x.shape, 90 + i) for i, x in enumerate(picture_batches(n))]


def forces_by_batch(model: Potential, batches: list[Tensor]) -> Tensor:
    """(elements, 3) in float64, by torch's layers in training."""
    twin = copy.deepcopy(model)
    for name, layer in model.energy.named_children():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            plain = nn.BatchNorm2d(layer.num_features)
            with torch.no_grad():
                plain.weight.copy_(layer.weight), plain.bias.copy_(layer.bias)
            setattr(twin.energy, name, plain)
    twin = twin.double().train()
    twin.functional = False
    return torch.cat([twin.forces(x.double()).movedim(1, -1).reshape(-1, 3) for x in batches])


each_order = pytest.mark.parametrize("order", [1, 2])
each_kind = pytest.mark.parametrize("to", [None, "precise", "running"])
each_way = pytest.mark.parametrize("functional", [False, True], ids=["autograd", "torch.func"])


@each_order
@each_kind
@each_way
def test_forces_by_batches_are_those_of_training(order, to, functional):
    model, batches = build(order, to, functional), data()
    before = everything(model, lambda name: is_statistic(name) or to is not None)
    update_bn_stats(model, batches)
    assert_same(everything(model, lambda name: is_statistic(name) or to is not None), before)
    forces = forces_by_batch(model, batches)
    mean, var = moments(forces, correction=0 if to == "running" else 1)
    assert float(var.min()) > 1e-6
    torch.testing.assert_close(model.head.running_var.double(), var, rtol=1e-3, atol=0)
    assert ((model.head.running_mean - mean).abs() <= 1e-4 * var.sqrt()).all()


@each_order
@each_kind
@each_way
def test_population_gives_the_forces_of_evaluation(order, to, functional):
    model, batches = build(order, to, functional), data()
    report = update_bn_stats(model, batches, normalize="population")
    correction = 0 if to == "running" else 1
    seen = inputs_in_evaluation(model, batches)
    assert_statistics(model, {name: moments(x, correction) for name, x in seen.items()}, 1e-4)
    assert max(layer.residual for layer in report.layers) <= 1e-4


def test_layer_that_computes_by_itself_is_differentiable():
    model, plain = (build(1, None, norm=norm) for norm in (OwnArithmetic, nn.BatchNorm2d))
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        update_bn_stats(each, data())
    for a, b in zip(model.head.buffers(), plain.head.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_single_elements_are_differentiable():
    class Jacobian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad((self.norm(x) * x).sum(), x)
            return self.head(slope)

    model = Jacobian()
    update_bn_stats(model, [noise((1, 3), i) for i in range(5)])
    assert model.head.running_mean.isfinite().all()
    assert (model.head.running_var > 0).all()


@pytest.mark.parametrize("to", ["running", "precise"])
def test_grad_mode_changes_no_value(to):
    models = [ours(to) for _ in range(2)]
    update_bn_stats(models[0], picture_batches())

    def with_gradients(model: nn.Module, x: Tensor) -> None:
        with torch.enable_grad():
            seen.append(model(x).requires_grad)

    seen = []
    update_bn_stats(models[1], picture_batches(), forward=with_gradients)
    assert all(seen)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not b.requires_grad


def test_precise_bn_and_failure():
    model = build(2, "precise")
    before = everything(model)

    def fail() -> None:
        with precise_bn(model):
            model(data()[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same(everything(model), before)
    with precise_bn(model):
        model(data()[0])
    assert not torch.equal(model.head.running_mean, torch.zeros(3))


def test_vmap_is_refused_by_name():
    class PerSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda row: self.norm(row[None]).sum()))(x)

    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap.*layers="):
        update_bn_stats(PerSample(), [noise((4, 3), 0)])
