"""center_weights and bake_weights: which layers are centred, when, and what is told about it.

A layer is re-parametrised in place: it stays the same object and changes its class, as in `batchnormify`. So parameters
keep their names, which ``torch.nn.utils.parametrize`` would change, and optimizers made before stay valid.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..recalibration.batches import Forward, call
from ..recalibration.text import counted
from .choice import Choice, Plan, Where, layers_of, logger, names_of, report
from .layers import CENTERED, PLAIN, CenteredWeights

ModelT = TypeVar("ModelT", bound=nn.Module)


def center_weights(
    model: ModelT,
    batch: Any = None,
    *,
    forward: Forward | None = None,
    where: Where | None = None,
    depthwise: bool = False,
) -> ModelT:
    """Centre the filters of the layers that feed a normalisation layer, in place.

    The layer then works with v − mean(v) + offset, where v is its `weight`: the mean is over the inputs and positions
    of each filter, the offset a constant per filter. So the mean of v gets no gradient, and the mean of what the
    normalisation layer sees does not move with the mean of what the layer before it sees: running statistics lag less.

    offset is 0 if all normalisation layers fed are fresh (no batches tracked, mean 0 and variance 1): training starts
    from filters without a mean. Otherwise, and for layers without running statistics such as ``nn.GroupNorm``, it is
    the mean that the filter has, and the model computes what it did before.

    Centred are ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d`` and ``nn.Linear`` that feed BatchNorm layers of any
    kind, ``nn.InstanceNorm1d/2d/3d`` or ``nn.GroupNorm``, and nothing else: whatever tensor such a layer returns in a
    forward pass has to be the input of a normalisation layer, and no operation may use it besides. This is seen in one
    pass over a batch, in evaluation and without gradients; it leaves buffers, flags and the random state as they were.

    Left alone, and named in the log with the reason: layers whose output goes elsewhere, too, as to an addition or the
    caller; layers that the pass does not call; depthwise convolutions; filters of a single weight; subclasses; layers
    with hooks, a parametrisation, a forward of their own, or a weight that another layer uses, too. One line is logged
    to the logger ``runningbn``: as a warning if no layer was centred, or one was left alone for how it is built.

    - Parameters stay the same objects with the same names; `weight_offset` is a buffer. State dicts load strictly into
      a centred model from a centred one, and from a plain one, whose function they then give. (Not from a plain one by
      ``torch.distributed.checkpoint.state_dict``, which leaves the offsets: load first, then centre.)
    - `bake_weights` makes plain layers again, with the same filters. It has to come before what reads `weight` by
      itself, as fusing, quantising and loading the state dict into a plain model, and before ``torch.jit.script`` and
      ``torch.fx``.
    - Centre before ``fully_shard``, ``torch.compile`` and ``torch.export``.

    Args:
        model: any module.
        batch: an example: a tensor, a list or tuple whose first element the model takes, or a mapping of keyword
            arguments. Without one, the first forward pass of `model` decides, before it computes anything; until then
            nothing is changed. Copies made meanwhile decide for themselves, so make averaged copies after it. That pass
            must not be compiled.
        forward: ``forward(model, batch)`` calls the model with a batch of any other kind, and returns what it returns.
        where: ``where(name, module)`` says whether to consider a convolution or linear layer; one with several names
            is considered if it says so for any of them.
        depthwise: whether to centre depthwise convolutions, too, whose filters see one channel.

    Returns:
        The model.

    Raises:
        TypeError: for something that is not a module, a bool as batch, or a `forward` without a batch.
        RuntimeError: if layers are lazy and not initialised. This, as whatever the model raises, leaves the model as it
            was; at a first forward pass that decides, the next one tries again.

    Sources: Huang et al., Centered Weight Normalization, ICCV 2017; Qiao et al., Weight Standardization, 2019
    (arXiv:1903.10520), which scales, too; Yan et al., Moving Average Batch Normalization, ICLR 2020.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import center_weights
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> [type(layer).__name__ for layer in center_weights(model, torch.randn(2, 3, 8, 8))]
        ['CenteredConv2d', 'BatchNorm2d', 'ReLU', 'Conv2d']
    """
    _check_module("center_weights", model)
    if isinstance(batch, bool):
        raise TypeError(f"center_weights: expected an example batch or None, got {batch}")
    if batch is None and forward is not None:
        raise TypeError("center_weights: forward= is for an example batch, and there is none")
    chosen = None if where is None else layers_of(model, tuple(CENTERED), where)
    choice = Choice(chosen, depthwise=depthwise)
    if batch is None:
        wait(model, choice)
    else:
        decide(model, choice, forward or call, batch).carry_out()
    return model


def bake_weights(model: ModelT, *, where: Where | None = None) -> ModelT:
    """Make plain layers of those that `center_weights` has centred, with the filters that they worked with, in place.

    v becomes v − mean(v) + offset, the class is again that of torch, and the buffer is gone. The model computes what it
    did. A model that still waits for its first forward pass waits no longer. ``batchnormify(model, "torch")`` does it,
    too.

    Left alone, and named in a warning: layers that have been given another class or parametrisation since, as by
    ``fully_shard``, and sharded weights.

    Args:
        model: any module.
        where: ``where(name, module)`` says whether to bake a layer.

    Returns:
        The model.

    Raises:
        TypeError: for something that is not a module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import bake_weights, center_weights
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(bake_weights(center_weights(model, torch.randn(2, 3, 8, 8)))[0]).__name__
        'Conv2d'
    """
    _check_module("bake_weights", model)
    if where is None:
        cancel(model)
    names = names_of(model)
    baked, left_alone = 0, {}
    for layer in layers_of(model, (CenteredWeights,), where):
        assert isinstance(layer, CenteredWeights)
        if type(layer) not in PLAIN:
            left_alone[names[layer]] = f"{type(layer).__name__} is a class that it was given later"
        elif type(layer.weight) is not nn.Parameter:
            left_alone[names[layer]] = f"its weight is a {type(layer.weight).__name__}"
        else:
            _bake(layer)
            baked += 1
    report(
        logging.WARNING if left_alone else logging.INFO, f"bake_weights: {counted(baked, 'layer')} baked", left_alone
    )
    return model


def _bake(layer: CenteredWeights) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.centered_weight())
    del layer.weight_offset
    layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------- when it is decided


def decide(model: nn.Module, choice: Choice, forward: Forward, batch: Any) -> Plan:
    """Decide by a pass over a batch. It replaces all decisions that still wait, unless it fails."""
    waiting = waiting_in(model)
    for hook in waiting:
        hook.paused = True
    try:
        plan = choice.plan(model, forward, batch)
    finally:
        for hook in waiting:
            hook.paused = False
    cancel(model)
    return plan


def wait(model: nn.Module, choice: Choice) -> None:
    """Let the first forward pass decide."""
    cancel(model)
    hook = Waiting(choice)
    hook.handle = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    logger.info("center_weights: the first forward pass of the model decides which layers are centred")


class Waiting:
    """The hook before the first forward pass. An object, and no closure, so that models with it can be copied."""

    handle: RemovableHandle

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.paused = False

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide by the arguments of the pass, and centre; then the pass goes on."""
        if self.paused:
            return
        if _is_no_plain_pass(model, self.choice):
            raise RuntimeError(
                "center_weights: the first forward pass decides which layers are centred, and it is being compiled, "
                "exported, run on a replica or by functional_call; give an example batch instead: "
                "center_weights(model, batch)"
            )
        decide(model, self.choice, _call_with, (args, kwargs)).carry_out()


def _is_no_plain_pass(model: nn.Module, choice: Choice) -> bool:
    """Whether what the pass changes in the model would be lost, or not be seen by it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    weights = [layer._parameters.get("weight") for layer in choice.layers_in(model)]
    swapped = any(weight is not None and not isinstance(weight, nn.Parameter) for weight in weights)
    return swapped or getattr(model, "_is_replica", False)


def _call_with(model: nn.Module, arguments: Any) -> object:
    args, kwargs = arguments
    return model(*args, **kwargs)


def waiting_in(model: nn.Module) -> list[Waiting]:
    """The hooks of a model and its parts that still wait."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Waiting)]


def is_centered(model: nn.Module) -> bool:
    """Whether there is something to bake, or to cancel."""
    return bool(waiting_in(model)) or any(isinstance(module, CenteredWeights) for module in model.modules())


def cancel(model: nn.Module) -> None:
    """Let nothing wait any more."""
    for hook in waiting_in(model):
        hook.handle.remove()


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
