"""A change of domain: the network is trained on clean digits and tested on shifted ones.

    python docs/examples/domain_shift.py

The statistics are recomputed from N shifted images without labels, none of them among those tested. With few images
they are noisy; a prior of 16 pseudo-samples mixes the old statistics in (Schneider et al., NeurIPS 2020).
"""

from __future__ import annotations

import torch
from digits import accuracy, run_example, trained
from torch import Tensor
from torch.nn import functional as F

from runningbn import update_bn_stats
from runningbn.demo.experiment import Digits

SIZES = (8, 32, 128, None)
PRIORS = (0, 16)


def inverted(images: Tensor) -> Tensor:
    """Dark on light. Pixels are standardised; empty ones have the smallest value."""
    return images.max() + images.min() - images


def blurred(images: Tensor) -> Tensor:
    """The mean over 3x3 pixels, and noise of half a standard deviation."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(padded, 3, stride=1) + 0.5 * torch.randn_like(images)


def faint(images: Tensor) -> Tensor:
    """A third of the contrast, and brighter."""
    return images / 3 + 1


SHIFTS = {"inverted": inverted, "blurred": blurred, "faint": faint, "none": torch.clone}


def one_seed(data: Digits, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Accuracy on shifted test images, by number of unlabelled images and prior."""
    model = trained(data, seed, epochs=3 if quick else 6)
    results = {}
    for name, shift in SHIFTS.items():
        test_images, unlabelled = shift(data.test_images), shift(data.train_images)
        unlabelled = unlabelled[torch.randperm(len(unlabelled))]
        for prior in PRIORS:
            row = {"old": accuracy(model, test_images, data.test_labels)}
            for size in SIZES:
                # All of them as one batch, and undone afterwards.
                with update_bn_stats(model, [unlabelled[:size]], prior=prior):
                    row[f"N = {size or 'all'}"] = accuracy(model, test_images, data.test_labels)
            results[f"{name}, prior {prior}"] = row
    return results


if __name__ == "__main__":
    run_example("domain_shift", "accuracy", one_seed, seeds=6)
