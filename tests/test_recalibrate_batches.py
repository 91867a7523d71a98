"""Batches that move, mappings that do not fit, single images."""

import pytest
import torch
from cases import noise
from recalibration_models import (
    assert_same,
    assert_statistics,
    everything,
    mlp,
    moments,
    net,
    pictures,
    recalibrated,
    reference,
    rows,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from runningbn import RunningBatchNorm, update_bn_stats

# ------------------------------------------------------------------------------------------------------------ mappings


def test_mapping_for_a_model_that_takes_no_keywords():
    for model in (net(), nn.Sequential(net()), nn.DataParallel(net())):
        before = everything(model)
        kind = "Sequential"
        with pytest.raises(
            TypeError, match=f"{kind}: a batch that is a mapping is passed as keyword arguments, here image"
        ):
            update_bn_stats(model, [[{"image": pictures(4)}]])
        assert_same(everything(model), before)


def test_mapping_with_the_name_that_a_sequential_has_is_taken():
    expected = reference(net(), [pictures(4)])
    assert_statistics(recalibrated(net(), [{"input": pictures(4)}]), expected)


def test_keys_that_are_no_names():
    with pytest.raises(TypeError, match="here 0, 1"):
        update_bn_stats(net(), [{0: pictures(4), 1: 2}])


def test_error_inside_the_model_is_its_own():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, **batch):
            return self.norm(*batch.values(), 3, 4)

    with pytest.raises(TypeError, match="takes 1 positional argument but 3 were given"):
        update_bn_stats(Fails(), [{"x": pictures(4)}])


# ---------------------------------------------------------------------------------------------------- batches that move


class InPlace:
    """Moves itself and returns nothing."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.where = x, None

    def to(self, device):
        self.where = device


class Items(list):
    """A list with a constructor of its own."""

    def __init__(self, first, second, *, name) -> None:
        super().__init__([first, second])
        self.name = name


class Pair(tuple):
    def __new__(cls, first, second):
        new = super().__new__(cls, (first, second))
        new.name = "pair"
        return new


class Record(dict):
    def __init__(self, x, *, name) -> None:
        super().__init__(x=x)
        self.name = name

    @property
    def first(self):
        return self["x"]


class Moving(list):
    """A list that knows how to move itself."""

    def to(self, device):
        return Moving([*self, device])


def seen_by_forward(batch, take) -> object:
    seen = []

    def forward(model, batch):
        seen.append(batch)
        model(take(batch))

    assert_statistics(recalibrated(mlp(1), [batch], forward=forward, device="cpu"), reference(mlp(1), [rows(8)]))
    return seen[0]


def test_what_moves_itself_in_place_is_not_lost():
    batch = InPlace(rows(8))
    assert seen_by_forward(batch, lambda b: b.x) is batch
    assert batch.where == torch.device("cpu")


@pytest.mark.parametrize("batch", [Items(rows(8), 3, name="items"), Pair(rows(8), 3)])
def test_sequences_keep_their_class_and_what_else_they_have(batch):
    moved = seen_by_forward(batch, lambda b: b[0])
    assert type(moved) is type(batch)
    assert moved.name == batch.name
    assert moved is not batch
    assert moved[1] == 3


def test_mappings_keep_their_class_and_what_else_they_have():
    batch = Record(rows(8), name="record")
    moved = seen_by_forward(batch, lambda b: b.first)
    assert (type(moved), moved.name) == (Record, "record")
    assert moved is not batch


def test_own_way_of_moving_comes_before_that_of_lists():
    moved = seen_by_forward(Moving([rows(8)]), lambda b: b[0])
    assert moved[1:] == [torch.device("cpu")]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_packed_sequences(device):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, packed):
            assert isinstance(packed, PackedSequence)
            return self.norm(packed.data)

    packed = [pack_sequence([rows(4, seed=i), rows(2, seed=9 + i)]) for i in range(3)]
    expected = {"norm": moments(torch.cat([p.data for p in packed]).double())}
    for batches in (packed, [(p, 0) for p in packed], [{"packed": p} for p in packed]):
        assert_statistics(recalibrated(Recurrent(), batches, device=device), expected)


# ----------------------------------------------------------------------------------------------------- prior, one image


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, RunningBatchNorm])
@pytest.mark.parametrize("prior", [1, 16])
def test_one_element_with_a_prior(kind, prior):
    layer, x = kind(3), noise((1, 3), 0)
    with torch.no_grad():
        layer.running_mean.copy_(noise((3,), 1)), layer.running_var.copy_(noise((3,), 2).square() + 0.5)
    m0, v0 = layer.running_mean.clone(), layer.running_var.clone()
    report = update_bn_stats(layer, [x], prior=prior)
    w = prior / (prior + 1)
    torch.testing.assert_close(layer.running_mean, w * m0 + (1 - w) * x[0])
    torch.testing.assert_close(layer.running_var, w * v0 + w * (1 - w) * (m0 - x[0]).square())
    assert report[""].elements == 1
    with pytest.raises(ValueError, match="single element per channel in all"):
        update_bn_stats(layer, [x])


def test_single_elements_have_no_variance_by_batches():
    report = update_bn_stats(nn.Sequential(nn.BatchNorm1d(3)), [noise((1, 3), i) for i in range(4)], variance="batch")
    reason = "a single element per channel in every batch, which has no variance"
    assert (report.skipped, report.unused) == ({"0": reason}, [])


def test_a_batch_that_is_dropped_counts_for_nothing():
    """Neither a sample nor an element of it reached a layer, not even one whose input was finite."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    data = [noise((n, 3, 5), n) for n in (4, 2, 7)]
    data[1][0, 0, 0] = torch.nan
    report = update_bn_stats(model, data)
    assert [(layer.batches, layer.samples, layer.elements) for layer in report.layers] == [(2, 11, 55)] * 2
