"""A callback for the Learner of fastai that recalibrates before every validation."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from .callback import RecalibrationCallback, framework
from .loaders import check_rereadable, copied_loader

_learner = framework("fastai", "fastai.learner")

if TYPE_CHECKING:
    from fastai.learner import Callback
else:
    Callback = _learner.Callback


class RecalibrateBatchNorm(RecalibrationCallback, Callback):
    """Recompute the BatchNorm statistics before every validation of ``learn.fit`` and its variants.

    Options, attributes and what holds in all frameworks: `RecalibrationCallback`. The batches come from
    ``learn.dls.train``, with its augmentation. The model is called with the inputs of a batch (``dls.n_inp``), on its
    device and in the precision of ``MixedPrecision``, unless ``forward(model, batch)`` is given. Callbacks that change
    batches in training, such as ``MixUp``, are not called.

    fastai saves models after a validation, so what ``SaveModelCallback`` saves is what was validated. A fit that is
    cancelled before its validation is recalibrated at its end. ``learn.validate``, ``learn.get_preds`` and
    ``learn.lr_find`` do not recalibrate.

    Example:
        >>> callback = RecalibrateBatchNorm(num_iters=50, every_n_epochs=2)
        >>> # Learner(dls, model, cbs=callback).fit(5); print(callback.report)
    """

    # After the callbacks that change the model, and before those that show progress, save and stop (from 60 on).
    order = _learner.Recorder.order + 5
    run_valid = False

    def before_fit(self) -> None:
        """Start, unless this is a search for a learning rate or a prediction."""
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")
        if self.run:
            self._start(self.learn.model)

    def before_epoch(self) -> None:
        """Look for the layers again: other callbacks may have changed the model."""
        self._find(self.learn.model)

    def before_batch(self) -> None:
        """Restore the statistics of training, unless ``keep=True``, and note that there is a step.

        At its end, another callback may cancel the rest.
        """
        self._before_step()
        self._note_step(self.learn.model, self.learn.epoch)

    def before_validate(self) -> None:
        """Recalibrate before validation."""
        self._recalibrate_if_due()

    def after_fit(self) -> None:
        """Recalibrate the final model, if it was not validated."""
        self._recalibrate_if_due()

    def _recalibrate_if_due(self) -> None:
        if self._due():
            self._recalibrate(
                self.learn.model, self.learn.dls.train, self._call, step=self.learn.train_iter, copied=_copied,
                is_main=_learner.rank_distrib() == 0,
            )  # fmt: skip

    def _call(self, model: nn.Module, batch: Any) -> object:
        batch = self.learn._set_device(batch)
        # None before and after a fit.
        autocast = getattr(getattr(self.learn, "mixed_precision", None), "autocast", None)
        with autocast or nullcontext():
            if self.forward is not None:
                return self.forward(model, batch)
            if not isinstance(batch, (list, tuple)):
                return model(batch)
            # As Learner does.
            inputs = getattr(self.learn.dls, "n_inp", 1 if len(batch) == 1 else len(batch) - 1)
            return model(*batch[:inputs])


def _copied(loader: Any) -> Any:
    """As `copied_loader`, also for loaders of fastai, which keep their random generator and their indices."""
    if not isinstance(loader, framework("fastai", "fastai.data.load").DataLoader):
        return copied_loader(loader)
    check_rereadable(loader.dataset)
    new, own = copy.copy(loader), vars(loader)
    changed = {"fake_l": copy.copy(loader.fake_l)}
    if "rng" in own:
        changed["rng"] = copy.copy(own["rng"])
    if "dl" in own:  # a DistributedDL wraps another
        changed["dl"] = _copied(loader.dl)
    vars(new).update(changed)
    vars(new.fake_l).update(d=new, default=new, dataset=new.fake_l, persistent_workers=False)
    return new
