"""The cases that the layers are measured on: shapes from real networks, unusual shapes, and the grids made of them.

All combinations of shapes, layouts, dtypes, threads, allocators and modes would take hours. So one grid, "training
step", has all shapes, and each other dimension has its own grid over a few representative shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# NCHW stands for contiguous, in any number of dimensions.
LAYOUTS = ("NCHW", "channels_last")
# x is half the channels of a larger tensor, as after a chunk; or has a border cut off; or comes from a layer of another
# memory format than the one that its gradient comes from.
OTHER_LAYOUTS = ("half the channels", "cropped", "NCHW, dy channels_last", "channels_last, dy NCHW")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PEER = "nn.BatchNorm"
OURS = ("PreciseBatchNorm", "RunningBatchNorm", "RunningBatchNorm exact")
FASTAI = "fastai 2019"
COPY = "copy of x"


@dataclass(frozen=True)
class Shape:
    """An input of a BatchNorm layer: (N, C, *).

    Attributes:
        family: where it is from.
        size: (N, C, *).
        count: how many of ResNet-50's layers have it.
        layouts: those that it is measured in.
    """

    family: str
    size: tuple[int, ...]
    count: int = 0
    layouts: tuple[str, ...] = LAYOUTS


@dataclass(frozen=True)
class Grid:
    """Cases that differ in shape, layout and dtype only.

    Attributes:
        name: of the grid.
        shapes: all of them in all their layouts.
        dtypes: with each of these.
        mode: "training step" (forward and backward), "forward" (in training, with gradients wanted) or "evaluation".
        contenders: besides nn.BatchNorm.
        one_thread: instead of as many as torch takes.
        page_faults: whether the allocator gives pages back, so that large outputs come from fresh ones; CPU only.
        compiled: whether all contenders, nn.BatchNorm too, go through torch.compile.
        activation: whether a ReLU comes after each, which a compiler may join with it.
        seconds: to be spent on the timing of a case, checks not counted.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    mode: str = "training step"
    contenders: tuple[str, ...] = (*OURS, COPY)
    one_thread: bool = False
    page_faults: bool = False
    compiled: bool = False
    activation: bool = False
    seconds: float = 0.5


@dataclass(frozen=True)
class Case:
    """One cell of a grid."""

    grid: Grid
    shape: Shape
    layout: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.grid.name}, {'x'.join(map(str, self.shape.size))}, {self.layout}, {self.dtype}"


def _shapes(family: str, batch: int, *sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(family, (batch, *size)) for size in sizes)


# (C, H, H) of the 53 layers at 224×224, and how often each occurs.
RESNET_50 = {
    (64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5, (256, 28): 1, (256, 14): 11,
    (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4,
}  # fmt: skip
SHAPES = (
    *(
        Shape("ResNet-50", (batch, channels, side, side), count)
        for batch in (32, 2)
        for (channels, side), count in RESNET_50.items()
    ),
    *_shapes("MobileNetV2", 8, (32, 112, 112), (16, 112, 112), (96, 112, 112), (96, 56, 56), (24, 56, 56)),
    *_shapes("MobileNetV2", 16, (144, 56, 56), (144, 28, 28), (32, 28, 28), (192, 28, 28)),
    *_shapes("MobileNetV2", 32, (192, 14, 14), (64, 14, 14), (384, 14, 14), (96, 14, 14), (576, 14, 14)),
    *_shapes("MobileNetV2", 64, (576, 7, 7), (160, 7, 7), (960, 7, 7), (320, 7, 7), (1280, 7, 7)),
    *_shapes("YOLO at 640", 8, (16, 320, 320), (32, 160, 160), (64, 80, 80), (128, 40, 40), (256, 20, 20)),
    *_shapes("YOLO at 640", 2, (16, 320, 320), (32, 160, 160), (64, 80, 80), (128, 40, 40), (256, 20, 20)),
    *_shapes("3-D U-Net", 2, (32, 64, 64, 64), (64, 32, 32, 32), (128, 16, 16, 16), (256, 8, 8, 8), (320, 4, 4, 4)),
    Shape("BatchNorm1d", (100_000, 32), layouts=LAYOUTS[:1]),
    Shape("BatchNorm1d", (64, 1024), layouts=LAYOUTS[:1]),
    Shape("BatchNorm1d", (8, 256, 1000), layouts=LAYOUTS[:1]),
    Shape("few channels", (20, 6, 65_536), layouts=LAYOUTS[:1]),
    Shape("few channels", (16, 3, 224, 224)),
    Shape("odd channels", (32, 37, 28, 28)),
    Shape("one position", (32, 256, 1, 1), layouts=LAYOUTS[:1]),
    Shape("tiny", (2, 64, 16, 16)),
    Shape("many positions of 49", (64, 1024, 7, 7)),
    Shape("awkward layout", (32, 64, 56, 56), layouts=OTHER_LAYOUTS),
    Shape("awkward layout", (2, 256, 14, 14), layouts=OTHER_LAYOUTS),
)


def _pick(*sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    """The shapes of these sizes."""
    return tuple(next(shape for shape in SHAPES if shape.size == size) for size in sizes)


# Large, where memory rules; in the middle; where the overhead rules; three dimensions.
LARGE, MIDDLE, TINY = (32, 64, 56, 56), (32, 256, 14, 14), (2, 64, 16, 16)
REPRESENTATIVE = _pick(
    LARGE, (32, 512, 28, 28), MIDDLE, (32, 2048, 7, 7), (2, 64, 56, 56), (2, 256, 14, 14), TINY,
    (8, 32, 160, 160), (16, 3, 224, 224), (2, 32, 64, 64, 64), (100_000, 32),
)  # fmt: skip
COMPILED = _pick(LARGE, (2, 64, 56, 56), TINY)
# What --quick keeps of each grid.
QUICK_SIZES, QUICK_SECONDS = (MIDDLE, TINY), 0.1

GRIDS = (
    Grid("training step", SHAPES, seconds=0.6),
    Grid("one thread", REPRESENTATIVE, one_thread=True),
    Grid("float16", REPRESENTATIVE, dtypes=("float16",)),
    Grid("forward", REPRESENTATIVE, mode="forward"),
    Grid("evaluation", REPRESENTATIVE, mode="evaluation"),
    Grid("default allocator", REPRESENTATIVE, page_faults=True),
    Grid("fastai", _pick(LARGE, MIDDLE, (2, 64, 56, 56), TINY), contenders=(*OURS, FASTAI, COPY)),
    Grid("compiled", COMPILED, contenders=(*OURS, FASTAI, COPY), compiled=True),
    Grid("compiled with ReLU", COMPILED, contenders=OURS, compiled=True, activation=True),
)


def cases(device: str, page_faults: bool, quick: bool = False) -> Iterator[Case]:
    """What one process measures, in such an order that neighbours share their data."""
    for grid in GRIDS:
        if grid.page_faults != page_faults or (device == "cuda" and (grid.page_faults or grid.one_thread)):
            continue
        if quick and grid.compiled:
            continue
        for shape, dtype in itertools.product(grid.shapes, grid.dtypes):
            if quick and shape.size not in QUICK_SIZES:
                continue
            for layout in shape.layouts:
                # Compiling takes long: each of the two layouts with one dtype.
                if not grid.compiled or (layout == "NCHW") == (dtype == "float32"):
                    yield Case(grid, shape, layout, dtype)


@lru_cache(maxsize=1)
def values(size: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """x and dy, contiguous float32. Channels of x differ in mean and spread."""
    generator = torch.Generator().manual_seed(0)
    per_channel = (1, size[1], *[1] * (len(size) - 2))
    x, dy = (torch.randn(size, generator=generator) for _ in range(2))
    spread = 0.5 + torch.rand(per_channel, generator=generator)
    x.mul_(spread).add_(torch.randn(per_channel, generator=generator))
    return x.to(device), dy.to(device)


def data(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """An input that wants a gradient, and the gradient of its output, in the case's layout and dtype."""
    x, dy = (t.to(DTYPES[case.dtype]) for t in values(case.shape.size, device))
    for_x, mixed, for_dy = case.layout.partition(", dy ")
    if not mixed:  # what comes out of a strided input is contiguous, and so is its gradient
        for_dy = for_x if for_x in LAYOUTS else "NCHW"
    return laid_out(x, for_x).requires_grad_(), laid_out(dy, for_dy)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A copy of a contiguous t with the strides of a layout."""
    if layout == "channels_last":
        form = torch.channels_last_3d if t.dim() == 5 else torch.channels_last
        return t.clone(memory_format=form)
    if layout == "half the channels":
        return torch.cat((t, t), 1).narrow(1, 0, t.shape[1])
    if layout == "cropped":
        return torch.nn.functional.pad(t, (1, 1, 1, 1))[..., 1:-1, 1:-1]
    return t.clone()
