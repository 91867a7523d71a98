"""What the tests on a GPU compare with: the same steps on the CPU in float64, by the backend in plain torch."""

from __future__ import annotations

import copy

import torch
from cases import statistics_dtype
from steps import buffers_of, training_step
from torch import Tensor, nn

from runningbn.kernels import use_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# About some pivot, which may be any near the mean; what they are about is in the running moments.
ABOUT_A_PIVOT = ("shift", "sums", "sqrs")


def in_float64(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).cpu().double()


def reference_step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """A step of a layer in float64, on the CPU."""
    with use_backend("aten"):
        return training_step(layer, x.detach().cpu().double(), dy.detach().cpu().double())


def roundings(dtype: torch.dtype) -> float:
    """What a result in `dtype` may be off by, relative to the largest value."""
    kind = statistics_dtype(dtype)
    # Of arithmetic in the dtype of the statistics, and one more of the result.
    return 512 * torch.finfo(kind).eps + (2 * torch.finfo(dtype).eps if dtype != kind else 0)


def assert_near_all(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float, ignored: tuple[str, ...] = ()
) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if name not in ignored:
            atol = relative * max(1.0, float(wanted.double().abs().max()))
            torch.testing.assert_close(
                found[name].detach().cpu().double(), wanted.double(), rtol=relative, atol=atol, equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


def assert_same_buffers(layer: nn.Module, expected: nn.Module, relative: float) -> None:
    # The measured noise multiplies what rounding has left of a difference of means.
    assert_near_all(buffers_of(layer), buffers_of(expected), 64 * relative, ABOUT_A_PIVOT)
