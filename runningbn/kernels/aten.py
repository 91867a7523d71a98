"""The sweeps in plain torch: any device, any strides, traceable. See the package for the contract.

Under torch.compile the equations are written out for the compiler to fuse. Otherwise they are arranged around what
torch's own kernels do well: on the CPU its batch-norm statistics and `var_mean` are scalar while plain sums are
vectorised, and its evaluation-mode batch norm is the fastest affine map per channel that it has.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange, reduce
from torch import Tensor

from ..statistics import Sums

# Elements of a temporary of the blocked sums: 16 MiB of float32. Blocks that fit the second-level cache are some 5 %
# faster on an idle machine and many times slower on a busy one (data loaders on the same cores): each operation has all
# threads meet, and a thread that has lost its core keeps the others waiting for a time slice.
_BLOCK = 2**22


def batch_sums(x: Tensor, pivot: Tensor) -> Sums:
    """Sums of x, (N, C, ...), per channel about its own mean, in the dtype of `pivot`.

    Two sweeps, so that the pivot fits however far the data have moved: Σx first, then the sums about the mean. Rounding
    puts that pivot half a digit beside the mean, and Σ(x − pivot) says by how much.
    """
    x = x.to(pivot.dtype)  # torch reduces 16-bit data slower than it converts them
    n = x.numel() // x.shape[1]
    if torch.compiler.is_compiling() or not x.is_cpu:
        # One sweep for the compiler or torch's own Welford; about the given pivot the mean keeps its digits.
        var, offset = torch.var_mean(x - _spread(pivot, x), [d for d in range(x.dim()) if d != 1], correction=0)
        mean = pivot + offset
        return Sums(mean, n * (offset - (mean - pivot)), n * var, torch.full_like(mean, n))
    if _is_rows(x):
        rows = _dense(x)
        mean = rows.sum(0) / n
        parts = [(d.sum(0), d.square_().sum(0)) for d in _centred_blocks(rows, mean.expand_as(rows))]
        sums, sqrs = (torch.stack(part).sum(0) for part in zip(*parts))
    else:
        planes = rearrange(x.contiguous(), "n c ... -> (n c) (...)")
        mean = reduce(planes.sum(1), "(n c) -> c", "sum", n=len(x)) / n
        means = mean.repeat(len(x)).unsqueeze(1)
        parts = [(d.sum(1), d.square_().sum(1)) for d in _centred_blocks(planes, means)]
        sums, sqrs = (reduce(torch.cat(part), "(n c) -> c", "sum", n=len(x)) for part in zip(*parts))
    return Sums(mean, sums, sqrs, torch.full_like(mean, n))


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x."""
    if torch.compiler.is_compiling():
        rstd = (var + eps).rsqrt()
        y = (x - _spread(mean, x)) * _spread(rstd if weight is None else rstd * weight, x)
        return (y if bias is None else y + _spread(bias, x)).to(x.dtype)
    # torch's CPU kernel refuses 16-bit weights beside float32 statistics.
    weight = None if weight is None else weight.to(mean.dtype)
    bias = None if bias is None else bias.to(mean.dtype)
    return _affine_map(x, mean, var, weight, bias, eps)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σdy and Σdy·z per channel, z = (x − mean)·rstd, in the dtype of mean."""
    if torch.compiler.is_compiling():
        dy = dy.to(mean.dtype)
        z = (x - _spread(mean, x)) * _spread(rstd, x)
        return reduce(dy, "n c ... -> c", "sum"), reduce(dy * z, "n c ... -> c", "sum")
    # The reduction of torch's own backward, asked for the gradients of weight and bias only.
    only_weight_and_bias = [False, True, True]
    _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        _dense(dy, like=x), _dense(x), torch.ones_like(mean), None, None, mean, rstd, True, 0.0, only_weight_and_bias
    )
    return sum_dy, sum_dy_xhat


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    """dx = weight·rstd·(dy − m0 − z·m1) with z = (x − mean)·rstd, in the dtype and layout of x."""
    scale = rstd if weight is None else rstd * weight
    if torch.compiler.is_compiling():
        z = (x - _spread(mean, x)) * _spread(rstd, x)
        return (_spread(scale, x) * (dy - _spread(m0, x) - z * _spread(m1, x))).to(x.dtype)
    # scale·dy + [(x − mean)·b + d]: the bracket is an affine map, so only one more sweep is left for dy.
    wide = x.to(mean.dtype)
    dx = _affine_map(wide, mean, torch.ones_like(mean), -scale * rstd * m1, -scale * m0, 0.0)
    return dx.addcmul_(dy.to(mean.dtype), _spread(scale, x)).to(x.dtype)


def batch_norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, Σdy, Σdy·z) of batch normalisation proper: `input_gradient` with m0 = Σdy/n, m1 = Σdy·z/n."""
    if torch.compiler.is_compiling():
        sum_dy, sum_dy_xhat = gradient_sums(dy, x, mean, rstd)
        n = x.numel() // x.shape[1]
        return input_gradient(dy, x, mean, rstd, weight, sum_dy / n, sum_dy_xhat / n), sum_dy, sum_dy_xhat
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    dx, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        _dense(dy, like=x), _dense(x), weight, None, None, mean, rstd, True, 0.0, [True, True, True]
    )
    if _is_rows(x) and x.dim() > 2:
        return dx.view(len(x), *x.shape[2:], -1).movedim(-1, 1), sum_dy, sum_dy_xhat
    return dx.view(x.shape), sum_dy, sum_dy_xhat


def _affine_map(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x − mean)·(var + eps)^−½·weight + bias by torch's evaluation-mode batch norm, in the layout of x.

    Written into a tensor that is nobody's view, since autograd refuses work in place on a view from a Function.
    """
    if x.movedim(1, -1).is_contiguous():
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    else:
        y = x.new_empty(x.shape)
    unused = mean.new_empty(0), mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        _dense(x), weight, bias, mean, var, False, 0.0, eps, out=_dense(y, like=x), save_mean=unused[0], save_invstd=unused[1]
    )
    return y


def _spread(vector: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector, (C,), shaped to broadcast over (N, C, ...)."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def _is_rows(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side: (N, C) and channels_last inputs."""
    # With one channel both layouts are the same memory, and planes are the faster view of it.
    return x.shape[1] > 1 and (x.dim() == 2 or x.movedim(1, -1).is_contiguous())


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x as torch's kernels take it fastest: contiguous rows (n·s, C) or planes (n, C, s), as `like` has it."""
    if _is_rows(x if like is None else like):
        return rearrange(x, "n c ... -> (n ...) c").contiguous()
    return rearrange(x, "n c ... -> n c (...)").contiguous()


def _centred_blocks(matrix: Tensor, means: Tensor) -> Iterator[Tensor]:
    """matrix − means, some rows at a time in one small buffer that is reused: consume each block before the next."""
    rows = max(1, _BLOCK // matrix.shape[1])
    buffer = torch.empty(min(rows, len(matrix)), matrix.shape[1], dtype=means.dtype, device=matrix.device)
    for block, mean in zip(matrix.split(rows), means.split(rows)):
        yield torch.sub(block, mean, out=buffer[: len(block)])
