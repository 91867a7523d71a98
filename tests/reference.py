"""Float64 references, written from the equations and sharing no code with the library.

N samples, C channels, `*` = S positions, n = N·S elements per channel in one batch. Everything is a plain loop over
channels on raw moments: in float64 Σx² − (Σx)²/n loses nothing that a float32 test could see, so no pivot is needed.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CLAMP_SAMPLES = 20  # below so many samples seen, the current batch included, ...
CLAMP_VARIANCE = 0.01  # ... the variance is at least this
LAG_NOISE = 512  # a batch whose mean has the variance R·var may be lagged behind by max_lag·(1 + 512·R)
TRUST_NOISE = 64  # and weighs 1/(1 + 64·R) in the running means of the backward
WINDOW = 100  # batches over which R is averaged


# --------------------------------------------------------------------------------------------------- weights of a batch


def batch_weight(momentum: object, batch_size: int, samples_before: float, steps_before: float) -> float:
    """The weight a of a batch of N samples, by rule:

    Horizon      a = 1 − exp(−N / h),  h = clamp(fraction · samples_before, start, samples)
    SquareRoot   a = 1 − (1 − m) / √max(N − 1, 1)      (fast.ai 2019, course part 2, notebook 07_batchnorm)
    None         a = 1 / t, t counts batches from 1    (torch's cumulative average)
    float        a                                      (torch's exponential average)
    """
    if momentum is None:
        return 1 / (steps_before + 1)
    if type(momentum).__name__ == "Horizon":
        samples, start, fraction = dataclasses.astuple(momentum)
        return 1 - math.exp(-batch_size / min(max(fraction * samples_before, start), samples))
    if type(momentum).__name__ == "SquareRoot":
        (m,) = dataclasses.astuple(momentum)
        return 1 - (1 - m) / math.sqrt(max(batch_size - 1, 1))
    return float(momentum)


def weighs_whole_batches(momentum: object) -> bool:
    """Whether a batch as a whole weighs a, whatever its size, or each of its elements alike."""
    return type(momentum).__name__ in ("Horizon",)


def element_weights(momentum: object, batch_sizes: Sequence[int], positions: int = 1) -> list[float]:
    """The weight that one element of every batch carries after the last batch, from an empty start.

    w_k = g_k · Π_{j>k} (1 − a_j), with g = a where every element counts alike. Under Horizon a batch counts by its a
    whatever its size: g_k · n_k = a_k · n_1, so that its share is a_k · Π_{j>k} (1 − a_j) over the sum of these.
    """
    weights: list[float] = []
    samples = 0
    for step, size in enumerate(batch_sizes):
        a = batch_weight(momentum, size, samples, step)
        elements = size * positions
        g = a * (batch_sizes[0] * positions) / elements if weighs_whole_batches(momentum) else a
        weights = [(1 - a) * w for w in weights] + [g]
        samples += size
    return weights


# ---------------------------------------------------------------------------------------------------- pooled statistics


@dataclasses.dataclass(frozen=True)
class Moments:
    """Weighted moments per channel: `count` = Σw, `mean`, biased `var`, and `unbiased` = var · m / (m − 1)."""

    count: Tensor
    mean: Tensor
    var: Tensor
    unbiased: Tensor


def pooled_moments(batches: Sequence[Tensor], weights: Sequence[float] | None = None) -> Moments:
    """Moments of all elements of all batches (N, C, *) together, an element of batch k weighing weights[k] (default 1).

    mean = Σ w·x / Σw,  var = Σ w·(x − mean)² / Σw,  and m = (Σw)² / Σw² is the effective count of Bessel's correction
    (Kish 1965). With equal weights m is the number of elements and `unbiased` is torch.var(correction=1).
    """
    weights = [1.0] * len(batches) if weights is None else weights
    columns = [channel_rows(batch.double()) for batch in batches]
    values = torch.cat(columns, dim=1)
    w = torch.cat([torch.full_like(column[:1], weight) for column, weight in zip(columns, weights, strict=True)], dim=1)
    count = w.sum(1)
    mean = (w * values).sum(1) / count
    var = (w * (values - mean[:, None]).square()).sum(1) / count
    effective = count.square() / w.square().sum(1)
    return Moments(count.expand_as(mean), mean, var, var * effective / (effective - 1))


def channel_rows(x: Tensor) -> Tensor:
    """(N, C, *) -> (C, N·S): all elements of a channel in one row."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


# ---------------------------------------------------------------------------------------------------- the fast.ai class


class FastaiRunningBatchNorm(nn.Module):
    """RunningBatchNorm as published by fast.ai (course part 2, 2019, notebook 07_batchnorm), the debiased version.

    With s = Σx, q = Σx², n of the batch and a = 1 − (1 − mom)/√(N − 1), the history being a constant to autograd:

        S ← S + a(s − S),  Q ← Q + a(q − Q),  c ← c + a(n − c),  dbias ← dbias(1 − a) + a
        mean = (S/dbias)/(c/dbias),  var = (Q/dbias)/(c/dbias) − mean², at least 0.01 below 20 samples
        y = (x − mean)/√(var + eps) · weight + bias

    The original divides by dbias in its first 100 steps only; as it cancels, it is always divided by here. Theirs takes
    NCHW and calls the parameters `mults` and `adds`; here the input is (N, C, *). N = 1 divides by zero in both.
    """

    def __init__(self, num_features: int, mom: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.mom, self.eps = mom, eps
        self.weight = nn.Parameter(torch.ones(num_features, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(num_features, dtype=torch.float64))
        self.sums = torch.zeros(num_features, dtype=torch.float64)
        self.sqrs = torch.zeros(num_features, dtype=torch.float64)
        self.count = self.dbias = 0.0
        self.samples = 0

    def update_stats(self, x: Tensor) -> None:
        rows = channel_rows(x)
        a = 1 - (1 - self.mom) / math.sqrt(x.shape[0] - 1)
        self.sums = torch.lerp(self.sums.detach(), rows.sum(1), a)
        self.sqrs = torch.lerp(self.sqrs.detach(), rows.square().sum(1), a)
        self.count += a * (rows.shape[1] - self.count)
        self.dbias = self.dbias * (1 - a) + a
        self.samples += x.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update_stats(x)
        sums, sqrs, count = self.sums / self.dbias, self.sqrs / self.dbias, self.count / self.dbias
        mean = sums / count
        var = sqrs / count - mean.square()
        if self.samples < CLAMP_SAMPLES:
            var = var.clamp(min=CLAMP_VARIANCE)
        return affine(x, mean, var + self.eps, self.weight, self.bias)


def affine(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x − mean)/√var · weight + bias, all but x of shape (C,)."""
    mean, var, weight, bias = (t.reshape(-1, *[1] * (x.dim() - 2)) for t in (mean, var, weight, bias))
    return (x - mean) / var.sqrt() * weight + bias


# ---------------------------------------------------------------------------------------------- RunningBatchNorm itself


@dataclasses.dataclass
class Channel:
    """The state of one channel, by raw moments: count = Σw, sums = Σ w·x, sqrs = Σ w·x², count_sqrs = Σw²."""

    sums: float = 0.0
    sqrs: float = 0.0
    count: float = 0.0
    count_sqrs: float = 0.0
    debias: float = 0.0
    samples: float = 0.0
    steps: float = 0.0
    running_mean: float = 0.0
    running_var: float = 1.0
    # what only training reads
    noise: float = 0.0  # N·R
    of_batch: float = 1.0  # R of the last batch
    noise_steps: float = 0.0
    last_mean: float = 0.0
    sum_dy: float = 0.0
    sum_dy_xhat: float = 0.0
    count_dy: float = 0.0

    @property
    def mean(self) -> float:
        return self.sums / self.count

    @property
    def var(self) -> float:
        return self.sqrs / self.count - self.mean**2

    def seed(self, mean: float, var: float, batches: int) -> None:
        """Statistics taken over from elsewhere: settled, of unknown size (Σw² = 0), weighing 1 − a next."""
        self.__init__(sums=mean, sqrs=var + mean**2, count=1.0, debias=1.0, samples=math.inf, steps=batches)
        self.running_mean, self.running_var = mean, var

    def absorb(self, x: Tensor, batch_size: int, momentum: object, max_lag: float) -> tuple[Tensor, Tensor, float]:
        """One batch enters: returns mean and var to normalise by, differentiable in x, and the weight a.

        new = (1 − a)·old + g·batch for count, sums and sqrs, (1 − a)² and g² for Σw². A batch with a non-finite sum
        does not enter: a = g = 0. By what is returned, the batch comes out with a mean of at most d and a std of at
        most 1 + d, d = max_lag·(1 + 512·R).
        """
        n = x.numel()
        sums, sqrs = x.sum(), x.square().sum()
        if not (torch.isfinite(sums) and torch.isfinite(sqrs)):
            return x.new_tensor(self.running_mean), x.new_tensor(self.running_var), 0.0

        a = batch_weight(momentum, batch_size, self.samples, self.steps)
        if a == 0:
            return x.new_tensor(self.running_mean), x.new_tensor(self.running_var), 0.0
        g = a
        if weighs_whole_batches(momentum):
            if self.debias > 0:
                g = a * (self.count / self.debias) / n
        elif (
            self.count > 0 and self.count_sqrs == 0
        ):  # the first batch after a seed: the seed becomes batches like this one
            scale = n * self.debias / self.count
            self.sums, self.sqrs, self.count = scale * self.sums, scale * self.sqrs, scale * self.count

        new_sums = (1 - a) * self.sums + g * sums
        new_sqrs = (1 - a) * self.sqrs + g * sqrs
        self.count = (1 - a) * self.count + g * n
        self.count_sqrs = (1 - a) ** 2 * self.count_sqrs + g**2 * n
        self.debias = (1 - a) * self.debias + a
        self.samples += batch_size
        self.steps += 1

        mean = new_sums / self.count
        var = new_sqrs / self.count - mean.square()
        if self.samples < CLAMP_SAMPLES:
            var = var.clamp(min=CLAMP_VARIANCE)
        self.sums, self.sqrs = new_sums.item(), new_sqrs.item()
        self.running_mean, self.running_var = mean.item(), var.item()
        self.measure_noise(x.mean().item(), x.var(correction=0).item(), batch_size)
        if max_lag < math.inf:
            lag = max_lag * (1 + LAG_NOISE * self.of_batch)
            var = var.clamp(min=x.var(correction=0).item() / (1 + lag) ** 2)
            reach = lag * math.sqrt(var.item())
            mean = mean.clamp(x.mean().item() - reach, x.mean().item() + reach)
        return mean, var, a

    def measure_noise(self, batch_mean: float, batch_var: float, samples: int) -> None:
        """N·R ← N·R + (N·o − N·R)/min(t, 100), o = min(½·(b − b before)²/max(v, v_b), 1), or 1 for the first batch."""
        observed = 1.0
        if self.noise_steps > 0:
            variance = max(self.running_var, batch_var)
            square = 0.5 * (batch_mean - self.last_mean) ** 2
            observed = min(square / variance, 1) if variance > 0 else float(square > 0)
        self.noise_steps += 1
        self.noise += (observed * samples - self.noise) / min(self.noise_steps, WINDOW)
        self.last_mean = batch_mean
        self.of_batch = min(self.noise / samples, 1)

    def average_gradients(self, dy: Tensor, x_hat: Tensor, a: float) -> tuple[float, float]:
        """The running means G0 of dy and G1 of dy·x_hat, the current batch included where its sums are finite.

        It weighs max(a, 1/(1 + 64·R)). G0 + x_hat·G1 is made no longer than the projection of dy on the span of 1 and
        x_hat. Where the sums are not finite, and where the forward has ignored the batch (a = 0), whose statistics are
        then constants, nothing is absorbed and G0 = G1 = 0.
        """
        mean_dy, mean_dy_xhat = dy.mean().item(), (dy * x_hat).mean().item()
        if a == 0 or not (math.isfinite(mean_dy) and math.isfinite(mean_dy_xhat)):
            return 0.0, 0.0
        weight = max(a, 1 / (1 + TRUST_NOISE * self.of_batch))
        self.sum_dy = (1 - weight) * self.sum_dy + weight * mean_dy
        self.sum_dy_xhat = (1 - weight) * self.sum_dy_xhat + weight * mean_dy_xhat
        self.count_dy = (1 - weight) * self.count_dy + weight
        g0, g1 = self.sum_dy / self.count_dy, self.sum_dy_xhat / self.count_dy
        basis = torch.stack([torch.ones_like(x_hat), x_hat], 1)
        projection = basis @ torch.linalg.lstsq(basis, dy[:, None], driver="gelsd").solution[:, 0]
        subtracted = (g0 + x_hat * g1).norm().item()
        scale = 1.0 if subtracted <= projection.norm().item() else projection.norm().item() / subtracted
        return scale * g0, scale * g1


@dataclasses.dataclass(frozen=True)
class Step:
    """What one training forward leaves for its backward; rows are (C, N·S), the vectors have C entries."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    y: Tensor
    x_hat: Tensor
    rstd: Tensor
    a: list[float]


class ReferenceRunningBatchNorm:
    """RunningBatchNorm, channel by channel, after its definition.

    Training: the batch enters every channel's state (`Channel.absorb`), then y = (x − mean)·rstd·weight + bias with the
    state's mean and biased variance, rstd = (var + eps)^−½; unless gradients are exact, these lag behind those of the
    batch by d at most. Backward, with sums over the batch:

        exact     autograd through that formula, with the state before the batch as a constant
        running   dx = weight·rstd·(dy − G0 − x_hat·G1),  dweight = Σ dy·x_hat,  dbias = Σ dy
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, momentum: object, gradient: str, max_lag: float = 0.05, eps: float = 1e-5
    ) -> None:
        self.weight, self.bias = weight.detach().double(), bias.detach().double()
        self.momentum, self.gradient, self.eps = momentum, gradient, eps
        self.max_lag = math.inf if gradient == "exact" else max_lag
        self.channels = [Channel() for _ in self.weight]
        self.num_batches_tracked = 0

    def seed(self, running_mean: Tensor, running_var: Tensor, num_batches_tracked: int) -> None:
        for channel, mean, var in zip(self.channels, running_mean.tolist(), running_var.tolist(), strict=True):
            channel.seed(mean, var, num_batches_tracked)
        self.num_batches_tracked = num_batches_tracked

    def state(self, name: str) -> Tensor:
        """One entry of every channel's state, shape (C,)."""
        return torch.tensor([getattr(channel, name) for channel in self.channels], dtype=torch.float64)

    def forward(self, x: Tensor) -> Step:
        """A training step on a batch that is not empty."""
        x, weight, bias = (t.detach().double().requires_grad_() for t in (x, self.weight, self.bias))
        self.num_batches_tracked += 1
        absorbed = [
            channel.absorb(row, len(x), self.momentum, self.max_lag)
            for channel, row in zip(self.channels, channel_rows(x), strict=True)
        ]
        mean, var = (torch.stack([stats[i] for stats in absorbed]) for i in (0, 1))
        y = affine(x, mean, var + self.eps, weight, bias)
        rstd = (var + self.eps).rsqrt().detach()
        x_hat = (channel_rows(x) - mean[:, None]).detach() * rstd[:, None]
        return Step(x, weight, bias, y, x_hat, rstd, [stats[2] for stats in absorbed])

    def backward(self, step: Step, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight, dbias of a forward, from dL/dy."""
        dy = dy.double()
        if self.gradient == "exact":
            return torch.autograd.grad(step.y, (step.x, step.weight, step.bias), dy)
        rows = channel_rows(dy)
        dx = torch.stack([self._dx(step, c, rows[c]) for c in range(len(self.channels))])
        dx = dx.reshape(dy.transpose(0, 1).shape).transpose(0, 1)
        return dx, (rows * step.x_hat).sum(1), rows.sum(1)

    def _dx(self, step: Step, c: int, dy: Tensor) -> Tensor:
        mean_dy, mean_dy_xhat = self.channels[c].average_gradients(dy, step.x_hat[c], step.a[c])
        return step.weight[c].detach() * step.rstd[c] * (dy - mean_dy - step.x_hat[c] * mean_dy_xhat)

    def evaluate(self, x: Tensor) -> Tensor:
        """y by the state as it stands; mean 0 and variance 1 before any training."""
        var = self.state("running_var") + self.eps
        return affine(x.double(), self.state("running_mean"), var, self.weight, self.bias)
