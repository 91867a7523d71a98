"""The linear state: facts that hold for any data, any split and any pivot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runningbn.ops.state import Sums, combine, common_pivot, moments, move_pivot, unbiased

# float64 sums of at most a few hundred elements of order 10: rounding stays some 1e-13 of the sum of squares.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def rows(count: int, seed: int = 0, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64) * 3 + 10


def exact_sums(data: Tensor) -> Sums:
    """The sums of (M, C) about their own mean."""
    mean = data.mean(0)
    centred = data - mean
    return Sums(mean, centred.sum(0), centred.square().sum(0), torch.full_like(mean, len(data)))


def empty(channels: int = 3) -> Sums:
    return Sums(*(torch.zeros(channels, dtype=torch.float64) for _ in Sums._fields))


def one(value: float = 1.0, channels: int = 3) -> Tensor:
    return torch.full((channels,), value, dtype=torch.float64)


def test_moments_of_exact_sums_are_those_of_torch():
    data = rows(17)
    mean, var = moments(exact_sums(data))
    torch.testing.assert_close(mean, data.mean(0), **CLOSE)
    torch.testing.assert_close(var, data.var(0, correction=0), **CLOSE)


def test_an_empty_state_has_its_pivot_as_mean_and_no_variance():
    mean, var = moments(empty()._replace(shift=one(5.0)))
    assert mean.tolist() == [5, 5, 5]
    assert var.tolist() == [0, 0, 0]


@pytest.mark.parametrize("shift", [-7.0, 0.0, 10.0, 1e3])
def test_the_pivot_changes_nothing_but_the_sums(shift):
    data = rows(23)
    moved = move_pivot(exact_sums(data), one(shift))
    torch.testing.assert_close(moved.sums, (data - shift).sum(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(moved.sqrs, (data - shift).square().sum(0), rtol=1e-12, atol=1e-9)
    # About a pivot 1000 away, var is a difference of two numbers of 1e6: six of sixteen digits go.
    torch.testing.assert_close(moments(moved)[1], data.var(0, correction=0), rtol=1e-8, atol=0)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 2**16))
def test_merging_any_split_gives_the_statistics_of_the_whole(sizes, seed):
    data = rows(sum(sizes), seed)
    state = empty()
    for part in data.split(sizes):
        state = combine(state, exact_sums(part), one(), one())
    mean, var = moments(state)
    torch.testing.assert_close(state.count, one(sum(sizes)))
    torch.testing.assert_close(mean, data.mean(0), **CLOSE)
    torch.testing.assert_close(var, data.var(0, correction=0), **CLOSE)


def test_combine_weighs_as_a_weighted_sum_over_elements():
    old, new = rows(5, 1), rows(9, 2)
    keep, gain = 0.3, 0.7
    mean, var = moments(combine(exact_sums(old), exact_sums(new), one(keep), one(gain)))
    weights = torch.cat([one(keep, 5), one(gain, 9)])[:, None]
    data = torch.cat([old, new])
    expected = (weights * data).sum(0) / weights.sum()
    torch.testing.assert_close(mean, expected, **CLOSE)
    torch.testing.assert_close(var, (weights * (data - expected) ** 2).sum(0) / weights.sum(), **CLOSE)


def test_combine_with_keep_0_forgets_and_with_gain_0_ignores():
    old, new = exact_sums(rows(5, 1)), exact_sums(rows(9, 2))
    for keep, gain, left in ((0.0, 1.0, new), (1.0, 0.0, old)):
        combined = combine(old, new, one(keep), one(gain))
        for got, expected in zip(moments(combined), moments(left)):
            torch.testing.assert_close(got, expected, **CLOSE)


def test_combining_two_empty_states_is_empty():
    combined = combine(empty(), exact_sums(rows(4)), one(), one(0.0))
    assert all(torch.isfinite(part).all() for part in combined)
    assert combined.count.tolist() == [0, 0, 0]


@pytest.mark.parametrize("weight", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_two_batches_far_apart_lose_no_digits_in_float32(weight):
    # Means 1000 standard deviations apart. The variance between them is p(1 - p)·1e6; about the pivot of either batch
    # the rounding of 1e6 in float32 (0.06) would swamp what is left of the variance at the extreme weights.
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(4096, 2, generator=generator) for _ in range(2))
    new = new + 1000
    got = moments(combine(exact_sums(old), exact_sums(new), torch.tensor([1 - weight] * 2), torch.tensor([weight] * 2)))
    data, weights = torch.cat([old, new]).double(), torch.tensor([1 - weight] * 4096 + [weight] * 4096)[:, None]
    # The weight 1 - 1e-6 itself has but a few digits in float32, so the reference takes it as rounded there.
    weights = weights.float().double() / weights.float().double().sum()
    mean = (weights * data).sum(0)
    var = (weights * (data - mean) ** 2).sum(0)
    # Σw and the two moved sums of squares carry a rounding of some 1e-7 each; the portion p = 1e-6 of 1 − 1e-6 more.
    torch.testing.assert_close(got[1].double(), var, rtol=2e-6, atol=0)


def test_the_common_pivot_is_the_mean_of_the_combination():
    old, new = exact_sums(rows(5, 1)), exact_sums(rows(9, 2))
    pivot = common_pivot(old, new, one(0.4), one(0.6))
    torch.testing.assert_close(pivot, moments(combine(old, new, one(0.4), one(0.6)))[0], **CLOSE)


def test_variance_is_never_negative():
    # A constant channel about a pivot that float32 cannot hold exactly.
    sums = move_pivot(exact_sums(torch.full((7, 1), 0.1)), torch.tensor([1e3]))
    assert moments(sums)[1].item() >= 0


def test_a_variance_that_rounding_left_below_zero_is_zero():
    sums = Sums(*(torch.tensor([value]) for value in (0.0, 3.000001, 3.0, 3.0)))
    assert sums.sqrs / sums.count < (sums.sums / sums.count).square()
    assert moments(sums)[1].item() == 0


def test_unbiased_with_equal_weights_is_bessels_correction():
    data = rows(11)
    var = unbiased(data.var(0, correction=0), one(11.0), one(11.0))
    torch.testing.assert_close(var, data.var(0, correction=1), **CLOSE)
    # Half the weight for every element is the same sample.
    half = unbiased(data.var(0, correction=0), one(5.5), one(11 * 0.25))
    torch.testing.assert_close(half, var, **CLOSE)


def test_unbiased_leaves_statistics_without_weights_alone():
    assert unbiased(one(2.0), one(1.0), one(0.0)).tolist() == [2, 2, 2]


def test_unbiased_of_a_single_element_is_finite():
    assert unbiased(one(0.0), one(1.0), one(1.0)).tolist() == [0, 0, 0]


def test_constant_data_have_exactly_their_mean_and_no_variance():
    mean, var = moments(exact_sums(torch.full((64, 3), 0.75)))
    assert mean.tolist() == [0.75] * 3
    assert var.tolist() == [0.0] * 3
