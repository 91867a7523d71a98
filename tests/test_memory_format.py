"""Strides: layouts that are kept, and layouts that must make no difference."""

import pytest
import torch
from cases import LAYERS, LayerCase, assert_near, channels_last, each, noise
from steps import assert_identical, buffers_of, evaluate, trained, training_step
from torch import Tensor, nn

# The rule weighs sums of C numbers, whose layout is always the same.
CASES = tuple(case for case in LAYERS if "momentum" not in case.kwargs)
SPATIAL = tuple(case for case in CASES if len(case.shape) > 1)
# Sums over the same up to 2000 numbers in another order, at about one rounding per level of a pairwise sum, in the
# two statistics and in the two backward sums, which the outputs then see through a dozen operations.
ROUNDINGS = 64


def is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def into_every_other(x: Tensor) -> Tensor:
    """A slice of a tensor twice as long in its last dimension."""
    holder = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    holder[..., ::2] = x
    return holder[..., ::2]


def batch_innermost(x: Tensor) -> Tensor:
    """The dimensions in reverse order in memory."""
    reverse = list(range(x.dim()))[::-1]
    return x.permute(reverse).contiguous().permute(reverse)


def with_offset(x: Tensor) -> Tensor:
    """Contiguous, but not at the start of its storage."""
    return torch.cat([torch.full_like(x[:1], torch.nan), x])[1:]


LAYOUTS = {
    "channels-last": channels_last,
    "sliced": into_every_other,
    "batch-innermost": batch_innermost,
    "offset": with_offset,
}
each_layout = pytest.mark.parametrize("arrange", LAYOUTS.values(), ids=LAYOUTS)


def step_in_layouts(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """One training step on exactly these tensors: `training_step` clones its input, which may change the strides."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx, *gradients) = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return {"y": y.detach(), "dx": dx, **dict(zip((f"d{name}" for name, _ in layer.named_parameters()), gradients))}


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            # The sums may cancel to nothing; they are made of numbers of order 1 to 10.
            assert_near(actual[name], value, ROUNDINGS, scale=value.abs().max().clamp(min=10))
        else:
            assert torch.equal(actual[name], value), name


# --------------------------------------------------------------------------------------------------- layouts are kept


@each(SPATIAL)
def test_output_of_a_channels_last_input_is_channels_last(case: LayerCase):
    assert is_channels_last(trained(case)(channels_last(case.input(4))))


# Evaluation is torch's own operation, which keeps the layouts that torch has a name for: those of images and volumes.
@each([case for case in SPATIAL if len(case.shape) in (3, 4)])
def test_output_of_a_channels_last_input_is_channels_last_in_evaluation(case: LayerCase):
    assert is_channels_last(trained(case).eval()(channels_last(case.input(4))))


@each(SPATIAL)
@pytest.mark.parametrize("of_dy", [channels_last, Tensor.contiguous], ids=["dy-channels-last", "dy-contiguous"])
def test_input_gradient_of_a_channels_last_input_is_channels_last(case: LayerCase, of_dy):
    x = case.input(4)
    step = step_in_layouts(trained(case), channels_last(x), of_dy(noise(x.shape, 1)))
    assert is_channels_last(step["dx"])


@each(CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_of_a_contiguous_input_is_contiguous(case: LayerCase, training):
    assert trained(case).train(training)(case.input(4)).is_contiguous()


@each(CASES)
def test_input_gradient_of_a_contiguous_input_is_contiguous_whatever_the_layout_of_dy(case: LayerCase):
    x = case.input(4)
    assert step_in_layouts(trained(case), x, batch_innermost(noise(x.shape, 1)))["dx"].is_contiguous()


@pytest.mark.parametrize(
    ("case", "memory_format"),
    [(case, torch.channels_last if len(case.shape) == 3 else torch.channels_last_3d)
     for case in CASES if len(case.shape) in (3, 4)],
    ids=lambda value: getattr(value, "id", ""),
)  # fmt: skip
def test_torchs_memory_formats_are_recognised_in_the_output(case: LayerCase, memory_format):
    y = trained(case)(case.input(4).contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)


# --------------------------------------------------------------------------------------------- layouts do not matter


@each(CASES)
@each_layout
def test_layout_of_the_input_makes_no_difference(case: LayerCase, arrange):
    layer, twin = trained(case), trained(case)
    x, dy = case.input(4, 20), noise((4, *case.shape), 1)
    assert_all_near(step_in_layouts(twin, arrange(x), dy), step_in_layouts(layer, x, dy))
    assert_all_near(buffers_of(twin), buffers_of(layer))


@each(CASES)
@each_layout
def test_layout_of_the_gradient_makes_no_difference(case: LayerCase, arrange):
    layer, twin = trained(case), trained(case)
    x, dy = case.input(4, 20), noise((4, *case.shape), 1)
    assert_all_near(step_in_layouts(twin, x, arrange(dy)), step_in_layouts(layer, x, dy))
    assert_all_near(buffers_of(twin), buffers_of(layer))


@each(SPATIAL)
def test_channels_last_input_beside_a_gradient_of_another_layout_makes_no_difference(case: LayerCase):
    layer, twin = trained(case), trained(case)
    x, dy = case.input(4, 20), noise((4, *case.shape), 1)
    actual = step_in_layouts(twin, channels_last(x), batch_innermost(dy))
    assert_all_near(actual, step_in_layouts(layer, x, dy))


@each(CASES)
@each_layout
def test_layout_makes_no_difference_in_evaluation(case: LayerCase, arrange):
    layer, x = trained(case), case.input(4, 20)
    assert_near(evaluate(layer, arrange(x)), evaluate(layer, x), ROUNDINGS)


@each(CASES)
def test_expanded_input_gives_what_its_copy_gives(case: LayerCase):
    layer, twin = trained(case), trained(case)
    x, dy = case.input(1, 20).expand(4, *case.shape), noise((4, *case.shape), 1)
    assert_all_near(step_in_layouts(twin, x, dy), step_in_layouts(layer, x.contiguous(), dy))


@each(CASES)
def test_expanded_gradient_of_a_sum_gives_what_its_copy_gives(case: LayerCase):
    layer, twin, x = trained(case), trained(case), case.input(4, 20)
    expected = training_step(layer, x, torch.ones_like(x))
    x = x.clone().requires_grad_()
    twin.zero_grad()
    twin(x).sum().backward()
    gradients = {f"d{name}": parameter.grad for name, parameter in twin.named_parameters()}
    assert_all_near({"dx": x.grad, **gradients}, {name: g for name, g in expected.items() if name != "y"})


@each(CASES)
def test_input_is_not_written_to(case: LayerCase):
    layer, x = trained(case), case.input(4, 20)
    before = x.clone()
    training_step(layer, x)
    evaluate(layer, x)
    assert_identical({"x": x}, {"x": before})


@each(CASES)
def test_gradient_is_not_written_to(case: LayerCase):
    x, dy = case.input(4, 20), noise((4, *case.shape), 1)
    before = dy.clone()
    step_in_layouts(trained(case), x, dy)
    assert_identical({"dy": dy}, {"dy": before})
