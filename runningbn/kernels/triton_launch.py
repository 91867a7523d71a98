"""Launches with little Python: by Triton's own way the first time, then by the compiled kernel itself.

For each launch Triton looks at all arguments, to find the compilation that goes with their types, alignments and
constants: most of the host's time of a small step. A `Launches` knows by a short key what it was the first time. The
key has to say all that the compilation depends on, but for the alignment of addresses: launches are prepared for
aligned ones, and anything else takes Triton's way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import or_
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from ..ops.compat import current_raw_stream

# A tensor, or a named tuple of them; None where the kernel is compiled without.
Pointers = Union[Tensor, tuple[Tensor, ...], None]

# Registers for four programs of 256 threads on a multiprocessor: the sums fit, and what follows them once may spill.
# That multiplications and additions are fused is said since Triton 3.9 warns of a change of its default.
OPTIONS = {"maxnreg": 64, "enable_fp_fusion": True}
# Bytes: what Triton tells the compiler of an address that is a multiple of it.
_ALIGNMENT = 16


class Prepared(NamedTuple):
    """A launch that was done before.

    Attributes:
        run: launches the compiled kernel on the grid, see `triton.compiler.CompiledKernel.__getitem__`.
        constants: the compile-time arguments, which it takes and drops.
    """

    run: Callable[..., Any]
    constants: tuple[Any, ...]


Launches = dict[Hashable, Prepared]


def launch(
    prepared: Launches, key: Hashable, kernel: Any, programs: int, tensors: tuple[Pointers, ...],
    numbers: tuple[int, ...], constants: dict[str, Any],
) -> None:  # fmt: skip
    """Launch a kernel on the current stream of the current device.

    Args:
        prepared: the launches that were done before, which this one is added to.
        key: all that decides about the compilation: the kernel, the dtypes of the tensors, which of them are None,
            and the constants; and, since it is part of what is prepared, the number of programs.
        kernel: a function of `triton_kernels`.
        programs: how many.
        tensors, numbers, constants: its arguments, in this order; the number of warps is among the constants.
    """
    known = prepared.get(key)
    if known is not None:
        addresses = _addresses(tensors)
        if addresses is not None:
            known.run(*addresses, *numbers, *known.constants)
            return
    compiled = kernel[(programs,)](*tensors, *numbers, **constants, **OPTIONS)
    # In the interpreter nothing is compiled.
    if compiled is not None and known is None and _addresses(tensors) is not None:
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        prepared[key] = Prepared(compiled[(programs, 1, 1)], tuple(constants[name] for name in names))


def _addresses(tensors: tuple[Pointers, ...]) -> list[Any] | None:
    """Where they lie; None if one of them does not lie at a multiple of what prepared launches were compiled for."""
    addresses: list[Any] = []
    bits = 0
    for part in tensors:
        if part is None:
            addresses.append(None)
        elif isinstance(part, tuple):
            inner = tuple([tensor.data_ptr() for tensor in part])
            bits |= reduce(or_, inner)
            addresses.append(inner)
        else:
            address = part.data_ptr()
            bits |= address
            addresses.append(address)
    return addresses if bits % _ALIGNMENT == 0 else None


def on(index: int) -> AbstractContextManager[Any]:
    """Make a device the current one, on which Triton launches; nothing to do for -1, the CPU."""
    if index < 0 or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)


def counter(device: torch.device, blocks: int) -> Tensor:
    """Zeros, (≥ blocks,), int32, that no other launch counts in meanwhile, and each leaves as zeros.

    Launches of one stream run one after the other, so it has them for good. A graph may be replayed beside any other
    work, and each launch in it has zeros of its own.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _of_a_graph(device, blocks)
        stream = current_raw_stream(device.index)
    key = device, stream
    found = counters.get(key)
    if found is None or len(found) < blocks:
        found = counters[key] = torch.zeros(max(4096, blocks), dtype=torch.int32, device=device)
        if device not in _for_graphs:
            _for_graphs[device] = torch.zeros(_COUNTERS_OF_GRAPHS, dtype=torch.int32, device=device)
    return found


def _of_a_graph(device: torch.device, blocks: int) -> Tensor:
    """Zeros that no other launch will ever count in, made before the capture: making them would be part of it."""
    # Whole alignments, as prepared launches ask for.
    unit = _ALIGNMENT // torch.int32.itemsize
    size = math.ceil(blocks / unit) * unit
    left = _for_graphs.get(device)
    if left is None or len(left) < size:
        # Filled in every replay, which is one more launch.
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    _for_graphs[device] = left[size:]
    return left[:size]


counters: dict[tuple[torch.device, int], Tensor] = {}
# What captured launches have not taken yet: 1 MiB, enough for some thousand layers.
_for_graphs: dict[torch.device, Tensor] = {}
_COUNTERS_OF_GRAPHS = 2**18
