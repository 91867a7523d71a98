"""update_bn_stats: what a batch may be, and what each argument does and refuses."""

import builtins
import collections
import itertools

import numpy as np
import pytest
import torch
from recalibration_models import assert_statistics, mlp, moments, recalibrated, reference, rows, statistics
from torch import nn

from runningbn import get_bn_modules, update_bn_stats

DATA = rows(48)
BATCHES = DATA.split(16)

# ------------------------------------------------------------------------------------------------------------- batches

Named = collections.namedtuple("Named", "x label")


class ByKeyword(nn.Module):
    """Takes its input as `x`, and something else with it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, x, factor=1.0):
        return self.net(x * factor)


POSITIONAL = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, torch.zeros(len(x))),
    "list": lambda x: [x, torch.zeros(len(x))],
    "tuple of one": lambda x: (x,),
    "named tuple": lambda x: Named(x, "label"),
}
KEYWORD = {
    "dict": lambda x: {"x": x},
    "ordered dict": lambda x: collections.OrderedDict(x=x / 2, factor=2.0),
    "user dict": lambda x: collections.UserDict(x=x),
    "dict and label": lambda x: ({"x": x, "factor": 1.0}, torch.zeros(len(x))),
    "list of dict and label": lambda x: [{"x": x}, 3],
}


@pytest.mark.parametrize("pack", POSITIONAL.values(), ids=POSITIONAL)
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_model_is_called_with_the_tensor_or_the_first_element(pack, device):
    expected = reference(mlp(), BATCHES)
    assert_statistics(recalibrated(mlp(), map(pack, BATCHES), device=device), expected)


@pytest.mark.parametrize("pack", KEYWORD.values(), ids=KEYWORD)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_model_is_called_with_a_mapping_as_keyword_arguments(pack, device):
    expected = reference(mlp(), BATCHES)
    assert_statistics(recalibrated(ByKeyword(), map(pack, BATCHES), device=device).net, expected)


@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_forward_is_called_with_the_model_and_the_batch_as_it_came(normalize):
    def forward(model, batch):
        seen.append((model, batch[0]))
        model(batch[1]["deep"])

    model, seen = mlp(1), []
    expected = reference(model, BATCHES)
    batches = [(name, {"deep": x}) for name, x in zip("abc", BATCHES)]
    assert_statistics(recalibrated(model, batches, forward=forward, normalize=normalize), expected)
    assert seen[:3] == [(model, "a"), (model, "b"), (model, "c")]


class Movable:
    """Something with tensors in it that knows how to move itself."""

    def __init__(self, x, device=None) -> None:
        self.x, self.device = x, device

    def to(self, device):
        return Movable(self.x, device)


def test_device_reaches_nested_things_that_can_move():
    def forward(model, batch):
        moved.append(batch)
        model(batch["pair"][0].x)

    moved = []
    loader = [{"pair": (Movable(DATA), [Named(Movable(DATA), 3)]), "text": "kept"}]
    model = recalibrated(mlp(1), loader, forward=forward, device="cpu")
    assert_statistics(model, reference(mlp(1), [DATA]))
    ((first, ((second, number),)), text) = moved[0].values()
    assert (first.device, second.device) == (torch.device("cpu"),) * 2
    assert (number, text) == (3, "kept")
    assert type(moved[0]["pair"][1][0]) is Named
    assert loader[0]["pair"][0].device is None


def test_thing_that_is_no_tensor_goes_to_the_model_as_it_is():
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, thing):
            return self.norm(thing.x)

    model = recalibrated(Takes(), [Movable(DATA)])
    assert_statistics(model, {"norm": moments(DATA.double())})


@pytest.mark.parametrize("empty", [(), []], ids=str)
def test_empty_sequence_is_no_batch(empty):
    with pytest.raises(ValueError, match="empty"):
        update_bn_stats(mlp(), [empty])


def test_data_loader_of_torch_with_labels():
    dataset = torch.utils.data.TensorDataset(DATA, torch.zeros(48))
    model = recalibrated(mlp(1), torch.utils.data.DataLoader(dataset, batch_size=10, shuffle=True))
    assert_statistics(model, reference(mlp(1), [DATA]))


# ------------------------------------------------------------------------------------------------------------ num_iters


def counted(drawn: list[int], n: int | None = None):
    for i in itertools.count() if n is None else range(n):
        drawn.append(i)
        yield rows(4, seed=i)


@pytest.mark.parametrize("normalize", ["batch", "population"])
@pytest.mark.parametrize("num_iters", [1, 3, 7])
def test_never_more_batches_are_drawn_than_num_iters(num_iters, normalize):
    model, drawn = mlp(1), []
    report = update_bn_stats(model, counted(drawn), num_iters, normalize=normalize)
    assert (drawn, report.batches) == ([*range(num_iters)], num_iters)
    assert_statistics(model, reference(mlp(1), [rows(4, seed=i) for i in range(num_iters)]))


def test_200_batches_by_default():
    drawn = []
    assert update_bn_stats(mlp(1), counted(drawn)).batches == len(drawn) == 200


@pytest.mark.parametrize("num_iters", [5, 6, 1000, None])
def test_shorter_loader_is_used_up(num_iters):
    model, drawn = mlp(1), []
    report = update_bn_stats(model, counted(drawn, 5), num_iters)
    assert (len(drawn), report.batches) == (5, 5)
    assert_statistics(model, reference(mlp(1), [rows(4, seed=i) for i in range(5)]))


class WithoutLength:
    """A loader whose length is an error of some kind, as that of streams in code of users."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        raise self.error

    def __iter__(self):
        return iter(BATCHES)


@pytest.mark.parametrize("error", [TypeError(), NotImplementedError(), ValueError(), AttributeError()], ids=repr)
def test_a_loader_may_not_know_its_length(error):
    model = mlp(1)
    report = update_bn_stats(model, WithoutLength(error))
    assert report.available is None
    assert_statistics(model, reference(mlp(1), BATCHES))


def test_numbers_may_be_of_numpy():
    report = update_bn_stats(mlp(1), BATCHES, np.int64(2), normalize="population", memory_limit=np.float32(1e9))
    assert report.batches == 2


def test_num_iters_may_be_given_by_position_as_to_fvcore():
    assert update_bn_stats(mlp(1), list(BATCHES), 2, None).batches == 2


# --------------------------------------------------------------------------------------------------------------- layers


def test_layers_by_function_names_and_modules():
    chosen = reference(mlp(), BATCHES)
    for layers in (
        lambda name, module: name in ("1", "4") and isinstance(module, nn.BatchNorm1d),
        ["1", "4"],
        {"4", "1"},
        (name for name in ("1", "4")),
    ):
        model, before = mlp(), statistics(mlp())
        update_bn_stats(model, BATCHES, layers=layers)
        assert_statistics(model, {**chosen, "7": before["7"]})
    model = mlp()
    report = update_bn_stats(model, BATCHES, layers=[model[4], "1", model[1]])
    assert [layer.name for layer in report.layers] == ["1", "4"]


def test_layers_not_chosen_evaluate():
    model = mlp()
    update_bn_stats(model, BATCHES, layers=["4"])
    front = mlp()[:4].eval()
    seen = front(DATA).double().detach()
    assert_statistics(model, {**statistics(mlp()), "4": moments(seen)})


def test_layer_of_two_names_can_be_asked_for_by_either():
    norm = nn.BatchNorm1d(5)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    for name in ("a", "b.0"):
        report = update_bn_stats(model, [DATA], layers=[name], forward=lambda model, x: model["a"](x))
        assert [layer.name for layer in report.layers] == ["a"]


@pytest.mark.parametrize(
    "layers", [["nowhere"], ["0"], ["1", "8"], [nn.BatchNorm1d(5)], [3], "1", nn.BatchNorm1d(5), ["4"]], ids=str
)
def test_layer_that_cannot_be_updated_is_refused(layers):
    model = mlp().train()
    model[4].eval()  # frozen
    with pytest.raises(ValueError, match="layers"):
        update_bn_stats(model, BATCHES, layers=layers)


def test_no_layer_chosen_leaves_the_model_and_the_loader_alone(caplog):
    model, before, drawn = mlp(), statistics(mlp()), []
    report = update_bn_stats(model, counted(drawn), layers=[])
    assert_statistics(model, before, tolerance=0)
    assert (report.layers, report.batches, drawn) == ([], 0, [])


# ------------------------------------------------------------------------------------------------------------- progress


def test_progress_bar_knows_its_length(monkeypatch):
    tqdm, totals = pytest.importorskip("tqdm"), []
    monkeypatch.setattr(tqdm, "tqdm", lambda iterable, total=None, **_: totals.append(total) or iterable)
    update_bn_stats(mlp(1), list(BATCHES), progress="tqdm")
    update_bn_stats(mlp(1), list(BATCHES), 2, "tqdm")
    update_bn_stats(mlp(1), iter(BATCHES), 2, "tqdm")
    update_bn_stats(mlp(1), iter(BATCHES), None, "tqdm")
    assert totals == [3, 2, 2, None]


def test_progress_bar_changes_no_number(capsys):
    pytest.importorskip("tqdm")
    assert_statistics(recalibrated(mlp(), BATCHES, progress="tqdm"), statistics(recalibrated(mlp(), BATCHES)), 0.0)
    assert "3/3" in capsys.readouterr().err


def test_without_progress_nothing_is_printed(capfd):
    recalibrated(mlp(), BATCHES)
    assert capfd.readouterr() == ("", "")


def test_without_tqdm_a_bar_is_an_error_that_says_what_to_install(monkeypatch):
    plain_import = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.partition(".")[0] == "tqdm":
            raise ImportError("no tqdm")
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"tqdm.*pip install"):
        update_bn_stats(mlp(1), BATCHES, progress="tqdm")
    assert update_bn_stats(mlp(1), BATCHES).batches == 3


# --------------------------------------------------------------------------------------------------------- wrong values

WRONG = [
    {"num_iters": 0}, {"num_iters": -1}, {"num_iters": 2.0}, {"num_iters": True}, {"progress": "bar"}, {"progress": 1},
    {"normalize": "layer"}, {"variance": "biased"}, {"variance": None}, {"tolerance": 0}, {"tolerance": -0.1},
    {"tolerance": float("nan")}, {"prior": -1}, {"prior": float("inf")}, {"prior": float("nan")},
    {"normalize": "population", "variance": "batch"}, {"memory_limit": -1},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_value_is_refused_by_the_name_of_the_argument(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        update_bn_stats(mlp(), BATCHES, **wrong)


@pytest.mark.parametrize(
    "thing", [None, "model", [mlp()], mlp().state_dict(), mlp], ids=lambda thing: type(thing).__name__
)
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(TypeError, match="Module"):
        update_bn_stats(thing, BATCHES)
    with pytest.raises(TypeError, match="Module"):
        get_bn_modules(thing)


@pytest.mark.parametrize(
    "loader", [[], iter(()), torch.utils.data.DataLoader([])], ids=["list", "iterator", "DataLoader"]
)
@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_loader_without_a_batch_is_an_error(loader, normalize):
    with pytest.raises(ValueError, match="no batch"):
        update_bn_stats(mlp(), loader, normalize=normalize)


def test_single_element_in_all_is_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match="4"):
        update_bn_stats(mlp(), [rows(1)], layers=["4"])


@pytest.mark.parametrize("normalize", ["batch", "population"])
def test_elements_one_by_one_are_enough(normalize):
    model = recalibrated(mlp(1), DATA.split(1), normalize=normalize)
    assert_statistics(model, {"1": moments(mlp(1)[0](DATA).detach().double())})
