"""The state of the layers: checkpoints in all directions, resuming, seeding, resetting, dtypes."""

import copy
import io

import pytest
import torch
from cases import LAYERS, LayerCase, each, each_dtype, noise
from models import pretrained
from steps import assert_identical, buffers_of, evaluate, train, trained, training_step
from torch import Tensor, nn

from runningbn import (
    Horizon,
    PreciseBatchNorm1d,
    PreciseBatchNorm2d,
    PreciseBatchNorm3d,
    RunningBatchNorm,
    batchnormify,
)

CLASSES = (RunningBatchNorm, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d)
each_class = pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)
each_assign = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])


def images(batch_size: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise((batch_size, 3, 2, 2), seed, dtype) * 2 + 1


def torch_checkpoint(**kwargs) -> dict[str, Tensor]:
    return pretrained(nn.BatchNorm2d(3, **kwargs)).state_dict()


def clones(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state_dict.items()}


# ----------------------------------------------------------------------------------------------------- golden state

# Checkpoints outlive releases: a change here is a change of the file format, and wants an upgrade of old files.
GOLDEN_PRECISE = [
    ("weight", (3,), "float32"),
    ("bias", (3,), "float32"),
    ("running_mean", (3,), "float32"),
    ("running_var", (3,), "float32"),
    ("num_batches_tracked", (), "int64"),
    ("shift", (3,), "float32"),
    ("sums", (3,), "float32"),
    ("sqrs", (3,), "float32"),
    ("count", (3,), "float32"),
    ("count_sqrs", (3,), "float32"),
    ("debias", (3,), "float32"),
    ("samples", (3,), "float32"),
    ("steps", (3,), "float32"),
]
GOLDEN_RUNNING = [
    *GOLDEN_PRECISE,
    ("noise", (3,), "float32"),
    ("noise_steps", (3,), "float32"),
    ("last_mean", (3,), "float32"),
    ("sum_dy", (3,), "float32"),
    ("sum_dy_xhat", (3,), "float32"),
    ("count_dy", (3,), "float32"),
]
NARROW = ("weight", "bias")


def layout(layer: nn.Module) -> list[tuple[str, tuple[int, ...], str]]:
    return [
        (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in layer.state_dict().items()
    ]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_state_dict_has_the_golden_names_shapes_and_dtypes(cls):
    assert layout(cls(3)) == (GOLDEN_RUNNING if cls is RunningBatchNorm else GOLDEN_PRECISE)


def test_exact_gradient_has_the_same_state():
    assert layout(RunningBatchNorm(3, gradient="exact")) == GOLDEN_RUNNING


@each_class
@each_dtype(torch.float16, torch.bfloat16)
def test_state_dict_of_a_half_precision_layer_is_float32_but_for_its_parameters(cls, dtype):
    golden = GOLDEN_RUNNING if cls is RunningBatchNorm else GOLDEN_PRECISE
    name_of = str(dtype).removeprefix("torch.")
    assert layout(cls(3, dtype=dtype)) == [(n, s, name_of if n in NARROW else d) for n, s, d in golden]


@each_class
def test_state_dict_of_a_double_layer_is_float64(cls):
    assert {d for _, _, d in layout(cls(3, dtype=torch.float64))} == {"float64", "int64"}


@each_class
def test_layer_without_statistics_has_no_state(cls):
    assert [name for name, *_ in layout(cls(3, track_running_stats=False))] == ["weight", "bias"]


# ------------------------------------------------------------------------------------------------- torch's checkpoints


@each_class
@each_assign
def test_checkpoint_of_batchnorm_loads_strictly_and_evaluates_identically(cls, assign):
    source = pretrained(nn.BatchNorm2d(3))
    layer = cls(3)
    layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert torch.equal(evaluate(layer, images()), evaluate(source, images()))


@each_class
@each_assign
def test_checkpoint_of_batchnorm_is_kept_bit_for_bit(cls, assign):
    layer, expected = trained_layer(cls), torch_checkpoint()
    layer.load_state_dict(expected, assign=assign)
    assert_identical({name: layer.state_dict()[name] for name in expected}, dict(expected))


def trained_layer(cls: type[nn.Module]) -> nn.Module:
    """A layer whose state has to give way completely."""
    return train(cls(3), [images(seed=seed) for seed in range(3)])


@each_class
@each_assign
@pytest.mark.parametrize("momentum", [0.1, None, Horizon()], ids=repr)
def test_training_goes_on_from_a_checkpoint_of_batchnorm_as_from_a_conversion(cls, assign, momentum):
    converted = pretrained(nn.BatchNorm2d(3))
    batchnormify(converted, "running" if cls is RunningBatchNorm else "precise", momentum=momentum)
    layer = trained_layer(cls)
    layer.momentum = momentum
    layer.load_state_dict(torch_checkpoint(), assign=assign)
    for seed in range(3):
        assert_identical(training_step(layer, images(seed=seed)), training_step(converted, images(seed=seed)))
    assert_identical(buffers_of(layer), buffers_of(converted))


@each_class
@each_assign
def test_fresh_checkpoint_of_batchnorm_leaves_an_empty_state(cls, assign):
    layer = trained_layer(cls)
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict(), assign=assign)
    assert_identical(buffers_of(layer), buffers_of(cls(3)))


@each_class
@each_assign
def test_checkpoint_from_before_num_batches_tracked_loads_strictly(cls, assign):
    source = pretrained(nn.BatchNorm2d(3))
    old = {name: value for name, value in source.state_dict().items() if name != "num_batches_tracked"}
    layer = cls(3)
    layer.load_state_dict(old, strict=True, assign=assign)
    assert torch.equal(evaluate(layer, images()), evaluate(source, images()))
    assert layer.num_batches_tracked == 0


@each_class
@each_assign
def test_first_batch_after_a_checkpoint_weighs_its_momentum(cls, assign):
    layer = cls(3, momentum=0.3)
    layer.load_state_dict(torch_checkpoint(), assign=assign)
    expected = 0.7 * layer.running_mean + 0.3 * images().mean((0, 2, 3))
    train(layer, [images()])
    torch.testing.assert_close(layer.running_mean, expected)


@each_class
def test_checkpoint_of_batchnorm_loads_onto_the_meta_device_by_assignment(cls):
    source = pretrained(nn.BatchNorm2d(3))
    layer = cls(3, device="meta")
    layer.load_state_dict(source.state_dict(), strict=True, assign=True)
    assert torch.equal(evaluate(layer, images()), evaluate(source, images()))


@each_class
def test_layer_that_came_from_the_meta_device_trains_as_one_that_did_not(cls):
    layer, twin = cls(3, device="meta"), cls(3)
    layer.load_state_dict(torch_checkpoint(), assign=True)
    twin.load_state_dict(torch_checkpoint())
    assert_identical(training_step(layer, images()), training_step(twin, images()))
    assert_identical(buffers_of(layer), buffers_of(twin))


@each_class
@each_assign
@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_checkpoint_leaves_the_state_float32(cls, assign, dtype):
    layer = cls(3)
    layer.load_state_dict(torch_checkpoint(dtype=dtype), assign=assign)
    assert {b.dtype for name, b in layer.named_buffers() if name != "num_batches_tracked"} == {torch.float32}


@each_class
@each_assign
@each_dtype(torch.float16, torch.bfloat16)
def test_half_precision_checkpoint_keeps_its_values(cls, assign, dtype):
    layer, checkpoint = cls(3), torch_checkpoint(dtype=dtype)
    layer.load_state_dict(checkpoint, assign=assign)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name].float(), checkpoint[name].float())


@each_class
@each_assign
def test_double_checkpoint_by_assignment_makes_the_layer_double(cls, assign):
    layer = cls(3)
    layer.load_state_dict(torch_checkpoint(dtype=torch.float64), assign=assign)
    dtype = torch.float64 if assign else torch.float32
    step = training_step(layer, images(dtype=dtype))
    assert {value.dtype for value in step.values()} == {dtype}


@each_class
@each_assign
def test_loading_leaves_the_checkpoint_as_it_was(cls, assign):
    checkpoint = torch_checkpoint(dtype=torch.float16)
    before, values = dict(checkpoint), clones(checkpoint)
    cls(3).load_state_dict(checkpoint, assign=assign)
    assert checkpoint.keys() == before.keys()
    assert all(checkpoint[name] is value for name, value in before.items())
    assert_identical(dict(checkpoint), values)


@each_class
def test_checkpoint_without_statistics_is_refused(cls):
    with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
        cls(3).load_state_dict(nn.BatchNorm2d(3, track_running_stats=False).state_dict())


@each_class
def test_layers_inside_a_model_load_under_their_names(cls):
    source = pretrained(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))))
    model = nn.Sequential(cls(3), nn.Sequential(cls(3)))
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(evaluate(model, images()), evaluate(source, images()))


# ------------------------------------------------------------------------------------------------------- failing loads


@each_class
@each_assign
def test_checkpoint_of_other_channels_changes_nothing_but_the_count_of_batches(cls, assign):
    layer = trained_layer(cls)
    expected = buffers_of(layer)
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        layer.load_state_dict(pretrained(nn.BatchNorm2d(4)).state_dict(), assign=assign)
    after = buffers_of(layer)
    # nn.BatchNorm takes over the one entry that fits, too.
    expected["num_batches_tracked"] = after["num_batches_tracked"]
    assert_identical(after, expected)


@each_class
@each_assign
@pytest.mark.parametrize(
    ("wrong", "ours"),
    [("running_mean", False), ("running_var", False), ("weight", False), ("sqrs", True), ("weight", True)],
    ids=["running_mean", "running_var", "weight", "ours, sqrs", "ours, weight"],
)
def test_failed_load_leaves_statistics_and_state_that_agree(cls, assign, wrong, ours):
    """A training step of momentum 0 keeps the state and shows it in evaluation, which so far saw the statistics."""
    checkpoint = train(trained_layer(cls), [images(seed=8) + 1]).state_dict() if ours else torch_checkpoint()
    layer = trained_layer(cls)
    layer.momentum = 0.0
    with pytest.raises(RuntimeError, match=f"size mismatch for {wrong}"):
        layer.load_state_dict({**clones(checkpoint), wrong: torch.ones(4)}, assign=assign)
    expected = evaluate(layer, images())
    train(layer, [images(seed=7)])
    torch.testing.assert_close(evaluate(layer, images()), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------- our own checkpoints


def through_a_file(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each(LAYERS)
@each_assign
def test_resuming_continues_bit_for_bit(case: LayerCase, assign):
    layer = trained(case)
    resumed = case.constructor(case.channels, **case.kwargs)
    resumed.load_state_dict(through_a_file(layer.state_dict()), strict=True, assign=assign)
    for seed in (10, 11, 12):
        x = case.input(4, seed)
        assert_identical(training_step(resumed, x), training_step(layer, x))
    assert_identical(buffers_of(resumed), buffers_of(layer))


@each_class
def test_a_layer_that_has_trained_loads_by_swapping_tensors(cls):
    layer, other = cls(3), train(cls(3), [images(seed=1)])
    layer(images()).sum().backward()  # an expanded gradient, which is not for the kernels that remember nothing
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(clones(other.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_identical(training_step(layer, images()), training_step(other, images()))
    assert_identical(buffers_of(layer), buffers_of(other))


@pytest.mark.parametrize(
    ("source", "target"),
    [(RunningBatchNorm, PreciseBatchNorm2d), (PreciseBatchNorm2d, RunningBatchNorm)],
    ids=["running to precise", "precise to running"],
)
@each_assign
def test_running_and_precise_load_each_other_strictly_and_evaluate_identically(source, target, assign):
    layer, loaded = trained_layer(source), trained_layer(target)
    loaded.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    assert torch.equal(evaluate(loaded, images()), evaluate(layer, images()))


@pytest.mark.parametrize("target", [RunningBatchNorm, PreciseBatchNorm2d], ids=["to running", "to precise"])
@each_assign
def test_state_goes_from_running_to_precise_and_back_bit_for_bit(target, assign):
    layer = trained_layer(PreciseBatchNorm2d if target is RunningBatchNorm else RunningBatchNorm)
    loaded = trained_layer(target)
    loaded.load_state_dict(layer.state_dict(), assign=assign)
    shared = [name for name, *_ in GOLDEN_PRECISE]
    assert_identical({n: loaded.state_dict()[n] for n in shared}, {n: layer.state_dict()[n] for n in shared})


def test_precise_checkpoint_leaves_no_backward_sums_of_another_training():
    layer = trained_layer(RunningBatchNorm)
    layer.load_state_dict(trained_layer(PreciseBatchNorm2d).state_dict())
    assert not any(getattr(layer, name).any() for name in ("sum_dy", "sum_dy_xhat", "count_dy"))


@each_class
def test_our_checkpoint_reaches_the_meta_device_by_assignment_and_continues_bit_for_bit(cls):
    layer, loaded = trained_layer(cls), cls(3, device="meta")
    loaded.load_state_dict(clones(layer.state_dict()), strict=True, assign=True)
    assert_identical(training_step(loaded, images()), training_step(layer, images()))
    assert_identical(buffers_of(loaded), buffers_of(layer))


@each_class
@pytest.mark.parametrize("missing", ["shift", "sqrs", "count", "debias", "samples", "steps", "running_var"])
def test_checkpoint_of_ours_that_lacks_a_part_of_the_state_is_refused(cls, missing):
    checkpoint = {name: value for name, value in trained_layer(cls).state_dict().items() if name != missing}
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        cls(3).load_state_dict(checkpoint)


@each_class
def test_unknown_key_is_refused(cls):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surprise"):
        cls(3).load_state_dict({**cls(3).state_dict(), "surprise": torch.zeros(3)})


@each(LAYERS)
def test_buffers_never_require_grad(case: LayerCase):
    layer = trained(case)
    assert not any(buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d], ids=["running", "precise"])
def test_a_checkpoint_in_16_bits_trains_on_though_its_counts_overflow(make):
    layer = make(2)
    layer(noise((16, 2, 70, 70), 0))  # 78400 elements per channel; float16 ends at 65504
    narrow = {key: t.half() if t.is_floating_point() else t for key, t in layer.state_dict().items()}
    loaded = make(2)
    loaded.load_state_dict(narrow)
    loaded(noise((4, 2, 5, 5), 1))
    assert all(torch.isfinite(buffer).all() for buffer in loaded.buffers())
    torch.testing.assert_close(loaded.running_mean, layer.running_mean, rtol=0, atol=0.2)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_part_of_a_state_is_refused_and_seeded_from_the_running_statistics(strict):
    source, layer = PreciseBatchNorm2d(2), PreciseBatchNorm2d(2)
    source(noise((8, 2, 5, 5), 0) * 10 + 3)
    layer(noise((8, 2, 5, 5), 1))
    partial = source.state_dict()
    del partial["sqrs"]
    if strict:
        with pytest.raises(RuntimeError, match="sqrs"):
            layer.load_state_dict(partial)
    else:
        assert "sqrs" in layer.load_state_dict(partial, strict=False).missing_keys
    assert torch.equal(layer.running_var, source.running_var)
    assert torch.equal(layer.sqrs / layer.count, source.running_var)
    assert layer.count_sqrs.tolist() == [0, 0]


def test_a_state_without_its_running_statistics_is_not_loaded():
    layer = PreciseBatchNorm2d(2)
    layer(noise((8, 2, 5, 5), 1))
    before = copy.deepcopy(layer)
    without = {key: t * 3 for key, t in layer.state_dict().items() if not key.startswith("running")}
    layer.load_state_dict(without, strict=False)
    for name in ("shift", "sums", "sqrs", "count", "running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), getattr(before, name)), name
