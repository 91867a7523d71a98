"""The pass by which center_weights decides leaves no trace in the model, whether it succeeds or fails."""

import copy
import random

import numpy as np
import pytest
import torch
from models import images, pretrained
from steps import assert_identical, buffers_of
from test_weights import small_net
from test_weights_choice import Net, centred, conv, norm
from torch import Tensor, nn

from runningbn import center_weights


class Restless(nn.Module):
    """Changes what it can, in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = conv(), norm(), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean((0, 2, 3))
        torch.rand(1), random.random(), np.random.rand()
        return self.dropout(self.norm(self.conv(x.mul_(2))))


def everything(model: nn.Module) -> dict:
    return {
        "parameters": [(name, id(p), p._version) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "flags": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_pass_leaves_no_trace(training):
    model = pretrained(Restless()).train(training)
    model.norm.eval()
    center_weights(model, images(), where=lambda name, module: False)
    before, values, x = everything(model), buffers_of(model), images()
    center_weights(model, x, where=lambda name, module: False)
    assert everything(model) == before
    assert_identical(buffers_of(model), values)
    torch.testing.assert_close(x, images(), rtol=0, atol=0)


def test_pass_that_fails_leaves_no_trace():
    def fails(net, x):
        net.inner(x)
        raise ValueError("of the model")

    model = Net(fails, inner=pretrained(Restless()), conv=conv(), norm=norm())
    before, values = everything(model), buffers_of(model)
    with pytest.raises(ValueError, match="of the model"):
        center_weights(model, images())
    assert everything(model) == before
    assert_identical(buffers_of(model), values)


def test_graphs_from_before_can_still_be_run_backward():
    model = small_net()
    x = torch.randn(4, 3, 6, 6)
    y = model(x)
    center_weights(model, x)
    y.sum().backward()
    assert model[0].weight.grad is not None


def test_activations_are_not_kept():
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(conv(3 if i == 0 else 4), norm()) for i in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            references = []
            for layer in self.layers:
                y = layer[0](x)
                references.append(torch.utils.weak.TensorWeakRef(y))
                x = layer[1](y)
                del y
            self.alive = sum(reference() is not None for reference in references)
            return x

    model = Watching()
    center_weights(model, images())
    assert model.alive == 0


def test_layers_in_evaluation_are_decided_on_as_those_in_training():
    model = small_net().eval()
    assert centred(center_weights(copy.deepcopy(model), torch.randn(4, 3, 6, 6))) == {"0", "3"}
