"""Layers that compute by themselves: their moments are those of their inputs, in the convention of their own update."""

import copy

import pytest
import torch
from recalibration_models import assert_same, everything, is_statistic, pictures
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn import update_bn_stats


class Own(nn.BatchNorm2d):
    """Arithmetic of its own; `update` makes new statistics of the old ones and the batch's, var biased."""

    dims = (0, 2, 3)
    shape = (1, -1, 1, 1)

    def update(self, mean: Tensor, var: Tensor, n: int) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean(self.dims), x.var(self.dims, correction=0)
            with torch.no_grad():
                self.update(mean, var, x.numel() // self.num_features)
        else:
            mean, var = self.running_mean, self.running_var
        mean, var, weight, bias = (t.view(self.shape) for t in (mean, var, self.weight, self.bias))
        return (x - mean) / (var + self.eps).sqrt() * weight + bias


class Keras(Own):
    """`momentum` is the share that is kept; running_var is biased."""

    def update(self, mean, var, n):
        self.running_mean.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self.running_var.mul_(self.momentum).add_(var, alpha=1 - self.momentum)


class Scheduled(Own):
    """Overrules momentum by a schedule of its own, which it counts in an attribute."""

    calls = 0

    def update(self, mean, var, n):
        self.calls += 1
        momentum = 1 / (1 + self.calls)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * n / (n - 1), momentum)


class Biased(Own):
    def update(self, mean, var, n):
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


class Fixed(Biased):
    """Nobody sets its momentum."""

    momentum = property(lambda self: 0.25, lambda self, value: None)


class Cumulative(Own):
    """momentum=None, by num_batches_tracked."""

    def update(self, mean, var, n):
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, 1 / float(self.num_batches_tracked))
        self.running_var.lerp_(var * n / (n - 1), 1 / float(self.num_batches_tracked))


class BySquares(Own):
    """E[x²] − E[x]², and new tensors in the place of the old ones."""

    def forward(self, x):
        if self.training:
            mean = x.mean(self.dims)
            var = x.square().mean(self.dims) - mean.square()
            self.running_mean = self.running_mean.lerp(mean.detach(), self.momentum)
            self.running_var = self.running_var.lerp(var.detach(), self.momentum)
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        rstd = (self.running_var + self.eps).rsqrt()
        scale = self.weight * rstd
        return x * scale.view(self.shape) + (self.bias - self.running_mean * scale).view(self.shape)


class EvaluatesByTorch(Own):
    """Is taken over in evaluation, and yet has a biased running_var."""

    update = Biased.update

    def forward(self, x):
        return super().forward(x) if self.training else nn.BatchNorm2d.forward(self, x)


class ChannelsLast(Biased):
    dims, shape = (0, 1, 2), (1, 1, 1, -1)

    def _check_input_dim(self, x):
        pass


CASES = {
    "Keras": (Keras, 0.99, 0),
    "a momentum near 1": (Keras, 0.999, 0),
    "a schedule": (Scheduled, 0.1, 1),
    "a biased running_var": (Biased, 0.1, 0),
    "a momentum that is a property": (Fixed, 0.1, 0),
    "frozen by momentum 0": (Biased, 0.0, 0),
    "cumulative": (Cumulative, None, 1),
    "squares, rebinding": (BySquares, 0.1, 0),
    "evaluates by torch": (EvaluatesByTorch, 0.1, 0),
}
each_case = pytest.mark.parametrize(("kind", "momentum", "correction"), CASES.values(), ids=CASES)


def model_of(kind: type[nn.Module], momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layer = kind(4, momentum=momentum)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2), layer.bias.normal_()
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


@each_case
@pytest.mark.parametrize("normalize", ["batch", "population"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_are_the_moments_of_the_input_in_the_layers_convention(kind, momentum, correction, normalize, mode):
    model, batches = getattr(model_of(kind, momentum), mode)(), [pictures(4, seed=i) + i for i in range(5)]
    before = everything(model, is_statistic)
    report = update_bn_stats(model, batches, normalize=normalize)
    x = model[0](torch.cat(batches)).detach().double()
    torch.testing.assert_close(model[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    expected = x.var((0, 2, 3), correction=correction)
    torch.testing.assert_close(model[1].running_var.double(), expected, rtol=1e-5, atol=0)
    assert report["1"].correction == correction
    assert ("variance without Bessel's correction, as in the layer's own update: 1" in str(report)) == (correction == 0)
    assert_same(everything(model, is_statistic), before)


@each_case
def test_layers_behind_it_see_it_normalise_by_the_batch(kind, momentum, correction):
    model, batches = model_of(kind, momentum), [pictures(4, seed=i) + 3 * i for i in range(3)]
    twin = copy.deepcopy(model)
    layer = model[1]
    twin[1] = nn.BatchNorm2d(4)
    twin[1].load_state_dict(layer.state_dict())
    for each in (model, twin):
        update_bn_stats(each, batches)
    for a, b in zip(model[3].buffers(), twin[3].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_channels_in_the_last_dimension():
    model, batches = nn.Sequential(ChannelsLast(3)), [pictures(4, seed=i).permute(0, 2, 3, 1) for i in range(3)]
    report = update_bn_stats(model, batches)
    x = torch.cat(batches).double()
    torch.testing.assert_close(model[0].running_mean.double(), x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), x.var((0, 1, 2), correction=0), rtol=1e-5, atol=0)
    assert report["0"].correction == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Keras, Biased, Scheduled])
def test_dtypes(kind, dtype):
    model, batches = nn.Sequential(kind(3, momentum=0.5)).to(dtype), [pictures(8, seed=i).to(dtype) for i in range(3)]
    update_bn_stats(model, batches)
    x = torch.cat(batches).double()
    rough = {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": 1e-2 if dtype.itemsize == 2 else 1e-5}
    torch.testing.assert_close(model[0].running_mean.double(), x.mean((0, 2, 3)), **rough)
    torch.testing.assert_close(model[0].running_var.double(), x.var((0, 2, 3)), **{**rough, "rtol": 0.02})


def test_single_elements_and_bad_batches_before_the_first_good_one():
    model = nn.Sequential(Keras(3, momentum=0.99))
    batches = [torch.full((1, 3, 1, 1), 2.0), torch.full((4, 3, 2, 2), torch.nan), pictures(4)]
    report = update_bn_stats(model, batches)
    rows = torch.cat([b.movedim(1, -1).reshape(-1, 3) for b in (batches[0], batches[2])]).double()
    torch.testing.assert_close(model[0].running_mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), rows.var(0, correction=0), rtol=1e-5, atol=0)
    assert report.not_finite == 1


def test_constant_channels_and_large_means():
    model = nn.Sequential(Biased(3))
    x = pictures(8)
    x[:, 0], x[:, 1] = 7.0, x[:, 1] + 1e3
    update_bn_stats(model, [x, x + 1])
    rows = torch.cat([x, x + 1]).double()
    torch.testing.assert_close(model[0].running_mean.double(), rows.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        model[0].running_var.double(), rows.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-6
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- refused


class KeepsStd(Own):
    def update(self, mean, var, n):
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var.sqrt(), self.momentum)


class LastQuarter(Own):
    """Statistics of a part of the batch."""

    def forward(self, x):
        if self.training:
            Biased.update(self, x[-1:].mean((0, 2, 3)), x[-1:].var((0, 2, 3), correction=0), 0)
        return (x - self.running_mean.view(self.shape)) / (self.running_var.view(self.shape) + self.eps).sqrt()


class Never(Own):
    def update(self, mean, var, n):
        pass


class Largest(Own):
    """Not linear in the old statistics."""

    def update(self, mean, var, n):
        self.running_mean.copy_(torch.maximum(self.running_mean, mean))
        self.running_var.copy_(torch.maximum(self.running_var, var))


class Raises(Own):
    def update(self, mean, var, n):
        raise ArithmeticError("not in training")


@pytest.mark.parametrize("kind", [KeepsStd, LastQuarter, Never, Largest, Raises])
@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_what_is_no_moving_average_of_moments_is_refused_by_name(kind, normalize):
    model = model_of(kind).train()
    before = everything(model)
    with pytest.raises(RuntimeError, match=rf"1 \({kind.__name__}\) has a custom forward.*leave it out with layers"):
        update_bn_stats(model, [pictures(4), pictures(4, seed=1)], normalize=normalize)
    assert_same(everything(model), before)
    report = update_bn_stats(model, [pictures(4)], layers=["3"])
    assert report.skipped == {"1": "not among the requested layers"}
