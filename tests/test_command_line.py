"""``python -m runningbn inspect`` and ``diff``: exit statuses, tables, JSON, messages."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import pretrained
from torch import nn

from runningbn import RunningBatchNorm, batchnormify, update_bn_stats
from runningbn.__main__ import main

C = 8
ROOT = Path(__file__).parent.parent


def net(depth: int = 2) -> nn.Module:
    return pretrained(nn.Sequential(*(nn.BatchNorm2d(C) for _ in range(depth))))


def spoilt() -> dict[str, torch.Tensor]:
    """A state dict with one error and one warning."""
    state = net().state_dict()
    state["0.running_var"][3] = -1
    state["1.weight"][:2] = 0
    return state


@pytest.fixture(name="save")
def saver(tmp_path):
    def save(contents, name="checkpoint.pt"):
        torch.save(contents, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture(autouse=True)
def _a_pipe_of_unknown_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def strict_json(text):
    """JSON as the standard has it: Python's own reader also takes NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def as_json(capsys, *arguments):
    status = main([*arguments, "--json"])
    return status, strict_json(capsys.readouterr().out)


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "runningbn", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def without(monkeypatch, *packages):
    """As where these are not installed."""
    for name in {*packages, *sys.modules}:
        if name.partition(".")[0] in packages:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "runningbn.inspection.tables", raising=False)


# ----------------------------------------------------------------------------------------------------------- inspect


def test_a_healthy_checkpoint_has_status_0_and_a_row_per_layer(save, capsys):
    assert main(["inspect", save(net().state_dict())]) == 0
    title, header, first, second, *rest = capsys.readouterr().out.splitlines()
    assert title.endswith("checkpoint.pt: 2 layers, 16 channels")
    assert header.split() == ["layer", "channels", "batches", "mean/std", "max", "var", "min", "median", "max"]
    assert first.split()[:3] == ["0", "8", "17"]
    assert second.split()[:3] == ["1", "8", "17"]
    assert rest[-1] == "no findings"


def test_errors_have_status_1_and_findings_say_where(save, capsys):
    assert main(["inspect", save(spoilt())]) == 1
    printed = capsys.readouterr().out
    assert "error: negative_variance, 1 channel\nrunning_var is negative" in printed
    assert "0 (1 of 8)" in printed
    assert "warning: zero_weight, 2 channels\n" in printed
    assert "1 (2 of 8)" in printed
    assert "no findings" not in printed


def test_warnings_alone_have_status_0(save, capsys):
    assert main(["inspect", save(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).state_dict())]) == 0
    assert "warning: untouched, 6 channels" in capsys.readouterr().out


def test_a_finding_in_many_layers_is_told_once(save, capsys):
    state = net(30).state_dict()
    for i in range(20):
        state[f"{i}.weight"][0] = 0
    assert main(["inspect", save(state)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("zero_weight") == 1
    assert "7 (1 of 8), 12 more layers: see --json" in printed


def test_several_state_dicts_are_told_apart_and_one_error_is_enough(save, capsys):
    path = save({"model": net().state_dict(), "ema": spoilt()})
    assert main(["inspect", path]) == 1
    printed = capsys.readouterr().out
    assert f"{path}, model: 2 layers" in printed
    assert f"{path}, ema: 2 layers" in printed


def test_what_is_left_out_is_told(save, capsys):
    status, contents = as_json(capsys, "inspect", save({**net().state_dict(), "obs.running_mean": torch.zeros(2, 2)}))
    assert status == 0
    assert contents["state_dicts"][0]["left_out"] == [{"name": "obs", "reason": "it has no running_var"}]
    main(["inspect", save({**net().state_dict(), "obs.running_mean": torch.zeros(2, 2)})])
    assert "left out: obs: it has no running_var" in capsys.readouterr().out


def test_json_of_an_inspection(save, capsys):
    state = spoilt()
    state["0.running_mean"][:] = math.nan
    path = save({"state_dict": state, "epoch": 1})
    status, contents = as_json(capsys, "inspect", path)
    assert status == 1
    assert contents["checkpoint"] == path
    assert contents["eps"] == 1e-5
    (state_dict,) = contents["state_dicts"]
    assert state_dict["place"] == "state_dict"
    broken, warned = state_dict["layers"]
    assert broken["mean_over_std"] == {"min": None, "median": None, "max": None}
    assert [(each["name"], each["severity"], each["channels"]) for each in broken["findings"]] == [
        ("not_finite", "error", 8),
        ("negative_variance", "error", 1),
    ]
    assert broken["findings"][1]["indices"] == [3]
    assert {key: warned[key] for key in ("name", "channels", "dtype", "batches_tracked", "state")} == {
        "name": "1", "channels": 8, "dtype": "float32", "batches_tracked": 17, "state": None,
    }  # fmt: skip
    assert warned["var"]["max"] == state["1.running_var"].max().item()
    assert "bias for any input" in warned["findings"][0]["sentence"]


def test_our_layers_tell_how_much_they_saw(save, capsys):
    layer = RunningBatchNorm(C)
    for _ in range(3):
        layer(torch.randn(4, C, 6))
    model = nn.ModuleList([layer, batchnormify(net(1))[0]])
    path = save(model.state_dict())
    _, contents = as_json(capsys, "inspect", path)
    trained, taken_over = (layer["state"] for layer in contents["state_dicts"][0]["layers"])
    assert trained["samples"] == 12
    assert trained["batches"] == 3
    assert 0 < trained["effective_elements"] <= 3 * 4 * 6
    assert taken_over == {"taken_over": True, "samples": None, "batches": 17.0, "effective_elements": None}
    main(["inspect", path])
    printed = capsys.readouterr().out
    assert "1 layer with pooled sums, of 12 samples seen" in printed
    assert "1 layer with pooled sums seeded from given statistics" in printed


# -------------------------------------------------------------------------------------------------------------- diff


def test_a_checkpoint_does_not_differ_from_itself(save, capsys):
    path = save(net().state_dict())
    status, contents = as_json(capsys, "diff", path, path)
    assert status == 0
    (comparison,) = contents["comparisons"]
    assert len(comparison["layers"]) == 2
    for layer in comparison["layers"]:
        assert layer["mean_shift"] == layer["mean_shift_max"] == 0
        # log and exp of a quotient that is 1 to a rounding of float64.
        assert layer["var_ratio"] == pytest.approx(1, abs=1e-15)
        assert layer["std_shift"] == pytest.approx(0, abs=1e-15)
    nothing = {"only_in_a", "only_in_b", "other_shapes", "left_out_a", "left_out_b"}
    assert [comparison[key] for key in nothing] == [[]] * len(nothing)


def test_the_farthest_layer_is_first_and_the_numbers_are_those_of_the_report(save, capsys):
    model = net(3)
    before = save(model.state_dict(), "before.pt")
    report = update_bn_stats(model, [torch.randn(4, C, 5, 5) for _ in range(3)])
    assert main(["diff", before, save({"state_dict": model.state_dict()}, "after.ckpt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("after.ckpt, state_dict")
    rows = [line.split() for line in lines[3:6]]
    expected = sorted(report.layers, key=lambda layer: layer.moved, reverse=True)
    assert [row[0] for row in rows] == [layer.name for layer in expected]
    # As printed by the report itself.
    assert [(row[2], row[4]) for row in rows] == [
        (f"{layer.mean_shift:.3f}", f"{layer.var_ratio:.3f}") for layer in expected
    ]


def test_a_prefix_that_is_left_out_is_told(save, capsys):
    plain = net().state_dict()
    wrapped = {f"module.{key}": value for key, value in plain.items()}
    assert main(["diff", save(plain, "a.pt"), save(wrapped, "b.pt")]) == 0
    assert "'module.' is removed from the names in B" in capsys.readouterr().out


def test_what_cannot_be_compared_is_told_with_status_1(save, capsys):
    a = {**net().state_dict(), "2.running_mean": torch.zeros(3), "obs.running_mean": torch.zeros(3)}
    b = {**nn.Sequential(nn.BatchNorm2d(3)).state_dict(), "5.running_mean": torch.zeros(1)}
    b |= {"5.running_var": torch.ones(1)}
    paths = save(a, "a.pt"), save(b, "b.pt")
    assert main(["diff", *paths]) == 1
    printed = capsys.readouterr().out
    for line in (
        "only in A: 1",
        "only in B: 5",
        "not compared: 0 has 8 channels in A, 3 in B",
        "left out of A: obs: it has no running_var",
    ):
        assert f"{line}\n" in printed
    status, contents = as_json(capsys, "diff", *paths)
    assert status == 1
    assert contents["comparisons"][0]["other_shapes"] == [{"name": "0", "channels_a": 8, "channels_b": 3}]


def test_state_dicts_without_a_counterpart_are_told_with_status_1(save, capsys):
    both = {"model": net().state_dict(), "ema": net().state_dict()}
    paths = save({"model": net().state_dict()}, "a.pt"), save(both, "b.pt")
    assert main(["diff", *paths]) == 1
    assert "b.pt, ema\n" in capsys.readouterr().out
    status, contents = as_json(capsys, "diff", *paths)
    assert (status, contents["only_in_a"], contents["only_in_b"]) == (1, [], ["ema"])
    assert main(["diff", paths[1], paths[1]]) == 0


def test_statistics_that_are_not_finite_are_null_in_json_with_status_1(save, capsys):
    state = net().state_dict()
    state["1.running_mean"][0] = math.nan
    paths = save(net().state_dict(), "a.pt"), save(state, "b.pt")
    status, contents = as_json(capsys, "diff", *paths)
    assert status == 1
    assert contents["comparisons"][0]["layers"][1]["mean_shift"] is None
    main(["diff", *paths])
    assert capsys.readouterr().out.splitlines()[3].split()[:3] == ["1", "8", "nan"]


def test_two_parts_of_one_file_are_compared(save, capsys):
    model, average = net(), net()
    average[0].running_mean += torch.linspace(-1, 1, C)
    path = save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()})
    assert main(["diff", f"{path}:state_dict", f"{path}:state_dict_ema"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A: {path}, state_dict", f"B: {path}, state_dict_ema"]
    status, contents = as_json(capsys, "diff", f"{path}:state_dict", f"{path}:state_dict_ema")
    assert status == 0
    assert (contents["a"], contents["b"]) == (f"{path}:state_dict", f"{path}:state_dict_ema")
    (comparison,) = contents["comparisons"]
    assert (comparison["place_a"], comparison["place_b"]) == ("state_dict", "state_dict_ema")
    shift = (average[0].running_mean - model[0].running_mean) / (average[0].running_var + 1e-5).sqrt()
    assert comparison["layers"][0]["mean_shift"] == pytest.approx(shift.square().mean().sqrt().item(), rel=1e-5)


def test_parts_with_several_state_dicts_are_paired_by_their_places_inside(save, capsys):
    def nets():
        return {"generator": net(1).state_dict(), "critic": net(2).state_dict()}

    path = save({"now": nets(), "ema": nets()})
    status, contents = as_json(capsys, "diff", f"{path}:now", f"{path}:ema")
    assert status == 0
    assert [(each["place_a"], each["place_b"]) for each in contents["comparisons"]] == [
        ("now.generator", "ema.generator"), ("now.critic", "ema.critic"),
    ]  # fmt: skip
    assert as_json(capsys, "inspect", f"{path}:now.critic")[1]["state_dicts"][0]["place"] == "now.critic"


def test_a_key_that_is_missing_is_told_what_there_is(save, capsys):
    path = save({"state_dict": net().state_dict(), "state_dict_ema": net().state_dict()})
    assert main(["inspect", f"{path}:ema"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("under the key 'ema'; there are some under: 'state_dict', 'state_dict_ema'")


def test_eps_of_the_layers_can_be_given(save, capsys):
    path = save(net().state_dict())
    _, contents = as_json(capsys, "inspect", path, "--eps", "0.5")
    assert contents["eps"] == 0.5
    assert [layer["eps"] for layer in contents["state_dicts"][0]["layers"]] == [0.5, 0.5]
    other = save({key: value + 1 for key, value in net().state_dict().items()}, "other.pt")
    shifts = []
    for eps in ("1e-5", "0.5"):
        _, contents = as_json(capsys, "diff", path, other, "--eps", eps)
        assert contents["eps"] == contents["comparisons"][0]["layers"][0]["eps"] == float(eps)
        shifts.append(contents["comparisons"][0]["layers"][0]["mean_shift"])
    assert shifts[1] < shifts[0]
    main(["inspect", path, "--eps", "0.5"])
    assert "sqrt(running_var + eps), eps = 0.5\n" in capsys.readouterr().out
    for wrong in ("0", "-1", "inf", "nan", "small"):
        with pytest.raises(SystemExit):
            main(["inspect", path, "--eps", wrong])


def test_wrappers_that_are_left_out_are_told(save, capsys):
    plain = net().state_dict()
    paths = [
        save({f"{prefix}{key}": value for key, value in plain.items()}, f"{i}.pt")
        for i, prefix in enumerate(("module.", "_orig_mod."))
    ]
    assert main(["diff", *paths]) == 0
    printed = capsys.readouterr().out
    assert "'module.' is removed from the names in A" in printed
    assert "'_orig_mod.' is removed from the names in B" in printed


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", ["inspect", "diff"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_file_that_cannot_be_read_is_one_line_and_status_2(name, options, tmp_path, capsys):
    paths = [str(tmp_path / "missing.pt")] * (2 if name == "diff" else 1)
    assert main([name, *paths, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line == f"runningbn {name}: {paths[0]}: there is no such file"


@pytest.mark.parametrize(
    "arguments", [["inspect"], ["diff", "a"], ["inspect", "a", "b"], ["inspect", "a", "--csv"], []]
)
def test_wrong_arguments_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_tables_need_rich_and_json_does_not(save, capsys, monkeypatch):
    path = save(net().state_dict())
    without(monkeypatch, "rich", "safetensors")
    assert main(["inspect", path, "--json"]) == 0
    assert main(["diff", path, path, "--json"]) == 0
    assert main(["backends"]) == 0
    capsys.readouterr()
    for arguments in (["inspect", path], ["diff", path, path]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("needs rich, which is not installed: pip install 'runningbn[cli]'")


def test_safetensors_files_need_the_package(tmp_path, capsys, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    without(monkeypatch, "safetensors")
    assert main(["inspect", str(tmp_path), "--json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("needs safetensors, which is not installed: pip install 'runningbn[cli]'")


def test_help_names_every_criterion_and_status(capsys):
    from runningbn.inspection.criteria import CRITERIA

    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{criterion.name} ({criterion.severity})" in text for criterion in CRITERIA)
    assert "Exit status: 0" in text


# -------------------------------------------------------------------------------------------------- terminals and pipes


def long_names():
    return nn.ModuleDict({"encoder": nn.ModuleDict({"stage" * 5: nn.ModuleDict({"normalization" * 2: net()})})})


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal_and_names_are_whole(width, save, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    path = save(long_names().state_dict())
    monkeypatch.chdir(Path(path).parent)
    for arguments in (["inspect", "checkpoint.pt"], ["diff", "checkpoint.pt", "checkpoint.pt"]):
        main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        header = next(line for line in lines if line.startswith("layer"))
        names = "".join(line[: header.index("channels")].strip() for line in lines)
        assert f"encoder.{'stage' * 5}.{'normalization' * 2}.1" in names


def test_in_a_pipe_every_layer_is_one_line_without_colours(save):
    state = {
        **long_names().state_dict(),
        "\x1b[31m.running_mean": torch.zeros(3),
        "\x1b[31m.running_var": -torch.ones(3),
    }
    done = command("inspect", save(state), FORCE_COLOR="", COLUMNS="")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert r"\x1b[31m" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if ".1 " in line)
    assert row.split()[:3] == [f"encoder.{'stage' * 5}.{'normalization' * 2}.1", "8", "17"]


class ClosedPipe(io.StringIO):
    """Standard output whose reader has gone; `file` lends it a descriptor."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_pipe_that_is_closed_ends_quietly(options, save, tmp_path, monkeypatch, capsys):
    path = save(net().state_dict())
    with (tmp_path / "pipe").open("w") as file:
        monkeypatch.setattr(sys, "stdout", ClosedPipe(file))
        assert main(["inspect", path, *options]) == 141
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_model_saved_whole_is_read_from_the_shell(save):
    done = command("inspect", save(net()))
    assert done.returncode == 0
    assert done.stderr == ""
    assert ": 2 layers, 16 channels" in done.stdout
