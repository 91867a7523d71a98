"""The tasks on real data: Fashion-MNIST, and series of a smart watch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from . import fashion, networks_real, series
from .pretrained import new_domain
from .results import IMAGE_SAMPLES, ONE_CLASS, VIEWS
from .tasks import TASKS, Data, Layout, Task, accuracy, composed, mean_iou

CANVASES = (IMAGE_SAMPLES, 500, 500)
LAYOUT = Layout(canvas=64, image=fashion.SIZE, ink=0.3)  # fainter pixels, a tenth of white, are noise
BRIGHTER = 4


def images(batches: str) -> Data:
    """(E, 1, 28, 28)."""
    return fashion.views() if batches == VIEWS else fashion.garments()


def canvases(batches: str) -> Data:
    """Four garments on a canvas, (E, 1, 64, 64); what to answer for a pixel is its garment, or none."""
    return _canvases(batches == ONE_CLASS, fashion.folder())


@cache
def _canvases(alike: bool, where: Path) -> Data:
    return composed(fashion.garments(), CANVASES, alike, LAYOUT)


def windows(batches: str) -> Data:
    """(E, 6, 128)."""
    return series.watch()


def inverted(images: Tensor) -> Tensor:
    """White for black."""
    return 1 - images


def brighter(images: Tensor) -> Tensor:
    """Brighter than white."""
    return BRIGHTER * images


def _fine_tuning(name: str, change: Callable[[Tensor], Tensor] | None) -> Task:
    data = partial(new_domain, change)
    return Task(name, networks_real.image_residual_net, data, accuracy, "accuracy", pretrained=True)


RESIDUAL, AT_28, MOBILE = "garments, residual net", "garments, residual net at 28x28", "garments, mobile net"
PLAIN, DEEP, SEGMENTATION = "garments, plain conv net", "garments, 50-layer residual net", "segmentation of garments"
PRE_ACTIVATION, PERCEPTRON = "garments, pre-activation net", "garments, perceptron"
SERIES = "watch, series"
FINE_TUNING = ("fine-tuning", "fine-tuning, inverted", "fine-tuning, four times as bright")

REAL_TASKS = {
    task.name: task
    for task in (
        Task(RESIDUAL, networks_real.image_residual_net, images, accuracy, "accuracy"),
        Task(AT_28, networks_real.image_residual_net_at_28, images, accuracy, "accuracy"),
        Task(MOBILE, networks_real.mobile_net, images, accuracy, "accuracy"),
        Task(PLAIN, networks_real.image_plain_net, images, accuracy, "accuracy"),
        Task(DEEP, networks_real.deep_image_net, images, accuracy, "accuracy"),
        Task(PRE_ACTIVATION, networks_real.pre_activation_net, images, accuracy, "accuracy"),
        Task(PERCEPTRON, networks_real.image_perceptron, images, accuracy, "accuracy"),
        Task(SEGMENTATION, networks_real.image_segmentation_net, canvases, mean_iou, "mean IoU"),
        Task(SERIES, networks_real.series_net, windows, accuracy, "accuracy"),
        *map(_fine_tuning, FINE_TUNING, (None, inverted, brighter)),
    )
}
ALL_TASKS = TASKS | REAL_TASKS
