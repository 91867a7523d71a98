"""Training flags of modules: read, set and put back, bit by bit."""

from __future__ import annotations

from torch import nn


def training_flags(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module of the model and whether it is in training mode."""
    # Not by `modules()`, which takes as long as the rest of what a batch needs.
    found, left = {model}, [model]
    while left:
        children = {child for child in left.pop()._modules.values() if child is not None} - found
        found |= children
        left += children
    return [(module, module.training) for module in found]


def restore_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    """Put back training flags."""
    for module, training in flags:
        set_training(module, training)


def set_training(module: nn.Module, training: bool) -> None:
    """``module.training = training``, not by the slow way of ``nn.Module.__setattr__`` where that is possible."""
    own = vars(module)
    if "training" in own:
        own["training"] = training
    else:  # a scripted module
        module.training = training
