"""How the recalibration callbacks read a training loader while training reads it."""

from __future__ import annotations

import pytest
import torch
from recalibrated import OneShot
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, RandomSampler, Subset

from runningbn.integrations.loaders import Share, separate_loader

DATA = torch.arange(12.0)


def read(loader):
    return [batch.tolist() for batch in loader]


class Counts(RandomSampler):
    """Its order depends on a number of the epoch, which it counts itself."""

    epoch = 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        return iter(torch.randperm(12, generator=generator).tolist())


@pytest.mark.parametrize("in_batch_sampler", [True, False])
def test_a_sampler_that_counts_goes_on_as_without(in_batch_sampler):
    def loader():
        sampler = Counts(DATA)
        if in_batch_sampler:
            return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 4, False))
        return DataLoader(DATA, batch_size=4, sampler=sampler)

    plain, other = loader(), loader()
    for _ in range(3):
        iterator = iter(other)
        first = next(iterator).tolist()
        with separate_loader(other) as separate:
            assert len(read(separate)) == 3  # in the middle of an epoch
        assert [first, *read(iterator)] == read(plain)
        with separate_loader(other) as separate:
            next(iter(separate))  # not to the end


def test_an_error_restores_the_sampler():
    class Fails(Counts):
        def __iter__(self):
            yield from super().__iter__()
            raise RuntimeError

    sampler = Fails(DATA)
    with pytest.raises(RuntimeError), separate_loader(DataLoader(DATA, sampler=sampler)) as separate:
        read(separate)
    assert "epoch" not in vars(sampler)


class InOrder(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class Wraps(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from self.dataset


@pytest.mark.parametrize(
    "loader",
    [
        lambda: iter([DATA]),
        lambda: OneShot(DATA),
        lambda: DataLoader(OneShot(DATA)),
        lambda: DataLoader(Wraps(OneShot(DATA))),
        lambda: DataLoader(Wraps(Wraps(iter(DATA)))),
    ],
    ids=["iterator", "data set", "loader", "wrapped", "wrapped twice"],
)
def test_data_that_can_be_read_only_once(loader):
    made = loader()
    with pytest.raises(ValueError, match=r"can be read only once.*separate dataloader="), separate_loader(made):
        pass
    assert len(list(made)) in (1, 12)  # nothing was read


@pytest.mark.parametrize(
    "loader",
    [
        lambda: [DATA, DATA],
        lambda: (DATA, DATA),
        lambda: DATA.split(4),
        lambda: DataLoader(InOrder()),
        lambda: DataLoader(Wraps(InOrder())),
        lambda: DataLoader(Subset(DATA, range(4))),
        lambda: DataLoader(ConcatDataset([DATA, DATA])),
    ],
    ids=["list", "tuple", "split", "stream", "wrapped stream", "subset", "joined"],
)
def test_data_that_can_be_read_again(loader):
    made = loader()
    with separate_loader(made) as separate:
        assert read(separate) == read(made)


def test_that_a_stream_is_checked_draws_nothing():
    class Shuffles(IterableDataset):
        def __iter__(self):
            return iter(torch.randperm(12))

    state = torch.get_rng_state()
    with separate_loader(DataLoader(Shuffles())):
        pass
    assert torch.equal(torch.get_rng_state(), state)


class KeepsItsIterator(DataLoader):
    """As the loaders of timm (``--use-multi-epochs-loader``) and of YOLO, which start their workers only once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.iterator = super().__iter__()

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


def test_a_loader_that_keeps_its_iterator():
    loader = KeepsItsIterator(DATA, batch_size=4)
    match = r"KeepsItsIterator keeps one iterator for all epochs.*separate dataloader="
    with pytest.raises(ValueError, match=match), separate_loader(loader):
        pass
    assert read(loader) == read(DATA.split(4))


class Prefetches:
    """A loader around another, as that of timm for GPUs."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return (batch + 1 for batch in self.loader)


def test_a_loader_around_another():
    def loader():
        return Prefetches(DataLoader(DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(1)))

    plain, other = loader(), loader()
    with separate_loader(other) as separate:
        assert len(read(separate)) == 3
    assert read(other) == read(plain)


def test_the_share_of_a_process():
    loader = DataLoader(DATA, batch_size=4)
    with separate_loader(Share(loader, 1, 2)) as separate:
        assert read(separate) == [[4.0, 5.0, 6.0, 7.0]]


@pytest.fixture
def accelerator(accelerate_forgets):
    return pytest.importorskip("accelerate").Accelerator(cpu=True)


@pytest.mark.parametrize("stream", [True, False])
def test_loaders_of_accelerate(accelerator, stream):
    def loader():
        generator = torch.Generator().manual_seed(1)
        made = DataLoader(InOrder(), 4) if stream else DataLoader(DATA, 4, shuffle=True, generator=generator)
        return accelerator.prepare(made)

    plain, other = loader(), loader()
    for _ in range(2):
        iterator = iter(other)
        first = next(iterator).tolist()
        with separate_loader(other) as separate:
            assert len(read(separate)) == 3
        with separate_loader(other) as separate:
            next(iter(separate))
        assert accelerator.gradient_state.active_dataloader is other
        assert [first, *read(iterator)] == read(plain)
    assert other.iteration == plain.iteration == 2
    assert not accelerator.gradient_state.in_dataloader
