"""A callback for Lightning that recalibrates before validation and before a checkpoint is written.

Needs ``lightning`` or ``pytorch_lightning``. The one that is already imported is used, otherwise the first that is
installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..recalibration.batches import Forward, call
from .callback import RecalibrationCallback, framework
from .loaders import Combined


def _lightning() -> ModuleType:
    """lightning.pytorch or pytorch_lightning."""
    return framework("lightning", "lightning.pytorch", "pytorch_lightning")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _lightning().Callback


class RecalibrateBatchNorm(RecalibrationCallback, Callback):
    """Recompute the BatchNorm statistics before every validation and before every checkpoint of ``trainer.fit``.

    Options, attributes and what holds in all frameworks: `RecalibrationCallback`. The module is called with a tensor,
    the first element of a list or tuple, or a mapping as keyword arguments, unless ``forward(pl_module, batch)`` is
    given.

    The batches come from the trainer's training loader, through the module's batch hooks and in the trainer's
    precision, within `limit_train_batches`.

    The sanity check before training (``num_sanity_val_steps``) and ``trainer.validate`` do not recalibrate. A
    checkpoint that Lightning writes after an exception has the statistics of that moment. A full checkpoint also has
    the statistics of training, for resuming.

    List it after callbacks that average weights. With Lightning's WeightAveraging, the averaged model is recalibrated
    for validation, and saved; without a validation loop, only the final one is.

    Example:
        >>> callback = RecalibrateBatchNorm(num_iters=50, every_n_epochs=2)
        >>> # Trainer(callbacks=[callback]).fit(module, loader); print(callback.report)
    """

    _unwrap_saving: Callable[[], None] = staticmethod(lambda: None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap ``trainer.save_checkpoint``, since no hook is called before all checkpoints."""
        if stage != "fit":
            return
        self._reset()
        self._unwrap_saving()
        own, save = vars(trainer), trainer.save_checkpoint
        before = own.get("save_checkpoint")

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._recalibrate_if_due(trainer, pl_module)
            save(*args, **kwargs)

        def unwrap_saving() -> None:
            if own.get("save_checkpoint") is save_checkpoint:
                if before is None:
                    del own["save_checkpoint"]
                else:
                    own["save_checkpoint"] = before
            self._unwrap_saving = lambda: None

        own["save_checkpoint"], self._unwrap_saving = save_checkpoint, unwrap_saving

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a checkpoint was loaded, restore the statistics of training."""
        self._start(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the layers again: other callbacks may have changed the model."""
        self._find(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        """Restore the statistics of training, unless ``keep=True``."""
        self._before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the recalibrated statistics are out of date."""
        self._note_step(pl_module, trainer.current_epoch)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate before validation. Callbacks that average weights have inserted them by now."""
        if not trainer.sanity_checking:
            self._recalibrate_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the final model."""
        self._recalibrate_if_due(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do not recalibrate for a checkpoint after an exception: recalibration may have raised it."""
        self._unwrap_saving()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore ``trainer.save_checkpoint``."""
        if stage == "fit":
            self._unwrap_saving()

    def _recalibrate_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._due() or trainer.state.fn != "fit":
            return
        loader, limit = self._loader(trainer)
        with _in_training_stage(trainer):
            self._recalibrate(
                pl_module, loader, self._forward(trainer), limit=limit, step=trainer.global_step,
                is_main=trainer.is_global_zero,
            )  # fmt: skip

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
def _in_training_stage(trainer: Trainer) -> Iterator[None]:
    """Put the trainer into the state of a training step, which hooks depend on."""
    stage = trainer.state.stage
    trainer.training = True
    try:
        yield
    finally:
        trainer.state.stage = stage
