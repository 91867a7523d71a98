"""A callback for Lightning that recalibrates before validation and before a checkpoint is written.

Needs ``lightning`` or ``pytorch_lightning``. The one that is already imported is used, otherwise the first that is
installed.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..recalibration.batches import Forward, call
from ..recalibration.recalibrate import update_bn_stats
from ..recalibration.report import StatsReport, restore
from .loaders import Combined, separate_loader

logger = logging.getLogger("runningbn")

# Arguments of update_bn_stats that the callback sets itself.
_NOT_OPTIONS = {"model", "data_loader", "num_iters", "forward"}
Buffers = dict[str, Tensor]


def _lightning() -> ModuleType:
    """lightning.pytorch or pytorch_lightning."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            # If Lightning is installed but one of its dependencies is missing, that error is shown.
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError("runningbn.integrations.lightning needs Lightning: pip install 'runningbn[lightning]'")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _lightning().Callback


class RecalibrateBatchNorm(Callback):
    """Recompute the BatchNorm statistics before every validation and before every checkpoint of ``trainer.fit``.

    The validated statistics are those that are saved: the model has the new statistics until the next training step,
    and keeps them at the end of training. At the next training step, the statistics of training are restored, so that
    training continues bit for bit as without this callback, also for layers that normalise by running statistics in
    training. With ``keep=True``, training continues with the new statistics.

    The batches come from the trainer's training loader, through the module's batch hooks and in the trainer's
    precision, within `limit_train_batches`. A separate iterator is used: the random state, the generators of samplers
    and data sets, and running workers are not affected. A loader that can be read only once needs `dataloader`.

    The sanity check before training (``num_sanity_val_steps``) and ``trainer.validate`` do not recalibrate. If
    recalibration fails, ``fit`` raises, and the model is unchanged. A checkpoint that Lightning writes after an
    exception has the statistics of that moment. A full checkpoint also has the statistics of training, for resuming.

    List it after callbacks that average weights. With Lightning's WeightAveraging, the averaged model is recalibrated
    for validation, and saved; without a validation loop, only the final one is.

    Args:
        num_iters: number of batches for each process; None for all.
        every_n_epochs: recalibrate only in every n-th epoch. Other epochs validate and save the statistics of training.
        dataloader: a loader to use instead of the training loader. In several processes, each uses its own.
        forward: ``forward(pl_module, batch)``. By default the module is called with a tensor, the first element of a
            list or tuple, or a mapping as keyword arguments.
        keep: whether training continues with the new statistics.
        **options: of `update_bn_stats`: `normalize`, `layers`, `tolerance`, `prior` and so on.

    Attributes:
        report: the last `StatsReport`, or None. It is also logged, by the logger ``runningbn`` at level INFO.

    Raises:
        TypeError: for an unknown option.
        ValueError: for `every_n_epochs` below 1.

    Example:
        >>> callback = RecalibrateBatchNorm(num_iters=50, every_n_epochs=2)
        >>> # Trainer(callbacks=[callback]).fit(module, loader); print(callback.report)
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
        self._in_training: set[nn.Module] = set()  # layers in training mode in the last training step
        self._trained = False  # whether there was a training step since the last recalibration
        self._epoch = 0  # of the last training step
        self._own: dict[str, Buffers] = {}  # the statistics of training, to be restored
        self._new: dict[str, Buffers] = {}  # the recalibrated statistics, in the model until then
        self._resumed: Mapping[str, Buffers] = {}
        self._undo_watch: Callable[[], None] = lambda: None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap ``trainer.save_checkpoint``, since no hook is called before all checkpoints."""
        if stage != "fit":
            return
        self._trained, self._own, self._new = False, {}, {}
        self._undo_watch()
        own, save = vars(trainer), trainer.save_checkpoint
        before = own.get("save_checkpoint")

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._recalibrate_if_due(trainer, pl_module)
            save(*args, **kwargs)

        def undo_watch() -> None:
            if own.get("save_checkpoint") is save_checkpoint:
                if before is None:
                    del own["save_checkpoint"]
                else:
                    own["save_checkpoint"] = before
            self._undo_watch = lambda: None

        own["save_checkpoint"], self._undo_watch = save_checkpoint, undo_watch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a checkpoint was loaded, restore the statistics of training."""
        self._layers = _batch_norms(pl_module)
        with torch.no_grad():
            for name, buffers in self._resumed.items():
                if name in self._layers:
                    restore(self._layers[name], buffers)
        self._resumed = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the layers again: other callbacks may have changed the model."""
        self._layers = _batch_norms(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        """Restore the statistics of training, unless ``keep=True``."""
        for name in self._recalibrated():
            restore(self._layers[name], self._own[name])
        self._own, self._new = {}, {}
        # Recorded here, since in validation all layers are in evaluation mode, frozen or not.
        self._in_training = {layer for layer in self._layers.values() if layer.training}
        self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the recalibrated statistics are out of date."""
        self._trained = True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate before validation. Callbacks that average weights have inserted them by now."""
        if not trainer.sanity_checking:
            self._recalibrate_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the final model."""
        self._recalibrate_if_due(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do not recalibrate for a checkpoint after an exception: recalibration may have raised it."""
        self._undo_watch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore ``trainer.save_checkpoint``."""
        if stage == "fit":
            self._undo_watch()

    def state_dict(self) -> dict[str, Any]:
        """The statistics of training, while the model has recalibrated ones."""
        return {"own": {name: self._own[name] for name in self._recalibrated()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the statistics for the start of training."""
        self._resumed = state_dict["own"]

    def _recalibrate_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate if the epoch is due and there was a training step since the last recalibration."""
        if not self._trained or trainer.state.fn != "fit" or (self._epoch + 1) % self.every_n_epochs:
            return
        before = {name: _copies(layer) for name, layer in self._layers.items()}
        # Validation runs in inference mode; inference tensors must not be written to the model.
        with torch.inference_mode(False), torch.no_grad(), _as_in_training(trainer, pl_module, self._modes()):
            loader, limit = self._loader(trainer)
            with separate_loader(loader) as copied:
                limits = [n for n in (self.num_iters, limit) if n is not None]
                self.report = update_bn_stats(
                    pl_module, copied, min(limits, default=None), forward=self._forward(trainer), **self.options
                )
            if not self.keep:
                self._own, self._new = before, {name: _copies(layer) for name, layer in self._layers.items()}
        self._trained = False
        if trainer.is_global_zero:
            logger.info("epoch %d, step %d\n%s", self._epoch, trainer.global_step, self.report)

    def _modes(self) -> dict[nn.Module, bool]:
        return {layer: layer in self._in_training for layer in self._layers.values()}

    def _recalibrated(self) -> list[str]:
        """The names of the layers that still have the recalibrated statistics, unchanged."""
        return [
            name
            for name, buffers in self._new.items()
            if name in self._layers
            and all(_same(self._layers[name]._buffers.get(key), value) for key, value in buffers.items())
        ]

    def _loader(self, trainer: Trainer) -> tuple[Iterable[Any], int | None]:
        """The loader to read batches from, and the largest number that the trainer allows."""
        fast = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
        if self.dataloader is not None:
            return self.dataloader, fast
        loaders, allowed = trainer.train_dataloader, trainer.num_training_batches
        # Several loaders are read in parallel, as in training.
        mode = getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "max_size_cycle")
        loader: Any = (
            Combined(loaders, mode, _lightning().__name__) if isinstance(loaders, (list, tuple, dict)) else loaders
        )
        return loader, None if allowed == float("inf") else int(allowed)

    def _forward(self, trainer: Trainer) -> Forward:
        """The user's forward, on a batch prepared as in training."""
        forward = self.forward or call

        def run(module: nn.Module, batch: Any) -> object:
            flag, module.training = module.training, True
            try:  # hooks may augment batches in training mode
                batch = trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)  # type: ignore[operator]
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            finally:
                module.training = flag
            with trainer.precision_plugin.forward_context():
                return forward(module, batch)

        return run


@contextmanager
def _as_in_training(
    trainer: Trainer, pl_module: LightningModule, modes: dict[nn.Module, bool]
) -> Iterator[None]:  # fmt: skip
    """Put trainer and module into the state of a training step, which hooks and the selection of layers depend on."""
    stage, before = trainer.state.stage, {module: module.training for module in (*modes, pl_module)}
    trainer.training = pl_module.training = True
    for module, training in modes.items():
        module.training = training
    try:
        yield
    finally:
        trainer.state.stage = stage
        for module, training in before.items():
            module.training = training


def _batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm)}


def _copies(layer: nn.Module) -> Buffers:
    return {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}


def _same(buffer: Tensor | None, value: Tensor) -> bool:
    return buffer is not None and buffer.device == value.device and torch.equal(buffer, value)
