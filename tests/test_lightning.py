"""The callback for Lightning: what is validated is what is saved, and training does not notice."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning's own imports warn of
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from runningbn import RunningBatchNorm, update_bn_stats
from runningbn.integrations.lightning import RecalibrateBatchNorm

# Lightning's own: its advice on workers and intervals, and its use of torch's tree specs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

X, Y = torch.randn(48, 3, generator=torch.Generator().manual_seed(1)) * 3 + 5, torch.randn(48, 1)


class Module(pl.LightningModule):
    """A small regression; notes the statistics that each validation sees."""

    def __init__(self, norm=nn.BatchNorm1d, keys=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.keys, self.validated, self.drawn = keys, [], []

    @property
    def norm(self):
        return self.net[1]

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if self.keys else batch
        self.drawn.append(x.clone())
        return (self(x) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        assert not self.training
        if batch_idx == 0:
            self.validated.append(statistics(self))
        self.log("loss", self(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class WithoutValidation(Module):
    validation_step = None


def statistics(module):
    return torch.stack([module.norm.running_mean, module.norm.running_var]).clone()


def data(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=8, **options)


def expected(module, batches=None):
    """The pooled moments of all that the layer sees, with the weights that the module has now."""
    with torch.no_grad():
        z = module.net[0](X if batches is None else batches)
    return torch.stack([z.mean(0), z.var(0)])


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 2, "enable_checkpointing": False} | options
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **options)


def fit(tmp_path, *callbacks, module=None, loader=None, val=True, **options):
    module = module or Module()
    torch.manual_seed(7)
    fitted = trainer(tmp_path, *callbacks, **options)
    fitted.fit(module, data(shuffle=True) if loader is None else loader, data() if val else None)
    return module, fitted


class Noisy(TensorDataset):
    """Augments with generators of its own."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.torch, self.python = torch.Generator().manual_seed(5), random.Random(6)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(3, generator=self.torch) + self.python.random(), y


class Calls(Callback):
    """Counts recalibrations by the reports that appear, with the epoch and step of each."""

    def __init__(self, watched):
        self.watched, self.seen, self.reports = watched, [], []

    def look(self, trainer, hook):
        if self.watched.report is not None and all(self.watched.report is not report for report in self.reports):
            self.reports.append(self.watched.report)
            self.seen.append((hook, trainer.global_step))

    def on_validation_epoch_start(self, trainer, pl_module):
        self.look(trainer, "validation")

    def on_train_batch_start(self, trainer, *_):
        self.look(trainer, "before")

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(trainer, "epoch end")

    def on_train_end(self, trainer, pl_module):
        self.look(trainer, "end")


def saved(path):
    return torch.load(path, weights_only=False)["state_dict"]


def saved_statistics(path):
    state = saved(path)
    return torch.stack([state["net.1.running_mean"], state["net.1.running_var"]])


def checkpoint(tmp_path, **options):
    return ModelCheckpoint(tmp_path / "checkpoints", **options)


@pytest.mark.parametrize("on_epoch_end", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_what_is_validated_is_saved_and_is_exact(tmp_path, on_epoch_end, weights_only):
    best = checkpoint(
        tmp_path, monitor="loss", save_top_k=-1, save_weights_only=weights_only, save_on_train_epoch_end=on_epoch_end,
        filename="{epoch}",
    )  # fmt: skip
    callback = RecalibrateBatchNorm()
    module, _ = fit(tmp_path, best, callback, enable_checkpointing=True)
    assert len(module.validated) == 3  # with the one before training
    for epoch in (0, 1):
        assert torch.equal(saved_statistics(tmp_path / f"checkpoints/epoch={epoch}.ckpt"), module.validated[epoch + 1])
    torch.testing.assert_close(module.validated[-1], expected(module))
    assert torch.equal(statistics(module), module.validated[-1])
    assert callback.report.batches == 6


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
@pytest.mark.parametrize("loader", ["plain", "sampler", "data set", "workers"])
def test_training_goes_on_bit_for_bit_as_without(tmp_path, norm, loader):
    def loaders():
        if loader == "sampler":
            dataset = TensorDataset(X, Y)
            sampler = RandomSampler(dataset, replacement=True, generator=torch.Generator().manual_seed(3))
            return DataLoader(dataset, batch_size=8, sampler=sampler, generator=torch.Generator().manual_seed(4))
        if loader == "data set":
            return DataLoader(Noisy(X, Y), batch_size=8, shuffle=True)
        workers = {"num_workers": 1, "persistent_workers": True} if loader == "workers" else {}
        return data(shuffle=True, **workers)

    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 3}
    plain, _ = fit(tmp_path, module=Module(norm), loader=loaders(), **options)
    callback = RecalibrateBatchNorm()
    last = Callback()
    own = []
    # The statistics that training had in the last step, before those for validation replaced them.
    last.on_train_batch_end = lambda trainer, module, *_: own.append(statistics(module))
    module, _ = fit(tmp_path, callback, last, module=Module(norm), loader=loaders(), **options)
    assert all(map(torch.equal, plain.drawn, module.drawn))
    assert all(map(torch.equal, plain.parameters(), module.parameters()))
    assert torch.equal(own[-1], statistics(plain))
    assert not torch.equal(statistics(module), statistics(plain))


def test_keep_trains_on_with_the_new_statistics(tmp_path):
    started = []
    spy = Callback()
    spy.on_train_batch_start = lambda trainer, module, *_: started.append(statistics(module))
    for keep in (True, False):
        started.clear()
        module, _ = fit(tmp_path, RecalibrateBatchNorm(keep=keep), spy)
        # The first batch of the second epoch: in validation 1 the new ones were in place.
        assert torch.equal(started[6], module.validated[1]) == keep


def test_check_before_training_and_validate_recalibrate_nothing(tmp_path):
    callback = RecalibrateBatchNorm()
    module, fitted = fit(tmp_path, callback, max_steps=0)
    assert callback.report is None
    assert torch.equal(module.validated[0], torch.stack([torch.zeros(4), torch.ones(4)]))
    fitted.validate(module, data(), verbose=False)
    assert callback.report is None


@pytest.mark.parametrize("module", [Module, WithoutValidation])
@pytest.mark.parametrize("weights_only", [True, False])
def test_without_validation_it_comes_before_the_checkpoint(tmp_path, module, weights_only):
    callback, every = RecalibrateBatchNorm(), checkpoint(tmp_path, save_weights_only=weights_only)
    module, _ = fit(tmp_path, every, callback, module=module(), val=False, enable_checkpointing=True)
    torch.testing.assert_close(saved_statistics(every.best_model_path), expected(module))


@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 4}, {"train_time_interval": timedelta(0)}], ids=["steps", "time"]
)
def test_checkpoints_in_the_middle_of_an_epoch(tmp_path, when):
    every = checkpoint(tmp_path, save_top_k=-1, filename="{step}", **when)
    module, _ = fit(tmp_path, every, RecalibrateBatchNorm(), enable_checkpointing=True, max_steps=4, max_epochs=-1)
    state = saved(tmp_path / "checkpoints/step=4.ckpt")
    torch.testing.assert_close(saved_statistics(tmp_path / "checkpoints/step=4.ckpt"), expected(module))
    assert torch.equal(state["net.0.weight"], module.net[0].weight)


def test_without_validation_and_checkpoints_the_finished_model_has_them(tmp_path):
    callback = RecalibrateBatchNorm()
    calls = Calls(callback)
    module, _ = fit(tmp_path, callback, calls, val=False)
    torch.testing.assert_close(statistics(module), expected(module))
    assert calls.seen == [("end", 12)]  # nobody needed them before


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"val_check_interval": 3}, [("validation", step) for step in (3, 6, 9, 12)]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [("validation", step) for step in (4, 8, 12)]),
        ({"max_epochs": -1, "max_steps": 9}, [("validation", 6), ("end", 9)]),
        ({"accumulate_grad_batches": 4, "val_check_interval": 3}, [("validation", step) for step in (0, 2, 2, 4)]),
    ],
    ids=["mid-epoch", "by steps", "endless", "accumulation"],
)
def test_when(tmp_path, options, seen):
    callback = RecalibrateBatchNorm()
    calls = Calls(callback)
    fit(tmp_path, callback, calls, **options)
    assert calls.seen == seen


def test_every_n_epochs(tmp_path):
    callback = RecalibrateBatchNorm(every_n_epochs=2)
    calls = Calls(callback)
    module, _ = fit(tmp_path, callback, calls, max_epochs=5)
    assert calls.seen == [("validation", 12), ("validation", 24)]
    assert torch.equal(statistics(module), module.validated[-1])


def test_gradients_being_accumulated_stay(tmp_path):
    before, after = [], []

    def gradients(module):
        return [None if p.grad is None else p.grad.clone() for p in module.parameters()]

    spy = Callback()
    spy.on_validation_start = lambda trainer, module: before.append(gradients(module))
    spy.on_validation_end = lambda trainer, module: after.append(gradients(module))
    options = {"accumulate_grad_batches": 4, "val_check_interval": 3, "num_sanity_val_steps": 0}
    fit(tmp_path, spy, RecalibrateBatchNorm(), **options)
    assert [grads[0] is None for grads in before] == [False, True, False, True]  # after batches 3 and 6 of each epoch
    assert all(map(torch.equal, before[0], after[0]))
    assert all(map(torch.equal, before[2], after[2]))


def test_batches_pass_the_hooks_in_the_state_of_training(tmp_path):
    class Hooked(Module):
        states = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] - 1, *batch[1:]] if self.trainer.training else batch

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            assert device == self.device
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.states = (*self.states, (self.trainer.training, self.training))
            return [batch[0] * 2, *batch[1:]] if self.training else batch

    module, _ = fit(tmp_path, RecalibrateBatchNorm(), module=Hooked())
    torch.testing.assert_close(statistics(module), expected(module, 2 * (X - 1)))
    assert set(module.states) == {(True, True), (False, False)}


def test_precision_of_the_trainer(tmp_path):
    module, _ = fit(tmp_path, RecalibrateBatchNorm(), precision="64-true")
    assert module.norm.running_var.dtype == torch.float64
    module = module.double()
    with torch.no_grad():
        torch.testing.assert_close(module.norm.running_mean, module.net[0](X.double()).mean(0))
    bf16, _ = fit(tmp_path, RecalibrateBatchNorm(), precision="bf16-mixed")
    torch.testing.assert_close(statistics(bf16), expected(bf16), rtol=0.02, atol=0.02)


class Keyed(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"x": x, "y": y}


def test_mappings(tmp_path):
    loader = DataLoader(Keyed(X, Y), batch_size=8)
    callback = RecalibrateBatchNorm(forward=lambda module, batch: module(batch["x"]))
    module, _ = fit(tmp_path, callback, module=Module(keys=True), loader=loader)
    torch.testing.assert_close(statistics(module), expected(module))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        fit(tmp_path, RecalibrateBatchNorm(), module=Module(keys=True), loader=loader)


def test_several_loaders(tmp_path):
    class Two(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    callback = RecalibrateBatchNorm(forward=lambda module, batch: module(torch.cat([batch["a"][0], batch["b"][0]])))
    loaders = {"a": data(), "b": DataLoader(TensorDataset(X + 1, Y), batch_size=8)}
    module, _ = fit(tmp_path, callback, module=Two(), loader=loaders)
    torch.testing.assert_close(statistics(module), expected(module, torch.cat([X, X + 1])))


def test_a_loader_of_its_own(tmp_path):
    callback = RecalibrateBatchNorm(dataloader=[X[:10], X[10:20]])
    module, _ = fit(tmp_path, callback)
    torch.testing.assert_close(statistics(module), expected(module, X[:20]))


class Stream(IterableDataset):
    """Can be read only once."""

    def __init__(self):
        self.left = iter(zip(X, Y))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


def test_data_that_can_be_read_only_once(tmp_path):
    loader = DataLoader(Stream(), batch_size=8)
    with pytest.raises(ValueError, match="separate dataloader="):
        fit(tmp_path, RecalibrateBatchNorm(), loader=loader, max_epochs=1)
    module, _ = fit(
        tmp_path, RecalibrateBatchNorm(dataloader=data()), loader=DataLoader(Stream(), batch_size=8), max_epochs=1
    )
    assert len(module.drawn) == 6
    torch.testing.assert_close(statistics(module), expected(module))


@pytest.mark.parametrize("dataloader", [None, [X[:8], X[8:16]]])
def test_fast_dev_run(tmp_path, dataloader):
    callback = RecalibrateBatchNorm(dataloader=dataloader)
    module, _ = fit(tmp_path, callback, fast_dev_run=True, loader=data())
    assert callback.report.batches == 1
    torch.testing.assert_close(statistics(module), expected(module, X[:8]))


class Cached(torch.utils.data.Dataset):
    """Makes each batch when it is first asked for, and keeps it."""

    def __init__(self):
        self.made = {}

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i not in self.made:
            self.made[i] = X[4 * i : 4 * i + 4] + 0, Y[4 * i : 4 * i + 4]
        return self.made[i]


def test_nothing_of_inference_mode_gets_into_training(tmp_path):
    dataset = Cached()
    loader = DataLoader(dataset, batch_size=None, shuffle=True)
    fit(tmp_path, RecalibrateBatchNorm(), module=Module(RunningBatchNorm), loader=loader, limit_train_batches=2)
    assert not any(x.is_inference() for x, _ in dataset.made.values())


def test_limits(tmp_path):
    callback = RecalibrateBatchNorm()
    fit(tmp_path, callback, limit_train_batches=3)
    assert callback.report.batches == 3
    callback = RecalibrateBatchNorm(num_iters=2, prior=8, normalize="population")
    fit(tmp_path, callback)
    assert callback.report.batches == 2
    assert callback.report.layers[0].residual < 1e-4


def test_a_failure_leaves_the_model_and_the_trainer_as_they_were(tmp_path):
    at = []

    def forward(module, batch):
        if len(at) == 0:
            at.append([t.clone() for t in module.state_dict().values()])
        else:
            raise RuntimeError("no")
        module(batch[0])

    module = Module()
    torch.manual_seed(7)
    failing = trainer(tmp_path, checkpoint(tmp_path, save_on_exception=True), RecalibrateBatchNorm(forward=forward),
                      enable_checkpointing=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="no"):
        failing.fit(module, data(shuffle=True), data())
    assert all(map(torch.equal, at[0], module.state_dict().values()))
    assert "save_checkpoint" not in vars(failing)
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert torch.equal(saved_statistics(path), statistics(module))
    assert not any(hook for m in module.modules() for hook in (m._forward_hooks, m._forward_pre_hooks))


def test_the_trainer_is_left_alone_afterwards(tmp_path):
    callback = RecalibrateBatchNorm()
    module, fitted = fit(tmp_path, callback)
    assert "save_checkpoint" not in vars(fitted)
    # A second fit of the same trainer watches again.
    fitted.fit_loop.max_epochs = 3
    first = callback.report
    fitted.fit(module, data(), data())
    assert callback.report is not first
    assert "save_checkpoint" not in vars(fitted)


def test_frozen_layers_stay_frozen(tmp_path):
    class Frozen(Module):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(4))

        @property
        def norm(self):
            return self.net[2]

        def on_train_epoch_start(self):
            self.net[1].eval()

    callback = RecalibrateBatchNorm()
    module, _ = fit(tmp_path, callback, module=Frozen())
    assert [layer.name for layer in callback.report.layers] == ["net.2"]
    assert torch.equal(module.net[1].running_mean, torch.zeros(4))
    assert not module.net[1].training
    with pytest.raises(ValueError, match="frozen"):
        fit(tmp_path, RecalibrateBatchNorm(layers=["net.1"]), module=Frozen())


@pytest.mark.filterwarnings("ignore:.*when using `ckpt_path`:UserWarning")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(epochs, *callbacks, ckpt_path=None):
        module = Module(RunningBatchNorm)
        module.net[2] = nn.Identity()  # dropout would draw from the random state, which is in no checkpoint
        options = {"max_epochs": epochs, "enable_checkpointing": bool(callbacks)}
        fitted = trainer(tmp_path, RecalibrateBatchNorm(), *callbacks, **options)
        fitted.fit(module, data(), data(), ckpt_path=ckpt_path)
        return module

    uninterrupted = run(3)
    every = checkpoint(tmp_path, filename="two")
    run(2, every)
    resumed = run(3, ckpt_path=every.best_model_path)
    assert all(map(torch.equal, uninterrupted.state_dict().values(), resumed.state_dict().values()))


def test_with_averaged_weights(tmp_path):
    averaging = pytest.importorskip("lightning.pytorch.callbacks", reason="since Lightning 2.6")
    if not hasattr(averaging, "WeightAveraging"):
        pytest.skip("since Lightning 2.6")
    best = checkpoint(tmp_path)
    callbacks = [averaging.WeightAveraging(), RecalibrateBatchNorm(), best]
    plain, _ = fit(tmp_path)
    own = []
    spy = Callback()
    spy.on_train_batch_end = lambda trainer, module, *_: own.append(statistics(module))
    module, _ = fit(tmp_path, *callbacks, spy, enable_checkpointing=True)
    averaged = expected(module)  # at the end the module has the averaged weights
    torch.testing.assert_close(module.validated[-1], averaged)
    torch.testing.assert_close(statistics(module), averaged)
    torch.testing.assert_close(saved_statistics(best.best_model_path), averaged)
    assert torch.equal(own[-1], statistics(plain))  # training did not notice


def test_the_report_is_logged(tmp_path, caplog):
    callback = RecalibrateBatchNorm()
    with caplog.at_level(logging.INFO, "runningbn"):
        fit(tmp_path, callback)
    told = [record for record in caplog.records if record.name == "runningbn"]
    assert [record.levelno for record in told] == [logging.INFO] * 2
    assert "epoch 1, step 12" in told[1].getMessage()
    assert str(callback.report) in told[1].getMessage()


def test_a_model_without_batchnorm(tmp_path, caplog):
    class Plain(Module):
        norm = None

        def __init__(self):
            super().__init__()
            self.net[1] = nn.Identity()

        def validation_step(self, batch, batch_idx):
            pass

    callback = RecalibrateBatchNorm()
    fit(tmp_path, callback, module=Plain())
    assert callback.report.layers == []


@pytest.mark.parametrize(
    ("options", "error"), [({"normalise": "batch"}, TypeError), ({"every_n_epochs": 0}, ValueError)]
)
def test_wrong_options_are_told_at_once(options, error):
    with pytest.raises(error, match=next(iter(options))):
        RecalibrateBatchNorm(**options)


def run(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)


def test_runningbn_does_not_import_lightning():
    code = "import sys, runningbn, runningbn.integrations; print([m for m in sys.modules if 'lightning' in m])"
    assert run(code).stdout.strip() == "[]", run(code).stderr


@pytest.mark.slow
def test_which_lightning():
    pytest.importorskip("pytorch_lightning")
    base = "from runningbn.integrations.lightning import RecalibrateBatchNorm as R; print(R.__mro__[2].__module__)"
    assert run(base).stdout.startswith("lightning.pytorch")
    assert run(f"import pytorch_lightning; {base}").stdout.startswith("pytorch_lightning")
    hidden = "import sys; sys.modules.update({'lightning': None, 'pytorch_lightning': None}); "
    told = run(hidden + base).stderr
    assert "ImportError" in told
    assert "runningbn[lightning]" in told


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Both end with the statistics of all data."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch, test_lightning as t\n"
        "from lightning.pytorch.strategies import DDPStrategy\n"
        "callback = t.RecalibrateBatchNorm()\n"
        "module, trainer = t.fit(sys.argv[1], callback, devices=2, strategy='ddp', max_epochs=1)\n"
        "torch.testing.assert_close(t.statistics(module), t.expected(module))\n"
        "assert callback.report.batches == 6\n"
        "print('right')\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2


def test_the_same_as_by_hand(tmp_path):
    module, _ = fit(tmp_path, RecalibrateBatchNorm())
    found = statistics(module)
    with update_bn_stats(module, data()):
        torch.testing.assert_close(statistics(module), found)
