"""The demo: what it shows, that it says what its numbers say, and that it leaves everything else as it was."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from runningbn import RunningBatchNorm
from runningbn.__main__ import main
from runningbn.demo import command as demo
from runningbn.demo.command import results_as_json, results_figure, results_table, scores, summary_sentence, verdict
from runningbn.demo.experiment import (
    CONTENDERS,
    SITUATIONS,
    Run,
    build_model,
    load_data,
    run_experiment,
    run_one,
    schedule,
)

NAMES = ["BatchNorm", "GroupNorm", "RunningBatchNorm", "+ centred weights"]
each_situation = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)


def made_up(accuracies, losses=(0.5, 0.5, 0.5), situation=SITUATIONS[0].name):
    """Runs of one situation: a list of accuracies, one per seed, for each of the contenders; one loss for each."""
    return [
        Run(situation, name, seed, accuracy, loss)
        for name, column, loss in zip(NAMES, accuracies, losses)
        for seed, accuracy in enumerate(column)
    ]


# ----------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_quick_demo_prints_a_full_table_and_a_sentence_and_writes_the_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "QUICK_STEPS", 4)
    figure, numbers = tmp_path / "figure.png", tmp_path / "numbers.json"
    assert main(["demo", "--quick", "--seeds", "2", "--output", str(figure), "--json", str(numbers)]) == 0

    printed = capsys.readouterr().out
    for situation in SITUATIONS:
        assert printed.count(situation.name) >= 1
        assert f"{situation.optimizer} at {situation.rate:g}" in printed
    rows = [line for line in printed.splitlines() if "±" in line]
    assert [name for line in rows for name in NAMES if f" {name} " in line] == NAMES * len(SITUATIONS)

    contents = json.loads(numbers.read_text())
    runs = [Run(**numbers) for numbers in contents["runs"]]
    assert len(runs) == len(SITUATIONS) * len(NAMES) * 2
    assert summary_sentence(runs) in " ".join(printed.split())
    assert str(figure) in printed

    png = figure.read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "rich"])
def test_missing_extra_is_one_line_that_says_what_to_install(missing, capsys, monkeypatch):
    for name in {missing, *sys.modules}:
        if name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    for name in ("runningbn.demo.command", "runningbn.demo.experiment"):
        monkeypatch.delitem(sys.modules, name)
    assert main(["demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line
    assert "pip install 'runningbn[demo]'" in line


def test_other_missing_modules_are_not_blamed_on_the_extra(monkeypatch):
    def run_demo(**options):
        raise ModuleNotFoundError("No module named 'torch.something'", name="torch.something")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    with pytest.raises(ModuleNotFoundError, match=r"torch\.something"):
        main(["demo"])


def test_command_line_starts_without_the_extra():
    code = "import sys, runningbn.__main__; print({'sklearn', 'matplotlib', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_interruption_ends_with_130_and_one_line(capsys, monkeypatch):
    def run_experiment(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_experiment", run_experiment)
    assert main(["demo", "--quick"]) == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "expected an integer of at least 1, got 0"),
        (["--seeds", "2.5"], "expected an integer of at least 1, got 2.5"),
        (["--output", "figure.jpg"], ".png"),
        (["--output", "no/such/folder/figure.png"], "no folder"),
    ],
)
def test_wrong_arguments_are_refused_before_any_training(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the sentence


def test_sentence_says_who_won_and_by_how_much():
    runs = made_up([[0.80, 0.82], [0.90, 0.90], [0.96, 0.98]])
    assert summary_sentence(runs) == (
        "Over 2 seeds, and in points of mean test accuracy, RunningBatchNorm "
        "beat BatchNorm with batches of 1 (+16.0); it beat GroupNorm with batches of 1 (+7.0)."
    )


def test_sentence_admits_losses_and_ties():
    runs = made_up([[0.98, 0.97], [0.90, 0.92], [0.90, 0.91]])
    assert "RunningBatchNorm lost to BatchNorm with batches of 1 (-7.0)" in summary_sentence(runs)
    assert "it did about as well as GroupNorm with batches of 1 (-0.5)" in summary_sentence(runs)
    assert "beat" not in summary_sentence(runs)


def test_sentence_sorts_situations_by_outcome():
    columns = {"a": [[0.5], [0.9], [0.9]], "b": [[0.9], [0.9], [0.9]], "c": [[0.9], [0.5], [0.5]]}
    runs = [run for situation, column in columns.items() for run in made_up(column, situation=situation)]
    assert summary_sentence(runs) == (
        "Over 1 seed, and in points of mean test accuracy, RunningBatchNorm beat BatchNorm with a (+40.0), "
        "did about as well as BatchNorm with b (+0.0) and lost to BatchNorm with c (-40.0); "
        "it did about as well as GroupNorm with a (+0.0), b (+0.0) and c (+0.0)."
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_sentence_and_table_show_diverged_runs_of_anybody(loss, capsys):
    runs = made_up([[0.1, 0.1], [0.9, 0.9], [0.1, 0.1]], losses=(loss, 0.5, loss))
    sentence = summary_sentence(runs)
    assert "did about as well as BatchNorm" in sentence
    assert "lost to GroupNorm with batches of 1 (-80.0)" in sentence
    assert sentence.endswith(
        "; the loss was not finite at the end of 2 of 2 BatchNorm runs with batches of 1 "
        "and 2 of 2 RunningBatchNorm runs with batches of 1."
    )
    demo.Console(width=120).print(results_table(runs, SITUATIONS))
    assert capsys.readouterr().out.count("not finite in 2 of 2") == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        ([0.95, 0.95, 0.95], [0.90, 0.90, 0.90], 1),
        ([0.90, 0.90, 0.90], [0.95, 0.95, 0.95], -1),
        # A seed that says otherwise.
        ([0.99, 0.99, 0.89], [0.90, 0.90, 0.90], 0),
        # √((0.95·0.05 + 0.94·0.06) / 450) = 0.015: less is what other test images could have undone.
        ([0.95, 0.95, 0.95], [0.94, 0.94, 0.94], 0),
        ([0.90], [0.90], 0),
    ],
)
def test_a_difference_counts_if_every_seed_and_the_number_of_test_images_support_it(ours, theirs, outcome):
    entries = scores(made_up([theirs, theirs, ours]))["batches of 1"]
    assert verdict(entries["RunningBatchNorm"], entries["GroupNorm"]) == outcome


def test_scores_are_paired_by_seed_whatever_the_order_of_the_runs():
    runs = made_up([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    assert {name: score.accuracies for name, score in scores(reversed(runs))["batches of 1"].items()} == {
        "BatchNorm": (0.1, 0.2),
        "GroupNorm": (0.3, 0.4),
        "RunningBatchNorm": (0.5, 0.6),
    }


def test_json_has_null_for_a_loss_that_is_not_a_number():
    runs = made_up([[0.1], [0.9], [0.9]], losses=(math.nan, 0.5, math.inf))
    contents = json.loads(results_as_json(SITUATIONS, runs), parse_constant=pytest.fail)
    assert [run["loss"] for run in contents["runs"]] == [None, 0.5, None]


def test_figure_draws_every_contender_and_every_seed():
    runs = [
        run for s in SITUATIONS for run in made_up([[0.7, 0.8], [0.8, 0.9], [0.9, 1.0], [0.8, 1.0]], (0.5,) * 4, s.name)
    ]
    (axes,) = results_figure(runs, SITUATIONS).axes
    heights = [round(bar.get_height()) for container in axes.containers for bar in container]
    assert heights == [75] * 3 + [85] * 3 + [95] * 3 + [90] * 3
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == len(runs)
    assert [label.get_text() for label in axes.get_xticklabels()] == [s.name for s in SITUATIONS]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == NAMES


# -------------------------------------------------------------------------------------------------- the experiment


@each_situation
def test_contenders_differ_in_their_normalisation_only(situation):
    models = [build_model(situation, contender, seed=3) for contender in CONTENDERS]
    weights = [
        [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))] for model in models
    ]
    for group in zip(*weights):
        assert all(torch.equal(weight, group[0]) for weight in group)
    norms = {
        contender.name: {type(layer) for layer in model.modules() if "Norm" in type(layer).__name__}
        for contender, model in zip(CONTENDERS, models)
    }
    assert norms["BatchNorm"] == {nn.BatchNorm2d}
    assert norms["GroupNorm"] == {nn.GroupNorm}
    assert len(norms["RunningBatchNorm"]) == 1
    for name in ("RunningBatchNorm", "+ centred weights"):
        assert all(issubclass(kind, RunningBatchNorm) for kind in norms[name])
    centered = [
        {type(layer) for layer in model.modules() if type(layer).__name__ == "CenteredConv2d"} for model in models
    ]
    assert [len(kinds) for kinds in centered] == [0, 0, 0, 1]


@each_situation
def test_batches_are_what_the_situation_says(situation):
    labels = load_data().train_labels
    batches = schedule(labels, situation, seed=0)
    assert {len(batch) for batch in batches} == {situation.batch_size}
    assert len(batches) == situation.steps
    # No image comes again before the others had their turn.
    epochs = math.ceil(situation.steps * situation.batch_size / (len(labels) - 10 * situation.batch_size))
    assert torch.cat(batches).bincount().max() <= epochs
    if situation.one_class:
        assert all(labels[batch].unique().numel() == 1 for batch in batches)
    assert not torch.equal(torch.cat(batches), torch.cat(schedule(labels, situation, seed=1)))


@pytest.mark.slow
def test_runs_repeat_exactly_and_leave_the_random_state_and_the_settings_alone():
    before = torch.get_rng_state(), torch.get_num_threads(), torch.backends.mkldnn.enabled
    for situation in SITUATIONS:
        short = replace(situation, steps=4)
        for contender in CONTENDERS:
            first = run_one(short, contender, seed=0)
            assert torch.equal(torch.get_rng_state(), before[0])
            assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before[1:]
            torch.rand(1)
            assert run_one(short, contender, seed=0) == first
            assert run_one(short, contender, seed=1).loss != first.loss
            torch.set_rng_state(before[0])


def test_settings_are_put_back_after_an_interruption(monkeypatch):
    def train(*arguments):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("runningbn.demo.experiment.train", train)
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    with pytest.raises(KeyboardInterrupt):
        run_one(SITUATIONS[0], CONTENDERS[0], seed=0)
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before


@pytest.mark.slow
def test_other_processes_give_the_same_numbers_in_the_order_of_the_jobs():
    short = [replace(situation, steps=3) for situation in SITUATIONS[1:2]]
    heard = []
    runs = run_experiment(short, [5], heard.append)
    assert runs == [run_one(situation, contender, 5) for situation in short for contender in CONTENDERS]
    assert heard == runs


def test_diverged_runs_are_evaluated_and_kept():
    hopeless = replace(SITUATIONS[1], rate=1e38, steps=4)
    for contender in CONTENDERS:
        run = run_one(hopeless, contender, seed=0)
        assert not math.isfinite(run.loss)
        assert 0 <= run.accuracy < 0.3
