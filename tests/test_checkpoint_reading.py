"""Files as people have them: read without an import, and what is read is what is in them."""

import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import C, saved, small_net
from models import pretrained
from torch import nn
from torch.optim.swa_utils import AveragedModel

from runningbn import RunningBatchNorm
from runningbn.inspection.layers import read_state_dict
from runningbn.inspection.reading import CheckpointError, Source, read_checkpoint

ROOT = Path(__file__).parent.parent


def pickled(tmp_path, contents, protocol=None, name="model.pkl"):
    (tmp_path / name).write_bytes(pickle.dumps(contents, protocol=protocol))
    return tmp_path / name


def assert_same_layers(found, state, prefix=""):
    """All numbers of the layers are those of a state dict, which are read by no reader."""
    expected = read_state_dict("", state).layers
    assert [layer.name for layer in found.layers] == [prefix + layer.name for layer in expected]
    assert not found.left_out
    for one, other in zip(found.layers, expected, strict=True):
        assert (one.dtype, one.batches) == (other.dtype, other.batches)
        for part in ("mean", "var", "weight", "bias"):
            assert torch.equal(getattr(one, part), getattr(other, part)), (one.name, part)
        assert one.state.keys() == other.state.keys()
        assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)


# --------------------------------------------------------------------------------------- what stands beside state dicts


class Foreign:
    """A class that nobody has who reads the file."""

    def __init__(self):
        self.value, self.others = 3, [np.arange(3), {1, 2}, frozenset("ab")]


class Settings(dict):
    """As of mmengine, addict, EasyDict: a dict with a class and attributes of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen = True


def numpy_generator():
    generator = np.random.default_rng(0)
    generator.random(3)
    return generator


BESIDE = {
    "namespace": lambda: Namespace(lr=1e-3, milestones=[3, 4], inner=Namespace(x=1)),
    "numpy scalars": lambda: {"best": np.float64(0.75), "epoch": np.int64(3), "flag": np.bool_(True)},
    "numpy arrays": lambda: [np.random.rand(3, 4), np.array(["a", "b"]), np.array([object, None], dtype=object)],
    "numpy rng": lambda: {"legacy": np.random.get_state(), "new": numpy_generator()},
    "python rng": random.getstate,
    "torch rng": torch.get_rng_state,
    "defaultdict": lambda: defaultdict(list, {"train": [0.5, 0.25]}),
    "counter": lambda: Counter("abca"),
    "path": lambda: Path("/data/imagenet"),
    "foreign": Foreign,
    "settings": lambda: Settings(optimizer={"lr": 0.1}),
    "optimizer": lambda: torch.optim.AdamW(small_net().parameters()).state_dict(),
    "dtype and device": lambda: [torch.float32, torch.device("cpu"), torch.Size([2, 3]), slice(1, 2), range(3), 1j],
    "class and function": lambda: [nn.BatchNorm2d, torch.relu, print],
    "generator": lambda: torch.Generator().get_state(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "strange keys": lambda: {(1, (2, 3)): 1, ("a", 1): 2, None: 3, frozenset("a"): 4, torch.float32: 5, -1.5: 6},
    "big numbers": lambda: {10**5000: 10**5000, "x" * 300: -(10**40)},
}


@pytest.mark.parametrize("name", list(BESIDE))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_tensors_are_read_whatever_lies_beside_them(tmp_path, name, legacy):
    state = small_net().state_dict()
    contents = {"other": BESIDE[name](), "state_dict": state}
    (found,) = read_checkpoint(saved(tmp_path, contents, _use_new_zipfile_serialization=not legacy))
    assert found.place == "state_dict"
    assert_same_layers(found, state)


def test_an_omegaconf_is_read(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    state = small_net().state_dict()
    config = omegaconf.OmegaConf.create({"model": {"depth": 3, "widths": [1, 2]}, "lr": "${model.depth}"})
    (found,) = read_checkpoint(saved(tmp_path, {"hyper_parameters": config, "state_dict": state}))
    assert_same_layers(found, state)


def test_state_dicts_inside_objects_have_their_attributes_as_place(tmp_path):
    state, average = small_net().state_dict(), small_net().state_dict()
    run = Namespace(ema=Namespace(shadow=average), nets=[Settings(state)])
    found = read_checkpoint(saved(tmp_path, {"run": run}))
    by_place = {each.place: each for each in found}
    assert set(by_place) == {"run.ema.shadow", "run.nets.0"}
    assert_same_layers(by_place["run.ema.shadow"], average)
    assert_same_layers(by_place["run.nets.0"], state)


def test_nothing_of_a_file_is_imported(tmp_path):
    """The module of the pickled classes is there to be imported, and is not."""
    (tmp_path / "zoo_of_models.py").write_text("class Thing: pass\nclass Made:\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import zoo_of_models

        path = saved(tmp_path, {"thing": zoo_of_models.Thing(), "model": small_net().state_dict()})
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("zoo_of_models", None)
    code = (
        "import sys; from pathlib import Path; from runningbn.inspection.reading import read_checkpoint;"
        "before = set(sys.modules); read_checkpoint(Path(sys.argv[1])); print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------------------- whole models


def averaged(model):
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, averaged, torch.fx.symbolic_trace])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_model_saved_whole_is_its_state_dict(tmp_path, wrap, legacy):
    model = wrap(small_net())
    # As ultralytics has it: the model, its average, and settings.
    contents = {"epoch": -1, "model": model, "ema": None, "train_args": {"lr0": 0.01}}
    (found,) = read_checkpoint(saved(tmp_path, contents, _use_new_zipfile_serialization=not legacy))
    assert found.place == "model"
    assert_same_layers(found, model.state_dict())


def test_a_model_that_is_the_file_and_its_own_layers(tmp_path):
    model = nn.ModuleDict({"a": RunningBatchNorm(C), "b": pretrained(nn.BatchNorm1d(C).half())})
    for _ in range(3):
        model["a"](torch.randn(4, C))
    (found,) = read_checkpoint(saved(tmp_path, model))
    assert found.place == ""
    assert_same_layers(found, model.state_dict())


def test_a_model_saved_whole_tells_its_eps(tmp_path):
    path = saved(tmp_path, small_net(eps=1e-3))
    assert [layer.eps for layer in read_checkpoint(path)[0].layers] == [1e-3, 1e-5]
    assert [layer.eps for layer in read_checkpoint(path, eps=0.1)[0].layers] == [0.1, 0.1]


def test_a_layer_that_is_shared_in_a_whole_model_is_listed_once(tmp_path):
    layer = pretrained(nn.BatchNorm2d(C))
    (found,) = read_checkpoint(saved(tmp_path, nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})))
    assert [each.name for each in found.layers] == ["a"]


def test_a_scripted_model_is_read_and_not_loaded(tmp_path):
    model = small_net(eps=1e-3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and such files are there
        torch.jit.script(model).save(tmp_path / "scripted.pt")
    (found,) = read_checkpoint(tmp_path / "scripted.pt")
    assert_same_layers(found, model.state_dict())


# ----------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f4", ">f4", "f2", "f8", "<f8"])
def test_arrays_of_numpy_in_a_pickle(tmp_path, protocol, dtype):
    state = {name: value.numpy() for name, value in small_net().state_dict().items()}
    arrays = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in state.items()}
    contents = {"model": arrays, "__author__": "a zoo", "matching_heuristics": True}  # as detectron2 has it
    (found,) = read_checkpoint(pickled(tmp_path, contents, protocol))
    native = {name: torch.from_numpy(value.astype(value.dtype.newbyteorder("="))) for name, value in arrays.items()}
    assert found.place == "model"
    assert_same_layers(found, native)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_tensors_in_a_plain_pickle(tmp_path, protocol):
    model = small_net()
    (found,) = read_checkpoint(pickled(tmp_path, {"state_dict": model.state_dict(), "whole": None}, protocol))
    assert_same_layers(found, model.state_dict())
    (found,) = read_checkpoint(pickled(tmp_path, model, protocol))
    assert_same_layers(found, model.state_dict())


def test_arrays_keep_their_order_and_scalars_are_tensors(tmp_path):
    columns = np.asfortranarray(np.arange(6, dtype="f4").reshape(2, 3))
    contents = {"a.running_mean": columns[:, 1].copy(), "a.running_var": np.ones(2, "f4"), "a.weight": columns}
    contents |= {"a.num_batches_tracked": np.int64(7)}
    for protocol in (2, 5):
        (found,) = _read_anything(pickled(tmp_path, contents, protocol))
        assert found.left_out == (("a", "weight has the shape (2, 3), and running_mean (2,)"),)
    del contents["a.weight"]
    (found,) = read_checkpoint(pickled(tmp_path, contents))
    assert found.layers[0].batches == 7
    assert found.layers[0].mean.tolist() == [1, 4]


def _read_anything(path):
    """Also what has nothing but layers that are left out."""
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    from runningbn.inspection.formats import loaded
    from runningbn.inspection.reading import _state_dicts

    assert "no BatchNorm statistics" in str(raised.value)
    with loaded(path) as (checkpoint, budget):
        return list(_state_dicts(checkpoint, "", budget, None))


def test_two_dimensional_arrays_have_their_elements_in_place(tmp_path):
    from runningbn.inspection.formats import loaded

    rows = np.arange(6, dtype="i4").reshape(2, 3)
    contents = {"rows": rows, "columns": np.asfortranarray(rows), "transposed": rows.T, "view": rows[:, ::2]}
    for protocol in (0, 2, 5):
        with loaded(pickled(tmp_path, contents, protocol)) as (checkpoint, budget):
            for name, expected in contents.items():
                found = checkpoint.tensor(checkpoint.contents[name]).read(budget)
                assert torch.equal(found, torch.from_numpy(expected.copy())), name


# ----------------------------------------------------------------------------------------------- tensors of every kind


def test_tensors_of_no_layer_are_not_even_looked_at(tmp_path):
    """The optimizer's are damaged: their storages are not in the file. Those of the layers are whole."""
    state = small_net().state_dict()
    moment = torch.full((100,), 0.5)
    path = saved(tmp_path, {"state_dict": state, "optimizer": {"exp_avg": moment}})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "part.pt", "w") as part:
        names = [name for name in archive.namelist() if archive.read(name) != moment.numpy().tobytes()]
        assert len(names) == len(archive.namelist()) - 1
        for name in names:
            part.writestr(name, archive.read(name))
    (found,) = read_checkpoint(tmp_path / "part.pt")
    assert_same_layers(found, state)


class Image(torch.Tensor):
    """As MONAI's MetaTensor."""


KINDS = {
    "parameter": lambda x: nn.Parameter(x),
    "subclass": lambda x: x.as_subclass(Image),
    "buffer": lambda x: nn.Buffer(x) if hasattr(nn, "Buffer") else x,
    "view": lambda x: torch.cat([torch.zeros(3), x, torch.zeros(2)])[3:-2],
    "column": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "expanded": lambda x: x[:1].expand(C),
    "conjugate": lambda x: torch.complex(x, x).conj().real,
    "frozen": lambda x: nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_tensors_of_every_kind(tmp_path, kind, legacy):
    mean = KINDS[kind](torch.arange(1.0, C + 1))
    state = {"running_mean": mean, "running_var": torch.ones(C)}
    (found,) = read_checkpoint(saved(tmp_path, state, _use_new_zipfile_serialization=not legacy))
    assert torch.equal(found.layers[0].mean, mean.detach().as_subclass(torch.Tensor).double())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8],
    ids=str,
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_dtypes(tmp_path, dtype, legacy):
    mean = torch.arange(C).to(dtype)
    state = {"running_mean": mean, "running_var": mean.clone()}
    (found,) = read_checkpoint(saved(tmp_path, state, _use_new_zipfile_serialization=not legacy))
    assert found.layers[0].dtype == dtype
    assert torch.equal(found.layers[0].mean, mean.double())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(C, device="meta"),
        lambda: torch.zeros(C).to_sparse(),
        lambda: torch.zeros(C, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.zeros(C), 1.0, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "complex", "quantised"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantized:DeprecationWarning")
def test_what_holds_no_plain_numbers_is_left_out(tmp_path, make, legacy):
    tensor = make()
    state = {"a.running_mean": tensor, "a.running_var": tensor, **small_net().state_dict()}
    (found,) = read_checkpoint(saved(tmp_path, state, _use_new_zipfile_serialization=not legacy))
    assert found.left_out == (("a", "running_mean holds no plain real numbers"),)
    assert len(found.layers) == 2


def test_bytes_in_the_other_order(tmp_path):
    state = small_net().state_dict()
    path = saved(tmp_path, state)
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "other.pt", "w") as swapped:
        widths = [value.element_size() for value in state.values()]
        for name in archive.namelist():
            contents = archive.read(name)
            if "/data/" in name:
                width = widths[int(name.rpartition("/")[2])]
                contents = b"".join(contents[i : i + width][::-1] for i in range(0, len(contents), width))
            swapped.writestr(name, other if name.endswith("byteorder") else contents)
    (found,) = read_checkpoint(tmp_path / "other.pt")
    assert_same_layers(found, state)


# ------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_with_nothing_but_the_layers(tmp_path, dtype):
    """The first and the last piece of a file are of layers, too."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    model = pretrained(nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C))).to(dtype)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    (found,) = read_checkpoint(tmp_path)
    assert found.place == ""
    assert_same_layers(found, model.state_dict())


@pytest.fixture(name="distributed")
def folder_of_distributed_checkpoint(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    model = small_net()
    contents = {"model": model.state_dict(), "step": 3, "lists": [torch.zeros(3), {"a": torch.ones(2)}]}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(contents, checkpoint_id=tmp_path / "step_3")
    return tmp_path / "step_3", model


def test_a_folder_of_torch_distributed_checkpoint(distributed):
    folder, model = distributed
    for path in (folder, folder / ".metadata"):
        (found,) = read_checkpoint(path)
        assert found.place == "model"
        assert_same_layers(found, model.state_dict())


def test_a_tensor_in_pieces_is_put_together():
    from runningbn.inspection.distributed import Piece, ShardedTensor
    from runningbn.inspection.errors import Budget, UnreadableError
    from runningbn.inspection.spans import span_of

    whole = torch.arange(12.0).view(4, 3)
    import io

    files, pieces = {}, []
    for row, column, height, width in ((0, 0, 2, 3), (2, 0, 2, 1), (2, 1, 2, 2)):
        buffer = io.BytesIO()
        torch.save(whole[row : row + height, column : column + width].clone(), buffer)
        files[f"{row}{column}"] = b"other" + buffer.getvalue()
        pieces.append(Piece((row, column), (height, width), f"{row}{column}", 5, len(buffer.getvalue())))

    def read(*some):
        return ShardedTensor((4, 3), some, lambda name: span_of(files[name])).read(Budget())

    assert torch.equal(read(*pieces), whole)
    with pytest.raises(UnreadableError, match="pieces are missing"):
        read(*pieces[:2])
    with pytest.raises(UnreadableError):
        read(replace(pieces[0], offsets=(3, 0)), *pieces[1:])


def test_a_folder_whose_metadata_leads_out_of_it_is_refused(distributed):
    folder, _ = distributed
    contents = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(contents.replace(b"__0_0.distcp", b"../secret.pt"))
    with pytest.raises(CheckpointError, match="names a file that is not in its folder"):
        read_checkpoint(folder)


def test_a_folder_without_its_pieces_says_which(distributed):
    folder, _ = distributed
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: there is no such file"):
        read_checkpoint(folder)


# -------------------------------------------------------------------------------------------------- other files, names


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 97800000\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "page of HTML"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (bytes(257) + b"ustar\x0000", "tar archive"),
    ],
)
def test_what_bears_the_name_of_a_checkpoint_is_called_what_it_is(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    for path in (tmp_path / name, *([tmp_path] if name != "model.pt" else [])):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


def test_contents_count_more_than_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = small_net().state_dict()
    safetensors.save_file(state, tmp_path / "weights.pt")
    (found,) = read_checkpoint(tmp_path / "weights.pt")
    assert {layer.name for layer in found.layers} == {"1", "2.0"}
    (found,) = read_checkpoint(saved(tmp_path, state, "weights.safetensors"))
    assert_same_layers(found, state)


def test_a_zip_archive_that_is_none_of_torch_or_was_packed_anew(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"without a data\.pkl"):
        read_checkpoint(tmp_path / "arrays.npz")
    path = saved(tmp_path, small_net().state_dict())
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="compressed members"):
        read_checkpoint(tmp_path / "c.pt")


def test_an_exported_program_is_told_how_to_be_read(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(C)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (torch.randn(2, C),)), tmp_path / "program.pt2")
        loaded_again = torch.export.load(tmp_path / "program.pt2")
    with pytest.raises(
        CheckpointError, match=r"torch\.export|without a data\.pkl"
    ):  # older releases wrote other members
        read_checkpoint(tmp_path / "program.pt2")
    (found,) = read_checkpoint(saved(tmp_path, loaded_again.state_dict))
    assert_same_layers(found, model.state_dict())


def test_a_key_selects_a_part_and_one_that_is_missing_is_told_what_there_is(tmp_path):
    model, average = small_net().state_dict(), small_net().state_dict()
    path = saved(tmp_path, {"model": model, "ema": {"shadow": average, "decay": 0.9}, "optimizer": {"state": {}}})
    (found,) = read_checkpoint(Source(path, "model"))
    assert_same_layers(found, model)
    for key in ("ema", "ema.shadow"):
        (found,) = read_checkpoint(Source(path, key))
        assert found.place == "ema.shadow"
        assert_same_layers(found, average)
    for key in ("optimizer", "missing", "mod", "model.1"):
        with pytest.raises(
            CheckpointError, match=rf"under the key '{key}'; there are some under: 'model', 'ema.shadow'"
        ):
            read_checkpoint(Source(path, key))


def test_what_is_in_two_places_is_listed_at_the_first_and_found_under_both(tmp_path):
    model = small_net()
    path = saved(tmp_path, {"model": model, "ema": model, "best": {"of": model.state_dict(), "self": None}})
    assert [each.place for each in read_checkpoint(path)] == ["model", "best.of"]
    for key in ("model", "ema", "best", "best.of"):
        (found,) = read_checkpoint(Source(path, key))
        assert found.place == ("best.of" if key == "best" else key)
        assert_same_layers(found, model.state_dict())


def test_a_key_inside_what_contains_itself(tmp_path):
    contents = {"model": small_net().state_dict()}
    contents["self"] = contents
    path = saved(tmp_path, contents)
    for key in ("model", "self", "self.model", "self.self.self.model"):
        (found,) = read_checkpoint(Source(path, key))
        assert len(found.layers) == 2


def test_keys_with_dots_and_numbers(tmp_path):
    state = small_net().state_dict()
    path = saved(tmp_path, {"a.b": {"c": state}, "list": [None, {"x": state}], 7: {"y": small_net().state_dict()}})
    assert [each.place for each in read_checkpoint(path)] == ["a.b.c", "7.y"]
    for key in ("a.b", "a.b.c", "7", "7.y"):
        assert len(read_checkpoint(Source(path, key))) == 1


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("last.pth", "epoch:3.pt"):
        Path(name).touch()
    assert Source.parse("last.pth") == Source(Path("last.pth"))
    assert Source.parse("last.pth:state_dict.ema") == Source(Path("last.pth"), "state_dict.ema")
    assert Source.parse("last.pth:a:b") == Source(Path("last.pth"), "a:b")
    assert Source.parse("epoch:3.pt") == Source(Path("epoch:3.pt"))
    assert Source.parse("epoch:3.pt:ema") == Source(Path("epoch:3.pt"), "ema")
    assert Source.parse("missing.pt:ema") == Source(Path("missing.pt"), "ema")
    assert Source.parse(r"C:\missing.pt").path == Path(r"C:\missing.pt")
    assert str(Source.parse("last.pth:ema")) == "last.pth:ema"


def test_an_ordered_dict_of_python_2_is_a_mapping(tmp_path):
    """Protocol 2 of Python 2 pickled an OrderedDict as a call with a list of pairs."""

    class Pairs:
        def __init__(self, items):
            self.items = items

        def __reduce__(self):
            return OrderedDict, ([list(pair) for pair in self.items],)

    state = {name: value.numpy() for name, value in small_net().state_dict().items()}
    path = pickled(tmp_path, {"state_dict": Pairs(state.items())}, protocol=2)
    (found,) = read_checkpoint(path)
    assert_same_layers(found, {name: torch.from_numpy(value) for name, value in state.items()})
