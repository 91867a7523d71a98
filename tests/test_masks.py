"""Padding masks: what a mask leaves out counts for nothing, in forward, backward, state, recalibration and ranks."""

import copy

import pytest
import torch
from cases import LAYERS, LayerCase, assert_near, each, from_this_state, noise, with_random_affine
from processes import ranks
from steps import assert_identical, buffers_of, evaluate
from torch import Tensor, nn

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, SquareRoot, update_bn_stats
from runningbn.layers.buffers import TRAINING

C, L = 3, 9
KINDS = {
    "running": lambda **kw: RunningBatchNorm(C, **kw),
    "running-exact": lambda **kw: RunningBatchNorm(C, gradient="exact", **kw),
    "running-limited": lambda **kw: RunningBatchNorm(C, max_lag=1e-3, **kw),
    "running-squareroot": lambda **kw: RunningBatchNorm(C, momentum=SquareRoot(0.1), **kw),
    "running-float": lambda **kw: RunningBatchNorm(C, momentum=0.2, **kw),
    "precise": lambda **kw: PreciseBatchNorm1d(C, **kw),
    "precise-cumulative": lambda **kw: PreciseBatchNorm1d(C, momentum=None, **kw),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
# Those in which every element counts alike, so that nothing depends on which sample one belongs to.
each_elementwise_kind = pytest.mark.parametrize("kind", ["running-float", "precise", "precise-cumulative"])


def layer_of(make, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    return with_random_affine(make(dtype=dtype, **options))


def lengths_mask(lengths: list[int], longest: int = L) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def masked_step(layer: nn.Module, x: Tensor, mask: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x) if mask is None else layer(x, mask)
    y.backward(dy)
    gradients = {f"d{name}": p.grad.clone() for name, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    """The buffers, but for the sums themselves: those depend on a pivot that may be any near the mean."""
    own = {name: buffer.double() for name, buffer in buffers_of(layer).items()}
    return {name: buffer for name, buffer in own.items() if name not in ("shift", "sums", "sqrs")}


def assert_steps_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Sums of up to 60 elements in another order, some steps long.
        assert_near(actual[name].to(value.dtype), value, roundings=300, scale=max(1.0, value.abs().max()))


@each(LAYERS)
def test_a_mask_that_leaves_nothing_out_changes_nothing(case: LayerCase):
    plain, masked = (with_random_affine(case.layer(dtype=torch.float64)) for _ in range(2))
    for seed in range(3):
        x = case.input(5, seed, torch.float64)
        dy, mask = noise(x.shape, 50 + seed, x.dtype), torch.ones_like(x[:, 0], dtype=torch.bool)
        assert_steps_near(masked_step(masked, x, mask, dy), masked_step(plain, x, None, dy))
    assert_steps_near(state_of(masked), state_of(plain))


@each_elementwise_kind
def test_any_mask_is_a_batch_of_the_real_elements(kind):
    masked, packed = (layer_of(KINDS[kind]) for _ in range(2))
    for seed, lengths in enumerate([[9, 1, 4, 0], [2, 2], [5, 0, 7]]):
        mask = lengths_mask(lengths)
        x, dy = (noise((len(lengths), C, L), s, torch.float64) for s in (seed, 20 + seed))
        actual = masked_step(masked, x, mask, dy)
        expected = masked_step(packed, x.movedim(1, 2)[mask], None, dy.movedim(1, 2)[mask])
        for name in ("y", "dx"):
            assert torch.equal(actual[name].movedim(1, 2)[~mask], torch.zeros_like(x).movedim(1, 2)[~mask])
            actual[name] = actual[name].movedim(1, 2)[mask]
        if kind == "running-float":
            # How much the backward believes a batch depends on its samples; see test_law_backends for its reference.
            del actual["dx"], expected["dx"]
        assert_steps_near(actual, expected)
    of_packed = {**state_of(packed), "samples": torch.full((C,), 3.0 + 2 + 2, dtype=torch.float64)}
    of_masked = state_of(masked)
    for name in TRAINING:
        of_packed.pop(name, None), of_masked.pop(name, None)
    assert_steps_near(of_masked, of_packed)


@each_kind
def test_padding_at_the_end_and_samples_of_nothing_else_leave_no_trace(make):
    masked, plain = layer_of(make), layer_of(make)
    for seed in range(3):
        x, dy = (noise((6, C, L), s, torch.float64) for s in (seed, 20 + seed))
        mask = lengths_mask([5, 5, 0, 5, 0, 5])
        actual, rows = masked_step(masked, x, mask, dy), [0, 1, 3, 5]
        expected = masked_step(plain, x[rows, :, :5], None, dy[rows, :, :5])
        actual |= {name: actual[name][rows, :, :5] for name in ("y", "dx")}
        assert_steps_near(actual, expected)
    assert_steps_near(state_of(masked), state_of(plain))


@each_kind
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_stands_in_the_padding_does_not_matter(make, poison, dtype):
    layer = layer_of(make, torch.float32)
    poisoned = copy.deepcopy(layer)
    for seed in range(3):
        mask = lengths_mask([4, 9, 2, 0])
        x, dy = noise((4, C, L), seed, dtype), noise((4, C, L), 20 + seed, dtype)
        bad = [torch.where(mask[:, None], t, poison) for t in (x, dy)]
        clean = [torch.where(mask[:, None], t, 0) for t in (x, dy)]
        assert_identical(masked_step(poisoned, bad[0], mask, bad[1]), masked_step(layer, clean[0], mask, clean[1]))
    assert_identical(buffers_of(poisoned), buffers_of(layer))
    assert_identical({"y": evaluate_masked(poisoned, bad[0], mask)}, {"y": evaluate_masked(layer, clean[0], mask)})


def evaluate_masked(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    layer.eval()
    with torch.no_grad():
        y = layer(x, mask)
    layer.train()
    return y


@each_kind
def test_evaluation_is_that_without_a_mask_and_0_in_the_padding(make):
    layer, mask = layer_of(make), lengths_mask([4, 9, 0])
    x = noise((3, C, L), 0, torch.float64)
    layer(x, mask)
    expected = torch.where(mask[:, None], evaluate(layer, x), 0)
    assert torch.equal(evaluate_masked(layer, x, mask), expected)
    # Gradients of evaluation, as for a frozen layer.
    layer.eval()
    step = masked_step(layer, torch.where(mask[:, None], x, torch.nan), mask, torch.ones_like(x))
    assert torch.equal(step["dbias"], torch.full((C,), 13.0, dtype=torch.float64))
    assert all(torch.isfinite(value).all() for value in step.values())


@each_kind
def test_a_batch_of_nothing_but_padding_changes_nothing(make):
    layer = layer_of(make)
    layer(noise((4, C, L), 0, torch.float64))
    before = buffers_of(layer)
    x = noise((2, C, L), 1, torch.float64)
    step = masked_step(layer, x, torch.zeros(2, L, dtype=torch.bool), torch.ones_like(x))
    assert all(not value.any() for value in step.values())
    passing = ("last_keep", "last_gain")
    assert_identical(*({k: v for k, v in b.items() if k not in passing} for b in (buffers_of(layer), before)))


@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d])
def test_without_running_statistics_the_real_elements_normalise(make):
    layer = make(C, track_running_stats=False, affine=False, dtype=torch.float64)
    mask = noise((4, 5, 6), 3) > 0
    x = noise((4, C, 5, 6), 0, torch.float64)
    for training in (True, False):
        rows = layer.train(training)(x, mask).movedim(1, -1)[mask]
        assert_near(rows.mean(0), torch.zeros(C, dtype=x.dtype), roundings=100, scale=1.0)
        # eps = 1e-5 beside a variance of order 1.
        torch.testing.assert_close(rows.var(0, correction=0), torch.ones(C, dtype=x.dtype), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("kind", ["running-exact", "precise"])
def test_gradients_are_the_derivatives(kind):
    layer, mask = layer_of(KINDS[kind]), lengths_mask([4, 2, 0], 4)
    layer(noise((4, C, 4), 0, torch.float64))
    masked, parameters = from_this_state(layer, mask)
    x = noise((3, C, 4), 1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(masked, (x, *parameters))
    assert torch.autograd.gradgradcheck(masked, (x, *parameters))


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_variance_of_real_elements_far_from_zero_is_kept(mean):
    layer, mask = PreciseBatchNorm1d(C, momentum=None), lengths_mask([9, 3, 5, 7])
    x = noise((4, C, L), 0, torch.float64) + mean
    layer(torch.where(mask[:, None], x, 0).float(), mask)
    # At 1e4, float32 inputs themselves are off by 5e-4 of their standard deviation.
    expected = x.movedim(1, 2)[mask].float().double().var(0)
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "kind",
    [
        "running",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("running-limited", "running-exact", "precise")),
    ],
)
def test_compiled_in_one_graph(kind):
    torch._dynamo.reset()
    eager = layer_of(KINDS[kind], torch.float32)
    copied = copy.deepcopy(eager)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for seed, lengths in enumerate([[9, 1, 4], [2, 9, 3], [7, 0, 5]]):
        x, dy, mask = noise((3, C, L), seed), noise((3, C, L), 20 + seed), lengths_mask(lengths)
        expected = masked_step(eager, x, mask, dy)
        x.requires_grad_()
        copied.zero_grad()
        y = compiled(x, mask)
        y.backward(dy)
        # Sums of 27 float32 elements of order 1, some steps long.
        torch.testing.assert_close(y, expected["y"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, expected["dx"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copied.weight.grad, expected["dweight"], rtol=1e-5, atol=1e-4)
    assert_identical(*({name: b.float().round(decimals=3) for name, b in state_of(m).items()} for m in (copied, eager)))
    torch._dynamo.reset()


LENGTHS = [[5, 9], [3, 0], [0, 0], [7, 1]]


def rank_step(rank: int, kind: str) -> tuple[dict, dict]:
    layer = layer_of(KINDS[kind], sync=True)
    for seed in range(2):
        x, dy = (noise((8, C, L), s, torch.float64)[2 * rank : 2 * rank + 2] for s in (seed, 20 + seed))
        step = masked_step(layer, x, lengths_mask(LENGTHS[rank + 2 * seed]), dy)
    return step, state_of(layer)


@pytest.mark.parametrize("kind", ["running", "running-limited", "running-exact", "precise"])
def test_ranks_are_one_process(kind):
    outcomes = ranks(2)(rank_step, kind)
    layer = layer_of(KINDS[kind])
    for seed in range(2):
        x, dy = (noise((8, C, L), s, torch.float64)[:4] for s in (seed, 20 + seed))
        mask = lengths_mask(LENGTHS[2 * seed] + LENGTHS[2 * seed + 1])
        expected = masked_step(layer, x, mask, dy)
    actual = {name: torch.cat([step[name] for step, _ in outcomes]) for name in ("y", "dx")}
    actual |= {name: sum(step[name] for step, _ in outcomes) for name in ("dweight", "dbias")}
    assert_steps_near(actual, expected)
    for _, buffers in outcomes:
        assert_steps_near(buffers, state_of(layer))


class Masked(nn.Module):
    """A net on sequences that hands its mask on."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.conv, self.second = cls(C), nn.Conv1d(C, C, 3, padding=1), cls(C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.conv(self.first(x, mask)), mask=mask)


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm1d])
@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_recalibration_counts_real_elements_only(cls, normalize):
    model = Masked(cls).double()
    masks = [lengths_mask(lengths) for lengths in ([9, 4, 1], [2, 0, 6])]
    batches = [{"x": noise((3, C, L), seed, torch.float64), "mask": mask} for seed, mask in enumerate(masks)]
    report = update_bn_stats(model, batches, normalize=normalize)
    rows = torch.cat([batch["x"].movedim(1, 2)[batch["mask"]] for batch in batches])
    correction = 1 if cls is PreciseBatchNorm1d else 0
    assert_near(model.first.running_mean, rows.mean(0), roundings=100, scale=1.0)
    assert_near(model.first.running_var, rows.var(0, correction=correction), roundings=100)
    assert [layer.elements for layer in report.layers] == [22, 22]
    if normalize == "population":
        model.eval()
        inside = [model.conv(model.first(batch["x"], batch["mask"])).movedim(1, 2)[batch["mask"]] for batch in batches]
        assert_near(model.second.running_mean, torch.cat(inside).mean(0).detach(), roundings=1000, scale=1.0)


@pytest.mark.parametrize("make", [KINDS["running"], KINDS["precise"]])
def test_a_mask_that_does_not_fit_is_refused_before_anything_changes(make):
    layer = layer_of(make)
    before, x = buffers_of(layer), noise((2, C, L), 0, torch.float64)
    with pytest.raises(TypeError, match=r"mask: expected torch.bool.* got torch.int64"):
        layer(x, torch.ones(2, L, dtype=torch.int64))
    for shape in ((2, C, L), (L,), (2, L + 1), (2, 1, L)):
        with pytest.raises(ValueError, match=r"mask: expected shape \(2, 9\) for an input of shape \(2, 3, 9\), got"):
            layer(x, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected it on cpu as the input, got meta"):
        layer(x, torch.ones(2, L, dtype=torch.bool, device="meta"))
    assert_identical(buffers_of(layer), before)
