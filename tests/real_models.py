"""Models nobody here wrote, tiny, built from configurations without downloads: what a row of the tables is.

The tables are in real_models_images.py, real_models_detection.py, real_models_sequences.py and
real_models_elsewhere.py; a test is one row times one property.
"""

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import pretrained
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class RealModel:
    """A model and its inputs; `build` imports the package, and a missing one skips the row."""

    id: str
    package: str
    build: Callable[[], nn.Module]
    # ``batch(samples)``: keyword arguments of forward.
    batch: Callable[[int], Batch]
    samples: int = 2

    def model(self) -> nn.Module:
        """The model in training mode, the same each time, with statistics that it might have learnt."""
        return copy.deepcopy(_built(self))

    def batches(self, count: int = 1, seed: int = 0) -> list[Batch]:
        """Different batches, the same for each seed."""
        found = []
        for step in range(count):
            torch.manual_seed(1000 * seed + step)
            found.append(self.batch(self.samples))
        return found


@functools.cache
def _built(case: RealModel) -> nn.Module:
    pytest.importorskip(case.package)
    torch.manual_seed(0)
    model = case.build().train()
    with torch.no_grad():
        return pretrained(model)


def transformers_model(id: str, name: str, batch: Callable[[int], Batch], samples: int = 2, **sizes: Any) -> RealModel:
    """The class `name` of transformers with a configuration of these sizes; the id is its folder there."""

    def build() -> nn.Module:
        cls = getattr(importlib.import_module(f"transformers.models.{id}.modeling_{MODULES.get(id, id)}"), name)
        return cls(cls.config_class(**sizes))

    return RealModel(id, "transformers", build, batch, samples)


# Where the file is not called as its folder.
MODULES = {"data2vec": "data2vec_vision"}


def images(size: int = 32, channels: int = 3, name: str = "pixel_values") -> Callable[[int], Batch]:
    """Square images, as the keyword `name`."""
    return lambda samples: {name: torch.randn(samples, channels, size, size)}


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What forward returns, as a list of its floating-point tensors; the same draws each time."""
    torch.manual_seed(0)
    found = [leaf for leaf in tree_leaves(model(**batch)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert found, "no output to compare"
    return found


@torch.no_grad()
def evaluated(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The outputs in evaluation; the model is in training mode afterwards."""
    found = outputs(model.eval(), batch)
    model.train()
    return found


@torch.enable_grad()
def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The parameters' gradients of one training step, of those that get one."""
    model.train().zero_grad()
    losses = [y.square().mean() for y in outputs(model, batch) if y.requires_grad and y.isfinite().all()]
    torch.stack(losses).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
