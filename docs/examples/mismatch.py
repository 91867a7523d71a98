"""What goes wrong with tiny batches: the loss on the same images in training mode and in evaluation mode.

    python docs/examples/mismatch.py

A network with nn.BatchNorm and the same one after `batchnormify` are trained on the same batches: of 2 images, and of 4
of one class. Every so many steps, copies of both are shown test images twice: in such batches in training mode, and in
evaluation mode. Takes a minute and draws docs/mismatch.png.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn.demo.experiment import (
    CONTENDERS,
    SITUATIONS,
    Digits,
    Situation,
    build_model,
    build_optimizer,
    load_data,
    one_epoch,
    schedule,
    settings_for_tiny_tensors,
    train,
)

SITUATIONS_SHOWN = (
    Situation("batches of 2", "residual net", 2, False, optimizer="AdamW", rate=1e-3, steps=500),
    *(situation for situation in SITUATIONS if situation.one_class),
)
LAYERS = [contender for contender in CONTENDERS if contender.name in ("BatchNorm", "RunningBatchNorm")]
EVERY, IMAGES = 25, 160  # more measurements and images cost time and show the same
QUICK_STEPS = QUICK_EVERY = 150
MODES = {"training": "training mode, in such batches", "evaluation": "evaluation mode"}
COLOURS = {"training": "#0072b2", "evaluation": "#d55e00"}  # Okabe and Ito's

Curves = dict[str, list[float]]  # "step" and each of MODES


@torch.no_grad()
def losses(model: nn.Module, data: Digits, batches: Sequence[Tensor]) -> dict[str, float]:
    """Mean loss on test images in both modes, of copies: training mode updates the statistics."""
    in_training, in_evaluation = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    logits = {
        "training": torch.cat([in_training(data.test_images[batch]) for batch in batches]),
        "evaluation": in_evaluation(data.test_images[torch.cat(list(batches))]),
    }
    labels = data.test_labels[torch.cat(list(batches))]
    return {mode: F.cross_entropy(given, labels).item() for mode, given in logits.items()}


def measured(model: nn.Module, situation: Situation, data: Digits, every: int) -> Curves:
    """Train on the situation's batches and measure every so many steps."""
    curves: Curves = {"step": [], **{mode: [] for mode in MODES}}
    optimizer = build_optimizer(situation, model)
    batches = schedule(data.train_labels, situation, seed=0)
    shown = one_epoch(data.test_labels, situation, torch.Generator().manual_seed(0))[: IMAGES // situation.batch_size]
    for step in range(0, situation.steps, every):
        train(model, optimizer, data, batches[step : step + every])
        curves["step"].append(step + every)
        for mode, loss in losses(model, data, shown).items():
            curves[mode].append(loss)
    return curves


def drawn(results: dict[str, dict[str, Curves]]) -> Figure:
    """A row of panels for each kind of batch, a column for each layer; the axes are the same in a row."""
    figure = Figure(figsize=(9.6, 6.4), dpi=150, layout="constrained")
    rows = figure.subplots(len(results), len(LAYERS), sharex=True, sharey="row")
    for row, (situation, by_layer) in zip(rows, results.items()):
        for axes, (layer, curves) in zip(row, by_layer.items()):
            axes.fill_between(curves["step"], curves["training"], curves["evaluation"], color="#999999", alpha=0.2)
            for mode, label in MODES.items():
                axes.plot(curves["step"], curves[mode], color=COLOURS[mode], linewidth=1.8, label=label)
            axes.set_title(f"{layer}, {situation}", fontsize=11, fontweight="bold")
            axes.set_ylim(bottom=0)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"loss on the same {IMAGES} test images")
    for axes in rows[-1]:
        axes.set_xlabel("training steps")
    rows[0][0].legend(frameon=False)
    return figure


def main() -> None:
    """Train all, draw the figure and, if asked, store the numbers."""
    parser = argparse.ArgumentParser(description="Training mode against evaluation mode in tiny batches of digits.")
    parser.add_argument("--quick", action="store_true", help="fewer steps and measurements")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "mismatch.png", metavar="PATH")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers to this file")
    arguments = parser.parse_args()
    data, every, situations = load_data(), EVERY, SITUATIONS_SHOWN
    if arguments.quick:
        every, situations = QUICK_EVERY, [replace(situation, steps=QUICK_STEPS) for situation in SITUATIONS_SHOWN]
    with settings_for_tiny_tensors():
        results = {
            situation.name: {
                layer.name: measured(build_model(situation, layer, seed=0), situation, data, every) for layer in LAYERS
            }
            for situation in situations
        }
    drawn(results).savefig(arguments.output)
    print(f"figure: {arguments.output}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
