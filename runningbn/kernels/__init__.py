"""The sweeps over the data: everything that touches all N·C·S elements, and nothing else does.

A backend is a module with these four functions; `aten` is the definition of correctness. Shapes: N batch, C channels,
any trailing dimensions, n = elements per channel; per-channel vectors are (C,) in the dtype of the statistics.

    batch_sums(x, dtype)                             -> Sums        n, Σ(x − p), Σ(x − p)² about a pivot p near the mean
    normalize(x, mean, var, weight, bias, eps)       -> y           (x − mean)·rstd·weight + bias
    gradient_sums(dy, x, mean, rstd)                 -> (Σdy, Σdy·z)    with z = (x − mean)·rstd
    input_gradient(dy, x, mean, rstd, weight, m0, m1) -> dx         weight·rstd·(dy − m0 − z·m1)
"""

from .aten import batch_sums, gradient_sums, input_gradient, normalize

__all__ = ["batch_sums", "gradient_sums", "input_gradient", "normalize"]
