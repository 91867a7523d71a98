"""Read, set and restore the `training` flag of every module of a model."""

from __future__ import annotations

from torch import nn


def training_flags(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module of the model and whether it is in training mode."""
    # `modules()` is avoided: for small batches it takes as long as all other overhead of a batch.
    found, left = {model}, [model]
    while left:
        children = {child for child in left.pop()._modules.values() if child is not None} - found
        found |= children
        left += children
    return [(module, module.training) for module in found]


def restore_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    """Restore training flags."""
    for module, training in flags:
        set_training(module, training)


def set_training(module: nn.Module, training: bool) -> None:
    """``module.training = training``; where possible without ``nn.Module.__setattr__``, which is slow."""
    own = vars(module)
    if "training" in own:
        own["training"] = training
    else:  # a scripted module
        module.training = training
