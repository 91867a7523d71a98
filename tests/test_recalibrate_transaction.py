"""update_bn_stats as a transaction: whatever fails, the model is bit for bit as before."""

import contextlib

import pytest
import torch
from cases import noise
from recalibration_models import (
    assert_same,
    draw_everywhere,
    each_model,
    each_procedure,
    everything,
    mlp,
    picture_batches,
    random_states,
    rows,
)
from torch import nn

from runningbn import precise_bn, update_bn_stats


class Unlucky(Exception):
    pass


each_error = pytest.mark.parametrize("error", [Unlucky, KeyboardInterrupt])


def batches(n: int = 4, wrong: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Batches of pictures, the last of which may be a wrong one."""
    good = picture_batches(n)
    return good if wrong is None else [*good[:-1], wrong]


@contextlib.contextmanager
def nothing_changes(model: nn.Module, *errors: type[BaseException]):
    """Something in here fails by one of these errors, and the model and the random state are as before."""
    before, random_before = everything(model), random_states()
    with pytest.raises(errors):
        yield
    assert_same(everything(model), before)
    assert random_states() == random_before


# ------------------------------------------------------------------------------------------------------------- failures


@each_model
@each_error
@pytest.mark.parametrize("at", [0, 1, 3])
def test_failing_loader_changes_nothing(build, error, at):
    def loader():
        for i, x in enumerate(batches()):
            draw_everywhere()
            if i == at:
                raise error
            yield x

    model = build()
    with nothing_changes(model, error):
        update_bn_stats(model, loader())


@each_model
@each_procedure
@each_error
def test_failing_forward_changes_nothing(build, normalize, error):
    def forward(model, x):
        draw_everywhere()
        model(x)
        calls.append(x)
        if len(calls) == 3:
            raise error

    model, calls = build(), []
    with nothing_changes(model, error):
        update_bn_stats(model, batches(), forward=forward, normalize=normalize)


@each_model
@each_error
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_failing_hook_in_the_middle_of_the_model_changes_nothing(build, error, kind):
    def hook(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error

    model, calls = build(), []
    layer = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][-1]
    getattr(layer, f"register_{kind}_hook")(hook)
    with nothing_changes(model, error):
        update_bn_stats(model, batches())


@each_model
@pytest.mark.parametrize("part", [0, 0.3, 0.6, 0.8, 1])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_failure_in_any_pass_over_the_data_changes_nothing(build, part, limit):
    def forward(model, x):
        calls.append(x)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        model(x)

    model, calls, fails_at = build(), [], None
    update_bn_stats(build(), batches(2), forward=forward, normalize="population", memory_limit=limit)
    assert len(calls) >= 4
    fails_at, calls = 1 + round(part * (len(calls) - 1)), []
    with nothing_changes(model, KeyboardInterrupt):
        update_bn_stats(model, batches(2), forward=forward, normalize="population", memory_limit=limit)


class Fragile(torch.Tensor):
    """Once, writing to it is interrupted."""

    interrupted = False

    def copy_(self, *args, **kwargs):
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super().copy_(*args, **kwargs)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_interruption_while_the_statistics_are_written_changes_nothing(place, buffer):
    model = mlp()
    layer = model[3 * place + 1]
    layer._buffers[buffer] = fragile = layer._buffers[buffer].as_subclass(Fragile)
    with nothing_changes(model, KeyboardInterrupt):
        update_bn_stats(model, [rows(8)])
    assert fragile.interrupted


@each_model
@each_procedure
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_finite_changes_nothing(build, normalize, value):
    model = build()
    with nothing_changes(model, RuntimeError):
        update_bn_stats(model, [torch.full((4, 3, 5, 5), value)] * 3, normalize=normalize)


@each_model
@each_procedure
@pytest.mark.parametrize(
    "wrong", [noise((4, 2, 5, 5), 0), noise((4, 3), 0), noise((0, 2, 5, 5), 0)], ids=["C", "d", "0"]
)
def test_wrong_shapes_change_nothing(build, normalize, wrong):
    model = build()
    with nothing_changes(model, RuntimeError, ValueError, IndexError):
        update_bn_stats(model, batches(wrong=wrong), normalize=normalize)


@each_model
def test_empty_loader_changes_nothing(build):
    model = build()
    with nothing_changes(model, ValueError):
        update_bn_stats(model, [])


@each_model
@each_error
@pytest.mark.parametrize("after", [0, 2])
def test_failure_in_the_loop_of_precise_bn_changes_nothing(build, error, after):
    model = build()
    with nothing_changes(model, error), precise_bn(model):
        for x in batches()[:after]:
            model(x)
        raise error


@each_model
def test_precise_bn_without_a_call_changes_nothing(build):
    model = build()
    with nothing_changes(model, ValueError), precise_bn(model):
        pass


@pytest.mark.parametrize(
    "wrong", [{"prior": -1}, {"layers": ["nowhere"]}, {"variance": "none"}, {"progress": "bar"}], ids=str
)
@each_model
def test_refused_argument_changes_nothing_and_draws_nothing(build, wrong):
    model, drawn = build(), []
    with nothing_changes(model, ValueError):
        update_bn_stats(model, (drawn.append(x) or x for x in batches()), **wrong)
    assert drawn == []


@each_model
def test_failure_leaves_gradient_mode(build):
    model = build()
    with nothing_changes(model, Unlucky), precise_bn(model):
        raise Unlucky
    assert torch.is_grad_enabled()


@each_model
def test_model_recalibrates_after_a_failure_as_if_there_had_been_none(build):
    model, twin = build(), build()
    with nothing_changes(model, RuntimeError, ValueError, IndexError):
        update_bn_stats(model, batches(wrong=noise((4, 2, 5, 5), 0)))
    for each in (model, twin):
        update_bn_stats(each, batches())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
