"""A handler for the engines of pytorch-ignite that recalibrates before evaluations and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .callback import RecalibrationCallback, framework

if TYPE_CHECKING:
    from ignite.distributed import get_rank
    from ignite.engine import Engine, Events
else:
    Events = framework("ignite", "ignite.engine").Events
    get_rank = framework("ignite", "ignite.distributed").get_rank


class RecalibrateBatchNorm(RecalibrationCallback):
    """Recompute the BatchNorm statistics at an event of a trainer: by default at the end of every epoch.

    Options, attributes and what holds in all frameworks: `RecalibrationCallback`. The batches come from the engine's
    loader, ``engine.state.dataloader``, at most ``engine.state.epoch_length``. The model is called with the first
    element of a list or tuple, a mapping as keyword arguments, or anything else as it is, on the device of its
    parameters. A trainer with a ``prepare_batch`` or mixed precision of its own needs ``forward(model, batch)`` that
    does the same.

    Attach it before the handlers that evaluate or save at the same event, and after an ``EMAHandler`` that updates the
    model. The model is recalibrated once more when the run completes, if it was trained since.

    To recalibrate an averaged model, attach a handler to the trainer with ``ema_handler.ema_model``. All of its layers
    are recalibrated, since it is in evaluation mode as a whole; choose with ``layers=`` if some are frozen. With
    ``handle_buffers="copy"``, ignite's default, the averaged model and the trained one share their statistics: what is
    evaluated or saved of the trained one until the next step also has those of the averaged model.

    For resuming, put the handler into ``to_save`` of ignite's ``Checkpoint``, and into ``to_load``.

    Example:
        >>> from ignite.engine import Engine, Events
        >>> from torch import nn
        >>> model, trainer = nn.BatchNorm1d(3), Engine(lambda engine, batch: None)
        >>> handler = RecalibrateBatchNorm(num_iters=50)
        >>> handler.attach(trainer, model, Events.EPOCH_COMPLETED(every=2))
    """

    _is_attached = False

    def attach(self, engine: Engine, model: nn.Module, event: Any = Events.EPOCH_COMPLETED) -> None:
        """Recalibrate the model at an event of the engine that trains it.

        Args:
            engine: the trainer.
            model: the trained model, or an average of it.
            event: an event of the engine, also with a filter, or several events joined by ``|``.

        Raises:
            TypeError: for a model that is not a module.
            ValueError: if the handler is attached already.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if self._is_attached:
            raise ValueError("this handler is attached already; make one for each model")
        handlers = [
            (Events.STARTED, lambda _: self._start(model)),
            (Events.EPOCH_STARTED, lambda _: self._find(model)),
            (Events.ITERATION_STARTED, lambda _: self._before_step()),
            (Events.ITERATION_COMPLETED, lambda engine: self._note_step(model, engine.state.epoch - 1)),
            (event, lambda engine: self._recalibrate_if_due(engine, model)),
            (Events.COMPLETED, lambda engine: self._recalibrate_if_due(engine, model)),
        ]
        added: list[Any] = []
        try:
            for at, handler in handlers:
                added.append(engine.add_event_handler(at, handler))
        except Exception:  # an unknown event
            for handle in added:
                handle.remove()
            raise
        self._is_attached = True

    def _recalibrate_if_due(self, engine: Engine, model: nn.Module) -> None:
        if self._due():
            self._recalibrate(
                model, engine.state.dataloader, self.forward, step=engine.state.iteration,
                limit=engine.state.epoch_length, is_main=get_rank() == 0,
                device=next((parameter.device for parameter in model.parameters()), None),
            )  # fmt: skip
