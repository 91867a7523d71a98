"""center_weights and bake_weights: re-parametrise layers with centred filters, and convert them back.

A layer is re-parametrised in place: it stays the same object and changes its class, as in `batchnormify`. So parameters
keep their names, which ``torch.nn.utils.parametrize`` would change, and existing optimizers stay valid.
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
from .layers import CENTERED, CenteredWeights

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

    The layer then computes with v − mean(v) + offset, where v is its `weight`. The mean is over the inputs and
    positions of each filter; the offset is a constant per filter. So the mean of v gets no gradient, and the mean of
    the input of the normalisation layer does not follow the mean of the layer's own input: running statistics lag less.

    offset is 0 if the layer feeds only fresh normalisation layers (no batches tracked, mean 0 and variance 1): training
    starts from filters of mean 0. Otherwise, and for layers without running statistics such as ``nn.GroupNorm``, it is
    the mean of the filter, and the outputs of the model do not change.

    Centred are ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d`` and ``nn.Linear`` that feed only BatchNorm layers of
    any kind, ``nn.InstanceNorm1d/2d/3d`` or ``nn.GroupNorm``: every tensor that such a layer returns in a forward pass
    must be the input of a normalisation layer, and no other operation may use it. This is detected in one forward pass
    of a batch, in evaluation mode and without gradients; buffers, flags and the random state are restored.

    Left alone, and named in the log with the reason: layers whose output has another use, as in an addition or as an
    output of the model; layers that the pass does not call; depthwise convolutions; filters of a single weight;
    layers with hooks, a parametrisation, a forward that is not torch's, a class that cannot be changed, or a weight
    that is computed or shared with another layer. One line is logged to the logger ``runningbn``: as a warning if no
    layer was centred, or if one was left alone because of its class, hooks or weight.

    - Parameters stay the same objects with the same names; `weight_offset` is a buffer. The state dict of a centred
      model or of a plain one loads strictly into a centred model, which then computes what that model did. (Except from
      a plain one by ``torch.distributed.checkpoint.state_dict``, which keeps the offsets: load first, then centre.)
    - `bake_weights` converts back to plain layers with the same filters. Call it before anything that reads `weight`
      directly, as fusing, quantising and loading the state dict into a plain model, and before ``torch.jit.script`` and
      ``torch.fx``.
    - Centre before ``fully_shard``, ``torch.compile`` and ``torch.export``.

    Args:
        model: any module.
        batch: an example: a tensor, a list or tuple whose first element the model takes, or a mapping of keyword
            arguments. Without one, the layers are centred at the start of the first forward pass of `model`; until then
            nothing is changed. A copy made before that pass is centred at its own first pass, so make averaged copies
            afterwards. That pass must not be compiled.
        forward: ``forward(model, batch)`` calls the model with any other kind of batch, and returns its output.
        where: ``where(name, module)`` returns whether to consider a convolution or linear layer. A layer with several
            names is considered if it returns True for any of them.
        depthwise: whether to centre depthwise convolutions, too, whose filters have one input channel.

    Returns:
        The model.

    Raises:
        TypeError: for an argument that is not a module, a bool as batch, or a `forward` without a batch.
        RuntimeError: if layers are lazy and not initialised. After this error, and after any error that the model
            raises, the model is unchanged. Without a batch, the next forward pass tries again.

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
        raise TypeError("center_weights: forward= is for an example batch, got batch=None")
    chosen = None if where is None else layers_of(model, tuple(CENTERED), where)
    choice = Choice(chosen, depthwise=depthwise)
    if batch is None:
        decide_at_first_pass(model, choice)
    else:
        decide(model, choice, forward or call, batch).apply()
    return model


def bake_weights(model: ModelT, *, where: Where | None = None) -> ModelT:
    """Convert the layers that `center_weights` has centred back to plain layers, with the same filters, in place.

    v becomes v − mean(v) + offset, the class is again that of torch, and the buffer is removed. The outputs of the
    model do not change. If a `center_weights` still waits for the first forward pass, it is cancelled.
    ``batchnormify(model, "torch")`` bakes the weights, too.

    Left alone, and named in a warning: layers whose class or parametrisation was changed after centring, as by
    ``fully_shard``, and sharded weights.

    Args:
        model: any module.
        where: ``where(name, module)`` returns whether to bake a layer.

    Returns:
        The model.

    Raises:
        TypeError: for an argument that is not a module.

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
        if "plain" not in vars(type(layer)):
            left_alone[names[layer]] = f"its class was changed to {type(layer).__name__} after centring"
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
    layer.__class__ = type(layer).plain  # type: ignore[assignment]


# ---------------------------------------------------------------------------------------- decide now or at first pass


def decide(model: nn.Module, choice: Choice, forward: Forward, batch: Any) -> Plan:
    """Decide which layers to centre by a forward pass of a batch. If it succeeds, pending decisions are cancelled."""
    pending = pending_hooks(model)
    for hook in pending:
        hook.paused = True
    try:
        plan = choice.plan(model, forward, batch)
    finally:
        for hook in pending:
            hook.paused = False
    cancel(model)
    return plan


def decide_at_first_pass(model: nn.Module, choice: Choice) -> None:
    """Register a hook that centres the layers at the first forward pass."""
    cancel(model)
    hook = Waiting(choice)
    hook.handle = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    logger.info("center_weights: the first forward pass of the model decides which layers are centred")


class Waiting:
    """The pre-hook of the first forward pass. It is an object, not a closure, so that models with it can be copied."""

    handle: RemovableHandle

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.paused = False

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide with the arguments of the pass, and centre the layers; then the pass continues."""
        if self.paused:
            return
        if _cannot_change_model(model, self.choice):
            raise RuntimeError(
                "center_weights: layers are centred in the first forward pass, which cannot be compiled, exported, or "
                "run on a replica or by functional_call; give an example batch instead: center_weights(model, batch)"
            )
        decide(model, self.choice, _call_with, (args, kwargs)).apply()


def _cannot_change_model(model: nn.Module, choice: Choice) -> bool:
    """Whether changes made in this pass would be lost, or would not affect the pass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    weights = [layer._parameters.get("weight") for layer in choice.layers_in(model)]
    swapped = any(weight is not None and not isinstance(weight, nn.Parameter) for weight in weights)
    return swapped or getattr(model, "_is_replica", False)


def _call_with(model: nn.Module, arguments: Any) -> object:
    args, kwargs = arguments
    return model(*args, **kwargs)


def pending_hooks(model: nn.Module) -> list[Waiting]:
    """The hooks of a model and its submodules that wait for the first forward pass."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Waiting)]


def is_centered(model: nn.Module) -> bool:
    """Whether the model has centred layers or pending hooks."""
    return bool(pending_hooks(model)) or any(isinstance(module, CenteredWeights) for module in model.modules())


def cancel(model: nn.Module) -> None:
    """Remove the pending hooks."""
    for hook in pending_hooks(model):
        hook.handle.remove()


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
