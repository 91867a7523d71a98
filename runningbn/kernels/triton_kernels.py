"""The kernels behind `triton`, whose Python side says how they are launched.

Shapes: x is (N, C, S) in memory, with the sizes `outer`, `channels` and `inner`; rows, (M, C), are N = M, S = 1. It is
cut into tiles of BN × BC × BS, which are numbered within a block of BC channels, along S first. A program takes `tiles`
of them one after the other, its `split`. n = N·S elements per channel.

They stand in `triton_forward`, `triton_backward` and `triton_updates`. What is done for each channel is in
`triton_state` and `triton_vectors`, how x is cut and how partial sums are merged in `triton_tiles`.

Sums over x, and what there is of one value per channel, are in the dtype of the statistics, W, as in plain torch; only
the mean of a batch is in float64. Where one program has all elements of its channels, it also maps them: a step is then
one launch forward and one backward.
"""

from .triton_backward import gradient_statistics, input_gradient
from .triton_forward import affine_map, batch_statistics
from .triton_updates import update_by_sums, update_gradient_by_sums

__all__ = [
    "affine_map",
    "batch_statistics",
    "gradient_statistics",
    "input_gradient",
    "update_by_sums",
    "update_gradient_by_sums",
]
