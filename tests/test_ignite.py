"""The handler for ignite: statistics at an event of the trainer, and training does not notice."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

pytest.importorskip("ignite")

import ignite.engine as engines
from ignite.engine import DeterministicEngine, Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler
from ignite.metrics import Loss
from recalibrated import (
    STEPS,
    Noisy,
    OneShot,
    X,
    Y,
    assert_same_training,
    assert_two_processes_share,
    expected,
    net,
    norms,
    statistics,
)

from runningbn.integrations.ignite import RecalibrateBatchNorm


def loader(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=8, **options)


def supervised(model, kind=None, accumulation=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loss = nn.CrossEntropyLoss()
    if kind is None:
        return engines.create_supervised_trainer(model, optimizer, loss, gradient_accumulation_steps=accumulation)
    return kind(engines.supervised_training_step(model, optimizer, loss, gradient_accumulation_steps=accumulation))


def trained(handler=None, model=None, data=None, event=None, epochs=2, **options):
    """The model and the trainer, with the statistics of training after every step in `trainer.own`."""
    model = net() if model is None else model
    trainer = supervised(model, **options)
    trainer.own = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: trainer.own.append(statistics(model)))
    if handler is not None:
        handler.attach(trainer, model, *([] if event is None else [event]))
    torch.manual_seed(7)
    random.seed(8)
    trainer.run(loader(shuffle=True) if data is None else data, max_epochs=epochs)
    return model, trainer


def test_statistics_are_those_of_update_bn_stats_and_evaluation_uses_and_saves_them(tmp_path):
    def run(handler, folder):
        model = net()
        trainer = supervised(model)
        evaluator = engines.create_supervised_evaluator(model, {"loss": Loss(nn.functional.cross_entropy)})
        if handler is not None:
            handler.attach(trainer, model)
        saver = Checkpoint({"model": model}, DiskSaver(folder, require_empty=False), n_saved=None)
        seen = []

        @trainer.on(Events.EPOCH_COMPLETED)
        def evaluate():
            seen.append(statistics(model))
            evaluator.run(loader())

        evaluator.add_event_handler(Events.COMPLETED, saver)
        trainer.run(loader(), max_epochs=2)
        return model, evaluator.state.metrics["loss"], seen, saver.last_checkpoint

    handler = RecalibrateBatchNorm()
    model, metric, seen, path = run(handler, tmp_path / "a")
    assert torch.equal(statistics(model), expected(model))
    assert torch.equal(seen[-1], statistics(model))
    assert handler.report.batches == 3
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(X), Y).item()
    assert metric == pytest.approx(loss, rel=1e-5)
    assert run(None, tmp_path / "b")[1] != pytest.approx(loss, rel=1e-3)
    other = net()
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(statistics(other), seen[-1])


@pytest.mark.parametrize("to", ["torch", "running"])
@pytest.mark.parametrize("kind", ["plain", "sampler", "workers", "data set", "deterministic", "accumulation"])
def test_training_goes_on_bit_for_bit_as_without(to, kind):
    def data():
        if kind == "sampler":
            sampler = RandomSampler(X, replacement=True, generator=torch.Generator().manual_seed(3))
            return DataLoader(TensorDataset(X, Y), 8, sampler=sampler, generator=torch.Generator().manual_seed(4))
        if kind == "data set":
            return DataLoader(Noisy(), batch_size=8, shuffle=True)
        return loader(shuffle=True, **({"num_workers": 1, "persistent_workers": True} if kind == "workers" else {}))

    options = {"kind": DeterministicEngine} if kind == "deterministic" else {}
    options |= {"accumulation": 2} if kind == "accumulation" else {}
    plain, trainer = trained(model=net(to), data=data(), epochs=3, **options)
    # Also in the middle of an epoch, where the training iterator is in use.
    event = Events.ITERATION_COMPLETED(every=2)
    model, other = trained(RecalibrateBatchNorm(), net(to), data(), event, epochs=3, **options)
    assert_same_training(plain, model)
    assert torch.equal(other.own[-1], trainer.own[-1])
    assert not torch.equal(statistics(model), statistics(plain))


def test_keep_trains_on_with_the_new_statistics():
    def run(keep):
        model, seen = net(), []
        trainer = supervised(model)
        RecalibrateBatchNorm(keep=keep).attach(trainer, model)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED | Events.ITERATION_STARTED, lambda _: seen.append(statistics(model))
        )
        trainer.run(loader(), max_epochs=2)
        return seen[STEPS : STEPS + 2]  # at the end of the first epoch, and in the next step

    assert torch.equal(*run(True))
    assert not torch.equal(*run(False))


@pytest.mark.parametrize(
    ("event", "every", "expected_steps"),
    [
        (None, 1, [3, 6, 9, 12, 15]),
        (None, 2, [6, 12]),
        (Events.EPOCH_COMPLETED(every=2), 1, [6, 12, 15]),
        (Events.ITERATION_COMPLETED(every=4), 1, [4, 8, 12, 15]),
        (Events.ITERATION_COMPLETED(once=5) | Events.EPOCH_COMPLETED(once=2), 1, [5, 6, 15]),
        (Events.COMPLETED, 1, [15]),
    ],
    ids=["default", "every_n_epochs", "every 2nd epoch", "every 4th step", "joined", "completed"],
)
def test_when(caplog, event, every, expected_steps):
    with caplog.at_level(logging.INFO, "runningbn"):
        trained(RecalibrateBatchNorm(every_n_epochs=every), event=event, epochs=5)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch")]
    assert [int(message.split("step ")[1].split()[0]) for message in told] == expected_steps


def test_a_run_that_is_terminated_is_recalibrated_at_its_end():
    model = net()
    trainer = supervised(model)
    RecalibrateBatchNorm().attach(trainer, model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda engine: engine.terminate())
    trainer.run(loader(), max_epochs=3)
    assert torch.equal(statistics(model), expected(model))


@pytest.mark.parametrize("buffers", ["copy", "update", "ema_train"])
def test_averaged_weights(buffers):
    def run(recalibrated):
        model = net("running")
        trainer = supervised(model)
        ema = EMAHandler(model, momentum=0.3, handle_buffers=buffers)
        ema.attach(trainer)
        seen = []
        if recalibrated:
            RecalibrateBatchNorm().attach(trainer, ema.ema_model)
            trainer.add_event_handler(
                Events.EPOCH_COMPLETED, lambda _: seen.append((statistics(ema.ema_model), expected(ema.ema_model)))
            )
        trainer.run(loader(), max_epochs=2)
        return model, ema.ema_model, seen

    plain, average, _ = run(False)
    model, other, seen = run(True)
    assert all(torch.equal(found, right) for found, right in seen)
    assert_same_training(plain, model)
    assert all(map(torch.equal, average.parameters(), other.parameters()))
    assert not torch.equal(statistics(average), statistics(other))
    assert not any(module.training for module in other.modules()) or buffers == "ema_train"


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(epochs, resume=None):
        model = net("running")
        model[6] = nn.Identity()  # dropout would draw from the random state, which is in no checkpoint
        trainer, handler = supervised(model), RecalibrateBatchNorm()
        handler.attach(trainer, model)
        saved = {"model": model, "trainer": trainer, "recalibration": handler}
        saver = Checkpoint(saved, DiskSaver(tmp_path, require_empty=False), n_saved=None)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
        if resume is not None:
            Checkpoint.load_objects(saved, torch.load(resume, weights_only=True))
        trainer.run(loader(), max_epochs=epochs)
        return model, saver.last_checkpoint

    whole, _ = run(3)
    _, path = run(2)
    resumed, _ = run(3, path)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_batches_that_are_prepared(tmp_path):
    class Keyed(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return {"image": x, "label": y}

    def prepare_batch(batch, device=None, non_blocking=False):
        return batch["image"] / 2, batch["label"]

    def run(handler):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        trainer = engines.create_supervised_trainer(
            model, optimizer, nn.CrossEntropyLoss(), prepare_batch=prepare_batch
        )
        handler.attach(trainer, model)
        trainer.run(DataLoader(Keyed(X, Y), batch_size=8), max_epochs=2)
        return model

    model = run(RecalibrateBatchNorm(forward=lambda model, batch: model(prepare_batch(batch)[0])))
    assert torch.equal(statistics(model), expected(model, (X / 2).split(8)))
    with pytest.raises(TypeError, match=r"here image, label, and .* give forward="):
        run(RecalibrateBatchNorm())


def test_device_of_the_model():
    seen = []

    class Noting(torch.Tensor):
        def to(self, *arguments, **keywords):
            seen.append(arguments[0])
            return self.as_subclass(torch.Tensor)

    handler = RecalibrateBatchNorm(dataloader=[x.as_subclass(Noting) for x in X.split(8)])
    model, _ = trained(handler, epochs=1)
    assert seen == [torch.device("cpu")] * 3
    assert torch.equal(statistics(model), expected(model))


def test_limits():
    handler = RecalibrateBatchNorm(None)
    model = net()
    trainer = supervised(model)
    handler.attach(trainer, model)
    trainer.run(loader(), max_epochs=2, epoch_length=2)
    assert handler.report.batches == 2
    handler = RecalibrateBatchNorm(1, normalize="population", prior=8)
    trained(handler)
    assert handler.report.batches == 1
    assert handler.report.layers[0].residual < 1e-4


@pytest.mark.parametrize(
    "data",
    [lambda: iter(loader()), lambda: DataLoader(OneShot(), batch_size=8), lambda: (batch for batch in loader())],
    ids=["iterator", "data set", "generator"],
)
def test_data_that_can_be_read_only_once(data):
    with pytest.raises(ValueError, match=r"can be read only once.*separate dataloader="):
        trained(RecalibrateBatchNorm(), data=data(), epochs=1)
    model, _ = trained(RecalibrateBatchNorm(dataloader=X.split(8)), data=data(), epochs=1)
    assert len(model.drawn) == 3
    assert torch.equal(statistics(model), expected(model))


def test_an_engine_without_data():
    model = net()
    handler = RecalibrateBatchNorm()
    trainer = Engine(lambda engine, batch: model(X[:8]))
    handler.attach(trainer, model)
    with pytest.raises(ValueError, match="no training loader; pass dataloader="):
        trainer.run(max_epochs=1, epoch_length=2)


def test_frozen_layers_stay_frozen():
    model = net()
    before = norms(model)[0].running_mean.clone()
    handler, optimizer = RecalibrateBatchNorm(), torch.optim.SGD(model.parameters(), 0.05)

    def step(engine, batch):
        model.train()
        norms(model)[0].eval()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    trainer = Engine(step)
    handler.attach(trainer, model)
    # As an evaluator does.
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda _: model.eval())
    trainer.run(loader(), max_epochs=2)
    assert torch.equal(norms(model)[0].running_mean, before)
    assert [layer.name for layer in handler.report.layers] == ["4"]


def test_gradients_being_accumulated_stay():
    gradients = []
    model = net()
    trainer = supervised(model, accumulation=4)

    def note(engine):
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    trainer.add_event_handler(Events.EPOCH_COMPLETED, note)
    RecalibrateBatchNorm().attach(trainer, model)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, note)
    trainer.run(loader(), max_epochs=1)
    assert all(map(torch.equal, *gradients))


def test_a_failure_leaves_the_model_as_it_was():
    at = []

    def forward(model, batch):
        if at:
            raise RuntimeError("no")
        at.append([value.clone() for value in model.state_dict().values()])
        model(batch[0])

    model = net()
    with pytest.raises(RuntimeError, match="no"):
        trained(RecalibrateBatchNorm(forward=forward), model)
    assert all(map(torch.equal, at[0], model.state_dict().values()))


def test_wrong_arguments_are_told_at_once():
    trainer, handler = supervised(net()), RecalibrateBatchNorm()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        handler.attach(trainer, [])
    with pytest.raises(ValueError, match="not a valid event"):
        handler.attach(trainer, net(), "epochs")
    assert not any(trainer._event_handlers.values())
    handler.attach(trainer, net())
    with pytest.raises(ValueError, match="attached already"):
        handler.attach(trainer, net())
    with pytest.raises(TypeError, match="normalise"):
        RecalibrateBatchNorm(normalise="batch")


def train_in_parallel(rank, recalibrated):
    """Under DDP, with every process on its own part of the data."""
    model = nn.parallel.DistributedDataParallel(net())
    handler = RecalibrateBatchNorm()
    trainer = supervised(model)
    if recalibrated:
        handler.attach(trainer, model)
    part = TensorDataset(X[rank::2], Y[rank::2])
    trainer.run(DataLoader(part, batch_size=4), max_epochs=2)
    assert not recalibrated or handler.report.batches == 6
    return model.module.state_dict()


def test_two_processes():
    assert_two_processes_share(net, train_in_parallel)
