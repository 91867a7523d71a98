"""A callback for the Trainer of transformers that recalibrates before evaluations and before checkpoints."""

from __future__ import annotations

import base64
import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..recalibration.batches import Forward, call
from .callback import Buffers, RecalibrationCallback, framework, logger

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = framework("transformers", "transformers").TrainerCallback

# Where the statistics of training are in a checkpoint: the Trainer saves this part of its state with every checkpoint.
# It is not the name of the class, under which the Trainer might make a new callback with other options.
_STORED = "RecalibrateBatchNorm.statistics_of_training"


class RecalibrateBatchNorm(RecalibrationCallback, TrainerCallback):
    """Recompute the BatchNorm statistics before every evaluation and every checkpoint of ``trainer.train()``.

    Options, attributes and what holds in all frameworks: `RecalibrationCallback`. The model is called with the batch as
    keyword arguments, as in training, in the mixed precision of the Trainer and on its device; labels that the model's
    forward does not accept are left out. If `compute_loss` calls the model in another way, give
    ``forward(model, batch)``.

    It also recalibrates at the end of training, unless the Trainer has loaded the best model
    (``load_best_model_at_end``), which has the statistics that it was evaluated with. The evaluation before training
    (``eval_on_start``) and ``trainer.evaluate()`` do not recalibrate. An optimizer with an ``eval`` method, as those of
    schedulefree, is put into evaluation mode first if an evaluation follows. A checkpoint also has the statistics of
    training, for resuming.

    List it after callbacks that change the model or ask for evaluations and checkpoints. If one that comes later asks
    for them, a warning is logged.

    In several processes, accelerate's loaders give each process its part of the data. If the main process reads the
    data for all (``dispatch_batches``, the default for an IterableDataset), each process reads the data set here, and
    uses every n-th batch.

    Example:
        >>> callback = RecalibrateBatchNorm(num_iters=50, every_n_epochs=2)
        >>> # Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(); print(callback.report)
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint was loaded, restore the statistics of training."""
        if stored := state.stateful_callbacks.pop(_STORED, None):
            self.load_state_dict({"own": _decoded(stored["attributes"]["statistics"])})
        self._start(kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for the layers again: other callbacks may have changed the model."""
        self._find(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the statistics of training, unless ``keep=True``."""
        state.stateful_callbacks.pop(_STORED, None)
        self._before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate if an evaluation or a checkpoint follows."""
        # In the last step of an epoch, state.epoch is the number of the next.
        self._note_step(kwargs["model"], math.ceil(state.epoch or 1) - 1)
        self._recalibrate_if_due(args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate if an evaluation or a checkpoint follows."""
        self._recalibrate_if_due(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn if the evaluation was asked for after this callback."""
        self._warn_if_missed("an evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn if the checkpoint was asked for after this callback."""
        self._warn_if_missed("a checkpoint")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate the final model, unless it is the best one of the checkpoints."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._reset()
        self._recalibrate_if_due(args, state, control, is_last=True, **kwargs)

    def _recalibrate_if_due(self, args: Any, state: Any, control: Any, is_last: bool = False, **kwargs: Any) -> None:
        if not self._due() or not (is_last or control.should_evaluate or control.should_save):
            return
        # The evaluation does this; so it evaluates the weights that are in the model then.
        if control.should_evaluate and not is_last and callable(getattr(kwargs["optimizer"], "eval", None)):
            kwargs["optimizer"].eval()
        self._recalibrate(
            kwargs["model"], kwargs["train_dataloader"], self.forward or _without_labels(args),
            step=state.global_step, device=args.device, is_main=state.is_world_process_zero,
        )  # fmt: skip
        if own := self.state_dict()["own"]:
            state.stateful_callbacks[_STORED] = {"args": {}, "attributes": {"statistics": _encoded(own)}}

    def _warn_if_missed(self, what: str) -> None:
        if self._due():
            logger.warning(
                "%s used the statistics of training: list RecalibrateBatchNorm after the callbacks that ask for it",
                what,
            )


def _without_labels(args: Any) -> Forward:
    """Call the model without the labels that its forward does not accept; the Trainer uses them for the loss."""
    labels = {"label", "label_ids", "labels", *(args.label_names or ())}

    def run(model: nn.Module, batch: Any) -> object:
        if isinstance(batch, Mapping):
            parameters = inspect.signature(type(model).forward).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                refused = labels - {parameter.name for parameter in parameters}
                batch = {key: value for key, value in batch.items() if key not in refused}
        return call(model, batch)

    return run


def _encoded(statistics: Mapping[str, Buffers]) -> str:
    """The statistics as a string, since the Trainer's state is saved as JSON."""
    from safetensors.torch import save

    tensors = {f"{name}.{key}": value.cpu() for name, buffers in statistics.items() for key, value in buffers.items()}
    return base64.b64encode(save(tensors)).decode()


def _decoded(text: str) -> dict[str, Buffers]:
    from safetensors.torch import load

    statistics: dict[str, Buffers] = {}
    for path, value in load(base64.b64decode(text)).items():
        name, _, key = path.rpartition(".")
        statistics.setdefault(name, {})[key] = value
    return statistics
