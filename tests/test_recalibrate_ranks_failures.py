"""update_bn_stats over several processes, one of which fails: all raise, nothing changes, and nobody waits for ever."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ranks
from recalibration_models import assert_same, everything, random_states
from test_recalibrate_ranks import assert_usable, batches_of, each_size, net
from torch import Tensor, nn

from runningbn import precise_bn, update_bn_stats

ERRORS: dict[str, type[BaseException]] = {}


def known(error: type[BaseException]) -> type[BaseException]:
    ERRORS[error.__name__] = error
    return error


@known
class Unlucky(Exception):
    pass


@known
class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("this error has no text")


known(KeyboardInterrupt)
each_error = pytest.mark.parametrize("error", ["Unlucky", "KeyboardInterrupt"])


def attempt(rank: int, model: nn.Module, call: Callable[[], Any]) -> tuple[str, str]:
    """The class of the error that the call ends with, and its text; then the model and the group are as before."""
    before, random_before = everything(model), random_states()
    outcome = "", ""
    try:
        call()
    except BaseException as error:
        with contextlib.suppress(ValueError):
            outcome = type(error).__name__, ""
            outcome = type(error).__name__, str(error)
        assert_same(everything(model), before)
        assert random_states() == random_before
    assert torch.is_grad_enabled()
    assert_usable(rank)
    return outcome


def assert_all_raise(outcomes: list[tuple[str, str]], error: str, unlucky: int) -> None:
    """One rank its error; the others one that names the rank and the error."""
    for rank, (name, text) in enumerate(outcomes):
        assert name == (error if rank == unlucky else "OtherProcessError"), (rank, name, text)
        assert rank == unlucky or (f"rank {unlucky}" in text and error in text)


# ---------------------------------------------------------------------------------------------- in loader and forward


class NoLoader:
    """A loader that cannot start."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __iter__(self):
        raise self.error


def fail(rank: int, stage: str, error: str, unlucky: int, options: dict) -> tuple[str, str]:
    shard = "rank 1 has none" if unlucky == 0 else "rank 0 has none"
    model, batches, calls = net(), batches_of(rank, shard), []

    def loader() -> Iterator[Tensor]:
        for i, x in enumerate(batches):
            if stage == f"loader at {i}":
                raise ERRORS[error]
            yield x
        if stage == "end of the loader":
            raise ERRORS[error]

    def forward(model: nn.Module, x: Tensor) -> None:
        calls.append(x)
        if stage == f"before call {len(calls)}":
            raise ERRORS[error]
        model(x)
        if stage == f"after call {len(calls)}":
            raise ERRORS[error]

    if rank != unlucky:
        return attempt(rank, model, lambda: update_bn_stats(model, batches, **options))
    if stage == "layer":
        model[4].register_forward_hook(lambda *_: (_ for _ in ()).throw(ERRORS[error]))
    started = NoLoader(ERRORS[error]) if stage == "start of the loader" else loader()
    return attempt(rank, model, lambda: update_bn_stats(model, started, forward=forward, **options))


STAGES = [
    "start of the loader",
    "loader at 0",
    "loader at 2",
    "end of the loader",
    "before call 1",
    "after call 3",
    "layer",
]


@each_size
@each_error
@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-6}, {"normalize": "population"}], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_failure_on_one_rank_reaches_all(size, stage, error, options):
    for unlucky in (0, 1):
        assert_all_raise(ranks(size)(fail, stage, error, unlucky, options), error, unlucky)


@each_error
@pytest.mark.parametrize("call", range(4, 13))
def test_failure_in_any_pass_over_the_data_reaches_all(call, error):
    """Three batches, of which each is seen in the first pass, in one for each later layer, and in the last."""
    assert_all_raise(ranks(2)(fail, f"before call {call}", error, 1, {"normalize": "population"}), error, 1)


def test_error_that_cannot_be_put_into_words_reaches_all():
    outcomes = ranks(2)(fail, "before call 1", "Unspeakable", 0, {})
    assert [name for name, _ in outcomes] == ["Unspeakable", "OtherProcessError"]


def fail_everywhere(rank: int) -> tuple[str, str]:
    return fail(rank, "loader at 0", "Unlucky", rank, {}) if rank < 2 else fail(rank, "", "", -1, {})


@each_size
def test_several_ranks_that_fail_raise_what_is_theirs(size):
    names = [name for name, _ in ranks(size)(fail_everywhere)]
    assert names == ["Unlucky", "Unlucky", *["OtherProcessError"] * (size - 2)]


def refused_on_one(rank: int, wrong: dict) -> tuple[str, str]:
    model = net()
    options = wrong if rank == 0 else {}
    return attempt(rank, model, lambda: update_bn_stats(model, batches_of(rank, "unequal"), **options))


@pytest.mark.parametrize("wrong", [{"progress": "bar"}, {"device": "nowhere"}, {"num_iters": 0}], ids=str)
def test_argument_that_one_rank_refuses_reaches_all(wrong):
    (mine, _), (theirs, _) = ranks(2)(refused_on_one, wrong)
    assert mine in ("ValueError", "RuntimeError")
    assert theirs == "OtherProcessError"


# -------------------------------------------------------------------------------------------------------- no data


def without_data(rank: int, options: dict) -> tuple[str, str]:
    model = net()
    return attempt(rank, model, lambda: update_bn_stats(model, [], **options))


@each_size
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.1}, {"normalize": "population"}], ids=str)
def test_all_ranks_refuse_if_none_has_a_batch(size, options):
    outcomes = ranks(size)(without_data, options)
    assert outcomes == [("ValueError", "the data loader gave no batch")] * size


def nothing_finite(rank: int) -> tuple[str, str]:
    model, batches = net(), [torch.full_like(x, torch.nan) for x in batches_of(rank, "rank 0 has none")]
    return attempt(rank, model, lambda: update_bn_stats(model, batches))


@each_size
def test_all_ranks_refuse_if_no_batch_is_finite(size):
    outcomes = ranks(size)(nothing_finite)
    assert [name for name, _ in outcomes] == ["RuntimeError"] * size


# ------------------------------------------------------------------------------------------------------ precise_bn


def fail_in_loop(rank: int, error: str, unlucky: int, after: int) -> tuple[str, str]:
    model = net()

    def loop() -> None:
        with precise_bn(model):
            for i, x in enumerate(batches_of(rank, "unequal")):
                if rank == unlucky and i == after:
                    raise ERRORS[error]
                model(x)
            if rank == unlucky:
                raise ERRORS[error]

    return attempt(rank, model, loop)


@each_size
@each_error
@pytest.mark.parametrize("after", [0, 1, 5])
def test_failure_in_the_loop_of_precise_bn_reaches_all(size, error, after):
    for unlucky in (0, size - 1):
        assert_all_raise(ranks(size)(fail_in_loop, error, unlucky, after), error, unlucky)


def loop_without_calls(rank: int) -> tuple[str, str]:
    model = net()

    def loop() -> None:
        with precise_bn(model):
            pass

    return attempt(rank, model, loop)


@each_size
def test_all_ranks_refuse_if_none_calls_the_model(size):
    assert [name for name, _ in ranks(size)(loop_without_calls)] == ["ValueError"] * size


# ------------------------------------------------------------------------------------- Ctrl-C in an exchange


@contextlib.contextmanager
def interrupted_after(nth: int) -> Iterator[list[int]]:
    """Ctrl-C during the nth all_gather: what waits for others in C++ is finished first, and then Python raises."""
    gather, count = dist.all_gather, [0]

    def all_gather(*args: Any, **kwargs: Any) -> None:
        gather(*args, **kwargs)
        count[0] += 1
        if count[0] == nth:
            signal.raise_signal(signal.SIGINT)

    dist.all_gather = all_gather
    try:
        yield count
    finally:
        dist.all_gather = gather


def interrupt(rank: int, nth: int, options: dict) -> tuple[tuple[str, str], int]:
    model = net()
    batches = [x for x in batches_of(rank, "rank 1 runs out first") for _ in range(3)]
    with interrupted_after(nth if rank == 0 else 0) as count:
        return attempt(rank, model, lambda: update_bn_stats(model, batches, **options)), count[0]


@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-9}, {"normalize": "population"}], ids=str)
@pytest.mark.parametrize("nth", range(1, 7))
def test_ctrl_c_while_one_rank_waits_for_the_others_deadlocks_nobody(options, nth):
    needed = ranks(2)(interrupt, 0, options)[0][1]
    if nth > needed:
        pytest.skip(f"there are {needed}")
    (mine, _), (theirs, _) = ranks(2)(interrupt, nth, options)
    assert mine[0] == "KeyboardInterrupt"
    # after the last exchange, the others have all they wait for
    assert theirs[0] == "OtherProcessError" or (nth == needed and theirs[0] == "")


def interrupt_everyone(rank: int) -> tuple[str, str]:
    """As a terminal does: rank 0 waits for the others, which are in their forward."""
    model, calling = net(), [True]

    def forward(model: nn.Module, x: Tensor) -> None:
        model(x)
        time.sleep(2)

    def call() -> None:
        try:
            update_bn_stats(model, batches, forward=forward)
        finally:
            calling[0] = False

    def interrupt(*_: Any) -> None:
        # The interrupt of rank 1 may have ended the call on rank 0 before that of rank 0 arrives.
        if calling[0]:
            raise KeyboardInterrupt

    batches = batches_of(rank, "rank 0 has none")
    previous = signal.signal(signal.SIGINT, interrupt)
    dist.barrier()
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    outcome = attempt(rank, model, call)
    timer.join()
    signal.signal(signal.SIGINT, previous)
    return outcome


def test_ctrl_c_on_all_ranks_while_one_waits_deadlocks_nobody():
    outcomes = ranks(2)(interrupt_everyone)
    assert outcomes[1][0] == "KeyboardInterrupt"
    assert outcomes[0][0] in ("KeyboardInterrupt", "OtherProcessError")
