"""Steps that the extension for the CPU leaves to Python, unchanged; and what it leaves behind, which is nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import noise
from step_extension import counted, in_python
from steps import assert_identical, buffers_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from runningbn import MomentumRule, PreciseBatchNorm2d, RunningBatchNorm
from runningbn.kernels import cpu_step, use_backend

if cpu_step.unavailable() is not None:
    pytest.skip(f"the extension for steps: {cpu_step.unavailable()}", allow_module_level=True)

X = (2, 4, 3, 3)


class Tenth(MomentumRule):
    """A rule of one's own."""

    def weight(self, batch: Any, samples: Tensor, steps: Tensor) -> Tensor:
        return torch.full_like(samples, 0.1)


class Seen(TorchDispatchMode):
    """Lets all pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    """Lets all pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A tensor that is one of its own kind."""


class Times(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def nothing(layer: nn.Module) -> None:
    pass


def plain(x: Tensor) -> Tensor:
    return x


class Case(NamedTuple):
    """What is out of the ordinary."""

    edit: Callable[[Any], Any] = nothing
    given: Callable[[Tensor], Any] = plain
    around: Callable[[], Any] = contextlib.nullcontext
    mask: Tensor | None = None


def data_as(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Change a buffer in its place."""

    def edit(layer: Any) -> None:
        getattr(layer, name).data = change(getattr(layer, name).data)

    return edit


def without_memory(layer: Any) -> None:
    layer.sqrs.untyped_storage().resize_(0)


def removed(name: str) -> Callable[[Any], None]:
    return lambda layer: layer._buffers.pop(name)


def assigned(**values: Any) -> Callable[[Any], None]:
    def edit(layer: Any) -> None:
        for name, value in values.items():
            setattr(layer, name, value)

    return edit


def parameter_as(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def edit(layer: Any) -> None:
        layer._parameters[name] = make(layer._parameters[name].detach())

    return edit


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2)[::2]


CASES = {
    "evaluation": Case(lambda layer: layer.eval()),
    "no statistics": Case(assigned(track_running_stats=False)),
    "sync": Case(assigned(sync=True)),
    "mask": Case(mask=torch.ones(2, 3, 3, dtype=torch.bool)),
    "a rule of one's own": Case(assigned(momentum=Tenth())),
    "eps that is no float": Case(assigned(eps=1)),
    "eps of zero": Case(assigned(eps=0.0)),
    "another backend": Case(around=lambda: use_backend("aten")),
    "dispatch mode": Case(around=Seen),
    "function mode": Case(around=SeenFunctions),
    "inference mode": Case(around=torch.inference_mode),
    "forward-mode level": Case(around=forward_ad.dual_level),
    "default device": Case(around=lambda: torch.device("cpu")),
    "double input": Case(given=Tensor.double),
    "integers": Case(given=Tensor.long),
    "every second": Case(given=lambda x: torch.cat((x, x), 3)[..., ::2]),
    "transposed": Case(given=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "expanded": Case(given=lambda x: x[:1].expand(X)),
    "negated view": Case(given=torch._neg_view),
    "zero tensor": Case(given=lambda x: torch._efficientzerotensor(X)),
    "meta": Case(given=lambda x: x.to("meta")),
    "sparse": Case(given=Tensor.to_sparse),
    "empty": Case(given=lambda x: x[:0]),
    "no dimensions": Case(given=lambda x: x[0, 0, 0, 0]),
    "one dimension": Case(given=lambda x: x[0, 0, 0]),
    "other channels": Case(given=lambda x: x[:, :3]),
    "no tensor": Case(given=lambda x: None),
    "parametrised": Case(lambda layer: parametrize.register_parametrization(layer, "weight", Times())),
    "derived weight": Case(parameter_as("weight", lambda w: w.as_subclass(Marked))),
    "bfloat16 weight": Case(parameter_as("weight", Tensor.bfloat16), given=Tensor.bfloat16),
    "strided weight": Case(parameter_as("weight", strided)),
    "short weight": Case(parameter_as("weight", lambda w: w[:3])),
    "square weight": Case(parameter_as("weight", lambda w: w.view(2, 2))),
    "negated bias": Case(parameter_as("bias", lambda b: torch._neg_view(b + 1))),
    "zero bias": Case(parameter_as("bias", lambda b: torch._efficientzerotensor((4,)))),
    "double bias": Case(parameter_as("bias", Tensor.double)),
    "a buffer of doubles": Case(data_as("debias", Tensor.double)),
    "a strided buffer": Case(data_as("sums", strided)),
    "a short buffer": Case(data_as("running_var", lambda t: t[:3])),
    "a derived buffer": Case(lambda layer: layer._buffers.update(count=layer.count.as_subclass(Marked))),
    "a count of doubles": Case(data_as("num_batches_tracked", Tensor.double)),
    "a buffer without memory": Case(without_memory),
    "no buffer": Case(lambda layer: layer._buffers.update(sqrs=None)),
}


@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_out_of_the_ordinary_is_left_to_python(make, case):
    found: list[Any] = []
    for way in (counted, in_python):
        layer = make(4)
        layer(noise(X, 1))
        case.edit(layer)
        try:
            with way() as counts, case.around():
                y = layer(case.given(noise(X, 2)), *(() if case.mask is None else (case.mask,)))
            outcome = {"y": y.detach()} if y.device.type == "cpu" else {}
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        assert way is in_python or "forward" not in counts
        state = {name: b for name, b in buffers_of_all(layer).items() if b.untyped_storage().size() > 0}
        found.append((outcome, state))
    (outcome, state), (expected, expected_state) = found
    if isinstance(expected, str):
        assert outcome == expected
    else:
        assert_identical(outcome, expected)
    assert_identical(state, expected_state)


def buffers_of_all(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach() for name, buffer in layer.named_buffers()}


def test_one_value_per_channel_is_refused_by_python():
    layer = PreciseBatchNorm2d(4)
    before = buffers_of(layer)
    with counted() as counts, pytest.raises(ValueError, match="more than 1 value"):
        layer(noise((1, 4, 1, 1), 0))
    assert counts == {"declined forward": 1}
    assert_identical(buffers_of(layer), before)


def test_a_check_of_the_dimensions_of_ones_own_is_asked():
    class Flat(PreciseBatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        Flat(4)(noise(X, 0))


# ------------------------------------------------------------------------------------------------------------ backward

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda dy: dy[:1, :1, :1, :1].expand(X),
    "transposed": lambda dy: dy.transpose(2, 3),
    "channels last": lambda dy: dy.to(memory_format=torch.channels_last),
    "negated view": torch._neg_view,
    "derived": lambda dy: dy.as_subclass(Marked),
}
SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "derived": lambda t: t.as_subclass(Marked),
    "strided": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "negated view": lambda t: torch._neg_view(torch.neg(t)),
}


def gradients(layer: Any, dy: Callable[[Tensor], Tensor], **options: Any) -> dict[str, Tensor]:
    x = noise(X, 0).requires_grad_()
    y = layer(x)
    y.backward(dy(noise(X, 1)), **options)
    return {"dx": x.grad.detach(), **{n: p.grad.detach() for n, p in layer.named_parameters()}, **buffers_of(layer)}


@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("dy", GRADIENTS.values(), ids=GRADIENTS)
def test_a_gradient_of_another_kind_is_left_to_python(make, dy):
    found = []
    for way in (counted, in_python):
        with way() as counts:
            found.append(gradients(make(4), dy))
        assert way is in_python or counts == {"forward": 1, "declined backward": 1}
    assert_identical(*found)


@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize("unpack", SAVED.values(), ids=SAVED)
def test_what_hooks_make_of_saved_tensors_is_left_to_python(make, unpack):
    found = []
    for way in (counted, in_python):
        with way() as counts, saved_tensors_hooks(plain, unpack):
            found.append(gradients(make(4), plain))
        assert way is in_python or counts == {"forward": 1, "declined backward": 1}
    assert_identical(*found)


@pytest.mark.parametrize("change", [Tensor.double, strided, lambda t: t[:3]], ids=["doubles", "strided", "short"])
def test_gradient_buffers_that_change_before_the_backward_are_left_to_python(change):
    found = []
    for way in (counted, in_python):
        layer = RunningBatchNorm(4)
        with way() as counts:
            x = noise(X, 0).requires_grad_()
            y = layer(x)
            for name in ("sum_dy", "sum_dy_xhat", "count_dy"):
                data_as(name, change)(layer)
            try:
                y.backward(noise(X, 1))
                outcome = {"dx": x.grad}
            except RuntimeError:
                outcome = {}
            assert way is in_python or counts == {"forward": 1, "declined backward": 1}
        found.append({**outcome, **buffers_of(layer)})
    assert_identical(*found)


def test_a_second_derivative_is_left_to_python():
    for make in (PreciseBatchNorm2d, lambda c: RunningBatchNorm(c, gradient="exact")):
        found = []
        for way in (counted, in_python):
            x, layer = noise(X, 0).requires_grad_(), make(4)
            with way() as counts:
                (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
                found.append({"ddx": torch.autograd.grad(dx.square().sum(), x)[0]})
            # The first with a graph of its own, and then through y, without.
            assert way is in_python or counts == {"forward": 1, "backward": 1}
        assert_identical(*found)
    x = noise(X, 0).requires_grad_()
    (dx,) = torch.autograd.grad(RunningBatchNorm(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


def test_a_backward_under_a_mode_is_left_to_python():
    with counted() as counts:
        y = RunningBatchNorm(4)(noise(X, 0))
        with Seen():
            y.backward(noise(X, 1))
    assert counts == {"forward": 1}


def test_a_backward_twice_is_taken_twice():
    with counted() as counts:
        y = RunningBatchNorm(4)(noise(X, 0))
        for _ in range(2):
            y.backward(noise(X, 1), retain_graph=True)
    assert counts == {"forward": 1, "backward": 2}
