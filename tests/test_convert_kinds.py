"""batchnormify: layers that are not plain nn.BatchNorm, converted with what belongs to them or left alone."""

import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import noise
from models import OURS, BatchNormAct2d, each_of_ours, pretrained
from steps import assert_identical, evaluate, train, training_step
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, batchnormify

# -------------------------------------------------------------------------------------------------- subclasses, known


class TaggedBatchNorm2d(nn.BatchNorm2d):
    """A subclass that computes what its base computes."""

    def __init__(self, num_features: int, tag: str = "mine") -> None:
        super().__init__(num_features)
        self.tag = tag


class NamedBatchNormAct2d(BatchNormAct2d):
    """A member of the family that only adds a default, as timm's are."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, act_layer=nn.SiLU)


KNOWN = {
    "subclass": lambda: TaggedBatchNorm2d(3),
    "act": lambda: BatchNormAct2d(3, inplace=False),
    "act inplace": lambda: BatchNormAct2d(3),
    "act with drop": lambda: BatchNormAct2d(3, drop_layer=nn.Dropout),
    "act subclass": lambda: NamedBatchNormAct2d(3),
}
each_known = pytest.mark.parametrize("build", KNOWN.values(), ids=KNOWN)


def images(batch_size: int = 4, seed: int = 0) -> Tensor:
    return noise((batch_size, 3, 2, 2), seed)


@each_known
@each_of_ours
def test_known_subclass_evaluates_as_before(build, to):
    layer = pretrained(build())
    expected = evaluate(layer, images())
    torch.testing.assert_close(evaluate(batchnormify(layer, to), images()), expected, rtol=1e-5, atol=1e-5)


@each_known
@each_of_ours
def test_known_subclass_becomes_a_layer_of_the_target(build, to):
    assert isinstance(batchnormify(build(), to), RunningBatchNorm if to == "running" else PreciseBatchNorm2d)


@each_known
@pytest.mark.parametrize("way", [("running",), ("precise",), ("running", "precise"), ("precise", "running")], ids=str)
def test_known_subclass_comes_back_as_its_own_class(build, way):
    layer = build()
    before = type(layer)
    for to in (*way, "torch"):
        batchnormify(layer, to)
    assert type(layer) is before


@each_known
@each_of_ours
def test_known_subclass_evaluates_as_before_when_back_after_training(build, to):
    layer = train(batchnormify(pretrained(build()), to), [images(seed=1)])
    expected = evaluate(layer, images())
    torch.testing.assert_close(evaluate(batchnormify(layer, "torch"), images()), expected, rtol=1e-5, atol=1e-5)


@each_known
@each_of_ours
def test_known_subclass_trains_with_finite_gradients(build, to):
    step = training_step(batchnormify(pretrained(build()), to), images())
    assert step.keys() == {"y", "dx", "dweight", "dbias"}
    assert all(value.isfinite().all() for value in step.values())


@each_known
@each_of_ours
def test_pickled_subclass_finds_its_way_back(build, to):
    layer = pickle.loads(pickle.dumps(batchnormify(build(), to)))
    assert type(batchnormify(layer, "torch")) is type(build())


def test_attributes_of_a_subclass_survive_there_and_back():
    layer = batchnormify(batchnormify(TaggedBatchNorm2d(3, tag="stem")), "torch")
    assert layer.tag == "stem"


@each_of_ours
def test_activation_trains_as_the_layer_and_the_activation_one_after_the_other(to):
    layer = batchnormify(pretrained(BatchNormAct2d(3)), to)
    apart = nn.Sequential(batchnormify(pretrained(nn.BatchNorm2d(3)), to), nn.ReLU())
    for seed in range(3):
        expected = {name.replace("0.", ""): value for name, value in training_step(apart, images(seed=seed)).items()}
        assert_identical(training_step(layer, images(seed=seed)), expected)


@each_of_ours
def test_drop_and_act_are_the_same_objects(to):
    layer = BatchNormAct2d(3, drop_layer=nn.Dropout)
    drop, act = layer.drop, layer.act
    batchnormify(layer, to)
    assert (layer.drop is drop, layer.act is act) == (True, True)


@each_of_ours
def test_drop_comes_before_act(to):
    layer = batchnormify(BatchNormAct2d(3), to)
    order = []
    layer.drop.register_forward_hook(lambda *_: order.append("drop"))
    layer.act.register_forward_hook(lambda *_: order.append("act"))
    layer(images())
    assert order == ["drop", "act"]


@each_of_ours
def test_drop_drops_in_training_and_not_in_evaluation(to):
    layer = batchnormify(pretrained(BatchNormAct2d(3, drop_layer=lambda: nn.Dropout(1.0))), to)
    assert training_step(layer, images())["y"].count_nonzero() == 0
    assert evaluate(layer, images()).count_nonzero() > 0


# ------------------------------------------------------------------------------------------ torch.nn.utils on the layer


@each_of_ours
def test_pruned_layer_evaluates_as_before(to):
    layer = pretrained(nn.BatchNorm2d(3))
    prune.l1_unstructured(layer, "weight", amount=1)
    expected = evaluate(layer, images())
    assert expected[:, layer.weight_mask == 0].std() < expected.std()  # something is pruned
    torch.testing.assert_close(evaluate(batchnormify(layer, to), images()), expected, rtol=1e-5, atol=1e-5)


@each_of_ours
def test_pruned_weight_gets_no_gradient(to):
    layer = pretrained(nn.BatchNorm2d(3))
    prune.l1_unstructured(layer, "weight", amount=1)
    step = training_step(batchnormify(layer, to), images())
    assert ((step["dweight_orig"] != 0) == (layer.weight_mask != 0)).all()


@each_of_ours
def test_pruning_can_be_made_permanent_after_the_conversion(to):
    layer = pretrained(nn.BatchNorm2d(3))
    prune.l1_unstructured(layer, "weight", amount=1)
    prune.remove(batchnormify(layer, to), "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.count_nonzero() == 2


@each_of_ours
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm_by_hooks_evaluates_as_before_and_trains(to):
    layer = nn.utils.weight_norm(pretrained(nn.BatchNorm2d(3)))
    expected = evaluate(layer, images())
    batchnormify(layer, to)
    torch.testing.assert_close(evaluate(layer, images()), expected, rtol=1e-5, atol=1e-5)
    assert training_step(layer, images()).keys() == {"y", "dx", "dbias", "dweight_g", "dweight_v"}


# ------------------------------------------------------------------------------------------------------- left alone


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Doubling(nn.BatchNorm2d):
    """Unknown, and computes something else by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.batch_norm(input, self.running_mean, self.running_var, training=self.training)


class Shifted(nn.BatchNorm2d):
    """With an attribute that has the name of a buffer of ours."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.shift = 0.5


class DoublingRunning(RunningBatchNorm):
    """The same of one of ours."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def parametrised() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def doubled_by_hand() -> nn.Module:
    """A forward of the instance, as some training libraries wrap it."""
    layer = nn.BatchNorm2d(3)
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)
    return layer


def frozen_by_lightning() -> nn.Module:
    """What BaseFinetuning.freeze(train_bn=False) makes of a layer: its statistics stay and are not tracked."""
    layer = nn.BatchNorm2d(3)
    layer.track_running_stats = False
    return layer


LEFT_ALONE = {
    "lazy": (lambda: nn.LazyBatchNorm2d(), "it is lazy and not initialised"),
    "without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), "it has no running statistics"),
    "parametrised": (parametrised, "it is parametrised"),
    "frozen by Lightning": (frozen_by_lightning, "it is frozen: track_running_stats=False"),
    "synchronised, without statistics": (
        lambda: nn.SyncBatchNorm(3, track_running_stats=False),
        "it has no running statistics",
    ),
    "scripted": (lambda: torch.jit.script(nn.BatchNorm2d(3)), "it is scripted"),
    "name of a buffer": (lambda: Shifted(3), "it has attributes of the same names as new buffers: shift"),
    "custom forward": (lambda: Doubling(3), "Doubling has a custom forward"),
    "forward of the instance": (doubled_by_hand, "custom forward"),
}
# nn.SyncBatchNorm is torch's already, and still becomes nn.BatchNorm.
STAYS_AS_TORCH = {name: entry for name, entry in LEFT_ALONE.items() if name != "synchronised, without statistics"}
each_left_alone = pytest.mark.parametrize(("build", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)


@pytest.mark.parametrize(
    ("to", "build"),
    [(to, build) for to in OURS for build, _ in LEFT_ALONE.values()]
    + [("torch", build) for build, _ in STAYS_AS_TORCH.values()],
)
def test_layer_is_left_alone(build, to):
    layer = build()
    before = type(layer), list(vars(layer)), list(layer.state_dict())
    batchnormify(nn.Sequential(layer), to)
    assert (type(layer), list(vars(layer)), list(layer.state_dict())) == before


@each_left_alone
@each_of_ours
def test_reason_is_given_with_the_name(caplog, build, reason, to):
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"norm": build()}))
    with caplog.at_level(logging.INFO, logger="runningbn"):
        batchnormify(model, to)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0 layers converted" in record.message
    assert "1.norm (" in record.message
    assert reason in record.message


@each_of_ours
def test_other_layers_of_the_model_are_converted(to):
    model = batchnormify(nn.Sequential(Doubling(3), nn.BatchNorm2d(3)), to)
    assert [type(model[0]), model[1].converted_from] == [Doubling, nn.BatchNorm2d]


def test_reason_at_the_root_has_a_name_too(caplog):
    with caplog.at_level(logging.INFO, logger="runningbn"):
        batchnormify(Doubling(3))
    assert "the model itself (Doubling has a custom forward" in caplog.messages[0]


@each_of_ours
def test_lazy_layer_is_converted_once_it_is_initialised(to):
    layer = nn.LazyBatchNorm2d()
    layer(images())
    assert isinstance(batchnormify(layer, to), RunningBatchNorm if to == "running" else PreciseBatchNorm2d)


@pytest.mark.parametrize("to", ["precise", "torch"])
def test_subclass_of_ours_with_a_forward_of_its_own_is_left_alone(to):
    layer = train(DoublingRunning(3), [images()])
    assert type(batchnormify(layer, to)) is DoublingRunning


# ------------------------------------------------------------------------------------ built as layers of this library

ORIGINS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize("to", ["precise", "torch"])
def test_running_layer_that_has_seen_no_input_is_left_alone_with_a_reason(caplog, to):
    layer = RunningBatchNorm(3)
    with caplog.at_level(logging.INFO, logger="runningbn"):
        batchnormify(nn.Sequential(layer), to)
    assert type(layer) is RunningBatchNorm
    assert "0 (its input dimensions are not known" in caplog.messages[0]


@pytest.mark.parametrize("dimensions", ORIGINS, ids=lambda dimensions: f"{dimensions}d-input")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_running_layer_becomes_the_batchnorm_of_its_inputs(dimensions, training):
    layer = RunningBatchNorm(3).train(training)
    layer(noise((4, 3, *[2] * (dimensions - 2)), 0))
    assert type(batchnormify(layer, "torch")) is ORIGINS[dimensions]


@pytest.mark.parametrize("to", ["precise", "torch"])
def test_running_layer_of_more_dimensions_than_torch_has_is_left_alone(to):
    layer = train(RunningBatchNorm(3), [noise((4, 3, 2, 2, 2, 2), 0)])
    assert type(batchnormify(layer, to)) is RunningBatchNorm


def test_running_layer_evaluates_the_same_as_batchnorm():
    layer = train(RunningBatchNorm(3), [images(seed=1)])
    expected = evaluate(layer, images())
    torch.testing.assert_close(evaluate(batchnormify(layer, "torch"), images()), expected, rtol=1e-5, atol=1e-5)


def test_precise_layer_becomes_its_base_without_having_seen_an_input():
    assert type(batchnormify(PreciseBatchNorm1d(3), "torch")) is nn.BatchNorm1d


def test_running_layer_becomes_the_precise_one_of_its_inputs():
    layer = train(RunningBatchNorm(3), [noise((4, 3), 0)])
    assert type(batchnormify(layer, "precise")) is PreciseBatchNorm1d


def test_a_momentum_that_is_no_weight_is_left_alone_as_precise():
    layer = batchnormify(nn.BatchNorm2d(3, momentum=1.5), "precise")
    assert type(layer) is nn.BatchNorm2d
    assert type(batchnormify(layer, "precise", momentum=0.5)) is PreciseBatchNorm2d


def test_layers_of_ours_without_statistics_go_back_to_torch():
    layer = batchnormify(PreciseBatchNorm2d(3, track_running_stats=False), "torch")
    assert type(layer) is nn.BatchNorm2d
    assert layer.running_mean is None
