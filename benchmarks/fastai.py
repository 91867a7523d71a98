"""The RunningBatchNorm of the fastai course, as published. The benchmarks compare the layers with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FastaiRunningBatchNorm(nn.Module):
    """RunningBatchNorm of the fastai course (part 2, 2019, notebook 07_batchnorm), in its debiased version.

    With s = Σx, q = Σx² and n elements per channel of a batch of N, and a = 1 − (1 − mom)/√(N − 1), the history being a
    constant to autograd:

        sums ← sums + a(s − sums),  sqrs ← sqrs + a(q − sqrs),  count ← count + a(n − count),  dbias ← dbias(1 − a) + a
        mean = sums/count,  var = sqrs/count − mean², at least 0.01 below 20 samples
        y = (x − mean)/√(var + eps) · mults + adds

    In the first 100 steps sums, sqrs and count are divided by dbias, which cancels. Changed for 16-bit inputs only,
    with which the original does not run: sums are in the dtype of the buffers, and the output is cast to that of x.

    Shape: (N, C, H, W), N > 1.
    """

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.mom, self.eps = mom, eps
        self.mults = nn.Parameter(torch.ones(nf, 1, 1))
        self.adds = nn.Parameter(torch.zeros(nf, 1, 1))
        self.register_buffer("sums", torch.zeros(1, nf, 1, 1))
        self.register_buffer("sqrs", torch.zeros(1, nf, 1, 1))
        self.register_buffer("batch", torch.tensor(0.0))
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("step", torch.tensor(0.0))
        self.register_buffer("dbias", torch.tensor(0.0))

    def update_stats(self, x: Tensor) -> None:
        """Let a batch into the sums."""
        bs, nc, *_ = x.shape
        self.sums.detach_()
        self.sqrs.detach_()
        dims = (0, 2, 3)
        s = x.sum(dims, keepdim=True, dtype=self.sums.dtype)
        ss = (x * x).sum(dims, keepdim=True, dtype=self.sqrs.dtype)
        c = self.count.new_tensor(x.numel() / nc)
        mom1 = self.dbias.new_tensor(1 - (1 - self.mom) / math.sqrt(bs - 1))
        self.sums.lerp_(s, mom1)
        self.sqrs.lerp_(ss, mom1)
        self.count.lerp_(c, mom1)
        self.dbias = self.dbias * (1 - mom1) + mom1
        self.batch += bs
        self.step += 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics; in training, let the batch in first."""
        dtype = x.dtype
        if self.training:
            self.update_stats(x)
        sums, sqrs, c = self.sums, self.sqrs, self.count
        if self.step < 100:
            sums, sqrs, c = sums / self.dbias, sqrs / self.dbias, c / self.dbias
        means = sums / c
        variances = (sqrs / c).sub_(means * means)
        if bool(self.batch < 20):
            variances.clamp_min_(0.01)
        x = (x - means).div_((variances.add_(self.eps)).sqrt())
        return x.mul_(self.mults).add_(self.adds).to(dtype)
