"""The layers and inputs that properties are checked on: one table, so that a test is one table times one property."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runningbn import Horizon, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm, SquareRoot

RULES: Mapping[str, Any] = MappingProxyType(
    {
        "horizon": Horizon(),
        # leaves its start, grows and settles within the few small batches of a test
        "horizon-short": Horizon(samples=8, start=2, fraction=0.5),
        "sqrt": SquareRoot(0.1),
        "float": 0.1,
        "one": 1.0,
        "none": None,
    }
)
GRADIENTS = ("running", "exact")
RAGGED = (5, 1, 2, 8, 3, 4)  # batch sizes; the last one passes the 20 samples below which the variance is clamped


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of its input without the batch: `shape` = (C, *)."""

    id: str
    constructor: Callable[..., nn.Module]
    shape: tuple[int, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def channels(self) -> int:
        return self.shape[0]

    def layer(self, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
        """The layer in training mode, with weights and biases that no mistake can hide behind (not ones and zeros)."""
        return with_random_affine(self.constructor(self.channels, dtype=dtype, **{**self.kwargs, **kwargs}))

    def input(self, batch_size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """A batch whose channels differ in mean and spread, and that differs in both from batches of other seeds."""
        generator = torch.Generator().manual_seed(seed)
        per_channel = (1, self.channels, *[1] * (len(self.shape) - 1))
        spread = 0.5 + torch.rand(per_channel, generator=generator, dtype=torch.float64)
        centre = torch.randn(per_channel, generator=generator, dtype=torch.float64)
        # not from `noise`, as gradients are: a dy in proportion to x_hat has a dx of zero
        x_hat = torch.randn((batch_size, *self.shape), generator=generator, dtype=torch.float64)
        return (x_hat * spread + centre).to(dtype)

    def batches(self, sizes: tuple[int, ...] = RAGGED, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [self.input(size, seed, dtype) for seed, size in enumerate(sizes)]


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same for every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    """The same tensor with the channels innermost, in any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the statistics are in, beside an input of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_random_affine(layer: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 + values)
    return layer


RUNNING = (
    LayerCase("running-2d-input", RunningBatchNorm, (3,)),
    LayerCase("running-3d-input", RunningBatchNorm, (3, 7), {"gradient": "exact"}),
    LayerCase("running-4d-input", RunningBatchNorm, (4, 5, 6)),
    LayerCase("running-5d-input", RunningBatchNorm, (2, 3, 4, 5)),
    LayerCase("running-6d-input", RunningBatchNorm, (3, 2, 3, 2, 3), {"gradient": "exact"}),
    LayerCase("running-exact", RunningBatchNorm, (4, 5, 6), {"gradient": "exact"}),
    LayerCase("running-sqrt", RunningBatchNorm, (4, 5, 6), {"momentum": SquareRoot(0.1)}),
    LayerCase("running-sqrt-exact", RunningBatchNorm, (4, 5, 6), {"momentum": SquareRoot(0.1), "gradient": "exact"}),
    LayerCase("running-float", RunningBatchNorm, (4, 5, 6), {"momentum": 0.1}),
    LayerCase("running-cumulative", RunningBatchNorm, (4, 5, 6), {"momentum": None}),
    # So near a limit to the lag that it binds, however noisy a few batches are.
    LayerCase("running-limited", RunningBatchNorm, (4, 5, 6), {"max_lag": 1e-3}),
    LayerCase("running-short-horizon", RunningBatchNorm, (4, 5, 6), {"momentum": RULES["horizon-short"]}),
    LayerCase("running-no-bias", RunningBatchNorm, (4, 5, 6), {"bias": False}),
    LayerCase("running-no-affine", RunningBatchNorm, (4, 5, 6), {"affine": False}),
)
PRECISE = (
    LayerCase("precise1d-2d-input", PreciseBatchNorm1d, (3,)),
    LayerCase("precise1d-3d-input", PreciseBatchNorm1d, (3, 7)),
    LayerCase("precise2d", PreciseBatchNorm2d, (4, 5, 6)),
    LayerCase("precise3d", PreciseBatchNorm3d, (2, 3, 4, 5)),
    LayerCase("precise2d-cumulative", PreciseBatchNorm2d, (4, 5, 6), {"momentum": None}),
    LayerCase("precise2d-horizon", PreciseBatchNorm2d, (4, 5, 6), {"momentum": Horizon()}),
    LayerCase("precise2d-sqrt", PreciseBatchNorm2d, (4, 5, 6), {"momentum": SquareRoot(0.1)}),
    LayerCase("precise2d-no-bias", PreciseBatchNorm2d, (4, 5, 6), {"bias": False}),
    LayerCase("precise2d-no-affine", PreciseBatchNorm2d, (4, 5, 6), {"affine": False}),
)
LAYERS = RUNNING + PRECISE


POISONED = 1  # a channel


def poisoned(x: Tensor, poison: float) -> Tensor:
    """The images with a single value in the channel `POISONED` that is another."""
    x = x.clone()
    x[0, POISONED, 2, 3] = poison
    return x


def from_this_state(layer: nn.Module, *further: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The layer as a function of x and its parameters, from the present buffers at every call; and the parameters.

    `further` arguments of the layer are fixed.

    What gradcheck needs: it calls a function many times, and a training forward leaves its trace in the buffers.
    """
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        state = {**dict(zip(names, parameters, strict=True)), **buffers}
        return torch.func.functional_call(layer, state, (x, *further))

    return function, tuple(p.detach().clone().requires_grad_() for p in layer.parameters())


def each(cases: tuple[LayerCase, ...]) -> pytest.MarkDecorator:
    """Parametrise a test over `case`."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def each_rule() -> pytest.MarkDecorator:
    """Parametrise a test over `momentum`."""
    return pytest.mark.parametrize("momentum", RULES.values(), ids=RULES.keys())


def each_gradient() -> pytest.MarkDecorator:
    """Parametrise a test over `gradient`."""
    return pytest.mark.parametrize("gradient", GRADIENTS)


def each_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parametrise a test over `dtype`."""
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def names_of(*values: Any) -> dict[str, Any]:
    """Values by the names they have in the names of tests."""
    return {getattr(value, "id", str(value).removeprefix("torch.")): value for value in values}


def each_pair(
    also: Sequence[tuple[str, ...]] = (), unless: Callable[..., bool] | None = None, **values: Mapping[str, Any]
) -> pytest.MarkDecorator:
    """Parametrise a test over all its arguments at once: any two values of any two arguments occur together.

    A full product grows with every argument. Most mistakes depend on one value or on two; what depends on more, and is
    known, goes into `also`.

    Args:
        also: further combinations, as the names of their values in the order of the arguments.
        unless: takes the arguments and tells combinations that there are none of.
        values: for each argument, its values by name.
    """
    arguments = [list(named.items()) for named in values.values()]
    possible = [
        row for row in product(*arguments) if unless is None or not unless(**dict(zip(values, [v for _, v in row])))
    ]
    by_name = {tuple(name for name, _ in row): row for row in possible}
    rows = pairwise(list(by_name))
    return pytest.mark.parametrize(
        tuple(values),
        [
            pytest.param(*(value for _, value in by_name[row]), id="-".join(row))
            for row in dict.fromkeys((*rows, *also))
        ],
    )


def pairwise(possible: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A few of the rows, with every pair of values that occurs in any of them: always that with the most new pairs."""
    pairs = {row: set(combinations(enumerate(row), 2)) or {row} for row in possible}
    missing, rows = set[Any]().union(*pairs.values()), []
    while missing:
        row = max(possible, key=lambda row: len(pairs[row] & missing))
        rows.append(row)
        missing -= pairs[row]
    return rows


def assert_near(actual: Tensor, expected: Tensor, roundings: float, scale: float | Tensor | None = None) -> None:
    """|actual − expected| ≤ roundings · eps(actual.dtype) · scale, scale being the largest |expected| unless given.

    A bound in roundings of the quantities that went in: relative bounds per element say nothing where terms cancel.
    """
    scale = torch.as_tensor(expected.abs().max() if scale is None else scale).detach()
    atol = roundings * torch.finfo(actual.dtype).eps * scale.item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)
