"""How an input is shared out among programs, for every size, and on large and small devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runningbn.kernels.triton_devices import Device
from runningbn.kernels.triton_plan import Plan
from runningbn.kernels.triton_plan import plan as plan_of

DEVICES = {"large": Device(132), "small": Device(20)}
each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)

SIZES = [1, 2, 3, 8, 17, 64, 100, 1000, 2**20]
PLAN_CHANNELS, PLAN_INNER = [2, 3, 16, 37, 64, 1000, 4096], [2, 9, 16, 49, 196, 784, 3136, 12544, 2**21]


def plans(outer: int, device: Device) -> Iterator[tuple[Plan, bool]]:
    for channels in PLAN_CHANNELS:
        for double in (False, True):
            yield plan_of(True, outer, channels, 1, double, device), double
            for inner in PLAN_INNER:
                yield plan_of(False, outer, channels, inner, double, device), double
    yield plan_of(False, 1, 3, 2**30 + 1, False, device), False


@each_device
@pytest.mark.parametrize("outer", SIZES)
def test_plans_cover_the_input_with_tiles_that_fit(outer: int, device: Device) -> None:
    for plan, double in plans(outer, device):
        n, channels, inner = plan.sizes
        of_n, of_c, of_s = (plan.tile[name] for name in ("BN", "BC", "BS"))
        assert of_n * of_c * of_s <= (2048 if double else 4096)
        assert plan.tile["num_warps"] in (1, 2, 4, 8)
        assert of_c <= 256
        assert all(size & (size - 1) == 0 for size in (of_n, of_c, of_s, plan.merged_at_once))
        tiles = -(-n // of_n) * -(-inner // of_s)
        assert plan.blocks * of_c >= channels
        for splits, of_split in (plan.summing, plan.mapping):
            assert (splits - 1) * of_split < tiles <= splits * of_split
            assert of_split <= 64
        # Offsets within a tile are 32 bits wide.
        assert (of_n - 1) * channels * inner + (of_c - 1) * inner + of_s < 2**31


@each_device
def test_few_shapes_are_compiled_while_samples_vary(device: Device) -> None:
    for channels, inner in [(64, 196), (64, 3136), (3, 50176), (2048, 49), (16, 4)]:
        compiled = {
            (*plan.tile.values(), plan.merged_at_once)
            for n in range(1, 300)
            if (plan := plan_of(False, n, channels, inner, False, device))
        }
        assert len(compiled) <= 6, (channels, inner, compiled)


@each_device
def test_a_program_has_all_elements_of_its_channels_where_these_are_few(device: Device) -> None:
    for rows, inner in ((False, 56 * 56), (False, 49), (True, 1)):
        outer = 2 * 49 if rows else 2
        assert plan_of(rows, outer, 64, inner, False, device).summing.splits == 1
        assert plan_of(rows, 100_000, 64, inner, False, device).summing.splits > 1
