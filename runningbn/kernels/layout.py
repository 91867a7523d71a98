"""How the elements of an input, and the buffers of a layer, lie in memory, as the kernels see it.

Two layouts are processed at full speed: planes, (N, C, S) contiguous, and rows, (M, C) contiguous with M = N·S,
which is what (N, C) and channels_last inputs are. Anything else is copied into one of them.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import NamedTuple, NoReturn

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import Parameter

from ..ops.compat import has_storage, number_of_dispatch_modes

# What fused kernels take: the dtype of the statistics beside data of a dtype.
STATISTICS = {
    torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32,
    torch.float64: torch.float64,
}  # fmt: skip
# Subclasses want to see operations, and may have no memory of their own.
PLAIN = Tensor, Parameter


def is_memory(x: Tensor) -> bool:
    """Whether x is what lies at its address, so that a kernel can work on that, and is not empty.

    Raises:
        RuntimeError: for a tensor whose storage was freed. Plain torch operations would crash on it as well, where
            ``nn.BatchNorm`` raises an error.
    """
    return (
        type(x) in PLAIN
        # Modes want to see operations, too.
        and number_of_dispatch_modes() == 0
        and x.layout is torch.strided
        # A negated view and a tensor of zeros do not mean what lies at their address.
        and not (x.is_neg() or x._is_zerotensor())
        and x.numel() > 0
        # What stands for several gradients at once has none.
        and has_storage(x)
        and (x.data_ptr() != 0 or _refuse_freed("a tensor"))
    )


def is_rows(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side: (N, C) and channels_last inputs."""
    if x.dim() == 2 or x.shape[2:].numel() == 1:
        return x.shape[1] > 1
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether x is one of the two layouts as it is."""
    return x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x as contiguous rows (n·s, C) or planes (n, C, ...), as `like` has it; x itself where it is that already."""
    if is_rows(x if like is None else like):
        return x.contiguous() if x.dim() == 2 else rearrange(x, "n c ... -> (n ...) c").contiguous()
    return x.contiguous()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the layout of x that is not a view: autograd refuses in-place operations on views."""
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, but no call where there is nothing to do.

    Not only for speed: the compiler of torch 2.11 takes the result of such a call, in the forward of an autograd
    function, for one more output, which is the same tensor. All gradients are then zero, without a warning.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def spread(vector: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector, (C,), shaped to broadcast over (N, C, ...)."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a copy of it, that is dense in one of the two layouts, in its own shape; and whether that is rows."""
    if x.is_contiguous():
        # `is_rows` without its way through the memory formats: this is asked in every step.
        return x, x.shape[1] > 1 and (x.dim() == 2 or x.shape[2:].numel() == 1)
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return x, True
    x = x.contiguous()
    return x, is_rows(x)


def laid_out_like(x: Tensor, data: Tensor) -> Tensor:
    """x, or a copy of it, with the memory layout of dense `data` of the same shape."""
    if data.is_contiguous():
        return x.contiguous()
    return x if x.stride() == data.stride() else torch.empty_like(data, dtype=x.dtype).copy_(x)


def is_addressable(tensor: Tensor | None, x: Tensor) -> bool:
    """Whether a kernel on the device of x can take a parameter by its address, or has none to take.

    As `is_memory`, but modes are no reason against it, and a parameter without memory, as on meta, is left to torch.
    """
    return tensor is None or (
        type(tensor) in PLAIN
        and tensor.data_ptr() != 0
        and tensor.is_cpu == x.is_cpu
        and tensor.get_device() == x.get_device()
        and not (tensor.is_neg() or tensor._is_zerotensor())
    )


class _Known(NamedTuple):
    addresses: tuple[int, ...]
    sizes: list[int]
    buffers: list[weakref.ref[Tensor]]


def addresses(buffers: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """Where the buffers of a layer lie, if they are memory as kernels update it; None otherwise."""
    found, sizes = tuple([tensor.data_ptr() for tensor in buffers]), [tensor.numel() for tensor in buffers]
    known = _known.get(id(buffers[0]))
    # The same tensors, as large as they were and at the same place as when all was looked at.
    if (
        known is not None
        and known.addresses == found
        and known.sizes == sizes
        and all(map(is_, [tensor() for tensor in known.buffers], buffers))
    ):
        return found
    if 0 in found:
        if any(t.data_ptr() == 0 and type(t) in PLAIN and t.numel() and not t.is_meta for t in buffers):
            _refuse_freed("a buffer of the layer")
        return None
    if not are_vectors(buffers):
        return None
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[id(buffers[0])] = _Known(found, sizes, [weakref.ref(tensor) for tensor in buffers])
    return found


# By the identity of the first buffer. Looking at all of a dozen tensors takes longer than a small batch.
_known: dict[int, _Known] = {}
_MOST_KNOWN = 4096


def forget_buffers() -> None:
    """Drop what is known of buffers: ``torch.utils.swap_tensors`` refuses tensors with weak references."""
    _known.clear()


def are_vectors(buffers: tuple[Tensor, ...]) -> bool:
    """Whether the buffers of a layer are memory as kernels update it.

    All are contiguous vectors like the first, but for `num_batches_tracked`, which has no dimensions.
    """
    first = buffers[0]
    return all(
        (t.dtype is first.dtype and t.shape == first.shape if t.dim() else t.dtype is torch.int64)
        and t.device == first.device
        and t.is_contiguous()
        and type(t) in PLAIN
        for t in buffers
    )


def _refuse_freed(what: str) -> NoReturn:
    raise RuntimeError(f"{what} has no memory: its storage was freed")
