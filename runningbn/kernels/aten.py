"""The kernels in plain torch: any device, any strides, traceable. See `contract`.

Under torch.compile the equations are written out for the compiler to fuse. Otherwise they are arranged around what
torch's own kernels do well: on the CPU its batch-norm statistics and `var_mean` are scalar while plain sums are
vectorised, and its evaluation-mode batch norm is the fastest affine map per channel that it has.
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

from ..ops.compat import has_storage
from ..ops.state import Sums, moments
from .contract import Centred, Gradients, GradientSums, Reduction
from .layout import cast, dense, empty_like, is_rows, spread

# Up to this size of a plane, torch's batch-norm reduction may add up its elements one by one per vector lane in
# float32: some 1e-6 of rounding. For larger planes, and for rows, torch's plain sums take over, which add pairwise.
_LARGEST_PLANE = 2**16

# From this number of elements on, two passes by torch's vectorised kernels beat its own scalar batch norm.
_LARGE = 2**20
# Where torch's batch norm adds up in float32, one by one, this is how far its mean may be off, in std, to be taken.
_TOLERATED_ERROR = 1e-4
# Sums of fewer are always taken: at mean/std = 1e4 their mean is off by some 1e-3 std, little more than its own digits.
_FEW = 2**10
# Sums of more never are: their variance may be off by more than 1e-4, wherever the mean is.
_MANY = 2**19


def unavailable() -> str | None:
    """None: plain torch runs everywhere."""
    return None


def version() -> str:
    """That of torch."""
    return f"torch {torch.__version__}"


def supports(x: Tensor, dtype: torch.dtype) -> bool:
    """True: any device, dtype and kind of tensor."""
    return True


def batch_sums(x: Tensor, dtype: torch.dtype) -> Reduction:
    """Sums of x, (N, C, ...), per channel about a pivot p from the data themselves, in `dtype`; and x − p, if at hand.

    The pivot is the mean of the first eighth of the samples. However the data are ordered, it lies close enough: where
    a portion f of the elements has a mean δ away from that of all, the variance is at least δ²·f/(1 − f), so that
    (mean − pivot)² ≤ 7·var and at most three bits cancel in sqrs/n − (sums/n)².

    x − p is what `normalize` goes on from, in the memory that the output needs anyway.
    """
    n = x.numel() // x.shape[1]
    if torch.compiler.is_compiling():
        x = x.to(dtype)
        pivot = reduce(x[: _eighth(x)], "n c ... -> c", "mean")
        deviation = x - spread(pivot, x)
        sums, sqrs = (reduce(t, "n c ... -> c", "sum") for t in (deviation, deviation * deviation))
        return Reduction(Sums(pivot, sums, sqrs, torch.full_like(pivot, n)))
    centred = empty_like(x, dtype)
    data, deviations = (t if t.dim() == 2 else t.flatten(2) for t in (dense(x), dense(centred, like=x)))
    part = data[: _eighth(x) * (len(data) // len(x))].to(dtype)
    pivot = _total(part) / (part.numel() // x.shape[1])
    # About a pivot that is not finite, or that comes from elements whose squares are not, `normalize` could not tell
    # the good elements of the channel any more. The factor allows for that many elements beside one that overflows.
    largest = 1e-7 * torch.finfo(dtype).max ** 0.5
    pivot.masked_fill_((pivot.abs() < largest).logical_not_(), 0)
    torch.sub(data, pivot if data.dim() == 2 else pivot.unsqueeze(1), out=deviations)
    sums, sqrs = _sums_and_sqrs(deviations)
    found = Sums(pivot, sums, sqrs, torch.full_like(pivot, n))
    return Reduction(found, Centred(pivot, centred) if x.dtype == dtype else None)


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    centred: Centred | None = None,
) -> Tensor:  # fmt: skip
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x; overwrites `centred`."""
    if torch.compiler.is_compiling():
        return affine(x, mean, (var + eps).rsqrt(), weight, bias)
    # torch's CPU kernel refuses 16-bit weights beside float32 statistics.
    weight = None if weight is None else weight.to(mean.dtype)
    bias = None if bias is None else bias.to(mean.dtype)
    if centred is not None:
        deviations = centred.deviations
        return _affine_map(deviations, mean - centred.pivot, var, weight, bias, eps, out=deviations)
    return _affine_map(x, mean, var, weight, bias, eps, out=empty_like(x))


def affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y = (x − mean)·rstd·weight + bias, in the dtype of x; for compilers."""
    y = (x - spread(mean, x)) * spread(rstd if weight is None else rstd * weight, x)
    return cast(y if bias is None else y + spread(bias, x), x.dtype)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, mean and biased variance, (C,) in `dtype`, of a batch with n > 1; without gradients."""
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    planes = x.dim() > 2 and not is_rows(x)
    if not (x.device.type == "cpu" and planes and x.dtype == dtype and x.numel() >= _LARGE):
        n = x.numel() // x.shape[1]
        # Not empty: torch adds (1 - momentum) times what is there, and 0 times NaN is NaN.
        mean, unbiased_var = torch.zeros((2, x.shape[1]), dtype=dtype, device=x.device)
        y, _, _ = torch.native_batch_norm(x, weight, bias, mean, unbiased_var, True, 1.0, eps)
        var = unbiased_var * ((n - 1) / n)
        # Everywhere else, torch adds up pairwise, by Welford's algorithm or in float64.
        naive = x.device.type == "cpu" and dtype == torch.float32 and not (planes and x.dtype == dtype)
        if not naive or n <= _FEW or (n <= _MANY and _error_of_plain_sums(mean, var, eps, n) <= _TOLERATED_ERROR):
            return y, mean, var
    sums, centred = batch_sums(x, dtype)
    mean, var = moments(sums)
    return normalize(x, mean, var, weight, bias, eps, centred), mean, var


def _error_of_plain_sums(mean: Tensor, var: Tensor, eps: float, n: int) -> float:
    """How far float32 sums of n elements, added up one by one, leave the mean off, in units of the std; about."""
    ratio = float((mean.abs() * (var + eps).rsqrt()).max())
    # Rounding errors of random sign grow like √n. One that is not finite is no reason to add up again.
    return n**0.5 * torch.finfo(torch.float32).eps / 2 * ratio if ratio < float("inf") else 0.0


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> GradientSums:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    if torch.compiler.is_compiling():
        dy = dy.to(mean.dtype)
        z = (x - spread(mean, x)) * spread(rstd, x)
        return GradientSums(reduce(dy, "n c ... -> c", "sum"), reduce(dy * z, "n c ... -> c", "sum"))
    # The reduction of torch's own backward, asked for the gradients of weight and bias only.
    only_weight_and_bias = [False, True, True]
    _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dense(dy, like=x), dense(x), torch.ones_like(mean), None, None, mean, rstd, True, 0.0, only_weight_and_bias
    )
    return GradientSums(sum_dy, sum_dy_xhat)


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    scale = rstd if weight is None else rstd * weight
    # What stands for several gradients at once cannot be written to memory that is given.
    if torch.compiler.is_compiling() or not has_storage(dy):
        z = (x - spread(mean, x)) * spread(rstd, x)
        return cast(spread(scale, x) * (dy - spread(m0, x) - z * spread(m1, x)), x.dtype)
    # scale·dy + [(x − mean)·b + d]: the bracket is an affine map, so only one more pass is left for dy.
    wide = x.to(mean.dtype)
    one = torch.ones_like(mean)
    dx = _affine_map(wide, mean, one, -scale * rstd * m1, -scale * m0, 0.0, out=empty_like(wide))
    return dx.addcmul_(dy.to(mean.dtype), spread(scale, x)).to(x.dtype)


def batch_norm_gradients(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Gradients:
    """dx, Σdy and Σdy·z of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    if torch.compiler.is_compiling():
        sum_dy, sum_dy_xhat = gradient_sums(dy, x, mean, rstd)
        n = x.numel() // x.shape[1]
        dx = input_gradient(dy, x, mean, rstd, weight, sum_dy / n, sum_dy_xhat / n)
        return Gradients(dx, sum_dy, sum_dy_xhat)
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    dx, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dense(dy, like=x), dense(x), weight, None, None, mean, rstd, True, 0.0, [True, True, True]
    )
    if is_rows(x) and x.dim() > 2:
        dx = dx.view(len(x), *x.shape[2:], -1).movedim(-1, 1)
    return Gradients(dx.view(x.shape), sum_dy, sum_dy_xhat)


def _affine_map(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> Tensor:
    """(x − mean)·(var + eps)^−½·weight + bias by torch's evaluation-mode batch norm; `out` may be x itself."""
    torch.ops.aten.native_batch_norm.out(
        dense(x), weight, bias, mean, var, False, 0.0, eps,
        out=dense(out, like=x), save_mean=mean.new_empty(0), save_invstd=mean.new_empty(0),
    )  # fmt: skip
    return out


def _eighth(x: Tensor) -> int:
    return (len(x) + 7) // 8


def _total(data: Tensor) -> Tensor:
    """Per-channel sums of rows (m, C) or planes (n, C, s)."""
    return data.sum(0) if data.dim() == 2 else data.sum(2).sum(0)


def _sums_and_sqrs(data: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel sums and sums of squares of rows (m, C) or planes (n, C, s)."""
    if data.dim() == 2 or data.shape[2] > _LARGEST_PLANE:
        return _total(data), _total(data.square())
    # Σdy and Σdy·(x − mean) with dy = x and mean = 0, in one pass.
    zero, one = data.new_zeros(data.shape[1]), data.new_ones(data.shape[1])
    _, sqrs, sums = torch.ops.aten.native_batch_norm_backward(
        data, data, one, None, None, zero, one, True, 0.0, [False, True, True]
    )
    return sums, sqrs
