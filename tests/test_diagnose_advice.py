"""What `diagnose` advises: every rule where it applies and not where it does not, and the evidence behind the rules."""

import dataclasses
import json
import math
import re

import pytest
import torch
from cases import noise
from models import pretrained
from recalibration_models import mlp, pictures, rows
from torch import nn

from benchmarks import readme
from runningbn import Diagnosis, batchnormify, diagnose, update_bn_stats
from runningbn.diagnosis.rules import MAX_SENTENCES, RULES
from runningbn.diagnosis.thresholds import FEW, OFF, errors_to_exceed

DOCS = readme.ROOT / "docs"


def names(diagnosis: Diagnosis) -> list[str]:
    return [finding.rule for finding in diagnosis.findings]


def right(model: nn.Module, batches) -> nn.Module:
    """With statistics that are exact for evaluation."""
    update_bn_stats(model, batches, None, normalize="population")
    return model


DATA = [rows(32, seed=seed) for seed in range(20)]


UNTOLD = "they are not the cause. Give a metric to test whether the model relies on its batches."


@pytest.mark.parametrize(
    ("to", "metric", "conclusion"),
    [
        ("torch", None, UNTOLD),
        ("precise", None, UNTOLD),
        ("running", None, "it is not the BatchNorm."),
        ("torch", lambda model: 1.0, "it is not the BatchNorm."),
    ],
)
def test_nothing_is_off(to, metric, conclusion):
    found = diagnose(right(batchnormify(mlp(3), to), DATA), DATA, metric=metric)
    assert names(found) == ["nothing"]
    (sentence,) = found.advice
    start = "Stored statistics differ from the data by no more than "
    assert sentence.startswith(start)
    assert sentence.endswith(f" std in 3 layers, with standard errors of 0.037: {conclusion}")
    assert float(sentence.removeprefix(start).split()[0]) < 1e-4
    assert found.findings[0].severity == "fine"


@pytest.mark.parametrize("to", ["torch", "precise", "running"])
def test_the_moving_average_of_training_is_not_off(to):
    """What torch's momentum leaves after training on batches of 32 is known to 0.04 std."""
    model = batchnormify(mlp(2), to).train()
    for seed in range(100, 200):
        model(rows(32, seed=seed))
    assert names(diagnose(model, DATA)) == ["nothing"]


def test_other_data_is_told_with_the_remedy():
    model = right(mlp(3), DATA)
    found = diagnose(model, [x + 1 for x in DATA])
    assert names(found) == ["off"]
    (sentence,) = found.advice
    assert "off in 3 of 3 layers, first in 1 (mean by" in sentence
    assert "update_bn_stats repairs that (the output changes by" in sentence
    with update_bn_stats(model, [x + 1 for x in DATA]):
        assert names(diagnose(model, [x + 1 for x in DATA])) == ["nothing"]


@pytest.mark.parametrize(("by", "rule"), [(0.5, "nothing"), (2, "off")])
def test_off_begins_at_its_threshold(by, rule):
    layer = nn.BatchNorm1d(5)
    batches = [rows(256, seed=seed) for seed in range(40)]  # known to 0.01 std
    update_bn_stats(layer, batches)
    layer.running_mean += by * OFF * layer.running_var.sqrt()
    assert names(diagnose(layer, batches)) == [rule]


def test_a_deviation_within_its_error_is_not_called_off():
    layer = nn.BatchNorm1d(5)
    layer.running_mean.copy_(torch.arange(5) - 1 + 0.15 * (1 + torch.arange(5) / 2))
    layer.running_var.copy_((1 + torch.arange(5) / 2).square())
    assert names(diagnose(layer, [rows(8, seed=seed) for seed in range(8)])) == ["unresolved"]
    assert names(diagnose(layer, [rows(256, seed=seed) for seed in range(40)])) == ["off"]


@pytest.mark.slow
def test_few_batches_raise_no_alarm_and_claim_nothing():
    """Of the data that the statistics are right for. Two errors would be exceeded in a third of the cases."""
    off = 0
    for count in range(2, 8):
        for seed in range(20):
            layer = nn.BatchNorm1d(1)
            layer.running_mean.fill_(-1)
            found = diagnose(layer, [rows(8, 1, seed=100 * seed + i) for i in range(count)])
            assert "nothing" not in names(found)
            off += "off" in names(found)
    assert off <= 3  # of 120
    assert re.match(r"Too few data .* in 1 layer, standard errors are up to 0.\d+ std from 7 batches", found.advice[0])


def test_errors_to_exceed_are_those_of_students_t():
    """Three standard errors of a normal variable are exceeded with a probability of 0.135 % on a side."""
    stats = pytest.importorskip("scipy.stats")
    for batches in (*range(2, 60), 200):
        expected = stats.t.isf(stats.norm.sf(3), batches - 1)
        assert errors_to_exceed(batches) == pytest.approx(expected, rel=0.03)


def test_a_single_batch_tells_of_no_errors():
    found = diagnose(mlp(2), [rows(32)])
    assert names(found) == ["unresolved"]
    assert found.advice[0].startswith("A single batch has no error bars")


def test_frozen_layers_that_are_off_are_told_as_such():
    model = right(mlp(2), DATA).train()
    model[1].eval()
    model[4].eval()
    found = diagnose(model, [x + 1 for x in DATA])
    assert names(found) == ["off"]
    assert "these layers are frozen; update_bn_stats(model.eval(), …)" in found.advice[0]
    update_bn_stats(model.eval(), [x + 1 for x in DATA])
    assert names(diagnose(model, [x + 1 for x in DATA])) == ["nothing"]


def test_correlated_batches_ask_for_population():
    torch.manual_seed(0)
    model = pretrained(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    )
    batches = torch.randn(60, 1, 3, 1, 1) + 0.2 * torch.randn(60, 8, 3, 8, 8)
    found = diagnose(model, batches, None)
    assert names(found) == ["off", "few"]
    remedy = 'after update_bn_stats with these batches 4 would still be off, but none with normalize="population"'
    assert remedy in found.advice[0]
    assert "The samples of a batch are correlated: in" in found.advice[1]
    by_population = diagnose(model, batches, None, normalize="population")
    assert "update_bn_stats repairs that (" in by_population.advice[0]


def test_a_layer_that_feeds_itself_is_what_recalibration_leaves():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            for _ in range(3):
                x = self.norm(self.linear(x)).relu() + x
            return x

    model = pretrained(Recurrent())
    found = diagnose(model, DATA, normalize="population")
    left = max(found["norm"].recomputed.mean_shift, found["norm"].recomputed.std_shift)
    assert names(found) == ["off"]
    assert ("update_bn_stats repairs that, except for norm (" in found.advice[0]) == (left > OFF)


def test_metric_that_recomputed_statistics_do_not_help():
    model = right(mlp(2), DATA)
    shifted = [x + 1 for x in DATA]
    found = diagnose(model, shifted, metric=lambda model: 0.5)
    assert names(found) == ["off_without_effect"]
    assert "but with recomputed ones the metric gains less than 2% (the metric goes from 0.5 to 0.5)" in found.advice[0]
    helped = diagnose(model, shifted, metric=lambda model: -float(model(shifted[0]).mean(0).sub(2).square().sum()))
    assert names(helped)[0] in ("off", "off_without_effect")
    assert f"from {helped.metric.stored:.4g} to {helped.metric.recomputed:.4g}" in helped.advice[0]


def scored(stored: float, recomputed: float, batch: float, data=DATA, model=None) -> Diagnosis:
    values = iter((stored, recomputed, batch))
    return diagnose(model or right(mlp(2), DATA), data, metric=lambda _: next(values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.55, 0.61, 0.83), ["relies_on_batch"]),
        ((0.81, 0.81, 0.81), ["nothing"]),
        ((0.81, 0.81, 0.82), ["nothing"]),  # by a point more in training mode
        ((0.81, 0.90, 0.90), ["nothing"]),
        ((-3.0, -3.0, -1.0), ["relies_on_batch"]),  # minus a loss
        ((-1.0, -1.0, -3.0), ["nothing"]),
        ((math.nan, 0.5, 0.9), ["relies_on_batch"]),
        ((0.9, math.nan, 0.9), ["nothing"]),
    ],
)
def test_metric_by_batches_against_all_others(values, expected):
    assert names(scored(*values)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.1, 0.9, 0.9), "off"),
        ((0.9, 0.9, 0.9), "off_without_effect"),
        ((0.9, 0.1, 0.9), "off_without_effect"),
        ((math.nan, 0.9, 0.9), "off"),
        ((-5.0, -1.0, -1.0), "off"),
    ],
)
def test_metric_decides_whether_being_off_matters(values, expected):
    assert names(scored(*values, data=[x + 1 for x in DATA])) == [expected]


@pytest.mark.slow
def test_small_batches():
    model = right(mlp(2), [x[:2] for x in DATA * 20])
    batches = [rows(2, seed=seed) for seed in range(600)]
    right(model, batches)
    found = diagnose(model, batches, None)
    assert names(found) == ["nothing", "few"]
    assert found.advice[1] == (
        "Batches of 2 are small; for training from scratch, use RunningBatchNorm with centred weights "
        "(batchnormify(model, center_weights=True))."
    )


@pytest.mark.parametrize("size", [7, 8])
def test_few_begins_at_its_threshold(size):
    batches = [rows(size, seed=seed) for seed in range(100)]
    found = diagnose(right(mlp(2), batches), batches, None)
    assert ("few" in names(found)) == (size < FEW)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["running", "frozen"])
def test_layers_that_do_not_train_by_their_batch_need_no_large_ones(change):
    batches = [rows(2, seed=seed) for seed in range(600)]
    model = right(mlp(2), batches)
    model = batchnormify(model) if change == "running" else model.train()
    if change == "frozen":
        model[1].eval()
        model[4].eval()
    assert names(diagnose(model, batches, None)) == ["nothing"]


def test_correlation_that_may_be_chance_is_not_told():
    batches = [rows(10, 1, seed) for seed in range(8)]
    found = diagnose(nn.BatchNorm1d(1), batches)
    assert "few" not in names(found)


def test_layers_without_statistics():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False))
    update_bn_stats(model, DATA)
    found = diagnose(model, DATA)
    assert names(found) == ["without_statistics"]
    assert found.advice[0].startswith("No running statistics in 1: ")


def test_at_most_three_sentences_the_most_important_first():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5))
    model[2].running_var[0] = math.nan
    batches = [rows(4, seed=seed) + 3 for seed in range(20)]
    found = diagnose(model, batches)
    assert names(found) == ["not_finite", "off", "without_statistics", "few"]
    assert len(found.advice) == MAX_SENTENCES == 3
    assert str(found).splitlines()[-3:] == list(found.advice)


def test_many_names_are_shortened():
    model = mlp(6)
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean[0] = math.nan
    assert "The stored statistics of 1, 4 and 4 more are NaN" in diagnose(model, DATA).advice[0]


# ------------------------------------------------------------------------------------- the table of rules, the evidence


def test_rules_are_in_the_docs():
    page = (DOCS / "pitfalls.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.severity} | {rule.when} | {rule.reason} |" in page


def test_threshold_of_off_is_the_noise_of_the_moving_average_with_batches_of_eight():
    torch.manual_seed(0)
    means = nn.BatchNorm1d(2000, momentum=0.1)
    for seed in range(200):
        means(noise((8, 2000), seed))
    noise_of_mean = float(means.running_mean.std())
    assert noise_of_mean == pytest.approx((0.1 / 1.9 / 8) ** 0.5, rel=0.1)
    assert noise_of_mean < OFF
    assert noise_of_mean * 2**0.5 > OFF  # with batches of 4


def test_accuracy_still_says_that_few_are_fewer_than_eight():
    page = (DOCS / "accuracy.md").read_text(encoding="utf-8")
    for contender in ("running, Horizon()", "running, centred weights"):
        section = page.split(f"### {contender}, by batch size\n")[1].split("###")[0]
        ahead = {row[0]: float(row[4]) for line in section.splitlines() if (row := cells(line))[0][:1].isdigit()}
        assert all(ahead[size] >= 1 for size in ("1", "2", "4"))
        assert all(abs(ahead[size]) < 0.5 for size in ("8", "32"))
        assert ahead["4 of one class"] > 10


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def table(page: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table below a heading: its rows by name, each a cell by column."""
    lines = [line for line in page.split(heading)[1].splitlines() if line.startswith("|")]
    header = cells(lines[0])
    end = next(i for i, line in enumerate(lines[2:], 2) if cells(line)[0] == "" or i + 1 == len(lines))
    return {row[0]: dict(zip(header, row)) for row in map(cells, lines[2:end])}


def test_accuracy_still_says_that_models_rely_on_batches_of_one():
    page = (DOCS / "accuracy.md").read_text(encoding="utf-8")
    row = table(page, "### Training mode and evaluation")["residual net, batch 1, AdamW"]
    modes = {name: [float(part) for part in row[name].split("/")] for name in ("BatchNorm", "RunningBatchNorm")}
    evaluation, by_batch = modes["BatchNorm"]
    score = table(page, "### Convolutions left alone")["residual net, batch 1"]["BatchNorm + update_bn_stats"]
    recalibrated = float(score.split("±")[0])
    assert by_batch - evaluation > 10
    assert recalibrated - evaluation < (by_batch - evaluation) / 2
    assert abs(modes["RunningBatchNorm"][0] - modes["RunningBatchNorm"][1]) < 2


def test_pages_that_reasons_name_are_there():
    titles = {re.match(r"# (.*)", path.read_text(encoding="utf-8"))[1] for path in DOCS.glob("*.md")}
    for rule in RULES:
        for named in re.findall(r"pages? (.*)\.$", rule.reason):
            assert set(named.split(" and ")) <= titles


# ------------------------------------------------------------------------------------------------ table, JSON, plot


def test_table_is_in_the_order_of_the_model():
    found = diagnose(mlp(4), DATA)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [layer.name for layer in found.layers] == ["1", "4", "7", "10"]
    row = lines[1].split()
    layer = found["1"]
    stored = layer.stored
    assert row[1:3] == ["32", "32"]
    assert row[3:6] == [f"{stored.mean_shift:.3f}", f"{stored.var_ratio:.3f}", f"{stored.standard_error:.4f}"]
    assert row[-1] == f"{layer.between.effective_batch:.1f}"
    with pytest.raises(KeyError, match="nowhere"):
        found["nowhere"]


def test_a_diagnosis_is_frozen_and_keeps_its_numbers():
    model = mlp(2)
    found = diagnose(model, DATA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batches = 3
    before = found.to_dict()
    model[1].running_mean.fill_(99)
    assert found.to_dict() == before


@pytest.mark.parametrize("spoil", [False, True])
def test_json_has_everything_and_null_for_what_is_not_finite(spoil):
    model = mlp(2)
    pairs = [x[:1].expand(2, 5) + torch.tensor([[0.0], [1.0]]) for x in DATA]
    if spoil:
        model[1].running_mean[0] = math.nan
    found = diagnose(model, pairs if spoil else DATA, metric=lambda model: 0.5)
    contents = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert contents["batches"] == 20
    assert contents["metric"] == {"stored": 0.5, "recomputed": 0.5, "batch": 0.5}
    assert [each["rule"] for each in contents["findings"]] == names(found)
    layer = contents["layers"][1]
    assert layer["name"] == "4"
    if spoil:
        assert layer["stored"]["mean_shift"] is None
        assert contents["layers"][0]["stored"]["mean_shift"] is None
        assert contents["output_recomputed"] == {"relative_rms": None, "agreement": None, "batches": 0}
    else:
        assert layer["stored"]["mean_shift"] == found["4"].stored.mean_shift
        assert layer["between"]["effective_batch"] == found["4"].between.effective_batch


def test_plot_draws_every_layer_and_saves(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    found = diagnose(mlp(5), DATA)
    figure = found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 1000
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [layer.name for layer in found.layers]
    widths = [bar.get_width() for bar in right.patches]
    assert widths == [layer.between.effective_batch for layer in found.layers]
    assert matplotlib.get_backend() == before


def test_plot_where_little_is_known(tmp_path):
    pytest.importorskip("matplotlib")
    diagnose(mlp(1), [rows(8)]).plot(tmp_path / "one.png")
    diagnose(nn.BatchNorm2d(3), pictures(4).split(1)).plot(tmp_path / "ones.png")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    found = diagnose(mlp(1), DATA)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Diagnosis\.plot needs matplotlib: pip install"):
        found.plot()
