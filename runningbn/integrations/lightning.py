"""A callback for Lightning that recalibrates before validation and before a checkpoint is written.

Needs ``lightning`` or ``pytorch_lightning``: whichever is already imported in the process, otherwise the first that is
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
from .loaders import Combined, beside

logger = logging.getLogger("runningbn")

# Those that the trainer decides: the model, and what is asked for by name in the callback.
_NOT_OPTIONS = {"model", "data_loader", "num_iters", "forward"}
Buffers = dict[str, Tensor]


def _lightning() -> ModuleType:
    """lightning.pytorch or pytorch_lightning."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            # A package that is there but lacks one of its own is another matter, and to be told as it is.
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError("runningbn.integrations.lightning needs Lightning: pip install 'runningbn[lightning]'")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _lightning().Callback


class RecalibrateBatchNorm(Callback):
    """Recompute the BatchNorm statistics before every validation and before every checkpoint of ``trainer.fit``.

    What is validated is what is saved: from then until the next training step the model has the new statistics, and at
    the end of training it keeps them. In between training gets its own statistics back, so that it goes on bit for bit
    as without this callback, with layers that normalise by running statistics in training, too. With ``keep=True`` it
    goes on with the new ones.

    Data come from the trainer's training loader, through the module's hooks for batches and in the trainer's precision,
    within `limit_train_batches`. The loader is iterated anew, beside training: the random state, generators of samplers
    and data sets, and running workers are left alone. A loader that can be read only once needs `dataloader`.

    The check of validation before training (``num_sanity_val_steps``) and ``trainer.validate`` recalibrate nothing. If
    recalibration fails, ``fit`` raises, and the model is as before. A checkpoint that Lightning writes after an
    exception has the statistics of that moment. A full checkpoint also has training's own, for a run that is resumed.

    List it after callbacks that average weights. With Lightning's WeightAveraging, the averaged model is what is
    recalibrated for validation, and saved; without a validation loop, only the one at the end is.

    Args:
        num_iters: batches to use, of each process; None for all there are.
        every_n_epochs: recalibrate in every n-th epoch only. The others validate and save with training's statistics.
        dataloader: where to take batches from instead. In several processes, each takes its own.
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
        self._in_training: set[nn.Module] = set()  # the layers that were, in the last training step
        self._trained = False  # whether there was a step since the last recalibration
        self._epoch = 0  # of the last training step
        self._own: dict[str, Buffers] = {}  # the statistics that training gets back
        self._new: dict[str, Buffers] = {}  # those that the model has meanwhile
        self._resumed: Mapping[str, Buffers] = {}
        self._undo_watch: Callable[[], None] = lambda: None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the trainer's checkpoints: no hook comes before all of them."""
        if stage != "fit":
            return
        self._trained, self._own, self._new = False, {}, {}
        self._undo_watch()
        own, save = vars(trainer), trainer.save_checkpoint
        before = own.get("save_checkpoint")

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._before_use(trainer, pl_module)
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
        """After a checkpoint was loaded, give training its own statistics back."""
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
        """Training goes on: with its own statistics, unless it is to keep the new ones."""
        for name in self._in_place():
            restore(self._layers[name], self._own[name])
        self._own, self._new = {}, {}
        # In validation everything is in evaluation mode, and frozen layers could not be told.
        self._in_training = {layer for layer in self._layers.values() if layer.training}
        self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From here on the statistics are out of date."""
        self._trained = True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate what is about to be validated. Callbacks that average weights have put them in by now."""
        if not trainer.sanity_checking:
            self._before_use(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The finished model has the statistics that it would be saved with."""
        self._before_use(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A checkpoint of the failure is written as things are: recalibrating may be what failed."""
        self._undo_watch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            self._undo_watch()

    def state_dict(self) -> dict[str, Any]:
        """The statistics of training, while the model has others."""
        return {"own": {name: self._own[name] for name in self._in_place()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the statistics for the start of training."""
        self._resumed = state_dict["own"]

    def _before_use(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate if that is due and there was a training step since the last time."""
        if not self._trained or trainer.state.fn != "fit" or (self._epoch + 1) % self.every_n_epochs:
            return
        before = {name: _copies(layer) for name, layer in self._layers.items()}
        # Validation runs in inference mode, whose tensors must not get into the model.
        with torch.inference_mode(False), torch.no_grad(), _as_in_training(trainer, pl_module, self._modes()):
            loader, limit = self._loader(trainer)
            with beside(loader) as copied:
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

    def _in_place(self) -> list[str]:
        """The layers that still have what recalibration wrote; others have been given other statistics since."""
        return [
            name
            for name, buffers in self._new.items()
            if name in self._layers
            and all(_same(self._layers[name]._buffers.get(key), value) for key, value in buffers.items())
        ]

    def _loader(self, trainer: Trainer) -> tuple[Iterable[Any], int | None]:
        """Where batches come from, and how many the trainer allows."""
        fast = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
        if self.dataloader is not None:
            return self.dataloader, fast
        loaders, allowed = trainer.train_dataloader, trainer.num_training_batches
        # Several loaders are read side by side, as training does it.
        mode = getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "max_size_cycle")
        loader: Any = (
            Combined(loaders, mode, _lightning().__name__) if isinstance(loaders, (list, tuple, dict)) else loaders
        )
        return loader, None if allowed == float("inf") else int(allowed)

    def _forward(self, trainer: Trainer) -> Forward:
        """The user's forward, on a batch as training would get it."""
        forward = self.forward or call

        def run(module: nn.Module, batch: Any) -> object:
            flag, module.training = module.training, True
            try:  # hooks may augment in training
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
    """Trainer and module as in a training step: hooks look at it, and so does the choice of layers."""
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
