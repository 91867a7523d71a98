"""Activation checkpointing with torch.compile: a batch is absorbed once, gradients are those of the plain run."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import noise, with_random_affine
from torch import nn
from torch.utils.checkpoint import checkpoint
from versions import needs_checkpoints_of_compiled_modules

from runningbn import PreciseBatchNorm2d, RunningBatchNorm


class Net(nn.Module):
    """Two blocks of convolution, layer and activation, each of which may be checkpointed."""

    def __init__(self, make):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), make(4), nn.ReLU()) for _ in range(2))
        self.checkpointed = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def inside(net):
    net.checkpointed = True
    return torch.compile(net, fullgraph=True, backend="aot_eager")


def outside(net):
    net.checkpointed = True
    for i, block in enumerate(net.blocks):
        net.blocks[i] = torch.compile(block, fullgraph=True, backend="aot_eager")
    return net


# Dynamo looks at .grad of whatever it is handed.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("arrange", [
    pytest.param(inside, id="checkpoint in compile"),
    pytest.param(
        outside, id="compile in checkpoint", marks=(needs_checkpoints_of_compiled_modules, pytest.mark.slow)
    ),
])  # fmt: skip
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(RunningBatchNorm, id="running"),
        pytest.param(lambda c: RunningBatchNorm(c, max_lag=1e-3), id="running-limited", marks=pytest.mark.slow),
        pytest.param(lambda c: RunningBatchNorm(c, gradient="exact"), id="exact", marks=pytest.mark.slow),
        pytest.param(PreciseBatchNorm2d, id="precise", marks=pytest.mark.slow),
    ],
)
def test_three_steps_equal_the_plain_run(make, arrange, way):
    torch._dynamo.reset()
    plain = with_random_affine(Net(make))
    copied = copy.deepcopy(plain)
    compiled = arrange(copied)
    for step in range(3):
        x, dy = noise((6, 4, 9, 9), step), noise((6, 4, 5, 5), 10 + step)
        for net, run in ((plain, plain), (copied, compiled)):
            net.zero_grad()
            run(x).backward(dy)
        for got, expected in zip(copied.parameters(), plain.parameters()):
            # Sums over up to 300 float32 elements of order 1 in another order.
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
        for got, expected in zip(copied.buffers(), plain.buffers()):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)
