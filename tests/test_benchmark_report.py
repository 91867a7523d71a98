"""The report on real images says what is in the file: who is best, what is lost, and what is not measured yet."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks.accuracy import report, report_digits, report_real, report_real_details, report_results, results
from benchmarks.accuracy.contenders import BATCH_NORM, OURS, OURS_CENTERED, REAL_CONTENDERS, RECALIBRATED
from benchmarks.accuracy.figure_real import real_figure
from benchmarks.accuracy.grid_real import CELLS, FINE_TUNING_RATES, RATES, SCATTERED, trained_in
from benchmarks.accuracy.report_results import LEFT_ALONE, MABN, MAIN, STANDARDISED, TRANSFORMED, RealResults
from benchmarks.accuracy.report_tables import label
from benchmarks.accuracy.results import Cell
from benchmarks.accuracy.tasks_real import FINE_TUNING, MOBILE

ONE, TWO, ALIKE, LARGE = CELLS[:4]  # of the residual net with AdamW
PART = {"part": {"machine": {"code": "c0ffee", "processor": "abacus", "torch": "2", "date": "2026-01-01"}}}


def record(cell: Cell, name: str, *means: float, spread: float = 0.01, **also) -> dict:
    """Scores of two seeds, mean ± spread, at as many rates as there are means; validated as tested."""
    scores = [[mean - spread, mean + spread] for mean in means]
    rates = list(RATES["AdamW"][: len(means)])
    common = {"contender": name, "rates": rates, "seeds": [0, 1], "loss": [[0.5, 0.5] for _ in means]}
    return asdict(cell) | common | {"validation": scores, "test": scores} | also


def everybody(cell: Cell) -> list[dict]:
    """All contenders of a cell, with the same score."""
    return [record(cell, name, 0.7) for contender in trained_in(cell) for name in contender.names]


def found(*records: dict) -> RealResults:
    return RealResults([PART, *records])


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, their headers and rulers included."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_an_empty_file_has_a_page(tmp_path):
    empty = report_results.load_real(tmp_path / "real_images.jsonl")
    text = report.page(empty, results.Results([]))
    assert text.count("Nothing is measured yet") == 2
    assert text.index("## Real images") < text.index("## The quick grid: digits")
    assert "No cell" in report_real.residual_net_table(empty)
    assert real_figure(empty).axes


def test_every_contender_is_in_one_of_the_two_tables():
    names = {name for contender in REAL_CONTENDERS.values() for name in contender.names}
    assert set(LEFT_ALONE) | set(TRANSFORMED) == names
    assert not set(LEFT_ALONE) & set(TRANSFORMED)
    assert {BATCH_NORM, RECALIBRATED, OURS} < set(LEFT_ALONE)
    assert {OURS_CENTERED, MABN, STANDARDISED} < set(TRANSFORMED)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (OURS, "RunningBatchNorm"),
        (OURS_CENTERED, "RunningBatchNorm + centred weights"),
        ("exact, SquareRoot(0.1)", "RunningBatchNorm, exact, SquareRoot(0.1)"),
        ("BatchNorm, centred weights, update_bn_stats", "BatchNorm + centred weights + update_bn_stats"),
        (f"recalibrated first, {OURS}", "recalibrated first, RunningBatchNorm"),
        ("GroupNorm", "GroupNorm"),
    ],
)
def test_contenders_are_named_by_their_layers(name, expected):
    assert label(name) == expected


def test_the_best_of_a_line_is_bold_and_who_is_missing_is_a_dash():
    text = report_real.table(found(record(ONE, OURS, 0.8, 0.7), record(ONE, BATCH_NORM, 0.75)), LEFT_ALONE)
    header, _, line = rows(text)
    shown = dict(zip(header, line, strict=True))
    assert shown[""] == "residual net, batch 1"
    assert shown["RunningBatchNorm"] == "**80.0 ± 1.4**"
    assert shown["BatchNorm"] == "75.0 ± 1.4"
    assert shown["GroupNorm"] == "–"


def test_a_difference_is_to_the_best_other_of_the_same_table():
    # Centred, MABN is ahead; it is no rival of the default, which leaves convolutions alone.
    some = found(
        record(ONE, OURS, 0.8), record(ONE, BATCH_NORM, 0.75), record(ONE, MABN, 0.9), record(ONE, OURS_CENTERED, 0.85)
    )  # fmt: skip
    text = report_real.differences(some)
    (line,) = rows(text)[2:]
    # Two seeds at ± 0.01: a standard deviation of 0.01·√2, a standard error of 0.01; of the difference 0.01·√2.
    assert line == [
        "residual net, batch 1, AdamW", "+5.0 ± 1.4", "BatchNorm (7 of 8 others not run)",
        "**-5.0 ± 1.4**", "MABN (5 of 6 others not run)",
    ]  # fmt: skip
    assert "RunningBatchNorm: ahead in 1 of 1 cells, behind in 0," in text
    assert "behind in 1, by more than two standard errors in 1; mean difference -5.0 points" in text


def test_means_of_differences_are_told_apart_where_somebody_is_missing():
    partly = record(TWO, OURS, 0.9), record(TWO, BATCH_NORM, 0.7)
    text = report_real.differences(found(*everybody(ONE), *partly))
    assert "ahead in 1 of 2 cells, behind in 0, by more than two standard errors in 0; mean difference +10.0" in text
    assert "Where all the others were run: ahead in 0 of 1 cells, behind in 0," in text


def test_ten_times_the_best_rate_is_two_steps_of_the_sweep_further():
    some = found(record(ONE, OURS, 0.8, 0.9, 0.85, 0.6), record(ONE, MABN, 0.5, 0.6, 0.7))
    (line,) = rows(report_real_details.too_high(some))[2:]
    assert line[1:] == ["90.0 at 0.001 / 60.0 at 0.01", "–", "70.0 at 0.003 / not tried", "–"]


def test_training_mode_is_at_the_best_rate_of_evaluation():
    modes = {"training_mode": [[0.95, 0.97], [0.7, 0.8]]}
    some = found(record(ONE, OURS, 0.6, 0.7, **modes), record(LARGE, OURS, 0.6, 0.7, **modes))
    ((name, _, ours, *_),) = rows(report_real_details.modes(some))[2:]
    assert (name, ours) == ("residual net, batch 1, AdamW", "70.0 / 75.0")
    not_a_number = {"training_mode": [[None, 0.9], [None, 0.9]]}
    assert report_real_details.modes(found(record(ONE, OURS, 0.6, 0.7, **not_a_number))) == ""


def test_depthwise_filters_centred_or_not():
    cell = next(cell for cell in CELLS if cell.task == MOBILE)
    (too,) = report_real_details.DEPTHWISE_TOO
    (line,) = rows(report_real_details.depthwise(found(record(cell, OURS, 0.7), record(cell, too, 0.8))))[2:]
    assert line == ["mobile net, batch 1", "70.0 ± 1.4", "–", "**80.0 ± 1.4**"]
    assert report_real_details.depthwise(found(record(cell, OURS, 0.7))) == ""


def test_fine_tuning_is_by_domain_and_batch():
    plain, inverted = (Cell(task, 1, results.SHUFFLED, "AdamW", results.IMAGE_SAMPLES) for task in FINE_TUNING[:2])
    some = found(record(inverted, OURS, 0.8), record(plain, f"recalibrated first, {BATCH_NORM}", 0.9))
    assert rows(report_real_details.fine_tuning(some)) == [
        ["", "as they are, batch 1", "inverted, batch 1"],
        ["---"] * 3,
        ["RunningBatchNorm", "–", "**80.0 ± 1.4**"],
        ["recalibrated first, BatchNorm", "**90.0 ± 1.4**", "–"],
    ]
    assert report_real.table(some, LEFT_ALONE) == report_real.differences(some) == ""
    introduced = report_real.introduction(some, [plain, inverted])
    assert f"{', '.join(f'{rate:g}' for rate in FINE_TUNING_RATES)} with fine-tuning" in introduced


def test_the_introduction_says_where_there_are_more_seeds():
    cell = SCATTERED[0]
    more = record(cell, OURS, 0.7, seeds=[3, 4])
    text = report_real.section(found(record(cell, OURS, 0.7), record(cell, BATCH_NORM, 0.7), more))
    described = report_results.without_optimizer(cell)
    assert f"9 more at the best rate: {described} (1 of 2 contenders)." in text


def test_the_introduction_counts_cells_seeds_and_sources():
    old = {"part": {"machine": {"processor": "abacus", "torch": "1", "date": "2025-12-31"}}}
    some = RealResults([old, record(TWO, BATCH_NORM, 0.7), PART, old, PART, *everybody(ONE)])
    text = report_real.section(some)
    assert "There are 3 seeds\n  at each rate.\n" in text
    assert f"1 of the {len(CELLS)} cells of the grid are complete, 1 in part" in text
    lines = rows(text)
    assert ["not recorded", "abacus", "1", "2025-12-31", "1", "0"] in lines
    names = [name for contender in trained_in(ONE) for name in contender.names]
    assert ["`c0ffee`", "abacus", "2", "2026-01-01", str(len(names)), "3"] in lines  # default, centred, exact
    (absent,) = [line for line in text.splitlines() if line.startswith(f"- {TWO}: ")]
    assert "RunningBatchNorm;" in absent
    assert "BatchNorm + update_bn_stats;" in absent
    assert f"; {CELLS[-1]}" in text.split("- everybody in: ")[1]


def test_runs_that_are_not_finite_and_contenders_that_cannot_are_told():
    broken = record(ONE, OURS, 0.8) | {"loss": [[None, 0.5]]}
    cannot = {key: value for key, value in record(ONE, "GroupNorm").items() if key != "test"}
    text = report_real.table(found(broken, cannot | {"error": "one value per channel"}), LEFT_ALONE)
    assert "**80.0 ± 1.4**, 1 of 2 not finite" in text
    assert "cannot" in text


def test_the_readme_has_the_cells_in_which_all_main_contenders_were_run():
    some = found(*everybody(TWO), *(r for r in everybody(ONE) if r["contender"] != MABN), record(LARGE, OURS, 0.8))
    header, _, line = rows(report_real.residual_net_table(some))
    assert header == ["test accuracy in %, 2 seeds", *map(label, MAIN)]
    assert line[0] == "batches of 2"


def test_the_figure_has_a_row_for_each_cell_and_a_point_for_whoever_was_run():
    drawn = real_figure(found(record(ONE, OURS, 0.8), record(ALIKE, OURS, 0.6), record(ALIKE, MABN, 0.7)))
    (panel,) = drawn.axes
    assert [text.get_text() for text in panel.get_yticklabels()] == ["batch 1", "batch 4 of one class"]
    points = {container.get_label(): list(container.lines[0].get_xdata()) for container in panel.containers}
    assert points == {"MABN": [pytest.approx(70)], "RunningBatchNorm": [pytest.approx(80), pytest.approx(60)]}


def test_a_line_without_its_end_is_left_out(tmp_path):
    path = tmp_path / "real_images.jsonl"
    path.write_text(f"{json.dumps(record(ONE, OURS, 0.8))}\n{json.dumps(record(TWO, OURS, 0.8))}")
    assert report_results.load_real(path).cells() == [ONE]


def test_digits_without_a_complete_cell_still_have_their_tables():
    cell = Cell("perceptron", 2, results.SHUFFLED, "AdamW")
    text = report_digits.section(results.Results([PART, record(cell, OURS, 0.8)]))
    assert "0 of 1 begun cells are" in text
    assert [f"**{OURS}**", "**80.0 ± 1.4** at 0.0003 / 80.0"] in rows(text)
    assert "## Losses" not in text


def test_the_default_is_compared_with_those_that_leave_convolutions_alone():
    cell = Cell("perceptron", 2, results.SHUFFLED, "AdamW")
    scores = dict.fromkeys(report_digits.NAMES, 0.7) | {OURS_CENTERED: 0.8, OURS: 0.75}
    some = results.Results([PART, *(record(cell, name, score) for name, score in scores.items())])
    assert report_digits.losses(some, [cell], OURS) == report_digits.losses(some, [cell], OURS_CENTERED) == []
    ahead = results.Results([PART, *(record(cell, name, 1 - score) for name, score in scores.items())])
    (line,) = report_digits.losses(ahead, [cell], OURS_CENTERED)
    assert line.startswith(f"{cell}: 20.0 ± 1.4, -10.0 ± 1.4 against ")
