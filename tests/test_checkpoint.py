"""Checkpoints read without model code: what is found in them, and what is said about it."""

import math
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoints import C, saved, small_net
from models import pretrained
from torch import nn
from torch.optim.swa_utils import AveragedModel

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, batchnormify, update_bn_stats
from runningbn.inspection.comparison import compare
from runningbn.inspection.criteria import CRITERIA, ERROR, findings, mean_over_std
from runningbn.inspection.layers import read_state_dict
from runningbn.inspection.reading import CheckpointError, read_checkpoint


def only_layer(state):
    """The one layer of a state dict."""
    (layer,) = read_state_dict("", state).layers
    return layer


def named_findings(state):
    return {each.criterion.name: list(each.indices) for each in findings(only_layer(state))}


# --------------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    ("wrap", "place", "prefix"),
    [
        (lambda state: state, "", ""),
        (dict, "", ""),
        (lambda state: {"state_dict": state, "epoch": 3, "lr_schedulers": []}, "state_dict", ""),
        (lambda state: {"model": state, "optimizer": {"state": {0: {"step": 1}}}}, "model", ""),
        (lambda state: {"ema": {"shadow": state, "decay": 0.9}}, "ema.shadow", ""),
        (lambda state: {"models": [state]}, "models.0", ""),
        (lambda state: {f"module.{key}": value for key, value in state.items()}, "", "module."),
        (lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}}, "state_dict", "model."),
    ],
    ids=["plain", "dict", "lightning", "optimizer", "ema", "list", "ddp", "prefixed"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_layers_are_found_in_any_container_with_their_whole_names(tmp_path, wrap, place, prefix, legacy):
    model = small_net()
    path = saved(tmp_path, wrap(model.state_dict()), _use_new_zipfile_serialization=not legacy)
    (state_dict,) = read_checkpoint(path)
    assert state_dict.place == place
    assert [layer.name for layer in state_dict.layers] == [f"{prefix}1", f"{prefix}2.0"]
    assert not state_dict.left_out
    first = state_dict.layers[0]
    assert torch.equal(first.mean, model[1].running_mean.double())
    assert torch.equal(first.var, model[1].running_var.double())
    assert torch.equal(first.weight, model[1].weight.detach().double())
    assert torch.equal(first.bias, model[1].bias.detach().double())
    assert first.batches == 17


def test_a_model_and_its_average_are_two_state_dicts(tmp_path):
    state = small_net().state_dict()
    found = read_checkpoint(saved(tmp_path, {"model": state, "ema": {k: v.clone() for k, v in state.items()}}))
    assert [(state_dict.place, len(state_dict.layers)) for state_dict in found] == [("model", 2), ("ema", 2)]


def test_a_checkpoint_that_contains_itself_is_read_once(tmp_path):
    contents = {"model": small_net().state_dict()}
    contents["self"] = contents
    assert [state_dict.place for state_dict in read_checkpoint(saved(tmp_path, contents))] == ["model"]


def test_a_layer_saved_by_itself_has_no_name(tmp_path):
    (state_dict,) = read_checkpoint(saved(tmp_path, nn.BatchNorm2d(C).state_dict()))
    assert [layer.name for layer in state_dict.layers] == [""]


def test_an_averaged_model_is_read(tmp_path):
    averaged = AveragedModel(small_net(), use_buffers=True)
    averaged.update_parameters(small_net())
    (state_dict,) = read_checkpoint(saved(tmp_path, averaged.state_dict()))
    assert [layer.name for layer in state_dict.layers] == ["module.1", "module.2.0"]


def test_frozen_layers_count_no_batches_and_layers_without_affine_have_no_weight():
    state = nn.BatchNorm2d(C, affine=False).state_dict()
    del state["num_batches_tracked"]
    layer = only_layer(state)
    assert (layer.batches, layer.weight, layer.bias) == (None, None, None)
    assert not {"affine_not_finite", "zero_weight"} & named_findings(state).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_of_any_dtype_are_read_exactly(dtype):
    state = small_net()[1].to(dtype).state_dict()
    layer = only_layer(state)
    assert layer.dtype == dtype
    assert torch.equal(layer.mean, state["running_mean"].double())


def test_an_averaged_count_of_batches_that_is_no_number_is_none():
    for tracked in (torch.tensor(math.nan), torch.zeros(3)):
        assert only_layer({**nn.BatchNorm2d(C).state_dict(), "num_batches_tracked": tracked}).batches is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"running_var": None}, "no running_var"),
        ({"running_mean": None}, "no running_mean"),
        ({"running_mean": torch.zeros(C, 2)}, "(8, 2)"),
        ({"running_mean": torch.zeros(())}, "()"),
        ({"running_mean": torch.zeros(0)}, "(0,)"),
        ({"running_var": torch.ones(C + 1)}, "running_var has the shape (9,)"),
        ({"weight": torch.ones(C, 1)}, "weight has the shape (8, 1)"),
        ({"running_mean": torch.zeros(C, device="meta")}, "no plain real numbers"),
        ({"running_mean": torch.zeros(C, dtype=torch.complex64)}, "no plain real numbers"),
    ],
)
def test_what_is_no_layer_is_left_out_with_its_reason(change, reason):
    state = {**nn.BatchNorm2d(C).state_dict(), **change}
    state_dict = read_state_dict("", {key: value for key, value in state.items() if value is not None})
    assert not state_dict.layers
    ((name, said),) = state_dict.left_out
    assert name == ""
    assert reason in said


# -------------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_gives_what_torch_gives_in_natural_order(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = pretrained(nn.Sequential(*(nn.BatchNorm2d(C) for _ in range(11)), nn.Linear(3, 3)))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (of_file,) = read_checkpoint(tmp_path / "model.safetensors")
    (of_folder,) = read_checkpoint(tmp_path)
    (of_torch,) = read_checkpoint(saved(tmp_path, model.state_dict()))
    assert [layer.name for layer in of_file.layers] == [str(i) for i in range(11)]
    assert [layer.name for layer in of_folder.layers] == [layer.name for layer in of_torch.layers]
    for ours, theirs in zip(of_file.layers, of_torch.layers, strict=True):
        assert torch.equal(ours.var, theirs.var)
        assert ours.batches == theirs.batches


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["one file", "shards"])
def test_a_transformers_model_saved_with_save_pretrained(tmp_path, shard_size):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config)
    # Big enough for a second shard, and no BatchNorm in it.
    model.extra = nn.Linear(150, 150)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "50KB")
    (state_dict,) = read_checkpoint(tmp_path)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {layer.name for layer in state_dict.layers} == names


# ---------------------------------------------------------------------------------------------------- unreadable files


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("empty.pt", b""),
        ("text.pt", b"hello world\n"),
        ("zeros.pt", bytes(4096)),
        ("empty.safetensors", b""),
        ("text.safetensors", b"no header of safetensors"),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "missing.safetensors"}}'),
    ],
)
def test_what_is_no_checkpoint_is_an_error_that_names_the_file(tmp_path, name, contents):
    if ".safetensors" in name:
        pytest.importorskip("safetensors")
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"{name}: (not a|expected an index)|missing.safetensors: there is no"):
        read_checkpoint(tmp_path / name)


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    path = saved(tmp_path, small_net().state_dict())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (torch.zeros(3), "expected a dict with tensors in it, got a tensor"),
        ({}, "no BatchNorm statistics"),
        (nn.Linear(3, 3).state_dict(), "no BatchNorm statistics"),
        ({"norm.running_mean": torch.zeros(3)}, r"norm: it has no running_var"),
        (nn.BatchNorm2d(3, track_running_stats=False).state_dict(), "no BatchNorm statistics"),
    ],
)
def test_a_checkpoint_without_statistics_is_an_error(tmp_path, contents, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(saved(tmp_path, contents))


def test_a_missing_file_and_a_folder_without_a_checkpoint_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match=r"is a folder, and has none of model\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_pipe_is_an_error_with_the_reason():
    # As of `cat last.pt | python -m runningbn inspect /dev/stdin`: the parts of a checkpoint are read where they are.
    receiver, sender = os.pipe()
    os.close(sender)
    try:
        with pytest.raises(CheckpointError, match=r"cannot be opened: .*not seekable"):
            read_checkpoint(Path(f"/dev/fd/{receiver}"))
    finally:
        os.close(receiver)


def test_names_in_a_message_leave_the_terminal_alone(tmp_path):
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(saved(tmp_path, {"\x1b[31mred.running_mean": torch.zeros(3)}))
    assert "\x1b" not in str(raised.value)
    assert r"\x1b[31mred" in str(raised.value)


# ----------------------------------------------------------------------------------------------------------- criteria


def healthy(**changes):
    """A layer with nothing wrong, but for the entries that are given for its first channels."""
    state = pretrained(nn.BatchNorm2d(C)).state_dict()
    for name, values in changes.items():
        state[name][: len(values)] = torch.tensor(values)
    return state


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"running_mean": [math.nan]}, "not_finite"),
        ({"running_var": [math.inf]}, "not_finite"),
        ({"weight": [math.nan]}, "affine_not_finite"),
        ({"bias": [-math.inf]}, "affine_not_finite"),
        ({"running_var": [-1e-9], "running_mean": [0.0]}, "negative_variance"),
        ({"running_var": [0.0]}, "constant_input"),
        ({"running_var": [9e-13]}, "constant_input"),
        ({"running_var": [2e-12], "running_mean": [0.0]}, "variance_below_eps"),
        ({"running_var": [9e-6], "running_mean": [0.0]}, "variance_below_eps"),
        ({"running_var": [2e4]}, "huge_variance"),
        ({"running_mean": [-1e3]}, "far_mean"),
        ({"weight": [0.0]}, "zero_weight"),
        ({"weight": [-9e-8]}, "zero_weight"),
    ],
)
def test_each_criterion_finds_its_channel_and_no_other_criterion_does(changes, name):
    assert named_findings(healthy()) == {}
    assert named_findings(healthy(**changes)) == {name: [0]}


@pytest.mark.parametrize(
    "changes",
    [
        {"running_var": [1.1e-5], "running_mean": [1.0]},
        {"running_var": [1e3]},
        {"running_mean": [100.0]},
        {"weight": [2e-7]},
        {"running_var": [1e-30], "running_mean": [1.0]},
    ],
)
def test_thresholds_are_not_passed_early(changes):
    assert not named_findings(healthy(**changes)).keys() - {"constant_input"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_narrow_dtype_cannot_tell_a_dead_channel(dtype):
    """A small variance is 0 in these dtypes, and mean/std says nothing then; in others it is what it is."""
    state = {"running_mean": torch.full((C,), 3.0), "running_var": torch.linspace(0.5, 2, C)}
    state["running_var"][2] = 1e-9
    narrow = {name: value.to(dtype) for name, value in state.items()}
    assert named_findings(narrow) == {"variance_underflow": [2]}
    for wide in (torch.float32, torch.bfloat16, torch.float64):
        assert named_findings({k: v.to(wide) for k, v in state.items()}) == {
            "variance_below_eps": [2], "far_mean": [2],
        }  # fmt: skip
        constant = {**state, "running_var": state["running_var"] * (torch.arange(C) != 2)}
        assert named_findings({k: v.to(wide) for k, v in constant.items()}) == {"constant_input": [2]}


def test_a_normaliser_of_observations_is_no_layer_with_a_broken_state():
    """As stable-baselines3, rl_games and RSL-RL have it: a count beside the mean and the variance."""
    state = {
        "obs.running_mean": torch.linspace(-1, 1, C, dtype=torch.float64),
        "obs.running_var": torch.linspace(0.5, 2, C, dtype=torch.float64),
        "obs.count": torch.tensor(1000.0, dtype=torch.float64),
    }
    assert named_findings(state) == {}
    for more in ({"obs.samples": torch.tensor(3)}, {"obs.steps": torch.full((C,), 3.0)}):
        assert named_findings(state | more) == {}
    assert not only_layer(state).state


def test_eps_is_part_of_every_judgement():
    state = healthy(running_mean=[30.0], running_var=[5e-4])
    assert named_findings(state) == {"far_mean": [0]}  # 30/(5e-4 + 1e-5)^½ is over 1000
    (layer,) = read_state_dict("", state, eps=1e-2).layers
    assert mean_over_std(layer)[0] == pytest.approx(30 / math.sqrt(5e-4 + 1e-2), rel=1e-6)
    # 293 std, which is over 256, too; and the variance is below eps now.
    assert {each.criterion.name for each in findings(layer)} == {"far_mean", "variance_below_eps"}
    (layer,) = read_state_dict("", state, eps=1e-1).layers
    assert {each.criterion.name for each in findings(layer)} == {"variance_below_eps"}


def test_layers_that_no_data_has_touched():
    assert named_findings(nn.BatchNorm2d(C).state_dict()) == {"untouched": list(range(C))}
    assert named_findings(healthy(running_var=[0.5] * C)) == {"identical_variance": list(range(C))}
    assert named_findings(healthy(running_mean=[0.0] * C)) == {}
    assert named_findings(RunningBatchNorm(C).state_dict()) == {"untouched": list(range(C))}


def test_criteria_have_names_of_their_own_and_errors_come_first():
    assert len({criterion.name for criterion in CRITERIA}) == len(CRITERIA)
    severities = [criterion.severity for criterion in CRITERIA]
    assert severities == sorted(severities, key=lambda severity: severity != ERROR)


def test_an_error_is_what_makes_evaluation_wrong():
    """Each error on its own takes the output of its channel away from what a finite positive variance gives."""
    x = torch.randn(16, C)
    for changes in ({"running_mean": [math.nan]}, {"weight": [math.inf]}, {"running_var": [-1.0]}):
        layer = nn.BatchNorm1d(C).eval()
        layer.load_state_dict(healthy(**changes))
        assert layer(x)[:, 0].isfinite().sum() == 0
        assert layer(x)[:, 1:].isfinite().all()


# ----------------------------------------------------------------------------------------------------------- our layers

OURS = pytest.mark.parametrize(
    "make",
    [
        lambda: RunningBatchNorm(C),
        lambda: RunningBatchNorm(C, gradient="exact", momentum=0.1),
        lambda: PreciseBatchNorm2d(C),
        lambda: PreciseBatchNorm2d(C, momentum=None),
    ],
    ids=["running", "exact", "precise", "cumulative"],
)


def trained(layer, batches=6, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 2, C).view(C, 1, 1)
    for _ in range(batches):
        x = (scale * torch.randn(4, C, 5, 5, generator=generator) + offset).requires_grad_()
        layer(x).square().sum().backward()
    return layer


@OURS
@pytest.mark.parametrize("offset", [0.0, 50.0, -100.0])
def test_our_layers_tell_how_much_they_saw_and_nothing_is_wrong_with_them(make, offset):
    state = trained(make(), offset=offset).state_dict()
    layer = only_layer(state)
    assert named_findings(state) == {}
    assert layer.state["samples"].tolist() == [24] * C
    assert not layer.is_seeded
    assert layer.batches == 6


def test_a_cumulative_average_knows_as_much_as_all_its_elements():
    layer = only_layer(trained(PreciseBatchNorm2d(C, momentum=None)).state_dict())
    # Equal weights 1/t: Kish's number is the number of elements itself, to the rounding of six float32 updates.
    torch.testing.assert_close(layer.effective_elements, torch.full((C,), 6.0 * 4 * 25).double(), rtol=1e-5, atol=0)


def test_a_horizon_knows_less_than_all():
    layer = only_layer(trained(RunningBatchNorm(C), batches=60).state_dict())
    assert (layer.effective_elements < 60 * 4 * 25 / 2).all()
    assert (layer.effective_elements > 100).all()


def test_statistics_taken_over_say_so_before_and_after_training_goes_on():
    layer = batchnormify(pretrained(nn.Sequential(nn.BatchNorm2d(C))))[0]
    assert only_layer(layer.state_dict()).is_seeded
    assert named_findings(layer.state_dict()) == {}
    assert only_layer(trained(layer).state_dict()).is_seeded
    assert named_findings(layer.state_dict()) == {}


@OURS
def test_recalibrated_layers_agree_with_their_state(make):
    model = nn.Sequential(trained(make()))
    update_bn_stats(model, [3 * torch.randn(4, C, 5, 5) + 20 for _ in range(3)])
    assert named_findings(model[0].state_dict()) == {}


@OURS
def test_averages_of_checkpoints_with_pooled_sums_are_no_false_alarm(make):
    averaged = AveragedModel(make(), use_buffers=True)
    for offset in (0.0, 3.0):
        averaged.update_parameters(trained(make(), offset=offset))
    state = {key.removeprefix("module."): value for key, value in averaged.state_dict().items() if key != "n_averaged"}
    assert named_findings(state) == {}


def test_a_channel_whose_batches_were_not_finite_is_behind():
    layer = trained(RunningBatchNorm(C))
    x = torch.randn(4, C, 5, 5)
    x[0, 2, 0, 0] = math.nan
    layer(x)
    assert named_findings(layer.state_dict()) == {"behind": [2]}


def test_a_mean_written_past_the_state_is_told():
    layer = trained(PreciseBatchNorm2d(C))
    layer.running_mean[3] += 1
    assert named_findings(layer.state_dict()) == {"state_disagrees": [3]}


@pytest.mark.parametrize("name", ["sqrs", "count_sqrs", "sum_dy"])
def test_sums_that_are_not_finite_are_told(name):
    state = trained(RunningBatchNorm(C)).state_dict()
    state[name][1] = math.inf
    assert named_findings(state) == {"state_not_finite": [1]}


def test_a_state_that_a_load_does_not_take_over_is_told():
    state = trained(PreciseBatchNorm2d(C)).state_dict()
    half = OrderedDict((key, value.half() if value.is_floating_point() else value) for key, value in state.items())
    incomplete = OrderedDict((key, value) for key, value in state.items() if key != "count")
    for broken in (half, incomplete):
        assert named_findings(broken) == {"unusable_state": list(range(C))}
        assert not only_layer(broken).state


# --------------------------------------------------------------------------------------------------------- comparison


def test_a_comparison_tells_what_the_report_of_a_recalibration_tells():
    model = nn.Sequential(pretrained(nn.BatchNorm2d(C)), nn.ReLU(), pretrained(nn.BatchNorm2d(C)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = update_bn_stats(model, [torch.randn(4, C, 5, 5) for _ in range(3)])
    comparison = compare(read_state_dict("", before), read_state_dict("", model.state_dict()))
    for ours, theirs in zip(comparison.layers, report.layers, strict=True):
        assert ours.name == theirs.name
        for number in ("mean_shift", "std_shift", "var_ratio", "moved"):
            # The report keeps float64 moments; the checkpoint has them in float32.
            assert getattr(ours, number) == pytest.approx(getattr(theirs, number), rel=1e-5)


def test_the_numbers_of_a_comparison_are_those_of_their_definitions():
    a = read_state_dict("", {"n.running_mean": torch.zeros(3), "n.running_var": torch.ones(3)})
    b = read_state_dict("", {"n.running_mean": torch.tensor([0.0, 3, -4]), "n.running_var": torch.tensor([1.0, 9, 4])})
    (layer,) = compare(a, b).layers
    # In std of B: 0, 1 and 2. The eps of 1e-5 changes each number by less than 1e-5 of itself.
    assert layer.mean_shift == pytest.approx(math.sqrt(5 / 3), rel=1e-5)
    assert layer.mean_shift_max == pytest.approx(2, rel=1e-5)
    assert layer.var_ratio == pytest.approx(36 ** (1 / 3), rel=1e-5)
    assert layer.var_ratio_extreme == pytest.approx(9, rel=1e-5)
    assert compare(b, a).layers[0].var_ratio_extreme == pytest.approx(1 / 9, rel=1e-4)


def test_a_wrapper_around_one_of_two_checkpoints_is_found_and_told():
    plain = small_net().state_dict()
    wrapped = {f"model.module.{key}": value for key, value in plain.items()}
    a, b = read_state_dict("", plain), read_state_dict("", wrapped)
    for comparison, prefixes in ((compare(a, b), ("", "model.module.")), (compare(b, a), ("model.module.", ""))):
        assert (comparison.prefix_a, comparison.prefix_b) == prefixes
        assert [layer.name for layer in comparison.layers] == ["1", "2.0"]
        assert not comparison.only_a
        assert not comparison.only_b


def renamed(state, rename):
    return read_state_dict("", {rename(key): value for key, value in state.items()})


@pytest.mark.parametrize(
    ("one", "other", "prefixes"),
    [
        ("module.", "model.", ("module.", "model.")),
        ("module.", "ema.", ("module.", "ema.")),
        ("model.module.", "ema.", ("model.module.", "ema.")),
        ("module.student.", "model.student.", ("module.", "model.")),
        ("module.", "", ("module.", "")),
        ("", "ema_model.module.", ("", "ema_model.module.")),
        ("module.", "student.", ("module.", "student.")),
        ("module.x.", "module.", ("module.x.", "module.")),
        ("x.", "", ("x.", "")),
        ("model.", "model.", ("", "")),
    ],
)
def test_prefixes_of_both_sides_are_paired(one, other, prefixes):
    state = small_net().state_dict()
    comparison = compare(renamed(state, one.__add__), renamed(state, other.__add__))
    assert (comparison.prefix_a, comparison.prefix_b) == prefixes
    assert len(comparison.layers) == 2
    assert not comparison.only_a
    assert not comparison.only_b


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: key.replace("2.", "2._checkpoint_wrapped_module."),
        lambda key: key.replace("2.", "2._orig_mod."),
    ],
)
@pytest.mark.parametrize("other", ["", "module.", "model."])
def test_what_torch_puts_into_names_is_left_out_wherever_it_is(rename, other):
    state = small_net().state_dict()
    comparison = compare(renamed(state, rename), renamed(state, other.__add__))
    assert len(comparison.layers) == 2, comparison
    assert comparison.wrappers_a
    assert comparison.wrappers_b == ()
    assert not comparison.only_a
    assert not comparison.only_b


def test_names_that_would_be_one_without_their_wrappers_stay_as_they_are():
    state = nn.BatchNorm2d(C).state_dict()
    both = {f"{prefix}n.{key}": value for prefix in ("", "_orig_mod.") for key, value in state.items()}
    comparison = compare(read_state_dict("", both), read_state_dict("", both))
    assert [layer.name for layer in comparison.layers] == ["n", "_orig_mod.n"]


def test_names_that_agree_in_part_are_compared_as_they_are():
    a = read_state_dict("", nn.ModuleDict({"x": nn.BatchNorm2d(2), "y": nn.BatchNorm2d(2)}).state_dict())
    b = read_state_dict("", {**nn.ModuleDict({"x": nn.BatchNorm2d(3)}).state_dict(), "z.running_var": torch.ones(1)})
    comparison = compare(a, b)
    assert comparison.other_shapes == (("x", 2, 3),)
    assert comparison.only_a == ("y",)
    assert comparison.left_out_b == (("z", "it has no running_mean"),)
    assert (comparison.layers, comparison.only_b, comparison.prefix_a, comparison.prefix_b) == ((), (), "", "")


def test_mean_over_std_is_nan_for_a_negative_variance_only():
    layer = only_layer(healthy(running_mean=[3.0, 1.0], running_var=[9.0, -1.0]))
    assert mean_over_std(layer)[0] == pytest.approx(1, rel=1e-5)
    assert mean_over_std(layer).isnan().nonzero().flatten().tolist() == [1]
