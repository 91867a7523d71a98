"""Inputs whose class is derived from Tensor: layers and recalibration give what nn.BatchNorm gives, class included."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import noise
from models import TARGETS, BatchNormAct2d, each_of_ours
from steps import assert_identical, buffers_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, batchnormify, update_bn_stats
from runningbn.kernels import use_backend


class Image(Tensor):
    """A class that adds nothing."""


class Tagged(Tensor):
    """Carries a tag from the first argument of an operation to its result, as classes with metadata do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls) and isinstance(args[0], cls):
            result.tag = getattr(args[0], "tag", None)
        return result


class Listed(Tensor):
    """Knows what is on its list and nothing else, and gives plain tensors."""

    allowed: Any = (F.conv2d, torch.conv2d, F.batch_norm, F.relu, torch.relu_, Tensor.dim, Tensor.shape.__get__)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls.allowed:
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Silent(Tensor):
    """Has its operations done as those of Tensor, as torch's own Parameter."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def tagged(x: Tensor) -> Tensor:
    image = x.as_subclass(Tagged)
    image.tag = "scan 7"
    return image


def meta_tensor(x: Tensor) -> Tensor:
    return pytest.importorskip("monai.data").MetaTensor(x, meta={"scan": 7})


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "added to": lambda x: x.as_subclass(Image),
    "with metadata": tagged,
    "with a list": lambda x: x.as_subclass(Listed),
    "without a function": lambda x: x.as_subclass(Silent),
    "parameter": lambda x: nn.Parameter(x),
    "monai": meta_tensor,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def net(to: str) -> nn.Module:
    torch.manual_seed(0)
    return batchnormify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), to)


def images(seed: int = 0, batch_size: int = 4) -> Tensor:
    return noise((batch_size, 3, 6, 6), seed)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@each_kind
@each_of_ours
@pytest.mark.parametrize("backend", ["cpu", "aten"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_numbers_are_those_of_plain_tensors_and_the_class_is_that_of_torch(kind, to, backend, training):
    expected, found, peer = net(to).train(training), net(to).train(training), net("torch").train(training)
    with use_backend(backend):
        for seed in range(3):
            plain, derived = expected(images(seed)), found(KINDS[kind](images(seed)))
            assert type(derived) is type(peer(KINDS[kind](images(seed))))
            assert torch.equal(derived.as_subclass(Tensor), plain)
            for y in plain, derived.as_subclass(Tensor):
                (y * y).sum().backward()
    assert_identical(gradients(found), gradients(expected))
    assert_identical(buffers_of(found), buffers_of(expected))
    assert {type(buffer) for buffer in found.buffers()} == {Tensor}


@each_of_ours
def test_the_gradient_of_the_input_is_that_of_a_plain_tensor(to):
    x, layer = images().requires_grad_(), batchnormify(nn.BatchNorm2d(3), to)
    leaf = images().requires_grad_()
    for batch, model in ((x, layer), (leaf.as_subclass(Image), copy.deepcopy(layer))):
        (model(batch) ** 3).sum().backward()
    assert x.grad.abs().max() > 0
    assert torch.equal(leaf.grad, x.grad)


@each_of_ours
def test_metadata_go_through(to):
    assert net(to)(tagged(images())).tag == "scan 7"


@each_of_ours
def test_metadata_of_monai_go_through(to):
    y = net(to)(meta_tensor(images()))
    assert type(y).__name__ == "MetaTensor"
    assert y.meta["scan"] == 7


@each_of_ours
def test_a_class_is_asked_about_batch_norm_once_with_the_input_first(to):
    seen = []

    class Watching(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func, args[0] if args else None))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = images().as_subclass(Watching)
    batchnormify(nn.BatchNorm2d(3), to)(x)
    of_batch_norm = [first for func, first in seen if func is F.batch_norm]
    assert len(of_batch_norm) == 1
    assert of_batch_norm[0] is x


@each_of_ours
def test_a_class_that_refuses_batch_norm_is_refused(to):
    class Refusing(Listed):
        allowed = (Tensor.dim, Tensor.shape.__get__)

    with pytest.raises(TypeError, match="batch_norm"):
        batchnormify(nn.BatchNorm2d(3), to)(images().as_subclass(Refusing))


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize(("of_input", "of_mask"), [("added to", None), (None, "monai"), ("monai", "monai")])
def test_a_mask_may_be_of_such_a_class_too(cls, of_input, of_mask):
    mask = noise((4, 6, 6), 9) > 0
    plain, derived = cls(3), cls(3)
    x, m = (KINDS[kind](t) if kind else t for kind, t in ((of_input, images()), (of_mask, mask)))
    y = derived(x, m)
    assert type(y) is type(x)
    assert torch.equal(y.as_subclass(Tensor), plain(images(), mask))
    assert_identical(buffers_of(derived), buffers_of(plain))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("normalize", ["batch", "population"])
@pytest.mark.parametrize("kind", ["added to", "with metadata", "monai"])
def test_recalibration_gives_the_statistics_of_plain_tensors(to, normalize, kind):
    expected, found = net(to), net(to)
    batches = [images(seed) for seed in range(3)]
    # Batches of such classes are not joined, so plain ones are not either: then the two agree in every bit.
    options = {"normalize": normalize, "memory_limit": 0}
    update_bn_stats(expected, batches, **options)
    update_bn_stats(found, [KINDS[kind](x) for x in batches], **options)
    assert_identical(buffers_of(found), buffers_of(expected))
    assert {type(buffer) for buffer in found.buffers()} == {Tensor}


@pytest.mark.parametrize("to", TARGETS)
def test_recalibration_of_a_net_of_monai(to):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    expected = nets.BasicUNet(2, 1, 2, features=(4, 4, 8, 8, 8, 4), norm=("batch", {}))
    found = copy.deepcopy(expected)
    batches = [noise((2, 1, 32, 32), seed) for seed in range(2)]
    for model, data in ((expected, batches), (found, [meta_tensor(x) for x in batches])):
        batchnormify(model, to)
        update_bn_stats(model, data)
    assert_identical(buffers_of(found), buffers_of(expected))


@each_of_ours
@pytest.mark.parametrize("kind", ["added to", "monai"])
def test_activation_of_a_norm_act_layer_is_applied_once(to, kind):
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    plain = batchnormify(BatchNormAct2d(3, act_layer=lambda inplace: Doubled()), to)
    derived = copy.deepcopy(plain)
    assert torch.equal(derived(KINDS[kind](images())).as_subclass(Tensor), plain(images()))


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d])
def test_statistics_of_such_a_class_become_plain_buffers(cls):
    layer = cls(3)
    layer.running_mean, layer.running_var = (meta_tensor(torch.full((3,), value)) for value in (2.0, 3.0))
    state = {name: meta_tensor(value) for name, value in layer.state_dict().items()}
    loaded = cls(3)
    loaded.load_state_dict(state, assign=True)
    for found in (layer, loaded):
        assert {type(found.running_mean), type(found.running_var), type(found.sums)} == {Tensor}
        assert found.running_mean.tolist() == [2, 2, 2]


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fake_tensors_go_through(cls, training):
    with FakeTensorMode():
        y = cls(3).train(training)(torch.randn(4, 3, 6, 6))
    assert isinstance(y, FakeTensor)
    assert y.shape == (4, 3, 6, 6)


@each_of_ours
def test_a_class_that_adds_nothing_compiles_into_one_graph(to):
    # inductor's own faults with such inputs depend on the first operation; the backend "eager" shows what is traced
    torch.compiler.reset()
    expected, found = net(to), net(to)
    compiled = torch.compile(found, fullgraph=True, backend="eager")
    for seed in range(2):
        y = compiled(images(seed).as_subclass(Image))
        assert type(y) is Image
        torch.testing.assert_close(y.as_subclass(Tensor), expected(images(seed)), rtol=1e-4, atol=1e-5)
        y.square().sum().backward()


@pytest.mark.slow
@each_of_ours
@pytest.mark.parametrize("kind", ["with metadata", "monai"])
@pytest.mark.filterwarnings("ignore")  # Dynamo has a lot to say about such classes
def test_other_classes_run_uncompiled_in_a_compiled_model(to, kind):
    torch.compiler.reset()
    expected, found = net(to), net(to)
    compiled = torch.compile(found, backend="eager")
    for seed in range(2):
        y = compiled(KINDS[kind](images(seed)))
        assert type(y) is type(KINDS[kind](images(seed)))
        torch.testing.assert_close(y.as_subclass(Tensor), expected(images(seed)), rtol=1e-4, atol=1e-5)
