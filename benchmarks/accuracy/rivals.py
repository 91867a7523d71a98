"""Published normalisation layers for small batches, as contenders: each as in its paper, per channel or per model.

Shapes: N batch, M models, C channels of all models together, n elements per channel. The factories at the end take the
number of steps of a run and return a function that makes the layer at a given position, including its activation if
there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrize

from .networks import Norm, Site, with_relu

# --------------------------------------------------------------------------------------------------------------- MABN


class MABN(nn.Module):
    """Moving Average Batch Normalization, from the paper and its authors' code.

    Nothing is centred: the statistics are of second moments. In step t of training, with χ² = mean x² of the batch,

        χ̄² = the mean of χ² over the last m batches,    σ = √(χ̄² + eps),    z = x/σ
        r = clip(σ/√(χ̂² + eps), 1/5, 5),    y = γ·r·z + β,    χ̂² ← χ̂² + a·(χ̄² − χ̂²)
        dx = (g − z·Ψ̄)/σ,    g = dy·γ·r,    Ψ̄ = the mean of Ψ = mean g·z over the last m batches

    with r a constant to autograd. Evaluation is y = γ·x/√(χ̂² + eps) + β. The convolutions before the layer have centred
    weights: see `center_weights_of`.

    m makes 32 samples of the last batches, the batch that the authors simulate for ImageNet: m = max(1, 32 // N). They
    have a = 0.02. As in `BatchRenorm` of contenders.py, a is 20/steps where the run is short, at most 0.1. In their
    code the batch's own χ² and Ψ are used while t ≤ m or t < 100, and r = 1 while t ≤ 1000. Here 100 and 1000 are
    steps/100 and steps/10. χ̂² begins with the first batch, as in their code for ImageNet; in their code of the layer by
    itself it begins with 1, which a short run would not forget.

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", 2020;
    https://github.com/megvii-model/MABN for m, the limits of r, a, eps and the first steps.
    """

    SIMULATED_BATCH = 32
    R_MAX = 5

    def __init__(self, channels: int, steps: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.steps, self.eps = steps, eps
        self.momentum = min(max(0.02, 20 / steps), 0.1)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean_square", torch.ones(channels))
        self.register_buffer("last_chi2", torch.zeros(self.SIMULATED_BATCH, channels))
        self.register_buffer("last_psi", torch.zeros(self.SIMULATED_BATCH, channels))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) in and out."""
        if not self.training:
            return x * _spread(self.weight * (self.mean_square + self.eps).rsqrt(), x) + _spread(self.bias, x)
        self.step += 1
        return _MovingAverage.apply(x, self.weight, self.bias, self)

    def averaged(self, last: Tensor, latest: Tensor, batch: int, step: int) -> Tensor:
        """A statistic of step `step`, stored among the last ones and averaged with those of the window."""
        last[step % len(last)] = latest
        window = max(1, self.SIMULATED_BATCH // batch)
        if step <= window or step < self.steps / 100:
            return latest
        return last[[(step - age) % len(last) for age in range(window)]].mean(0)

    def correction(self, mean_square: Tensor) -> Tensor:
        """r of a step, and χ̂² after it."""
        if self.step == 1:
            self.mean_square.copy_(mean_square)
        r = ((mean_square + self.eps) / (self.mean_square + self.eps)).sqrt()
        self.mean_square.lerp_(mean_square, self.momentum)
        return r.clamp(1 / self.R_MAX, self.R_MAX) if self.step > self.steps / 10 else torch.ones_like(r)


class _MovingAverage(Function):
    """A training step of MABN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: MABN) -> Tensor:
        chi2 = x.square().mean(_all_but_channels(x))
        mean_square = layer.averaged(layer.last_chi2, chi2, len(x), layer.step)
        r, rstd = layer.correction(mean_square), (mean_square + layer.eps).rsqrt()
        ctx.save_for_backward(x, weight, r, rstd)
        ctx.layer, ctx.step = layer, layer.step
        return x * _spread(weight * r * rstd, x) + _spread(bias, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r, rstd = ctx.saved_tensors
        dims = _all_but_channels(x)
        sum_dy_z = (dy * x).sum(dims) * rstd
        psi = weight * r * sum_dy_z * (len(rstd) / x.numel())
        psi = ctx.layer.averaged(ctx.layer.last_psi, psi, len(x), ctx.step)
        dx = dy * _spread(weight * r * rstd, x) - x * _spread(psi * rstd.square(), x)
        return dx, sum_dy_z * r, dy.sum(dims), None


# ---------------------------------------------------------------------------------- Filter Response Normalization, TLU


class FilterResponseNorm(nn.Module):
    """Filter Response Normalization and the Thresholded Linear Unit, from the paper.

    For each sample and channel, with ν² = mean x² over its n positions,

        y = γ·x/√(ν² + ε) + β,    and max(y, τ) where activated

    τ is learned, per channel, and begins with 0. In the paper ε = 1e-6. Where n = 1 it is learned, as
    ε = 1e-6 + |ε_l|, or y would be little more than a sign; ε_l is a number for each layer, so for each model here, and
    begins with 1e-4. The paper raises the rate slowly in the first steps; that is for who trains to do.

    Source: Singh, Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
    Neural Networks", 2020. It says nothing of layers that no activation follows; they have no threshold here.
    """

    EPS = 1e-6

    def __init__(self, channels: int, models: int = 1, activated: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = nn.Parameter(torch.full((models,), 1e-4))
        self.threshold = nn.Parameter(torch.zeros(channels)) if activated else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) in and out."""
        nu2 = x.square().mean(list(range(2, x.dim())), keepdim=True)
        rms = (nu2 + self.epsilon(x)).sqrt()
        y = x / rms * _spread(self.weight, x) + _spread(self.bias, x)
        return y if self.threshold is None else torch.maximum(y, _spread(self.threshold, x))

    def epsilon(self, x: Tensor) -> Tensor | float:
        """ε, per channel where it is learned."""
        if x[0, 0].numel() > 1:
            return self.EPS
        return _spread((self.EPS + self.eps.abs()).repeat_interleave(x.shape[1] // len(self.eps)), x)


# ------------------------------------------------------------------------------------------------------------- EvoNorm


class EvoNormS0(nn.Module):
    """EvoNorm-S0, from the paper; normalisation and activation in one.

    Where activated, with the biased variance of each sample over the channels and positions of a group,

        y = x·sigmoid(v·x)/√(var + eps)·γ + β

    with v per channel, from 1 on, and eps = 1e-5. Elsewhere y = x·γ + β, as in the authors' code: such a layer does not
    normalise. They have 32 groups, in layers of 64 channels and more.

    Source: Liu et al., "Evolving Normalization-Activation Layers", 2020; models/official/resnet/resnet_model.py of
    https://github.com/tensorflow/tpu for eps, groups, initial values and layers that no activation follows.
    """

    def __init__(self, channels: int, groups: int, activated: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gate = nn.Parameter(torch.ones(channels)) if activated else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) in and out."""
        if self.gate is not None:
            x = self.over_std(x * torch.sigmoid(_spread(self.gate, x) * x), x)
        return x * _spread(self.weight, x) + _spread(self.bias, x)

    def over_std(self, y: Tensor, x: Tensor) -> Tensor:
        """What y is over the standard deviations of the groups of x."""
        var = x.unflatten(1, (self.groups, -1)).flatten(2).var(2, correction=0)
        rstd = (var + self.eps).rsqrt().repeat_interleave(x.shape[1] // self.groups, 1)
        return y * rstd.view(*rstd.shape, *[1] * (x.dim() - 2))


# ------------------------------------------------------------------------------------------------ Online Normalization


class OnlineNorm(nn.Module):
    """Online Normalization with layer scaling, from the paper.

    The samples of a batch come one after another. For each, with its mean m and biased variance s over n,

        z = (x − μ)/σ,    σ = √(σ² + eps),    σ² ← α·σ² + (1 − α)·s + α·(1 − α)·(m − μ)²,    μ ← α·μ + (1 − α)·m

    The backward pass goes through the samples in the same order, with dz the gradient of z:

        h = dz − (1 − α_b)·ε_y·z,    ε_y ← ε_y + mean h·z
        dx = h/σ − (1 − α_b)·ε_1,    ε_1 ← ε_1 + mean dx

    so that in the long run dx is orthogonal to z and to 1. The output is the affine map y = γ·z + β divided by the
    layer's scale, √(mean y² + eps) over all channels and positions of a sample, of each model by itself. Autograd
    differentiates through that. Evaluation has μ and σ² of the end of training.

    α = `forward_decay` and α_b = `backward_decay` are 0.999 and 0.99, the authors' choice for ImageNet. For CIFAR-10
    they have 1023/1024 and 127/128, for CIFAR-100 511/512 and 15/16. μ, σ², ε_y and ε_1 begin with 0, 1, 0, 0; after K
    samples the first two still have a part α^K of that. The recurrences are of vectors of C, one sample after another.

    Source: Chiley et al., "Online Normalization for Training Neural Networks", 2019;
    https://github.com/Cerebras/online-normalization for the decay factors, eps, maps of more than one position, and
    layer scaling after the affine map.
    """

    def __init__(
        self, channels: int, models: int = 1, forward_decay: float = 0.999, backward_decay: float = 0.99,
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.models, self.eps = models, eps
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("error_z", torch.zeros(channels))
        self.register_buffer("error_1", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) in and out."""
        if self.training:
            z = _Online.apply(x, self)
        else:
            z = (x - _spread(self.mean, x)) * _spread((self.var + self.eps).rsqrt(), x)
        return self.scaled(z * _spread(self.weight, x) + _spread(self.bias, x))

    def scaled(self, y: Tensor) -> Tensor:
        """Layer scaling."""
        by_model = y.unflatten(1, (self.models, -1))
        mean_square = by_model.square().mean(list(range(2, by_model.dim())), keepdim=True)
        return (by_model * (mean_square + self.eps).rsqrt()).flatten(1, 2)

    def absorb(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """μ and σ² before each sample, (N, C), from the moments of the samples; the buffers then have them all."""
        alpha, mu, var = self.forward_decay, torch.empty_like(means), torch.empty_like(variances)
        for number, (mean, variance) in enumerate(zip(means, variances, strict=True)):
            mu[number], var[number] = self.mean, self.var
            delta = mean - self.mean
            self.var.lerp_(variance + alpha * delta.square(), 1 - alpha)
            self.mean.add_(delta, alpha=1 - alpha)
        return mu, var

    def control(
        self, mean_dz: Tensor, mean_dz_z: Tensor, mean_z: Tensor, mean_z2: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ε_y and ε_1 before each sample, (N, C), from the means of the samples; then the errors of them all."""
        gain, error_z, error_1 = 1 - self.backward_decay, torch.empty_like(mean_dz), torch.empty_like(mean_dz)
        for i in range(len(mean_dz)):
            error_z[i], error_1[i] = self.error_z, self.error_1
            mean_h = mean_dz[i] - gain * error_z[i] * mean_z[i]
            self.error_z += mean_dz_z[i] - gain * error_z[i] * mean_z2[i]
            self.error_1 += mean_h * rstd[i] - gain * error_1[i]
        return error_z, error_1


class _Online(Function):
    """z of Online Normalization, without the affine map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OnlineNorm) -> Tensor:
        variances, means = torch.var_mean(x, list(range(2, x.dim())), correction=0)
        mu, var = layer.absorb(means, variances)
        rstd, away = (var + layer.eps).rsqrt(), means - mu
        z = (x - _by_sample(mu, x)) * _by_sample(rstd, x)
        ctx.save_for_backward(z, rstd, away * rstd, (variances + away.square()) * rstd.square())
        ctx.layer = layer
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, rstd, mean_z, mean_z2 = ctx.saved_tensors
        positions = list(range(2, z.dim()))
        error_z, error_1 = ctx.layer.control(dz.mean(positions), (dz * z).mean(positions), mean_z, mean_z2, rstd)
        gain = 1 - ctx.layer.backward_decay
        h = dz - z * _by_sample(gain * error_z, z)
        return h * _by_sample(rstd, z) - _by_sample(gain * error_1, z), None


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) as (C, 1, ..., 1), to go with x."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def _by_sample(vectors: Tensor, x: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, ..., 1), to go with x."""
    return vectors.view(*vectors.shape, *[1] * (x.dim() - 2))


# ------------------------------------------------------------------------------------------------------------- weights


class Centred(nn.Module):
    """w − mean w, the mean over the inputs and positions of a filter: weight centralisation of MABN's paper."""

    def forward(self, weight: Tensor) -> Tensor:
        """(filters, inputs, *) in and out."""
        return weight - weight.mean(list(range(1, weight.dim())), keepdim=True)


class Standardized(nn.Module):
    """(w − mean w)/(std w + 1e-5), the moments over the inputs and positions of a filter, the deviation biased.

    That is the formula of the paper, and what its authors' TensorFlow code computes. Their PyTorch code has the
    unbiased standard deviation, which a normalisation after the convolution cancels but for its eps.

    Source: Qiao et al., "Weight Standardization", 2019; https://github.com/joe-siyuan-qiao/WeightStandardization for
    the 1e-5.
    """

    EPS = 1e-5

    def forward(self, weight: Tensor) -> Tensor:
        """(filters, inputs, *) in and out."""
        std, mean = torch.std_mean(weight, list(range(1, weight.dim())), correction=0, keepdim=True)
        return (weight - mean) / (std + self.EPS)


def center_weights_of(stack: nn.Module, depthwise: bool = True) -> None:
    """Centre the weights of all convolutions that feed a normalisation: they have no bias."""
    _reparametrise(stack, Centred, depthwise)


def standardize_weights(stack: nn.Module) -> None:
    """Standardise the weights of all convolutions that feed a normalisation: they have no bias."""
    _reparametrise(stack, Standardized, True)


def _reparametrise(stack: nn.Module, transform: type[nn.Module], depthwise: bool) -> None:
    """The raw weights stay as they are, as parameters. A filter of a single weight would vanish and is left alone."""
    for layer in list(stack.modules()):
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or layer.bias is not None or layer.weight[0].numel() == 1:
            continue
        # The stem of a stack has one input channel per group, too, but more output channels.
        if depthwise or not layer.in_channels == layer.out_channels == layer.groups:
            parametrize.register_parametrization(layer, "weight", transform())


# ----------------------------------------------------------------------------------------------------------- factories


def mabn(steps: int) -> Norm:
    """MABN for a run of so many steps; the weights are to be centred, too."""
    return lambda site: with_relu(MABN(site.models * site.channels, steps), site)


def frn(steps: int) -> Norm:
    """Filter Response Normalization with its own activation."""
    return lambda site: FilterResponseNorm(site.models * site.channels, site.models, site.activated)


def evonorm(steps: int) -> Norm:
    """EvoNorm-S0 with its own activation and the groups of GroupNorm in contenders.py."""

    def make(site: Site) -> nn.Module:
        groups = site.models * min(8, site.channels // 4)
        return EvoNormS0(site.models * site.channels, groups, site.activated)

    return make


def online_norm(steps: int, forward_decay: float = 0.999, backward_decay: float = 0.99) -> Norm:
    """Online Normalization with these decay factors."""

    def make(site: Site) -> nn.Module:
        layer = OnlineNorm(site.models * site.channels, site.models, forward_decay, backward_decay)
        return with_relu(layer, site)

    return make
