"""The accuracy benchmark: its layers are their papers', a stack is its models, runs resume, the report says what is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from pools import InThisProcess
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy import networks, published, report, report_tables, results, runner, tasks, train
from benchmarks.accuracy.contenders import CONTENDERS, OURS, BatchRenorm
from benchmarks.accuracy.figure import figure
from benchmarks.accuracy.grid import CELLS, GRID, rates
from benchmarks.accuracy.jobs import Job
from benchmarks.accuracy.report_digits import NAMES
from benchmarks.accuracy.report_results import RealResults
from benchmarks.accuracy.results import ONE_CLASS, SHUFFLED, Cell
from benchmarks.accuracy.run import run

TINY = Cell("perceptron", 8, SHUFFLED, "AdamW", samples=24)
TINY_GRID = replace(GRID, cells=(TINY,))
each_task = pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def output_and_gradients(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


# ------------------------------------------------------------------------------------------------------- contenders


def renorm(steps_done: int = 0, steps: int = 1300) -> BatchRenorm:
    layer = BatchRenorm(3, steps).double()
    layer.step = steps_done
    with torch.no_grad():
        layer.mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.std.copy_(torch.tensor([0.7, 2.0, 1.0]))
        layer.weight.copy_(torch.tensor([1.5, 0.5, -1.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return layer


def test_batch_renormalization_begins_as_batch_norm():
    layer, peer = renorm(), nn.BatchNorm2d(3).double()
    peer.load_state_dict(layer.state_dict(), strict=False)
    x, dy = noise(4, 3, 5, 5), noise(4, 3, 5, 5, seed=1)
    for ours, theirs in zip(output_and_gradients(layer, x, dy), output_and_gradients(peer, x, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_batch_renormalization_within_its_limits_is_the_moving_statistics():
    # Far into the run, r = σ_B/σ and d = (μ_B − μ)/σ undo the batch: what is left is evaluation's formula.
    layer = renorm(steps_done=1000)
    x = noise(4, 3, 5, 5)
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected)
    # 20 steps of 1300 is a weight of 20/1300.
    torch.testing.assert_close(layer.mean[0], 0.5 + 20 / 1300 * (x[:, 0].mean() - 0.5))


def test_batch_renormalization_limits_grow_as_in_the_paper():
    assert renorm(50).limits() == (1, 0)
    assert renorm(250).limits() == pytest.approx((1 + 2 * 20_000 / 35_000, 5))
    assert renorm(400).limits() == (3, 5)
    r, d = renorm(400).corrections(torch.tensor([9.0, -1, -9]), torch.tensor([7.0, 1, 0.1]))
    torch.testing.assert_close(r, torch.tensor([3, 0.5, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([5.0, 0, -5], dtype=torch.float64))


def test_batch_renormalization_takes_r_and_d_for_constants():
    layer = renorm(steps_done=1000)
    x = noise(4, 3, 5).requires_grad_()
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    r, d = (t.detach().view(-1, 1) for t in layer.corrections(mean, (var + layer.eps).sqrt()))
    z = (x - mean.view(-1, 1)) / (var + layer.eps).sqrt().view(-1, 1)
    dy = noise(4, 3, 5, seed=1)
    (expected,) = torch.autograd.grad((z * r + d) * layer.weight.view(-1, 1), x, dy)
    torch.testing.assert_close(output_and_gradients(layer, x.detach(), dy)[1], expected)


# ------------------------------------------------------------------------------------------------- tasks and stacks


@each_task
def test_data_are_the_same_every_time_and_their_parts_differ(task):
    data = task.data(SHUFFLED)
    tasks.digits.cache_clear()
    tasks.canvases.cache_clear()
    for part, again in zip(data, task.data(SHUFFLED), strict=True):
        assert all(map(torch.equal, part, again))
    assert len(data.train.inputs) == tasks.SAMPLES
    # Larger images were standardised before they were enlarged, which shows more of the borders.
    assert abs(data.train.inputs.mean()) < (0.1 if task.name == "larger images" else 1e-4)
    seen = {row.numpy().tobytes() for row in data.train.inputs}
    assert not any(row.numpy().tobytes() in seen for part in data[1:] for row in part.inputs)


@pytest.mark.parametrize("kind", [SHUFFLED, ONE_CLASS])
def test_a_schedule_is_of_full_batches_and_nothing_twice_in_an_epoch(kind):
    classes = tasks.digits().train.classes
    batches = tasks.schedule(classes, 8, kind, 1088, seed=3)
    assert batches.shape == (136, 8)
    assert torch.equal(batches, tasks.schedule(classes, 8, kind, 1088, seed=3))
    assert not torch.equal(batches, tasks.schedule(classes, 8, kind, 1088, seed=4))
    assert len(batches[:100].unique()) == 800
    alike = (classes[batches] == classes[batches[:, :1]]).all(1)
    assert alike.all() if kind == ONE_CLASS else not alike.any()


def test_canvases_show_what_their_labels_say():
    part = tasks.canvases(ONE_CLASS).train
    ink = part.inputs[:, 0] > part.inputs.min()
    assert torch.equal(ink, part.labels != tasks.BACKGROUND)
    digits = torch.where(ink, part.labels, part.classes.view(-1, 1, 1))
    assert (digits == part.classes.view(-1, 1, 1)).all()
    mixed = tasks.canvases(SHUFFLED).train.labels[0].unique()
    assert len(mixed) > 2


def test_scores():
    labels = torch.tensor([[0, 0, 1, 10]])
    answers = torch.stack([labels, torch.tensor([[0, 1, 1, 1]])], 1)
    # 0: 1 of 2, 1: 1 of 3, 10: 0 of 1
    assert tasks.mean_iou(answers, labels).tolist() == pytest.approx([3 / 11, (1 / 2 + 1 / 3) / 11])
    assert tasks.accuracy(answers[:, :, 0], labels[:, 0]).tolist() == [1, 1]


@each_task
def test_a_stack_is_its_models(task):
    norm = CONTENDERS["GroupNorm"].norm(1)
    stack = networks.build_stack(task.network, norm, seeds=(0, 7), copies=2).double()
    alone = networks.build_stack(task.network, norm, seeds=(7,), copies=1).double()
    x = task.data(SHUFFLED).test.inputs[:3].double()
    outputs = stack(torch.cat([x] * 4, 1)).unflatten(1, (4, -1))
    for number in (1, 3):
        torch.testing.assert_close(outputs[:, number], alone(x))
    assert not torch.allclose(outputs[:, 0], outputs[:, 1])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", ["BatchNorm", "running, Horizon()", "exact, SquareRoot(0.1)"])
def test_training_a_stack_is_training_each_model_by_torch(name, optimizer):
    task, norm = tasks.TASKS["plain conv net"], CONTENDERS[name].norm(6)
    part = task.data(SHUFFLED).train
    part = part._replace(inputs=part.inputs.double())
    seeds, rate = (0, 7), torch.tensor([0.003, 0.01])
    batches = torch.stack([tasks.schedule(part.classes, 4, SHUFFLED, 24, seed) for seed in seeds], 1)
    stack = networks.build_stack(task.network, norm, seeds, 2).double()
    rated = train.RatedOptimizer(optimizer, stack, rate.double().repeat_interleave(2))
    train.train(stack, rated, part, batches, copies=2)

    single = networks.build_stack(task.network, norm, seeds[1:], 1).double()
    plain = train.OPTIMIZERS[optimizer](single.parameters(), lr=rate[1].item())
    for step, batch in enumerate(batches[:, 1]):
        plain.param_groups[0]["lr"] = rate[1].item() * (1 - step / 6)
        plain.zero_grad()
        F.cross_entropy(single(part.inputs[batch]).flatten(1), part.labels[batch]).backward()
        plain.step()
    # Rates are float32 here and there; AdamW divides by the root of gradients that may be tiny.
    last = {name: parameter.view(4, -1)[3] for name, parameter in stack.named_parameters()}
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(parameter.flatten(), last[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- grid and runs


def test_every_cell_is_there_once_and_has_rates():
    assert len(set(CELLS)) == len(CELLS)
    for cell in CELLS:
        assert cell.task in tasks.TASKS
        assert len(rates(cell)) >= 4
    assert {cell.batch for cell in CELLS} == {1, 2, 4, 8, 32}


def test_a_run_is_the_same_every_time_and_knows_what_cannot_be_trained():
    job = Job(TINY, "BatchNorm", (0.003,), (0, 1))
    first, again = (run(job) for _ in range(2))
    assert [record["contender"] for record in first] == ["BatchNorm", "BatchNorm, update_bn_stats"]
    for one, other in zip(first, again, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    (cannot,) = run(Job(replace(TINY, batch=1), "PreciseBatchNorm", (0.1,), (0,)))
    assert cannot["error"] == "one value per channel"


@pytest.fixture
def few_contenders(monkeypatch):
    for name in set(CONTENDERS) - {"BatchNorm", "GroupNorm"}:
        monkeypatch.delitem(CONTENDERS, name)


def test_a_killed_run_is_resumed(tmp_path, few_contenders, monkeypatch):
    path = tmp_path / "accuracy.jsonl"
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    done: list[str] = []
    runner.run_missing(path, TINY_GRID, jobs=1, budget=math.inf, say=done.append)
    assert len(done) == 3  # two contenders, "complete"
    complete = path.read_text()
    lines = complete.splitlines(keepends=True)

    # Killed while it wrote the line of GroupNorm's sweep, after those of BatchNorm, recalibrated and not.
    path.write_text("".join(lines[:3]) + lines[3][:40])
    resumed: list[str] = []
    runner.run_missing(path, TINY_GRID, jobs=1, budget=math.inf, say=resumed.append)
    assert [line.rpartition(",")[0] for line in resumed] == [line.rpartition(",")[0] for line in done[1:]]

    def without_times(text: str) -> list[dict]:
        return [{**json.loads(line), "seconds": 0} for line in text.splitlines() if '"part"' not in line]

    assert without_times(path.read_text()) == without_times(complete)
    assert list(TINY_GRID.pending(results.load(path))) == []


def test_nothing_begins_after_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    said: list[str] = []
    runner.run_missing(tmp_path / "accuracy.jsonl", TINY_GRID, jobs=1, budget=0, say=said.append)
    assert said == [f"{len(CONTENDERS)} runs left"]


# ------------------------------------------------------------------------------------------------------- the report


def made_up(cell: Cell, scores: dict[str, list[list[float]]], **also) -> list[dict]:
    """A sweep of two rates and two seeds each, validated as tested."""
    return [
        {
            **asdict(cell), "contender": name, "rates": [0.001, 0.01], "seeds": list(results.SWEEP_SEEDS),
            "validation": values, "test": values, "loss": [[0.5, 0.5], [0.5, None]],
        }
        | also
        for name, values in scores.items()
    ]  # fmt: skip


@pytest.fixture
def made_up_results() -> results.Results:
    """In one cell the default is best, in the next it loses, in the last most contenders are missing."""
    first, second, third = (Cell("residual net", batch, SHUFFLED, "AdamW") for batch in (2, 32, 8))
    level = {name: [[0.8, 0.82], [0.9, 0.92]] for name in NAMES}
    records = made_up(first, level | {OURS: [[0.85, 0.85], [0.95, 0.97]]})
    records += made_up(second, level | {"GroupNorm": [[0.7, 0.7], [0.93, 0.93]]})
    records += made_up(third, {OURS: [[0.5, 0.5], [0.6, 0.6]], "exact, SquareRoot(0.1)": [[0.5, 0.5], [0.7, 0.7]]})
    records += [record | {"error": "one value per channel"} for record in made_up(third, {"PreciseBatchNorm": []})]
    machine = {"processor": "abacus", "torch": "2", "date": "2026-01-01"}
    return results.Results([{"part": {"machine": machine}}, *records])


def test_scores_are_at_the_rate_that_validation_likes(made_up_results):
    cell = made_up_results.cells()[0]
    (record,) = made_up(Cell("perceptron", 2, SHUFFLED, "SGD"), {"GroupNorm": [[0.9, 0.9], [0.1, 0.1]]})
    made_up_results.add(record | {"validation": [[0.1, 0.2], [0.3, 0.4]]})
    made_up_results.add(record | {"seeds": [5, 6], "rates": [0.01], "test": [[0.7]], "loss": [[1.0]]})
    best = made_up_results.best(made_up_results.cells()[-1], "GroupNorm")
    assert (best.rate, best.test, best.diverged) == (0.01, (0.1, 0.1, 0.7), 1)
    assert made_up_results.best(cell, OURS).mean == pytest.approx(0.96)
    assert made_up_results.worst(cell, OURS).rate == 0.001


def test_the_report_shows_the_best_the_losses_and_what_is_missing(made_up_results):
    text = report.page(RealResults(), made_up_results)
    rows = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if line.startswith("|")}
    assert "2 of 3 begun cells" in text
    # Behind by 2 points of 93 in the second cell only; nobody has a better worst rate.
    assert (f"**{OURS}**", "1 of 2", "1.0", "2.0", "0.0") in rows
    assert ("GroupNorm", "1 of 2", "2.5", "5.0", "7.5") in rows
    losses = text.split("## Losses")[1].split("## Task")[0]
    assert losses.count("residual net, batch 32, AdamW: 91.0 ± 1.4, -2.0 ± 1.0 against GroupNorm") == 1
    assert "residual net, batch 2," not in losses
    (line,) = [line for line in text.splitlines() if line.startswith("| PreciseBatchNorm | 91.0")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "91.0 ± 1.4 at 0.01 / 81.0, 1 of 2 not finite", "cannot", "91.0 ± 1.4 at 0.01 / 81.0, 1 of 2 not finite",
    ]  # fmt: skip
    (line,) = [line for line in text.splitlines() if line.startswith("| GroupNorm | 91.0")]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["–", "**93.0 ± 0.0** at 0.01 / 70.0, 1 of 2 not finite"]


def test_batches_of_two_are_set_beside_batches_of_32(made_up_results):
    row, centred = report_tables.against_reference(made_up_results).splitlines()[2:]
    assert "| **running, centred weights** | 91.0" in centred
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [
        "91.0 ± 1.4", "91.0 ± 1.4", "–", "96.0 ± 1.4", "–", "–", "+5.0 ± 1.4", "+5.0 ± 1.4",
    ]  # fmt: skip


def test_the_figure_has_a_line_for_whoever_was_run(made_up_results):
    panels = figure(made_up_results).axes
    drawn = {line.get_label(): list(line.get_xdata()) for panel in panels for line in panel.get_lines()}
    assert drawn[OURS] == [1, 3, 4]
    assert drawn["GroupNorm"] == [1, 4]
    assert sum(any(text.get_text() == "not run" for text in panel.texts) for panel in panels) == len(panels) - 1


def test_published_tables_have_as_many_numbers_as_columns():
    for theirs, columns in ((published.TABLE_1, published.NUMBERS), (published.TABLE_2, published.SPLITS)):
        assert {len(row) for row in theirs.values()} == {1 + len(columns)}


def test_samples_that_are_normalised_together():
    layer, peer = published.SplitBatchNorm2d(3, normalised=2).double(), nn.BatchNorm2d(3).double()
    x = noise(6, 3, 4, 4)
    torch.testing.assert_close(layer(x), torch.cat([nn.BatchNorm2d(3).double()(part) for part in x.split(2)]))
    peer(x[:2])
    torch.testing.assert_close(layer.running_var, peer.running_var)
    torch.testing.assert_close(layer.eval()(x), peer.eval()(x))
