"""The callback for fastai: what is validated is what is saved, and training does not notice.

They run where fastai is installed, as ``requirements-fastai.txt`` says; `.ci/run` does that.
"""

from __future__ import annotations

import logging
import operator
import random
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what fastai's own imports warn of
    pytest.importorskip("fastai.learner", exc_type=ImportError)
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.schedule import lr_find  # noqa: F401 - a method of Learner from here on
    from fastai.callback.tracker import SaveModelCallback
    from fastai.callback.training import BnFreeze
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import SGD

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

from runningbn.integrations.fastai import RecalibrateBatchNorm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(autocast|GradScaler).*:UserWarning"),  # without a GPU
    pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated:DeprecationWarning"),  # fastai's own, in loading
]

DATA = list(zip(X, Y))


class Own(Callback):
    """Notes the statistics of training after a step, and those at its start and in validation."""

    run_valid = False

    def __init__(self):
        super().__init__()
        self.stepped, self.started, self.validated = [], [], []

    def before_batch(self):
        self.started.append(statistics(self.learn.model))

    def after_batch(self):
        self.stepped.append(statistics(self.learn.model))

    def after_validate(self):
        self.validated.append(statistics(self.learn.model))


def learner(*callbacks, model=None, train=None, tmp_path=None, **options):
    train = DataLoader(DATA, bs=8) if train is None else train
    dls = DataLoaders(train, DataLoader(DATA, bs=8), device=torch.device("cpu"))
    model = net() if model is None else model
    made = Learner(
        dls, model, nn.CrossEntropyLoss(), opt_func=SGD, lr=0.05, cbs=list(callbacks), path=tmp_path, **options
    )
    made.logger, made.create_mbar = (lambda *_: None), False
    made.remove_cbs([cb for cb in made.cbs if type(cb).__name__ == "ProgressCallback"])
    return made


def trained(*callbacks, epochs=2, **options):
    made = learner(*callbacks, **options)
    torch.manual_seed(7)
    random.seed(8)
    made.fit(epochs)
    return made


def test_statistics_are_those_of_update_bn_stats_and_validation_uses_and_saves_them(tmp_path):
    callback, own = RecalibrateBatchNorm(), Own()
    saver = SaveModelCallback(every_epoch=True, fname="net")
    made = trained(callback, own, saver, tmp_path=tmp_path)
    assert torch.equal(statistics(made.model), expected(made.model))
    assert torch.equal(own.validated[-1], statistics(made.model))
    assert callback.report.batches == 3
    with torch.no_grad():
        loss = nn.functional.cross_entropy(made.model.eval()(X), Y).item()
    assert made.recorder.values[-1][1] == pytest.approx(loss, rel=1e-5)
    assert trained().recorder.values[-1][1] != pytest.approx(loss, rel=1e-3)
    for epoch in (0, 1):
        other = net()
        other.load_state_dict(torch.load(tmp_path / f"models/net_{epoch}.pth", weights_only=True))
        assert torch.equal(statistics(other), own.validated[epoch])


def test_the_best_model_has_the_statistics_that_it_was_validated_with(tmp_path, capsys):
    own = Own()
    saver = SaveModelCallback(
        monitor="valid_loss", comp=operator.gt, fname="worst"
    )  # the first one is loaded at the end
    made = trained(RecalibrateBatchNorm(), own, saver, tmp_path=tmp_path, epochs=3)
    losses = [values[1] for values in made.recorder.values]
    assert losses[0] == max(losses)
    assert torch.equal(statistics(made.model), own.validated[0])


@pytest.mark.parametrize("to", ["torch", "running"])
@pytest.mark.parametrize("kind", ["plain", "transformed", "workers", "data set", "of torch"])
def test_training_goes_on_bit_for_bit_as_without(to, kind):
    def data():
        random.seed(9)  # a loader of fastai takes a seed from here
        if kind == "of torch":
            return torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
        if kind == "data set":
            return DataLoader(Noisy(), bs=8, shuffle=True)
        if kind == "transformed":
            return TfmdDL(DATA, bs=8, shuffle=True, num_workers=0)
        workers = {"num_workers": 1, "persistent_workers": True} if kind == "workers" else {}
        return DataLoader(DATA, bs=8, shuffle=True, **workers)

    own, plain_own = Own(), Own()
    plain = trained(plain_own, model=net(to), train=data(), epochs=3).model
    made = trained(own, RecalibrateBatchNorm(), model=net(to), train=data(), epochs=3)
    assert_same_training(plain, made.model)
    assert torch.equal(own.stepped[-1], plain_own.stepped[-1])
    assert not torch.equal(statistics(made.model), statistics(plain))


def test_keep_trains_on_with_the_new_statistics():
    for keep in (True, False):
        own = Own()
        own.order = 60  # after the callback's
        trained(RecalibrateBatchNorm(keep=keep), own)
        assert torch.equal(own.started[STEPS], own.validated[0]) == keep


def steps(caplog):
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch")]
    return [int(message.split("step ")[1].split()[0]) for message in told]


@pytest.mark.parametrize(("every", "expected_steps"), [(1, [3, 6, 9, 12, 15]), (2, [6, 12])])
def test_every_n_epochs(caplog, every, expected_steps):
    with caplog.at_level(logging.INFO, "runningbn"):
        trained(RecalibrateBatchNorm(every_n_epochs=every), epochs=5)
    assert steps(caplog) == expected_steps


def test_outside_of_a_fit_nothing_is_recalibrated(tmp_path):
    callback = RecalibrateBatchNorm()
    made = learner(callback, tmp_path=tmp_path)
    before = statistics(made.model)
    made.validate()
    made.get_preds()
    assert callback.report is None
    made.lr_find(num_it=6, show_plot=False)
    assert callback.report is None
    assert torch.equal(statistics(made.model), before)
    made.fit(1)
    report, after = callback.report, statistics(made.model)
    made.validate()
    made.get_preds()
    assert callback.report is report
    assert torch.equal(statistics(made.model), after)


def test_a_fit_that_is_cancelled_is_recalibrated_at_its_end():
    class Cancels(Callback):
        def after_batch(self):
            if self.learn.train_iter == 4:
                raise CancelFitException

    made = trained(RecalibrateBatchNorm(), Cancels())
    assert torch.equal(statistics(made.model), expected(made.model))


def test_several_inputs_and_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, factor):
            return self.net(x * factor[:, None, None, None])

    data = [(x, torch.tensor(3.0), y) for x, y in DATA]

    def run(**options):
        made = learner(RecalibrateBatchNorm(**options), model=Two(), train=DataLoader(data, bs=8))
        made.dls.loaders[1] = DataLoader(data, bs=8)
        made.fit(1)
        return made.model

    model = run()
    assert torch.equal(statistics(model), expected(model.net, (X * 3).split(8)))
    model = run(forward=lambda model, batch: model(batch[0], batch[1] * 2))
    assert torch.equal(statistics(model), expected(model.net, (X * 6).split(8)))


def test_a_loader_of_its_own_and_options():
    callback = RecalibrateBatchNorm(1, dataloader=[[x, x] for x in X.split(6)], normalize="population", prior=8)
    trained(callback)
    assert (callback.report.batches, callback.report.layers[0].samples) == (1, 6)
    assert callback.report.layers[0].residual < 1e-4


@pytest.mark.parametrize("kind", [DataLoader, torch.utils.data.DataLoader])
def test_data_that_can_be_read_only_once(kind):
    def data():
        made = kind(OneShot(), batch_size=8)
        if kind is DataLoader:
            made.n = 24  # fastai needs to know
        else:
            made.__class__ = type("Sized", (kind,), {"__len__": lambda self: 3})
        return made

    with pytest.raises(ValueError, match=r"OneShot can be read only once.*separate dataloader="):
        trained(RecalibrateBatchNorm(), train=data(), epochs=1)
    batches = list(torch.utils.data.DataLoader(DATA, batch_size=8))
    made = trained(RecalibrateBatchNorm(dataloader=batches), train=data(), epochs=1)
    assert len(made.model.drawn) == 3
    assert torch.equal(statistics(made.model), expected(made.model))


def test_mixed_precision():
    """There is no autocast on the CPU in fastai; that it is entered once for each batch is seen."""

    class Counts:
        inside = entered = 0

        def __enter__(self):
            self.inside, self.entered = self.inside + 1, self.entered + 1
            assert self.inside == 1

        def __exit__(self, *error):
            self.inside -= 1

    class Precision(MixedPrecision):
        order, counts = 10, Counts()

        def before_fit(self):
            super().before_fit()
            self.autocast = self.counts

    Precision.__name__ = "MixedPrecision"
    precision = Precision(amp_mode="bf16")
    trained(precision, RecalibrateBatchNorm(), epochs=1)
    assert precision.counts.entered == 3 * STEPS  # training, recalibration, validation
    assert precision.counts.inside == 0


def test_frozen_layers_stay_frozen():
    model = net()
    for parameter in norms(model)[0].parameters():
        parameter.requires_grad_(False)
    before = norms(model)[0].running_mean.clone()
    callback = RecalibrateBatchNorm()
    made = learner(callback, BnFreeze(), model=model)
    made.fit(2)
    assert torch.equal(norms(model)[0].running_mean, before)
    assert [layer.name for layer in callback.report.layers] == ["4"]


def test_a_failure_leaves_the_model_as_it_was():
    at = []

    def forward(model, batch):
        if at:
            raise RuntimeError("no")
        at.append([value.clone() for value in model.state_dict().values()])
        model(batch[0])

    made = learner(RecalibrateBatchNorm(forward=forward))
    with pytest.raises(RuntimeError, match="no"):
        made.fit(1)
    assert all(map(torch.equal, at[0], made.model.state_dict().values()))


def test_wrong_options_are_told_at_once():
    with pytest.raises(TypeError, match="normalise"):
        RecalibrateBatchNorm(normalise="batch")


def train_in_parallel(rank, recalibrated):
    """Under DDP, with every process on its own part of the data."""
    model, callback = nn.parallel.DistributedDataParallel(net()), RecalibrateBatchNorm()
    part = DataLoader(DATA[rank::2], bs=4)
    trained(*([callback] if recalibrated else []), model=model, train=part)
    assert not recalibrated or callback.report.batches == 6
    return model.module.state_dict()


def test_two_processes():
    assert_two_processes_share(net, train_in_parallel)
