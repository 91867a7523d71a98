"""The sweeps over the data: everything that touches all N·C·S elements, and nothing else does.

A backend is a module with these functions; `aten` is the definition of correctness. Shapes: N batch, C channels, any
trailing dimensions, n = elements per channel; per-channel vectors are (C,) in the dtype of the statistics.

    batch_sums(x, dtype)                              -> Sums, x − p   p, Σ(x − p), Σ(x − p)², n; pivot p near the mean;
                                                                  x − p, or None, is memory for `normalize`
    normalize(x, mean, var, weight, bias, eps, p, x − p) -> y     (x − mean)·rstd·weight + bias
    gradient_sums(dy, x, mean, rstd)                  -> Σdy, Σdy·z    with z = (x − mean)·rstd
    input_gradient(dy, x, mean, rstd, weight, m0, m1) -> dx       weight·rstd·(dy − m0 − z·m1)
    batch_norm_gradients(dy, x, mean, rstd, weight)   -> dx, Σdy, Σdy·z    both at once where m0 = Σdy/n, m1 = Σdy·z/n
    batch_norm(x, weight, bias, eps, dtype)           -> y, mean, var    the first two at once, for n > 1, no gradients
"""

from .aten import batch_norm, batch_norm_gradients, batch_sums, gradient_sums, input_gradient, normalize

__all__ = ["batch_norm", "batch_norm_gradients", "batch_sums", "gradient_sums", "input_gradient", "normalize"]
