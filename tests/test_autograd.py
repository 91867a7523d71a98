"""What a training loop relies on: in-place neighbours, several forwards, autocast, no host synchronisation, memory."""

import itertools

import pytest
import torch
from cases import LAYERS, LayerCase, assert_near, channels_last, each, each_dtype, noise
from steps import assert_identical, buffers_of, evaluate, train, trained, training_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm

each_class = pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)


def images(batch_size: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise((batch_size, 3, 4, 4), seed, dtype) * 2 + 1


# ----------------------------------------------------------------------------------------------- in-place neighbours


@each(LAYERS)
def test_output_may_be_changed_in_place(case: LayerCase):
    # As nn.ReLU(inplace=True) does in most image models.
    x = case.input(4, 20)
    after, in_place = (nn.Sequential(trained(case), nn.ReLU(inplace=inplace)) for inplace in (False, True))
    assert_identical(training_step(in_place, x), training_step(after, x))


@each(LAYERS)
def test_channels_last_output_may_be_changed_in_place(case: LayerCase):
    x = channels_last(case.input(4, 20)).requires_grad_()
    nn.functional.relu_(trained(case)(x)).sum().backward()
    assert x.grad.isfinite().all()


@each(LAYERS)
def test_output_may_be_added_to_in_place(case: LayerCase):
    # As residual connections do: y += x.
    x = case.input(4, 20).requires_grad_()
    y = trained(case)(x)
    y += x
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    alone = training_step(trained(case), x, torch.ones_like(y))["dx"]
    torch.testing.assert_close(dx, alone + 1)


def test_input_changed_in_place_between_forward_and_backward_is_an_error():
    # It is kept for backward, as in nn.BatchNorm; wrong gradients would be the alternative.
    x = images().requires_grad_() * 1
    y = RunningBatchNorm(3)(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -------------------------------------------------------------------------------------------------- several forwards


@each(LAYERS)
def test_a_training_step_between_an_evaluation_and_its_backward_does_not_matter(case: LayerCase):
    # As in losses that compare both modes. nn.BatchNorm goes back by the new statistics then.
    layer, x = trained(case), case.input(4, 20).requires_grad_()
    dy = noise(x.shape, 21)
    (expected,) = torch.autograd.grad(layer.eval()(x), x, dy)
    y = layer(x)
    layer.train()(case.input(6, 22))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, expected)


def runs(case: LayerCase, interleaved: bool) -> dict[str, Tensor]:
    """Output and input gradient of two batches, with both forwards before the backwards or one run after the other."""
    layer, results = trained(case), {}
    inputs = [case.input(size, 20 + i).requires_grad_() for i, size in enumerate((4, 6))]
    layer.zero_grad()
    if interleaved:
        outputs = [layer(x) for x in inputs]
    for i, x in enumerate(inputs):
        y = outputs[i] if interleaved else layer(x)
        y.backward(noise(y.shape, i) + 0.5)
        results |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
    return {**results, **{name: p.grad for name, p in layer.named_parameters()}, **buffers_of(layer)}


@each(LAYERS)
def test_two_forwards_before_the_backwards_give_the_gradients_of_separate_runs(case: LayerCase):
    assert_identical(runs(case, interleaved=True), runs(case, interleaved=False))


@each(LAYERS)
def test_evaluation_between_forward_and_backward_changes_nothing(case: LayerCase):
    layer, twin, x = trained(case), trained(case), case.input(4, 20)
    expected = training_step(twin, x)
    x.requires_grad_()
    y = layer(x)
    evaluate(layer, case.input(6, 21))
    y.backward(noise(y.shape, seed=0) + 0.5)
    assert torch.equal(x.grad, expected["dx"])


@each_class
def test_backward_twice_through_a_kept_graph_gives_the_same_weight_gradients(cls):
    layer = train(cls(3), [images()])
    y = layer(images(seed=1))
    first, second = (torch.autograd.grad(y.square().sum(), layer.weight, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


@each_class
def test_training_forward_without_gradients_advances_the_statistics_as_one_with_them(cls):
    layer, twin = cls(3), cls(3)
    layer(images())
    with torch.no_grad():
        twin(images())
    assert_identical(buffers_of(twin), buffers_of(layer))


@each_class
def test_inference_mode_evaluates(cls):
    layer = train(cls(3), [images()])
    expected = evaluate(layer, images(seed=1))
    with torch.inference_mode():
        assert torch.equal(layer.eval()(images(seed=1)), expected)


# ---------------------------------------------------------------------------------------------------------- autocast


@each_class
@each_dtype(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_keeps_what_the_convolution_gives(cls, dtype, training):
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(3, 3, 1), train(cls(3), [images()]).train(training)
    with torch.autocast("cpu", dtype):
        y = layer(conv(images()))
    assert y.dtype == dtype


@each_class
@each_dtype(torch.bfloat16, torch.float16)
def test_autocast_trains_as_float32_up_to_the_roundings_of_the_activations(cls, dtype):
    torch.manual_seed(0)
    conv, layer, twin = nn.Conv2d(3, 3, 1), train(cls(3), [images()]), train(cls(3), [images()])
    with torch.autocast("cpu", dtype):
        activations = conv(images(seed=1)).detach()
        y = layer(activations)
        loss = y.float().square().mean()
    loss.backward()
    # From the activations that autocast gave, float32 throughout: only y itself was rounded on the way.
    expected = twin(activations.float())
    expected.square().mean().backward()
    assert_near(y.detach(), expected.detach(), roundings=2)
    assert_near(layer.weight.grad, twin.weight.grad.detach(), roundings=4 * torch.finfo(dtype).eps / 1.2e-7)
    # float16 is summed in float32 and in another order, unlike the others.
    for name in ("running_mean", "running_var", "count", "debias", "samples", "steps"):
        assert_near(getattr(layer, name), getattr(twin, name), roundings=8)


def buffers_of_forward(layer: nn.Module) -> dict[str, Tensor]:
    backward = ("sum_dy", "sum_dy_xhat", "count_dy")
    return {name: buffer for name, buffer in buffers_of(layer).items() if name not in backward}


@each_class
def test_autocast_leaves_parameters_gradients_and_statistics_in_float32(cls):
    conv, layer = nn.Conv2d(3, 3, 1), cls(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(conv(images())).float().square().mean()
    loss.backward()
    values = [*layer.parameters(), *(p.grad for p in layer.parameters()), *buffers_of(layer).values()]
    assert {value.dtype for value in values if value.is_floating_point()} == {torch.float32}


# ------------------------------------------------------------------------------------------- no host synchronisation

READS_A_VALUE = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "unique_dim",
    "_unique2", "unique_consecutive", "allclose",
)  # fmt: skip


class RefuseHostSynchronisation(TorchDispatchMode):
    """Fails at every operator that has to wait for a value on the device, or whose output shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READS_A_VALUE or any(index is not None and index.dtype == torch.bool for index in indices):
            raise AssertionError(f"{func} synchronises with the host")
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("synchronise", SYNCHRONISING.values(), ids=SYNCHRONISING)
def test_the_guard_notices(synchronise):
    with RefuseHostSynchronisation(), pytest.raises(AssertionError, match="synchronises with the host"):
        synchronise(torch.arange(3.0))


@each(LAYERS)
@pytest.mark.parametrize("state", ["new", "trained", "seeded"])
def test_training_step_does_not_synchronise_with_the_host(case: LayerCase, state):
    layer = trained(case) if state == "trained" else case.layer()
    if state == "seeded":
        layer.running_mean = torch.ones(case.channels)
    with RefuseHostSynchronisation():
        training_step(layer, case.input(4, 20))


@each(LAYERS)
def test_evaluation_does_not_synchronise_with_the_host(case: LayerCase):
    layer = trained(case).eval()
    with RefuseHostSynchronisation():
        layer(case.input(4, 20))


# ------------------------------------------------------------------------------------------------------------ memory


def kept_for_backward(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors that autograd holds between forward and backward, each storage once."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return list(kept.values())


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@each(LAYERS)
def test_only_the_input_and_vectors_are_kept_for_backward(case: LayerCase):
    layer, x = trained(case), case.input(64, 20).requires_grad_()
    # Up to six vectors over channels, in one tensor.
    large = [tensor for tensor in kept_for_backward(layer, x) if tensor.numel() > 6 * case.channels]
    assert [tensor.untyped_storage().data_ptr() for tensor in large] == [x.untyped_storage().data_ptr()]


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16-input"])
def test_no_more_is_kept_for_backward_than_by_batchnorm_but_for_some_vectors(cls, dtype):
    x = images(dtype=dtype).requires_grad_()
    ours, torchs = (bytes_of(kept_for_backward(layer, x)) for layer in (cls(3), nn.BatchNorm2d(3)))
    vector = 3 * 4  # bytes of one vector of C float32 numbers
    assert ours - torchs <= 4 * vector


@each_class
def test_layer_holds_nothing_of_the_size_of_its_input_between_steps(cls):
    layer = train(cls(3), [images(64)])

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return list(itertools.chain.from_iterable(tensors(part) for part in parts))

    held = [tensor for tensor in tensors(vars(layer)) if tensor is not None]
    assert max(tensor.untyped_storage().nbytes() for tensor in held) <= 3 * 8


@pytest.mark.parametrize("make", [lambda: RunningBatchNorm(3, gradient="exact"), lambda: PreciseBatchNorm1d(3)])
def test_create_graph_with_a_gradient_of_the_bias_only(make):
    layer = make()
    layer.weight.requires_grad_(False)
    y = layer(noise((6, 3), 0))
    (dbias,) = torch.autograd.grad(y.square().sum(), [layer.bias], create_graph=True)
    torch.testing.assert_close(dbias, 2 * y.sum(0))
