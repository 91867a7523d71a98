"""What the GPU kernels ask of a machine, with machines that are not there: old cards, ROCm, MPS, consumer cards."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import LAYERS, LayerCase, each
from steps import training_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runningbn import RunningBatchNorm, batchnormify, kernels, update_bn_stats
from runningbn.kernels import aten, backend_for, triton, triton_devices, use_backend
from runningbn.kernels.triton_devices import Device

pytestmark = pytest.mark.skipif(triton_devices.INTERPRETED, reason="the interpreter takes the place of any device")
CARDS: dict[str, Any] = {
    "H100": {"major": 9, "minor": 0, "multi_processor_count": 132, "shared_memory_per_block": 49152},
    "A100": {"major": 8, "minor": 0, "multi_processor_count": 108},
    "B200": {"major": 10, "minor": 0, "multi_processor_count": 148, "shared_memory_per_block": 49152},
    "RTX 4090": {"major": 8, "minor": 9, "multi_processor_count": 128, "shared_memory_per_block": 49152},
    "RTX 5090": {"major": 12, "minor": 0, "multi_processor_count": 170, "shared_memory_per_block": 49152},
    "V100": {"major": 7, "minor": 0, "multi_processor_count": 80},
    "one with little shared memory": {
        "major": 9, "minor": 0, "multi_processor_count": 10, "shared_memory_per_block": 16384,
    },
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts cards into this machine."""

    def put(*names: str, hip: str | None = None) -> None:
        cards = [SimpleNamespace(name=name, **CARDS[name]) for name in names]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
        monkeypatch.setattr(triton_devices, "too_old", lambda: None)

    return put


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("H100", Device(132)), ("A100", Device(108)), ("B200", Device(148)),
        ("RTX 4090", Device(128)), ("RTX 5090", Device(170)),
    ],
)  # fmt: skip
def test_a_card_that_can(name: str, device: Device, machine: Any) -> None:
    machine(name)
    assert triton_devices.unavailable() is None
    assert triton_devices.device(0) == device
    assert triton_devices.device(-1) is None  # the CPU


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("V100", "V100: expected compute capability 8.0 or above, got 7.0"),
        ("one with little shared memory", "expected 32768 bytes of shared memory for a block, got 16384"),
    ],
)
def test_a_card_that_cannot_is_named_with_what_it_lacks(name: str, reason: str, machine: Any) -> None:
    machine(name)
    found = triton_devices.unavailable()
    assert found is not None
    assert found.endswith(reason)
    assert triton_devices.device(0) is None


def test_one_card_among_several(machine: Any) -> None:
    machine("V100", "H100")
    assert triton_devices.unavailable() is None
    assert triton_devices.device(0) is None
    assert triton_devices.device(1) == Device(132)


def test_rocm_takes_the_plain_path(machine: Any) -> None:
    machine("H100", hip="7.0")
    assert triton_devices.unavailable() == "the kernels were written for CUDA and have never met ROCm"
    assert triton_devices.device(0) is None
    triton._can_use.cache_clear()
    # What torch calls a CUDA device there.
    assert not triton._can_use(0)
    triton._can_use.cache_clear()


def test_an_old_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = pytest.importorskip("triton")
    monkeypatch.setattr(installed, "__version__", "3.2.0")
    triton_devices.too_old.cache_clear()
    assert triton_devices.too_old() == "triton 3.2.0 is older than 3.3"
    triton_devices.too_old.cache_clear()


# ------------------------------------------------------------------------------------------- devices without float64


class NoFloat64(TorchDispatchMode):
    """Any tensor of float64 that an operation takes or gives is an error, as on MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in (*torch.utils._pytree.tree_leaves(args), *torch.utils._pytree.tree_leaves(results)):
            if isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() > 0:
                raise TypeError(f"{func}: MPS has no float64")
        return results


def test_the_check_itself() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(2, dtype=torch.float64)


@each(LAYERS)
def test_the_plain_path_needs_no_float64(case: LayerCase) -> None:
    """MPS takes it, and has none."""
    layer, batches = case.layer(), case.batches((3, 2))
    gradients = [torch.ones_like(x) for x in batches]
    with use_backend("aten"), NoFloat64():
        for x, dy in zip(batches, gradients, strict=True):
            training_step(layer, x, dy)
        layer.eval()(batches[0])


def test_what_is_on_mps_goes_to_the_plain_path() -> None:
    # A meta tensor stands for one of a device that no kernel of ours knows.
    assert backend_for(torch.empty(2, 3, device="meta"), torch.float32) is aten


@pytest.mark.parametrize("procedure", ["batch", "population"])
def test_recalibration_keeps_float64_off_such_devices(procedure: Any) -> None:
    """Its sums are on the CPU then: what is asked of the layers themselves is float32."""
    model = batchnormify(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "running")
    seen = []
    model[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    update_bn_stats(model, [torch.randn(4, 3, 5, 5) for _ in range(2)], normalize=procedure)
    assert set(seen) == {torch.float32}
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())


# --------------------------------------------------------------------------------------------------- several devices


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_no_kernel_reads_a_parameter_of_another_device(part: str) -> None:
    """Backends go by addresses. A meta tensor has none, and one on a GPU has one that the CPU cannot read."""
    layer = RunningBatchNorm(3)
    setattr(layer, part, nn.Parameter(torch.ones(3, device="meta")))
    x = torch.randn(2, 3)
    assert kernels.fused(x, layer.weight, layer.bias, layer._layer_state(False), 0.1) is None


def test_no_kernel_reads_buffers_of_another_device() -> None:
    layer = RunningBatchNorm(3).to("meta")
    assert kernels.fused(torch.randn(2, 3), None, None, layer._layer_state(False), 0.1) is None
    with pytest.raises(RuntimeError, match="on meta, where the layer is, got one on cpu"):
        layer(torch.randn(2, 3))
