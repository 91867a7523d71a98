"""How the GPU kernels are launched: prepared launches are what Triton would have launched, and take little Python.

No GPU: Triton compiles for one that is not there, and its launcher notes what it is given.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LayerCase
from torch import Tensor, nn

from benchmarks.gpu import host
from benchmarks.gpu.no_device import Launch, no_device
from runningbn import PreciseBatchNorm2d, RunningBatchNorm, SquareRoot
from runningbn.kernels import triton_devices, triton_launch


def compiles() -> bool:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None or triton_devices.INTERPRETED or torch.cuda.is_available():
        return False
    return (Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


needs_compiler = pytest.mark.skipif(
    not compiles(), reason="takes Triton with ptxas, neither its interpreter nor a GPU, where tests/gpu has the proof"
)
KINDS = {
    "running": LayerCase("", RunningBatchNorm, (8, 4, 4)),
    "exact": LayerCase("", RunningBatchNorm, (8, 4, 4), {"gradient": "exact", "momentum": 0.0}),
    "precise": LayerCase("", PreciseBatchNorm2d, (8, 4, 4), {"momentum": SquareRoot(0.1)}),
    "no affine": LayerCase("", RunningBatchNorm, (8, 4, 4), {"affine": False, "momentum": None}),
}


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    noted: list[Launch] = []
    with no_device(noted):
        yield noted


def step(layer: nn.Module, x: Tensor) -> None:
    y = layer(x.requires_grad_())
    y.backward(torch.ones_like(y))


def flat(arguments: Any) -> list[Any]:
    """Tensors as their addresses, tuples as what is in them."""
    found = []
    for argument in arguments:
        if isinstance(argument, tuple):
            found += flat(argument)
        else:
            found.append(argument.data_ptr() if isinstance(argument, Tensor) else argument)
    return found


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_a_prepared_launch_is_the_one_of_triton(case: LayerCase, launches: list[Launch]) -> None:
    layer, x = case.layer(), case.input(3)
    for _ in range(3):
        step(layer, x)
    names = ["batch_statistics", "gradient_statistics"]
    assert [launch.kernel for launch in launches] == names * 3
    where = {t.data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    for first, second, third in zip(launches[:2], launches[2:4], launches[4:]):
        assert any(isinstance(argument, Tensor) for argument in first.arguments)
        for later in (second, third):
            assert not any(isinstance(argument, Tensor) for argument in later.arguments)
            assert later.programs == first.programs
            for one, other in zip(flat(first.arguments), flat(later.arguments), strict=True):
                # What is made in every step lies anywhere; all else is the same, constants included.
                if one != other:
                    assert isinstance(other, int)
                    assert min(one, other) > 2**20
                    assert other % 16 == 0
                    assert one not in where
                    assert other not in where


@needs_compiler
@pytest.mark.slow
def test_what_changes_the_compilation_is_never_taken_from_another(launches: list[Launch]) -> None:
    """Each of these launches by Triton's own way the first time, and is prepared the second time."""
    x = KINDS["running"].input(3)
    changes = [
        (RunningBatchNorm(8), x),
        (RunningBatchNorm(8, momentum=0.1), x),
        (RunningBatchNorm(8, momentum=0.3), None),  # a number, and no other compilation
        (RunningBatchNorm(8, bias=False), x),
        (RunningBatchNorm(8, affine=False), x),
        (RunningBatchNorm(8, gradient="exact"), x),
        (PreciseBatchNorm2d(8), x),
        (RunningBatchNorm(8), x.bfloat16()),
        (RunningBatchNorm(8, dtype=torch.float64), x.double()),
        (RunningBatchNorm(8), x.repeat(2, 1, 1, 1)),
        (RunningBatchNorm(8), x.to(memory_format=torch.channels_last)),
    ]
    for layer, data in changes:
        for prepared in (data is None, True):
            launches.clear()
            layer(x if data is None else data)
            by_address = not any(isinstance(argument, Tensor) for argument in launches[0].arguments)
            assert by_address == prepared, layer


@needs_compiler
@pytest.mark.slow
def test_what_is_not_aligned_takes_tritons_way(launches: list[Launch]) -> None:
    layer, x = RunningBatchNorm(8), KINDS["running"].input(3)
    for _ in range(2):
        layer(x)
    memory = torch.empty(x.numel() + 1)
    for moved in (memory[1:].view(x.shape), x):
        launches.clear()
        layer(moved)
        assert isinstance(launches[0].arguments[0], Tensor) == (moved is not x)
    memory = torch.zeros(20)
    layer.weight = nn.Parameter(memory[1:9])
    launches.clear()
    layer(x)
    assert isinstance(launches[0].arguments[0], Tensor)


@needs_compiler
@pytest.mark.slow
def test_the_benchmark_of_the_host_measures_all_layers() -> None:
    rows = host.measure(in_a_row=3, repeats=2)
    by_layer = {row["layer"]: row for row in rows}
    assert list(by_layer) == [*host.LAYERS, "nothing"]
    for name in host.LAYERS:
        row = by_layer[name]
        assert [launch["kernel"] for launch in row["launches"]] == [
            "batch_statistics", "gradient_statistics",
        ]  # fmt: skip
        assert min(*row["microseconds"].values(), *row["by Triton"].values()) > 0
    arguments = [launch["arguments"] for launch in by_layer["RunningBatchNorm"]["launches"]]
    # Pointers: x, y, weight, bias, fixed, 13 buffers and 3 of the noise; 6 sizes, 10 numbers.
    assert arguments[0] == 5 + 13 + 3 + 6 + 10
    # dy, x, dx, weight, fixed, sums, 3 buffers; 5 sizes.
    assert arguments[1] == 6 + 3 + 5


def test_no_device_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_devices, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="expected a process without TRITON_INTERPRET"), no_device():
        pass


# ------------------------------------------------------------------------------------------------------ CUDA graphs


class TestCountersOfGraphs:
    """Made before a capture, each for one launch only."""

    DEVICE = torch.device("cpu")

    @pytest.fixture(autouse=True)
    def _own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_launch, "counters", {})
        monkeypatch.setattr(triton_launch, "_for_graphs", {})
        monkeypatch.setattr(triton_launch, "_COUNTERS_OF_GRAPHS", 12)

    def test_no_two_launches_share_one(self) -> None:
        triton_launch.counter(self.DEVICE, 3)
        taken = [triton_launch._of_a_graph(self.DEVICE, 3) for _ in range(3)]
        assert all(len(t) >= 3 and t.eq(0).all() and t.data_ptr() % 16 == 0 for t in taken)
        assert len({t.data_ptr() for t in taken}) == 3
        assert {t.untyped_storage().data_ptr() for t in taken} == {taken[0].untyped_storage().data_ptr()}

    def test_when_all_are_taken_there_are_others(self) -> None:
        triton_launch.counter(self.DEVICE, 3)
        taken = [triton_launch._of_a_graph(self.DEVICE, 4) for _ in range(4)]
        assert len({t.data_ptr() for t in taken}) == 4
        assert taken[3].eq(0).all()

    def test_without_an_eager_step_before_they_are_made_in_the_graph(self) -> None:
        assert triton_launch._of_a_graph(self.DEVICE, 5).tolist() == [0] * 5


def test_a_counter_grows_with_the_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "counters", {})
    device = torch.device("cpu")
    small = triton_launch.counter(device, 7)
    assert triton_launch.counter(device, len(small)) is small
    large = triton_launch.counter(device, len(small) + 1)
    assert len(large) > len(small)
    assert large.eq(0).all()
