"""Weight averaging: the averaged network was never run, so its statistics are those of another network.

    python docs/examples/weight_averaging.py

torch's `swa_utils.update_bn` recomputes them, and so does `update_bn_stats`. On batches sorted by class both lose
variance in deep layers: `update_bn` averages the variances within batches, and by default `update_bn_stats` normalises
each layer by its batch meanwhile. ``normalize="population"`` loses none. The second column shows how much variance is
left in the last layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from digits import accuracy, network, run_example, train_epoch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from runningbn import get_bn_modules, update_bn_stats
from runningbn.demo.experiment import Digits


def averaged(data: Digits, seed: int, epochs: int) -> tuple[nn.Module, nn.Module]:
    """The network as it is at the end, and the average of its weights over the second half of the epochs."""
    model = network(seed)
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for epoch in range(epochs):
        train_epoch(model, data, optimizer)
        if epoch >= epochs // 2:
            average.update_parameters(model)
    return model, average


@torch.no_grad()
def variance_kept(model: nn.Module, images: Tensor) -> float:
    """`running_var` of the last BatchNorm relative to the variance of its input in evaluation, mean over channels."""
    layer, seen = get_bn_modules(model)[-1], []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1)))
    model.eval()(images)
    hook.remove()
    return (layer.running_var / seen[0].var(1)).mean().item()


def one_seed(data: Digits, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Accuracy and variance, by how the statistics are obtained."""
    last, average = averaged(data, seed, epochs=4 if quick else 8)

    def tested(model: nn.Module) -> dict[str, float]:
        told = accuracy(model, data.test_images, data.test_labels)
        return {"accuracy": told, "variance kept": variance_kept(model, data.train_images)}

    results = {"last weights": tested(last), "averaged weights, old statistics": tested(average)}
    orders = {"shuffled": torch.randperm(len(data.train_labels)), "sorted by class": data.train_labels.argsort()}
    for name, order in orders.items():
        loader: Sequence[Tensor] = data.train_images[order].split(32)
        by_torch = copy.deepcopy(average)
        update_bn(loader, by_torch)
        results[f"{name}, update_bn"] = tested(by_torch)
        with update_bn_stats(average, loader):
            results[f"{name}, update_bn_stats"] = tested(average)
        with update_bn_stats(average, loader, normalize="population"):
            results[f'{name}, normalize="population"'] = tested(average)
    return results


if __name__ == "__main__":
    run_example("weight_averaging", "weights and statistics", one_seed, seeds=4)
