"""Activation checkpointing: a segment is run again in backward, and the statistics must not notice."""

import pytest
import torch
from cases import LAYERS, LayerCase, each, noise, with_random_affine
from steps import assert_identical, buffers_of, train, training_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, SquareRoot

each_kind = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
each_class = pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)


class Checkpointed(nn.Module):
    """The same function and the same parameter names, with its activations recomputed."""

    def __init__(self, segment: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.segment = segment
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.segment, x, use_reentrant=self.use_reentrant)


class Plain(nn.Module):
    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        return self.segment(x)


def images(batch_size: int = 4, seed: int = 0) -> Tensor:
    return noise((batch_size, 3, 4, 4), seed) * 2 + 1


def several_layers() -> nn.Module:
    torch.manual_seed(0)
    return with_random_affine(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            RunningBatchNorm(4),
            nn.Tanh(),
            PreciseBatchNorm2d(4),
            nn.Conv2d(4, 3, 1),
            RunningBatchNorm(3, momentum=SquareRoot(0.1), gradient="exact"),
        )
    )


@each(LAYERS)
@each_kind
def test_checkpointed_layer_trains_bit_for_bit_as_the_plain_one(case: LayerCase, use_reentrant):
    plain, checkpointed = Plain(case.layer()), Checkpointed(case.layer(), use_reentrant)
    for x in case.batches((5, 3, 8)):  # another shape at every step
        assert_identical(training_step(checkpointed, x), training_step(plain, x))


@each(LAYERS)
@each_kind
def test_buffers_are_updated_once_per_step(case: LayerCase, use_reentrant):
    # Statistics, counters and the running sums of the backward pass: all buffers, at every step.
    plain, checkpointed = Plain(case.layer()), Checkpointed(case.layer(), use_reentrant)
    for x in case.batches((5, 3, 8)):
        training_step(plain, x)
        training_step(checkpointed, x)
        assert_identical(buffers_of(checkpointed), buffers_of(plain))


@each_kind
def test_segment_of_several_layers_trains_bit_for_bit_as_the_plain_one(use_reentrant):
    plain, checkpointed = Plain(several_layers()), Checkpointed(several_layers(), use_reentrant)
    for seed in range(3):
        assert_identical(training_step(checkpointed, images(seed=seed)), training_step(plain, images(seed=seed)))
    assert_identical(buffers_of(checkpointed), buffers_of(plain))


@each_kind
def test_segments_one_after_the_other_train_bit_for_bit_as_the_plain_model(use_reentrant):
    plain, checkpointed = several_layers(), several_layers()
    for seed in range(3):
        expected, x = training_step(plain, images(seed=seed)), images(seed=seed).requires_grad_()
        checkpointed.zero_grad()
        y = checkpoint_sequential(checkpointed, 3, x, use_reentrant=use_reentrant)
        y.backward(noise(y.shape, seed=0) + 0.5)
        actual = {f"d{name}": parameter.grad for name, parameter in checkpointed.named_parameters()}
        assert_identical({"y": y.detach(), "dx": x.grad, **actual}, expected)
    assert_identical(buffers_of(checkpointed), buffers_of(plain))


def test_segment_inside_a_segment_trains_bit_for_bit_as_the_plain_one():
    plain = Plain(Plain(several_layers()))
    nested = Checkpointed(Checkpointed(several_layers(), use_reentrant=False), use_reentrant=False)
    for seed in range(3):
        assert_identical(training_step(nested, images(seed=seed)), training_step(plain, images(seed=seed)))
    assert_identical(buffers_of(nested), buffers_of(plain))


@each_class
@each_kind
def test_plain_steps_and_checkpointed_steps_mix(cls, use_reentrant):
    plain, mixed = Plain(cls(3)), cls(3)
    for seed, wrap in enumerate((Plain, lambda layer: Checkpointed(layer, use_reentrant), Plain)):
        assert_identical(training_step(wrap(mixed), images(seed=seed)), training_step(plain, images(seed=seed)))
    assert_identical(buffers_of(mixed), buffers_of(plain.segment))


@each_class
@each_kind
def test_layer_in_evaluation_inside_a_segment_stays_frozen(cls, use_reentrant):
    layer = train(cls(3), [images()]).eval()
    plain = training_step(Plain(layer), images(seed=1))
    before = buffers_of(layer)
    checkpointed = Checkpointed(layer, use_reentrant)
    assert_identical(training_step(checkpointed, images(seed=1)), plain)
    assert_identical(buffers_of(layer), before)


@each_class
@each_kind
def test_channel_that_was_not_finite_is_recomputed_as_it_was(cls, use_reentrant):
    plain, checkpointed = Plain(train(cls(3), [images()])), Checkpointed(train(cls(3), [images()]), use_reentrant)
    x = images(seed=1)
    x[0, 1] = torch.inf
    assert_identical(training_step(checkpointed, x), training_step(plain, x))
    assert_identical(buffers_of(checkpointed), buffers_of(plain))


@each_kind
def test_two_forwards_in_flight_absorb_each_batch_once(use_reentrant):
    # Their gradients are documented not to be those of a plain run; the statistics still are.
    plain, checkpointed = RunningBatchNorm(3), RunningBatchNorm(3)
    own = ("shift", "sums", "sqrs", "count", "count_sqrs", "debias", "samples", "steps", "num_batches_tracked")
    wrapped = Checkpointed(checkpointed, use_reentrant)
    outputs = [wrapped(images(seed=seed).requires_grad_()) for seed in range(2)]
    for y in outputs:
        y.sum().backward()
    for seed in range(2):
        plain(images(seed=seed))
    expected = buffers_of(plain)
    assert_identical({name: buffers_of(checkpointed)[name] for name in own}, {name: expected[name] for name in own})


@each_kind
def test_two_forwards_of_a_precise_layer_in_flight_train_bit_for_bit_as_plain_ones(use_reentrant):
    # What is recomputed depends on the batch alone.
    results = []
    for wrap in (Plain, lambda layer: Checkpointed(layer, use_reentrant)):
        model = wrap(PreciseBatchNorm2d(3))
        inputs = [images(batch_size, seed).requires_grad_() for seed, batch_size in enumerate((4, 2))]
        for y in [model(x) for x in inputs]:
            y.square().sum().backward()
        results.append({**{str(i): x.grad for i, x in enumerate(inputs)}, **buffers_of(model)})
    assert_identical(*results)


@each_class
def test_no_more_than_the_input_is_kept_between_forward_and_backward(cls):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Checkpointed(cls(3), use_reentrant=True)(images().requires_grad_())
    assert [tuple(t.shape) for t in kept] == [(4, 3, 4, 4)]
