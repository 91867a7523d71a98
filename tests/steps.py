"""What many tests do with a layer: train it a little, look at its state, compare two of them bit for bit."""

from collections.abc import Iterable

import torch
from cases import LayerCase, noise
from torch import Tensor, nn


def training_step(model: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients of one forward and backward, by name, in its mode."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    # with a mean, so that a gradient that forgets to subtract it shows
    y.backward(noise(y.shape, seed=0, dtype=y.dtype).to(y.device) + 0.5 if dy is None else dy)
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **{name: gradient.clone() for name, gradient in gradients.items()}}


def see(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Forwards without a backward, in whatever mode the model is in."""
    for x in batches:
        model(x)
    return model


def train(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    model.train()
    for x in batches:
        training_step(model, x)
    return model


def trained(case: LayerCase, **kwargs) -> nn.Module:
    """A layer of the case after some steps: no buffer is what it was at the start."""
    return train(case.layer(**kwargs), case.batches((5, 3, 8), dtype=kwargs.get("dtype", torch.float32)))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    """The output in evaluation; the training flags are as before afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    y = model(x)
    for module, flag in training.items():
        module.training = flag
    return y


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
