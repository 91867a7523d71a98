"""What no kernel may take by its address, and what may change between steps: errors, and nothing is changed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import noise
from steps import assert_identical, buffers_of
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from runningbn import (
    MomentumRule,
    PreciseBatchNorm1d,
    RunningBatchNorm,
    batchnormify,
    diagnose,
    merge_statistics,
    update_bn_stats,
)
from runningbn.kernels import cpu, cpu_calls, cpu_step, use_backend
from runningbn.momentum import Constant


class Returning(MomentumRule):
    """A rule whose weight is what it is told, as a user's may be."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def weight(self, batch, samples, steps):
        return self.value


@pytest.mark.parametrize(
    "value", [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((64,), 0.25, dtype=torch.float64)], ids=str
)
def test_a_rule_may_return_a_number_or_any_tensor_that_expands(value):
    layers = [RunningBatchNorm(64, momentum=momentum) for momentum in (Returning(value), 0.25)]
    for layer in layers:
        layer(noise((8, 64), 0))
        layer(noise((8, 64), 1) + 1)
    for name, buffer in buffers_of(layers[0]).items():
        torch.testing.assert_close(buffer, buffers_of(layers[1])[name], rtol=1e-5, atol=1e-5)


def test_a_rule_that_returns_another_length_changes_nothing():
    layer = RunningBatchNorm(3, momentum=Returning(torch.full((2,), 0.25)))
    before = buffers_of(layer)
    with pytest.raises(RuntimeError, match="expand"):
        layer(noise((8, 3), 0))
    assert_identical(buffers_of(layer), before)


def test_a_derived_rule_is_asked_itself():
    class Half(Constant):
        def weight(self, batch, samples, steps):
            return super().weight(batch, samples, steps) / 2

    layer = RunningBatchNorm(3, momentum=Half(0.5))
    layer(noise((8, 3), 0))
    assert layer.last_keep.eq(0.75).all()


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm1d])
def test_a_weight_of_two_tensors_is_not_left_out(cls):
    x, weight = noise((8, 16), 0), 3 * torch.ones(16)
    expected = torch.func.functional_call(cls(16), {"weight": weight}, x)
    found = torch.func.functional_call(cls(16), {"weight": TwoTensor(weight, weight.clone())}, x)
    torch.testing.assert_close(torch.as_tensor(getattr(found, "a", found)), expected)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_parameter_without_memory_is_an_error(part):
    layer = RunningBatchNorm(6)
    setattr(layer, part, nn.Parameter(torch.ones(6, device="meta")))
    with pytest.raises(RuntimeError):
        layer(noise((4, 6), 0))


def test_a_negated_view_as_weight_means_its_values():
    x, weight = noise((8, 16), 0), torch.linspace(1, 2, 16)
    layers = RunningBatchNorm(16), RunningBatchNorm(16)
    expected = torch.func.functional_call(layers[0], {"weight": -weight}, x)
    found = torch.func.functional_call(layers[1], {"weight": torch._neg_view(weight)}, x)
    torch.testing.assert_close(found, expected)


def test_an_input_elsewhere_changes_nothing():
    layer = RunningBatchNorm(3)
    layer(noise((4, 3), 0) + 5)
    before = buffers_of(layer)
    with pytest.raises(RuntimeError, match="expected an input on cpu, where the layer is, got one on meta"):
        layer(torch.randn(4, 3, device="meta"))
    assert_identical(buffers_of(layer), before)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="plain torch operations crash on it")
@pytest.mark.parametrize("training", [True, False])
def test_an_input_whose_memory_was_freed_is_an_error_and_changes_nothing(training):
    """As with ``nn.BatchNorm``; many operations of torch crash on it."""
    layer = RunningBatchNorm(3).train(training)
    before = buffers_of(layer)
    x = noise((4, 3, 5, 5), 0)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        layer(x)
    assert_identical(buffers_of(layer), before)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="plain torch operations crash on it")
def test_a_gradient_whose_memory_was_freed_is_an_error():
    layer, x = RunningBatchNorm(3), noise((4, 3, 5, 5), 0).requires_grad_()
    y = layer(x)
    dy = torch.ones_like(y)
    dy.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        y.backward(dy)


def test_a_buffer_without_storage_is_an_error():
    layer = RunningBatchNorm(16)
    layer(noise((4, 16), 0))
    layer.running_var.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"), use_backend("cpu"):
        layer(noise((4, 16), 0))


@pytest.mark.parametrize("name", ["running_var", "running_mean"])
def test_a_buffer_that_shrinks_after_a_step_is_noticed(name):
    layer = RunningBatchNorm(4)
    layer(noise((8, 4), 0))
    getattr(layer, name).resize_(2)
    before = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    with pytest.raises(RuntimeError, match=rf"{name} 2.*the input 4"):
        layer(noise((8, 4), 1))
    assert_identical(dict(layer.named_buffers()), before)


def test_replicas_of_data_parallel_on_the_device_of_the_layer_update_it():
    """As torch's replicate does: what is on the first device is assigned to the replica itself."""
    layer, plain, x = RunningBatchNorm(3), RunningBatchNorm(3), noise((64, 3), 0) + 5
    for _ in range(3):
        replica: Any = layer._replicate_for_data_parallel()
        replica._former_parameters = {}
        for key, parameter in layer._parameters.items():
            setattr(replica, key, parameter.view_as(parameter))
            replica._former_parameters[key] = parameter
        for key, buffer in layer._buffers.items():
            setattr(replica, key, buffer)
        replica(x)
        plain(x)
    assert_identical(buffers_of(layer), buffers_of(plain))


def test_a_thread_that_changes_the_call_between_two_reads_does_no_harm(monkeypatch):
    layer, plain, x = RunningBatchNorm(4, eps=0.5), RunningBatchNorm(4, eps=0.5), noise((8, 4), 0) * 2 + 5
    copy, interrupted = cpu_calls.Forward.from_buffer_copy, []

    def copied(buffer: Any) -> Any:
        out = copy(buffer)
        if not interrupted:
            interrupted.append(True)
            thread = threading.Thread(target=layer, args=(x,))
            thread.start()
            thread.join()
        return out

    try:
        with use_backend("cpu"):
            pass
    except RuntimeError as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(cpu_step, "extension", lambda: cpu_step._without("not in this test"))
    monkeypatch.setattr(cpu_calls.Forward, "from_buffer_copy", staticmethod(copied))
    y = layer(x)
    assert interrupted
    assert plain(x) is not None
    torch.testing.assert_close(y, plain(x))
    assert_identical(buffers_of(layer), buffers_of(plain))


def test_rows_that_a_hook_returns_with_other_strides_are_the_same_rows():
    def transposed(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t

    def gradient(unpack: Any) -> Tensor:
        x = noise((8, 5, 3), 0).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            RunningBatchNorm(5)(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(transposed), gradient(lambda t: t))


@pytest.mark.parametrize(("name", "value"), [("gradient", "foo"), ("max_lag", -1.0), ("momentum", 2.0)])
def test_an_option_is_checked_when_it_is_assigned(name, value):
    layer = RunningBatchNorm(3)
    before = getattr(layer, name)
    with pytest.raises(ValueError, match=name):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


WITH_AND_WITHOUT_MASK = {
    "plain": lambda layer, x: layer(x),
    "masked": lambda layer, x: layer(x, torch.ones(8, dtype=torch.bool, device="cpu")),
}


@pytest.mark.parametrize("backend", ["cpu", "aten"])
@pytest.mark.parametrize("forward", WITH_AND_WITHOUT_MASK.values(), ids=WITH_AND_WITHOUT_MASK)
@pytest.mark.parametrize("momentum", [0.25, Returning(0.25)], ids=["float", "a rule of one's own"])
@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm1d])
def test_what_a_step_makes_is_beside_its_input_whatever_the_default_device(cls, momentum, forward, backend):
    # As after torch.set_default_device("cuda") with a model on the CPU. On "meta" there is no memory to write to.
    found, expected = ({}, {})
    for device, kept in (("meta", found), ("cpu", expected)):
        layer, inputs = cls(64, momentum=momentum), [noise((8, 64), seed).requires_grad_() for seed in range(2)]
        with torch.device(device), use_backend(backend):
            for x in inputs:
                y = forward(layer, x)
                y.square().sum().backward()
        kept.update(buffers_of(layer), y=y.detach(), dx=x.grad, dweight=layer.weight.grad)
    assert_identical(found, expected)


@pytest.mark.parametrize("to", ["running", "precise", "torch"])
def test_recalibration_diagnosis_and_merging_do_not_depend_on_the_default_device(to):
    reports = []
    for device in "meta", "cpu":
        model = batchnormify(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)), to)
        batches = list(noise((4, 16, 3), 0))
        with torch.device(device):
            report = update_bn_stats(model, batches)
            population = update_bn_stats(model, batches, normalize="population", memory_limit=0)
            diagnosis = diagnose(model, batches)
            merged = merge_statistics([model.state_dict()] * 2, weights=[1, 3])
        assert_identical(dict(model.state_dict()) | merged, dict(model.state_dict()))
        reports.append((str(report), str(population), str(diagnosis)))
    assert reports[0] == reports[1]
