"""Subclasses that wrap ``super().forward`` keep what they do around it; those that do more are left alone."""

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import real_models_elsewhere
import torch
import torch.nn.functional as F
from cases import noise
from models import each_of_ours, pretrained
from steps import assert_identical, buffers_of, evaluate, train, training_step
from torch import Tensor, nn

from runningbn import RunningBatchNorm, batchnormify, diagnose, update_bn_stats
from runningbn.conversion.classes import wraps_forward
from runningbn.layers.precise import PreciseBatchNorm


class Spiking(nn.BatchNorm2d):
    """Time steps before the batch, (T, N, C, H, W), as spiking networks have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ChannelsLast(nn.BatchNorm1d):
    """Channels last, (N, L, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Sparse(NamedTuple):
    features: Tensor
    places: tuple[int, ...]


class OfSparse(nn.BatchNorm1d):
    """The features of a sparse tensor, (points, C)."""

    def forward(self, x: Sparse) -> Sparse:
        return x._replace(features=super().forward(x.features))


class Split(nn.BatchNorm2d):
    """As timm's SplitBatchNorm2d: further layers for the other parts of a batch in training."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(num_features)])

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        first, *others = input.split(len(input) // 2)
        return torch.cat([super().forward(first), *[aux(x) for aux, x in zip(self.aux_bn, others)]])


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class SyncBatchNormAct(real_models_elsewhere.SyncBatchNormAct):
    """timm's, which drops and acts itself; its activation, done twice, is another one."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU()


WRAPPERS: dict[type[nn.Module], Any] = {
    Spiking: lambda seed: noise((2, 4, 3, 2, 2), seed),
    ChannelsLast: lambda seed: noise((4, 5, 3), seed),
    OfSparse: lambda seed: Sparse(noise((9, 3), seed), (1, 2)),
    Split: lambda seed: noise((4, 3, 2, 2), seed),
    Activated: lambda seed: noise((4, 3, 2, 2), seed),
    SyncBatchNormAct: lambda seed: noise((4, 3, 2, 2), seed),
}
each_wrapper = pytest.mark.parametrize(("cls", "data"), WRAPPERS.items(), ids=[cls.__name__ for cls in WRAPPERS])
KINDS = {"running": RunningBatchNorm, "precise": PreciseBatchNorm}


def values(y: Any) -> Tensor:
    return y.features if isinstance(y, Sparse) else y


@each_wrapper
@each_of_ours
def test_it_is_converted_and_evaluates_as_before(cls, data, to):
    layer = pretrained(cls(3))
    expected = values(evaluate(layer, data(0)))
    batchnormify(layer, to)
    assert isinstance(layer, cls)
    assert isinstance(layer, KINDS[to])
    torch.testing.assert_close(values(evaluate(layer, data(0))), expected, rtol=1e-5, atol=1e-5)


@each_wrapper
@each_of_ours
def test_there_and_back_and_through_a_pickle(cls, data, to):
    layer = pickle.loads(pickle.dumps(batchnormify(pretrained(cls(3)), to)))
    layer(data(1))
    other = copy.deepcopy(layer)
    layer(data(2)), other(data(2))
    assert_identical(buffers_of(other), buffers_of(layer))
    expected = values(evaluate(layer, data(0)))
    batchnormify(batchnormify(layer, "precise" if to == "running" else "running"), "torch")
    assert type(layer) is cls
    torch.testing.assert_close(values(evaluate(layer, data(0))), expected, rtol=1e-5, atol=1e-5)


@each_of_ours
def test_it_trains_as_the_layer_on_the_reshaped_input(to):
    layer, plain = batchnormify(Spiking(3), to), batchnormify(nn.BatchNorm2d(3), to)
    for seed in range(3):
        x = noise((2, 4, 3, 2, 2), seed)
        dy = noise(x.shape, 10 + seed)
        found, expected = training_step(layer, x, dy), training_step(plain, x.flatten(0, 1), dy.flatten(0, 1))
        assert_identical({k: v.reshape(expected[k].shape) for k, v in found.items()}, expected)
    assert_identical(buffers_of(layer), buffers_of(plain))


def test_precise_trains_as_torch_does():
    layer, torchs = batchnormify(Split(3), "precise"), Split(3)
    found, expected = (training_step(m, noise((4, 3, 2, 2), 0)) for m in (layer, torchs))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@each_of_ours
def test_it_is_recalibrated_as_the_layer_in_it(to):
    layer, plain = batchnormify(Spiking(3), to), batchnormify(nn.BatchNorm2d(3), to)
    batches = [noise((2, 4, 3, 2, 2), seed) for seed in range(3)]
    update_bn_stats(layer, batches)
    update_bn_stats(plain, [x.flatten(0, 1) for x in batches])
    assert_identical(buffers_of(layer), buffers_of(plain))


# ------------------------------------------------------------------------------------------------- what does more


class OwnArithmetic(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Partly(nn.BatchNorm2d):
    """The layer of torch in evaluation, arithmetic of its own in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)).detach(), 0.1)
            return x - x.mean((0, 2, 3), keepdim=True)
        return super().forward(x)


class InAMethod(nn.BatchNorm2d):
    def _update(self, x: Tensor) -> None:
        self.running_var.mul_(0.9)

    def forward(self, x: Tensor) -> Tensor:
        self._update(x)
        return super().forward(x)


class InAFunction(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        def shift() -> Tensor:
            return getattr(self, "running_mean")[:, None, None]  # noqa: B009

        return super().forward(x) + shift()


class ByName(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


class Decorated(nn.BatchNorm2d):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OnTop(OwnArithmetic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Schedule(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.momentum = 0.5 * self.momentum
        return super().forward(x)


@each_of_ours
@pytest.mark.parametrize(
    "cls", [OwnArithmetic, Partly, InAMethod, InAFunction, ByName, Decorated, OnTop, Schedule], ids=lambda c: c.__name__
)
def test_what_does_more_is_left_alone_and_named(cls, to, caplog):
    model = batchnormify(nn.Sequential(nn.BatchNorm2d(3), cls(3)), to)
    assert type(model[1]) is cls
    assert f"1 left alone: 1 ({cls.__name__} has a custom forward)" in caplog.text


def test_layers_that_wrap_nothing_are_not_wrappers():
    for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, RunningBatchNorm):
        assert not wraps_forward(cls)
    assert train(batchnormify(Activated(3)), [noise((4, 3, 2, 2), 0)]).samples.tolist() == [4, 4, 4]


class Conditional(nn.BatchNorm1d):
    """A scale by class label: its second argument is no mask."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x) * (1 + labels.unsqueeze(1))


class Lengths(RunningBatchNorm):
    """Lengths, of which it makes the mask of `RunningBatchNorm`."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x, torch.arange(x.shape[2]) < lengths[:, None])


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_an_argument_of_a_subclass_is_not_taken_for_a_mask(to, dtype):
    layer = batchnormify(Conditional(3), to)
    batches = [{"x": noise((6, 3), seed), "labels": torch.tensor([0, 1, 1, 0, 0, 1]).to(dtype)} for seed in range(3)]
    report, diagnosis = update_bn_stats(layer, batches), diagnose(layer, batches)
    data = torch.cat([batch["x"] for batch in batches])
    torch.testing.assert_close(layer.running_mean, data.mean(0))
    torch.testing.assert_close(layer.running_var, data.var(0, correction=int(to == "precise")))
    assert report.layers[0].elements == diagnosis.layers[0].recomputed.elements == 18
    assert "_normalize_only" not in vars(layer)


def test_a_mask_that_a_subclass_makes_is_heeded():
    layer, x = Lengths(3), noise((4, 3, 5), 0)
    update_bn_stats(layer, [{"x": x, "lengths": torch.tensor([5, 2, 1, 4])}])
    real = torch.cat([x[0].T, x[1, :, :2].T, x[2, :, :1].T, x[3, :, :4].T])
    torch.testing.assert_close(layer.running_mean, real.mean(0))
    torch.testing.assert_close(layer.running_var, real.var(0, correction=0))
