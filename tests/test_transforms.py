"""torch.func, forward-mode differentiation, several gradients at once: right, or a clear error that changes nothing."""

import pytest
import torch
from cases import noise
from steps import assert_identical, buffers_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from runningbn import PreciseBatchNorm2d, RunningBatchNorm
from runningbn.kernels import use_backend

LAYERS = {
    "running": lambda: RunningBatchNorm(3),
    "exact": lambda: RunningBatchNorm(3, gradient="exact"),
    "precise": lambda: PreciseBatchNorm2d(3),
}
each_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def images() -> Tensor:
    return noise((4, 3, 5, 5), 0)


def by_parameters(layer: nn.Module) -> dict[str, Tensor]:
    return grad(lambda p: functional_call(layer, p, (images(),)).pow(3).sum())(dict(layer.named_parameters()))


def dual(layer: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(images(), images()))).tangent


TRANSFORMS = {
    "grad by parameters": by_parameters,
    "grad by input": lambda layer: grad(lambda x: layer(x).pow(3).sum())(images()),
    "vmap": lambda layer: vmap(layer)(torch.stack([images(), 2 * images()])),
    "jvp": lambda layer: jvp(layer, (images(),), (images(),))[1],
    "jacrev": lambda layer: jacrev(lambda x: layer(x).pow(3).sum())(images()),
    "dual": dual,
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@each_layer
@each_transform
@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_training_says_what_to_do_and_changes_nothing(build, transform, backend):
    layer = build()
    before = buffers_of(layer)
    with use_backend(backend), pytest.raises(RuntimeError, match=r"torch.func transforms .* Call eval\(\)"):
        transform(layer)
    assert_identical(buffers_of(layer), before)


@each_layer
@each_transform
def test_evaluation_gives_what_torch_gives(build, transform):
    layer, peer = build().eval(), nn.BatchNorm2d(3).eval()
    torch.testing.assert_close(transform(layer), transform(peer))


@each_layer
@each_transform
def test_what_the_message_advises_works(build, transform):
    layer = build()
    peer = nn.BatchNorm2d(3)
    for model in layer, peer:
        torch.func.replace_all_batch_norm_modules_(model)
    torch.testing.assert_close(transform(layer), transform(peer))


@each_layer
def test_plain_tensors_train_where_others_are_dual(build):
    layer, other = build(), build()
    with forward_ad.dual_level():
        y = layer(images())
    assert torch.equal(y, other(images()))


@each_layer
def test_a_compiled_gradient_is_refused_too(build):
    # traced without a word, it would be a gradient by constant statistics
    torch.compiler.reset()
    layer, x = build(), images()
    before = buffers_of(layer)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.compile(lambda x: grad(lambda x: layer(x).pow(3).sum())(x), backend="eager")(x)
    assert_identical(buffers_of(layer), before)


def by_autograd(y: Tensor, inputs: tuple[Tensor, ...], dy: Tensor, **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True, **options)


def by_vmap(y: Tensor, inputs: tuple[Tensor, ...], dy: Tensor, **options: bool) -> tuple[Tensor, ...]:
    return vmap(lambda one: torch.autograd.grad(y, inputs, one, retain_graph=True, **options))(dy)


each_way_at_once = pytest.mark.parametrize("at_once", [by_autograd, by_vmap])
each_backend = pytest.mark.parametrize("backend", ["cpu", "aten"])


@each_way_at_once
@each_backend
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", ["precise", "exact"])
def test_several_gradients_at_once_are_those_one_after_the_other(kind, create_graph, backend, at_once):
    layer, x = LAYERS[kind](), images().requires_grad_()
    with use_backend(backend):
        y, inputs = layer(x), (x, layer.weight, layer.bias)
        dy = noise((3, *y.shape), 1)
        found = at_once(y, inputs, dy, create_graph=create_graph)
        each = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in dy]
    torch.testing.assert_close(found, tuple(torch.stack(gradients) for gradients in zip(*each)))


@each_way_at_once
@each_backend
def test_running_gradients_take_one_at_a_time(backend, at_once):
    layer = LAYERS["running"]()
    with use_backend(backend):
        y = layer(images().requires_grad_())
        before = buffers_of(layer)
        with pytest.raises(RuntimeError, match=r"is_grads_batched=True.* one after the other"):
            at_once(y, (layer.weight,), noise((3, *y.shape), 1))
    assert_identical(buffers_of(layer), before)


@each_layer
def test_a_jacobian_may_be_vectorised_in_evaluation(build):
    layer, peer = build().eval(), nn.BatchNorm2d(3).eval()
    found, expected = (torch.autograd.functional.jacobian(m, images()[:1], vectorize=True) for m in (layer, peer))
    torch.testing.assert_close(found, expected)
