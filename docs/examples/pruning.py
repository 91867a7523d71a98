"""Magnitude pruning: the smallest weights are set to 0, and the statistics no longer fit the convolutions.

    python docs/examples/pruning.py

No weight is trained afterwards. Recomputing the statistics takes one pass over the training images, without labels.
"""

from __future__ import annotations

import copy

from digits import accuracy, run_example, trained
from torch import nn
from torch.nn.utils import prune

from runningbn import update_bn_stats
from runningbn.demo.experiment import Digits

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)


def pruned(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy without the smallest weights of all convolutions and linear layers taken together."""
    model = copy.deepcopy(model)
    weights = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=sparsity)
    return model


def one_seed(data: Digits, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Accuracy by sparsity, before and after recalibration."""
    dense = trained(data, seed, epochs=3 if quick else 6)
    results = {}
    for sparsity in SPARSITIES:
        model = pruned(dense, sparsity)
        before = accuracy(model, data.test_images, data.test_labels)
        update_bn_stats(model, data.train_images.split(128))
        after = accuracy(model, data.test_images, data.test_labels)
        results[f"{sparsity:.0%} of the weights cut"] = {"old statistics": before, "recalibrated": after}
    return results


if __name__ == "__main__":
    run_example("pruning", "accuracy", one_seed, seeds=5)
