"""The callback for transformers' Trainer: what is evaluated is what is saved, and training does not notice."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from recalibrated import STEPS, X, Y, assert_same_training, expected, norms, statistics
from trainers import MARKS, Images, Noisy, Own, Spy, Stream, net, saved, trained
from transformers import TrainerCallback

from runningbn.integrations.transformers import RecalibrateBatchNorm

pytestmark = MARKS


def eval_losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_statistics_are_those_of_update_bn_stats_and_evaluation_uses_and_saves_them(tmp_path):
    callback, spy = RecalibrateBatchNorm(), Spy()
    model, trainer = trained(tmp_path, callback, spy, save_strategy="epoch")
    assert torch.equal(statistics(model), expected(model))
    assert callback.report.batches == 3
    assert len(callback.report.layers) == len(norms(model)) > 4
    assert torch.equal(spy.evaluated[-1], statistics(model))
    for epoch in (1, 2):
        assert torch.equal(saved(tmp_path / f"checkpoint-{STEPS * epoch}"), spy.evaluated[epoch - 1])
    # The metric that was logged is that of the final model, and not that of the statistics of training.
    with torch.no_grad():
        loss = model.eval()(X, labels=Y).loss.item()
    assert eval_losses(trainer)[-1] == pytest.approx(loss, rel=1e-5)
    _, plain = trained(tmp_path / "plain")
    assert eval_losses(plain)[-1] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("to", ["torch", "running"])
@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "random"},
        {"train_sampling_strategy": "random", "accelerator_config": {"use_seedable_sampler": False}},
        {"train_sampling_strategy": "random", "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
        {"data": "noisy"},
        {"data": "stream", "max_steps": 8},
    ],
    ids=["seedable sampler", "sampler", "workers", "accumulation", "data set", "stream"],
)
def test_training_goes_on_bit_for_bit_as_without(tmp_path, to, options):
    options = {"num_train_epochs": 3} | options
    kind = options.pop("data", "images")

    def run(*callbacks):
        random.seed(3)
        data = {"images": Images, "noisy": Noisy, "stream": Stream}[kind]()
        return trained(tmp_path, *callbacks, model=net(to), data=data, **options)[0]

    own = Own()
    plain, model = run(), run(own, RecalibrateBatchNorm(), Spy())
    assert len(plain.drawn) >= 8
    assert_same_training(plain, model)
    assert torch.equal(own.own[-1], statistics(plain))
    assert not torch.equal(statistics(model), statistics(plain))


def test_keep_trains_on_with_the_new_statistics(tmp_path):
    for keep in (True, False):
        spy = Spy()
        trained(tmp_path, RecalibrateBatchNorm(keep=keep), spy)
        assert torch.equal(spy.started[STEPS], spy.evaluated[0]) == keep


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, [("evaluation", 3), ("evaluation", 6)]),
        ({"eval_on_start": True}, [("evaluation", 3), ("evaluation", 6)]),
        ({"eval_strategy": "steps", "eval_steps": 2}, [("evaluation", 2), ("evaluation", 4), ("evaluation", 6)]),
        ({"eval_strategy": "no", "save_strategy": "steps", "save_steps": 4}, [("save", 4), ("save", 6)]),
        ({"eval_strategy": "no"}, [("end", 6)]),
        ({"eval_delay": 2, "num_train_epochs": 3}, [("evaluation", 6), ("evaluation", 9)]),
        ({"every": 2, "num_train_epochs": 5}, [("evaluation", 6), ("evaluation", 12)]),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, [("evaluation", 3), ("evaluation", 6)]),
    ],
    ids=["epochs", "before training", "steps", "checkpoints", "neither", "delay", "every 2nd epoch", "best"],
)
def test_when(tmp_path, options, seen):
    options = dict(options)
    callback = RecalibrateBatchNorm(every_n_epochs=options.pop("every", 1))
    spy = Spy(callback)
    _, trainer = trained(tmp_path, callback, spy, **options)
    assert spy.seen == seen
    report = callback.report
    if options.get("eval_strategy") != "no":
        trainer.evaluate()
    assert callback.report is report


def test_the_best_model_keeps_the_statistics_that_it_was_evaluated_with(tmp_path):
    class First(TrainerCallback):
        """The first evaluation is the best, and training stops in an epoch without one."""

        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_save = state.global_step == STEPS

    spy = Spy()
    callbacks = First(), RecalibrateBatchNorm(), spy
    # In another order, the statistics of the same weights would differ.
    options = {"load_best_model_at_end": True, "save_strategy": "epoch", "train_sampling_strategy": "random"}
    model, trainer = trained(tmp_path, *callbacks, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert torch.equal(statistics(model), spy.evaluated[0])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {"save_strategy": "epoch", "train_sampling_strategy": "random", "num_train_epochs": 3}
    whole, _ = trained(tmp_path / "a", RecalibrateBatchNorm(), model=net("running"), **options)
    trained(tmp_path / "b", RecalibrateBatchNorm(), model=net("running"), **options)
    moved = (tmp_path / "b" / "checkpoint-6").rename(tmp_path / "moved")  # the directory is not the output's
    resumed, _ = trained(tmp_path / "c", RecalibrateBatchNorm(), model=net("running"), resume=str(moved), **options)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    # Without the callback, the statistics of the checkpoint would be those of training.
    other, _ = trained(tmp_path / "d", model=net("running"), resume=str(moved), **options)
    assert not all(map(torch.equal, whole.parameters(), other.parameters()))


def test_options_survive_when_the_trainer_restores_callbacks(tmp_path, caplog):
    trained(tmp_path, RecalibrateBatchNorm(num_iters=2), save_strategy="epoch", num_train_epochs=1)
    callback = RecalibrateBatchNorm(num_iters=2)
    resume = str(tmp_path / "checkpoint-3")
    trained(tmp_path, callback, resume=resume, restore_callback_states_from_checkpoint=True, num_train_epochs=2)
    assert callback.report.batches == 2


def test_the_report_is_logged(tmp_path, caplog):
    callback = RecalibrateBatchNorm()
    with caplog.at_level(logging.INFO, "runningbn"):
        trained(tmp_path, callback)
    told = [record for record in caplog.records if record.getMessage().startswith("epoch")]
    assert [record.levelno for record in told] == [logging.INFO] * 2
    assert "epoch 1, step 6" in told[1].getMessage()
    assert str(callback.report) in told[1].getMessage()


@pytest.mark.parametrize("what", ["evaluation", "checkpoint"])
def test_being_listed_too_early_is_told(tmp_path, caplog, what):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                setattr(control, {"evaluation": "should_evaluate", "checkpoint": "should_save"}[what], True)

    with caplog.at_level(logging.WARNING, "runningbn"):
        trained(tmp_path, Asks(), RecalibrateBatchNorm())
        assert caplog.records == []
        trained(tmp_path, RecalibrateBatchNorm(), Asks())
    (record,) = caplog.records
    assert f"{what} used the statistics of training: list RecalibrateBatchNorm after" in record.getMessage()


def check_one_process(tmp_path, kind):
    """Run by torchrun in each of two processes: all end with the statistics of all data, and train as without."""
    data = {"images": Images, "stream": Stream}[kind]
    options = {"per_device_train_batch_size": 4, "max_steps": 6, "ddp_backend": "gloo", "save_strategy": "steps"}
    options |= {"save_steps": 6, "eval_strategy": "no", "ddp_find_unused_parameters": False}
    plain, _ = trained(tmp_path / "a", data=data(), **options)
    callback = RecalibrateBatchNorm()
    model, trainer = trained(tmp_path / "b", callback, data=data(), **options)
    assert trainer.args.world_size == 2
    assert_same_training(plain, model)
    assert callback.report.batches == 6
    assert callback.report.layers[0].samples == 24
    assert torch.equal(norms(model)[0].num_batches_tracked, norms(plain)[0].num_batches_tracked)
    torch.testing.assert_close(statistics(model), expected(model, X.split(4), process_group=False))
    torch.distributed.barrier()
    assert torch.equal(saved(tmp_path / "b" / "checkpoint-6"), statistics(model))


@pytest.mark.slow
def test_two_processes(tmp_path):
    """With a data set and with a stream, one after the other: the imports of the processes take longer than that."""
    here = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, pathlib, torch, test_transformers_trainer as t\n"
        "for kind in ('images', 'stream'):\n"
        "    t.check_one_process(pathlib.Path(sys.argv[1]) / kind, kind)\n"
        "    print('right ' + kind, flush=True)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"right {kind}") for kind in ("images", "stream")] == [2, 2]
