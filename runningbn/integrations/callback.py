"""What the recalibration callbacks of all frameworks share: options, timing, and the two sets of statistics.

A framework's file says which of its hooks call `_start`, `_find`, `_before_step`, `_note_step` and `_recalibrate`.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..recalibration.batches import Forward
from ..recalibration.recalibrate import update_bn_stats
from ..recalibration.report import StatsReport, restore
from .loaders import copied_loader, separate_loader

logger = logging.getLogger("runningbn")

# Arguments of update_bn_stats that the callback sets itself.
_NOT_OPTIONS = {"model", "data_loader", "num_iters", "forward"}
Buffers = dict[str, Tensor]


def framework(extra: str, *names: str) -> ModuleType:
    """The module of a framework: the one of these that is already imported, otherwise the first that is installed.

    Raises:
        ImportError: if none is installed; it names the extra of this library that installs it.
    """
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            # If the framework is installed but one of its dependencies is missing, that error is shown.
            if error.name not in (name, name.partition(".")[0]):
                raise
    package = names[0].partition(".")[0]
    raise ImportError(f"runningbn.integrations.{extra} needs {package}: pip install 'runningbn[{extra}]'")


class RecalibrationCallback:
    """Options and attributes of the callbacks ``RecalibrateBatchNorm`` of all frameworks.

    After a recalibration, the model has the new statistics until the next training step, and keeps them at the end of
    training. So those that are evaluated are also saved. At the next training step, the statistics of training are
    restored, so that training continues bit for bit as without the callback, also for layers that normalise by running
    statistics in training. With ``keep=True``, training continues with the new statistics.

    The batches are those of the training loader, read with a separate iterator: the random state, the generators and
    attributes of samplers, the generators of data sets, and running workers are not affected. A loader that can be read
    only once, or that keeps one iterator for all epochs, needs `dataloader`. In several processes, each reads its part,
    and all get the statistics of the whole. Layers that were in evaluation mode in the last training step are frozen:
    they keep their statistics. Gradients are not affected. If recalibration fails, training raises, and the model is
    unchanged.

    Args:
        num_iters: number of batches for each process; None for all.
        every_n_epochs: recalibrate only in every n-th epoch. Other epochs evaluate and save the statistics of training.
        dataloader: a loader to use instead of the training loader. In several processes, each uses its own.
        forward: ``forward(model, batch)``, to call the model in another way than by default.
        keep: whether training continues with the new statistics.
        **options: of `update_bn_stats`: `normalize`, `layers`, `tolerance`, `prior` and so on.

    Attributes:
        report: the last `StatsReport`, or None. It is also logged, by the logger ``runningbn`` at level INFO.

    Raises:
        TypeError: for an unknown option.
        ValueError: for `every_n_epochs` below 1; in training, if there is no training loader or if it can be read only
            once; and as `update_bn_stats`.
    """

    def __init__(
        self,
        num_iters: int | None = 200,
        *,
        every_n_epochs: int = 1,
        dataloader: Iterable[Any] | None = None,
        forward: Forward | None = None,
        keep: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        known = set(inspect.signature(update_bn_stats).parameters) - _NOT_OPTIONS
        if unknown := sorted(set(options) - known):
            raise TypeError(f"unknown options {', '.join(unknown)}; update_bn_stats has {', '.join(sorted(known))}")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: expected at least 1, got {every_n_epochs!r}")
        self.num_iters, self.every_n_epochs, self.dataloader = num_iters, every_n_epochs, dataloader
        self.forward, self.keep, self.options = forward, keep, options
        self.report: StatsReport | None = None
        self._layers: dict[str, _BatchNorm] = {}
        self._modes: dict[nn.Module, bool] = {}  # the training flags of model and layers in the last training step
        self._trained = False  # whether there was a training step since the last recalibration
        self._epoch = 0  # of the last training step, from 0
        self._own: dict[str, Buffers] = {}  # the statistics of training, to be restored
        self._new: dict[str, Buffers] = {}  # the recalibrated statistics, in the model until then
        self._resumed: Mapping[str, Buffers] = {}

    def state_dict(self) -> dict[str, Any]:
        """The statistics of training, while the model has recalibrated ones; for checkpoints to resume from."""
        return {"own": {name: self._own[name] for name in self._recalibrated()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember the statistics for the start of training."""
        self._resumed = state_dict["own"]

    def _reset(self) -> None:
        """Forget an earlier training."""
        self._trained, self._own, self._new = False, {}, {}

    def _start(self, model: nn.Module) -> None:
        """At the start of training. If a checkpoint was loaded, restore the statistics of training."""
        self._reset()
        self._find(model)
        with torch.no_grad():
            for name, buffers in self._resumed.items():
                if name in self._layers:
                    restore(self._layers[name], buffers)
        self._resumed = {}

    def _find(self, model: nn.Module) -> None:
        """Look for the layers; again in every epoch, since the model may have changed."""
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}

    def _before_step(self) -> None:
        """Restore the statistics of training, unless ``keep=True``."""
        with torch.no_grad():
            for name in self._recalibrated():
                restore(self._layers[name], self._own[name])
        self._own, self._new = {}, {}

    def _note_step(self, model: nn.Module, epoch: int) -> None:
        """Note that the statistics are out of date after a training step, and which layers are frozen in it."""
        # In evaluation all layers are in evaluation mode, frozen or not.
        self._modes = {module: module.training for module in (*self._layers.values(), model)}
        self._trained, self._epoch = True, epoch

    def _due(self) -> bool:
        """Whether there was a training step since the last recalibration, in an epoch for it."""
        return self._trained and (self._epoch + 1) % self.every_n_epochs == 0

    def _recalibrate(
        self,
        model: nn.Module,
        loader: Iterable[Any] | None,
        forward: Forward | None,
        *,
        step: int,
        limit: int | None = None,
        device: torch.device | None = None,
        copied: Callable[[Any], Any] = copied_loader,
        is_main: bool = True,
    ) -> None:
        """Recalibrate the model, in the state of the last training step.

        Args:
            loader: the training loader, which `dataloader` replaces.
            forward: calls the model as in training.
            step: number of the step, for the log.
            limit: the largest number of batches.
            device: to move the batches to, unless it is among the options.
            copied: gives a loader a separate iterator.
            is_main: whether this process logs.
        """
        loader = loader if self.dataloader is None else self.dataloader
        if loader is None:
            raise ValueError(f"there is no training loader; pass dataloader= to {type(self).__name__}")
        before = {name: _copies(layer) for name, layer in self._layers.items()}
        limits = [n for n in (self.num_iters, limit) if n is not None]
        # Evaluation may run in inference mode; inference tensors must not be written to the model.
        with torch.inference_mode(False), torch.no_grad(), self._as_in_training():
            with separate_loader(loader, copied) as separate:
                options = {"device": device} | self.options
                self.report = update_bn_stats(model, separate, min(limits, default=None), forward=forward, **options)
            if not self.keep:
                self._own, self._new = before, {name: _copies(layer) for name, layer in self._layers.items()}
        self._trained = False
        if is_main:
            logger.info("epoch %d, step %d\n%s", self._epoch, step, self.report)

    def _recalibrated(self) -> list[str]:
        """The names of the layers that still have the recalibrated statistics, unchanged."""
        return [
            name
            for name, buffers in self._new.items()
            if name in self._layers
            and all(_same(self._layers[name]._buffers.get(key), value) for key, value in buffers.items())
        ]

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """Put model and layers into the modes of the last training step, which the selection of layers depends on."""
        before = {module: module.training for module in self._modes}
        try:
            for module, training in self._modes.items():
                module.training = training
            yield
        finally:
            for module, training in before.items():
                module.training = training


def _copies(layer: nn.Module) -> Buffers:
    return {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}


def _same(buffer: Tensor | None, value: Tensor) -> bool:
    return buffer is not None and buffer.device == value.device and torch.equal(buffer, value)
