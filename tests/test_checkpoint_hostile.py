"""Damaged and hostile files: the documented error or an answer, no code run, nothing imported, memory bounded."""

from __future__ import annotations

import copyreg
import io
import pickle
import pickletools
import random
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import pretrained
from torch import nn

from runningbn.inspection.errors import Budget, UnreadableError
from runningbn.inspection.reading import CheckpointError, StateDict, read_checkpoint
from runningbn.inspection.unpickling import unpickle

resource = pytest.importorskip("resource")  # tells how much memory was taken

C = 4
# What Python tells of while code is imported, compiled or run, and other processes are started.
RUNNING = (
    "import",
    "exec",
    "compile",
    "os.system",
    "subprocess.",
    "pickle.",
    "os.exec",
    "os.fork",
    "ctypes.",
    "socket.",
)


class _Watch:
    """While it is on, whatever Python reports of `RUNNING` is kept. An audit hook cannot be taken out again."""

    on = False
    seen: ClassVar[list[str]] = []

    @classmethod
    def hook(cls, event, arguments):
        if cls.on and event.startswith(RUNNING):
            cls.seen.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_Watch.hook)
# Text is decoded by modules of the standard library that are imported at their first use.
for encoding in ("cp437", "raw_unicode_escape", "latin-1", "ascii"):
    "a".encode(encoding)


def attempt(path: Path) -> list[StateDict] | str:
    """What is read, or what the error says; anything else that is raised fails the test."""
    _Watch.seen, _Watch.on = [], True
    found: list[StateDict] | str
    try:
        found = read_checkpoint(path)
    except CheckpointError as error:
        found = str(error)
    finally:
        _Watch.on = False
    assert _Watch.seen == []
    assert not isinstance(found, str) or str(path.parent) in found
    return found


def net() -> nn.Module:
    return pretrained(nn.Sequential(nn.BatchNorm1d(C), nn.Sequential(nn.BatchNorm1d(C))))


def torch_file(contents, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def zip_with(data: bytes, **members: bytes) -> bytes:
    """A zip archive as torch.save writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, contents in members.items():
            archive.writestr(f"a/data/{name}", contents)
    return buffer.getvalue()


ARRAYS = {name: value.numpy() for name, value in net().state_dict().items()}
BESIDE = {"state_dict": net().state_dict(), "args": Namespace(lr=1), "path": Path("a"), "best": np.float64(1)}
FILES = {
    "zip": lambda: torch_file(BESIDE),
    "before torch 1.6": lambda: torch_file(BESIDE, _use_new_zipfile_serialization=False),
    "whole model": lambda: torch_file(net()),
    **{f"pickle {protocol}": lambda protocol=protocol: pickle.dumps(ARRAYS, protocol) for protocol in (0, 2, 5)},
    "pickle of tensors": lambda: pickle.dumps(net()),
}


# -------------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("kind", list(FILES))
def test_files_that_were_cut_off(tmp_path, kind):
    whole = FILES[kind]()
    path = tmp_path / "cut.pt"
    rng = random.Random(0)
    for length in sorted({0, 1, 2, 3, 4, 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))}):
        path.write_bytes(whole[:length])
        said = attempt(path)
        # Storages that come last may be of no layer; a part that is read is whole.
        if isinstance(said, str):
            assert "\n" not in said
        else:
            assert all(layer.channels == C for state_dict in said for layer in state_dict.layers)


@pytest.mark.parametrize("kind", list(FILES))
def test_files_with_flipped_bits(tmp_path, kind):
    whole = FILES[kind]()
    path = tmp_path / "flipped.pt"
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 20))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        attempt(path)


@pytest.mark.parametrize("kind", list(FILES))
def test_the_pickle_in_a_file_with_other_opcodes(tmp_path, kind):
    """Bytes of the pickle itself are replaced by opcodes, which a flip seldom makes."""
    whole = FILES[kind]()
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    start = whole.find(b"\x80") if not kind.startswith("pickle 0") else 0
    path = tmp_path / "opcodes.pt"
    rng = random.Random(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            position = start + rng.randrange(min(len(whole) - start, 1500))
            damaged[position : position + 1] = rng.choice(opcodes)
        path.write_bytes(damaged)
        attempt(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_folders_of_torch_distributed_checkpoint_that_are_damaged(tmp_path, name):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": net().state_dict()}, checkpoint_id=tmp_path)
    whole = (tmp_path / name).read_bytes()
    assert isinstance(attempt(tmp_path), list)
    rng = random.Random(0)
    for i in range(48):
        damaged = bytearray(whole)
        if i % 4 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.choice((1, 3))):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        attempt(tmp_path)


def test_damaged_files_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    whole = safetensors.save(net().state_dict())
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole)
    assert isinstance(attempt(path), list)
    rng = random.Random(0)
    for i in range(80):
        damaged = bytearray(whole)
        if i % 4 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.choice((1, 3))):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 600))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        attempt(path)


def argument_of(opcode: pickletools.OpcodeInfo, rng: random.Random) -> bytes:
    """Something that the opcode may be followed by."""
    if opcode.arg is None:
        return b""
    text = rng.choice((b"os system", b"builtins\neval", b"1", b"-3", b"'x'", b"L", b"1.5", b"running_mean"))
    size = opcode.arg.n
    if size == pickletools.UP_TO_NEWLINE:
        return b"os\nsystem\n" if "pair" in opcode.arg.name else text.replace(b"\n", b" ") + b"\n"
    if size >= 0:
        return bytes(rng.choice((0, 1, 2, 3, 127, 255)) for _ in range(size))
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(size, 4)
    declared = rng.choice((len(text), len(text), 0, 255, 2 ** (8 * width - 1) - 1))
    return min(declared, 2 ** (8 * width) - 1).to_bytes(width, "little") + text


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_programs_of_any_opcodes(seed, length):
    rng = random.Random(seed)
    program = b"\x80\x04"
    pushes = [opcode for opcode in pickletools.opcodes if opcode.stack_after and not opcode.stack_before]
    for _ in range(length):
        opcode = rng.choice(pushes if rng.random() < 0.5 else pickletools.opcodes)
        program += opcode.code.encode("latin-1") + argument_of(opcode, rng)
    _Watch.seen, _Watch.on = [], True
    try:
        unpickle(io.BytesIO(program + b"."), Budget())
    except UnreadableError:
        pass
    finally:
        _Watch.on = False
    assert _Watch.seen == []


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    for start in (b"", b"\x80\x02", b"PK\x03\x04"):
        path.write_bytes(start + contents)
        attempt(path)


# --------------------------------------------------------------------------------------------------------- hostile code


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


TOUCH = "touch {marker}"
# Programs that leave one object, and under Python's own pickle run a command when they are loaded.
ATTACKS = {
    "reduce": b"cos\nsystem\n(X{text}tR",
    "reduce of posix": b"cposix\nsystem\n(X{text}tR",
    "inst": b"(X{text}ios\nsystem\n",
    "obj": b"(cos\nsystem\nX{text}o",
    "newobj": b"csubprocess\nPopen\n(X{text}t\x81",
    "newobj_ex": b"csubprocess\nPopen\n(X{text}t}\x92",
    "stack global": short("os") + short("system") + b"\x93(X{text}tR",
    "a dotted name": short("os") + short("path.os.system") + b"\x93(X{text}tR",
    "build": b"cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsbX{text}b",
    "build on a class": b"cargparse\nNamespace\n}X\x08\x00\x00\x00__init__cos\nsystem\nsb",
    "extension": b"\x82\xf0(X{text}tR",
    "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\nX\x06\x00\x00\x00systemtR(X{text}tR",
    "eval": b"cbuiltins\neval\n(X{python}tR",
    "exec by map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(X{text}ltRtR",
    "persistent id": b"(X\x07\x00\x00\x00storagecos\nsystem\nX{text}X\x03\x00\x00\x00cpuK\x04tQ",
    "torch.load again": b"ctorch.storage\n_load_from_bytes\n(X{text}tR",
    "a name with a line": b"\x8c\x0aos\nsystem\n\x8c\x06system\x93(X{text}tR",
}


def program_of(attack: str, marker: Path) -> bytes:
    text = f"touch {marker}".encode()
    python = f"open({str(marker)!r}, 'w')".encode()
    program = ATTACKS[attack]
    for name, value in ((b"{text}", text), (b"{python}", python)):
        program = program.replace(name, struct.pack("<I", len(value)) + value)
    return program


@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("place", ["beside", "as a key", "as a tensor", "as a module"])
@pytest.mark.parametrize("container", ["zip", "pickle", "before torch 1.6"])
def test_no_code_is_run_and_the_layers_beside_it_are_read(tmp_path, attack, place, container):
    if attack == "extension":
        # A process that has given `os.system` a code, and has used it: Python's unpickler then asks no find_class.
        copyreg.add_extension("os", "system", 0xF0)
    try:
        marker = tmp_path / "sprung"
        program = program_of(attack, marker)
        wrapped = {
            "beside": b"}X\x01\x00\x00\x00a" + program + b"s",
            "as a key": b"}" + program + b"K\x01s",
            "as a tensor": b"}X\x0e\x00\x00\x00a.running_mean" + program + b"s",
            "as a module": b"}X\x01\x00\x00\x00mcfoo\nModule\n)\x81}(X\x08\x00\x00\x00_buffers"
            + b"}X\x0c\x00\x00\x00running_mean" + program + b"s"
            + b"X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00x" + program + b"subs",
        }[place]  # fmt: skip
        # The healthy layer is a pickle of numpy arrays, whose opcodes are put into the same dict.
        healthy = pickle.dumps({"n.running_mean": np.zeros(3, "f4"), "n.running_var": np.full(3, 2, "f4")}, 2)
        data = b"\x80\x04}(X\x01\x00\x00\x00h" + healthy[2:-1] + b"X\x01\x00\x00\x00x" + wrapped + b"u."
        if container == "zip":
            data = zip_with(data)
        elif container == "before torch 1.6":
            parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
            data = b"".join(pickle.dumps(part, 2) for part in parts) + data + pickle.dumps([], 2)
        path = tmp_path / "attack.pt"
        path.write_bytes(data)
        found = attempt(path)
    finally:
        if attack == "extension":
            copyreg.remove_extension("os", "system", 0xF0)
    assert not marker.exists()
    if isinstance(found, str):
        # Not all of these are pickles for a reader that runs nothing: then the file is refused as a whole.
        assert attack in ("build on a class", "persistent id", "torch.load again") or place == "as a tensor"
    else:
        assert next((each.place, [layer.name for layer in each.layers]) for each in found) == ("h", ["n"])
        assert found[0].layers[0].var.tolist() == [2, 2, 2]


def test_the_attacks_are_attacks(tmp_path):
    """With Python's own unpickler some of these run: the test above would notice."""
    for attack in ("reduce", "inst", "stack global"):
        marker = tmp_path / f"sprung by {attack.split()[0]}".replace(" ", "_")
        pickle.loads(b"\x80\x04" + program_of(attack, marker) + b".")
        assert marker.exists()


# ----------------------------------------------------------------------------------------------- deep, circular, shared

# Deeper than recursion goes; and deeper than C may recurse on a stack of 8 MiB, as hashing a tuple does.
DEPTH, DEEPEST = 20_000, 100_000


@pytest.mark.parametrize(
    "program",
    [
        b"]" * DEPTH + b"a" * (DEPTH - 1),
        b")" + b"\x85" * DEPTH,
        b"N" + b"".join(b"}K\x01" for _ in range(100)) + b"N" + b"s" * 100,
        b"(" * DEPTH + b"t" * DEPTH,
        b"cfoo\nBar\n" + b")" + b"\x85" * DEPTH + b"R",
        b"cfoo\nBar\n)\x81q\x00" * 1 + b"".join(b"cfoo\nBar\nh\x00\x85Rq\x00" for _ in range(DEPTH // 10)),
        b"}" + b")" + b"\x85" * DEEPEST + b"Ns",  # a key that would exhaust the C stack when it is hashed
        b"}" + b")" + b"2\x86" * 100 + b"Ns",  # a key of 2^100 parts
        b")" + b"2\x86" * 100,
        b"]q\x00h\x00a",
        b"}q\x00X\x01\x00\x00\x00ah\x00s",
        b"]q\x00h\x00\x85q\x01a",
        b"cfoo\nBar\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb",
        b"cfoo\nBar\n)\x81q\x00h\x00b",
        b"ctorch._utils\n_rebuild_parameter\n]q\x01\x85Rq\x00h\x01h\x00a0h\x00",
        b"(" * DEPTH,
        b"",
        b"0",
        b"a",
        b"1",
        b"h\x07",
    ],
    ids=range(21),
)
def test_depth_and_circles(tmp_path, program):
    path = tmp_path / "deep.pt"
    for wrap in (b"%s", b"}X\x0c\x00\x00\x00running_mean%ss"):
        path.write_bytes(b"\x80\x02" + wrap.replace(b"%s", program) + b".")
        assert isinstance(attempt(path), str)


def test_modules_inside_themselves_and_shared_by_all(tmp_path):
    """Each of 60 modules holds the next twice, and the last the first: 2^60 paths lead to its layer."""
    modules = [nn.Module() for _ in range(60)]
    for one, other in pairwise(modules):
        one._modules.update(a=other, b=other)
    modules[-1]._modules.update(n=pretrained(nn.BatchNorm1d(C)), first=modules[0])
    path = tmp_path / "shared.pt"
    path.write_bytes(torch_file(modules[0]))
    (found,) = attempt(path)
    assert [layer.name for layer in found.layers] == ["a." * 59 + "n"]


# ------------------------------------------------------------------------------------------------------- declared sizes


def peak() -> int:
    """Most memory that this process ever had, in bytes; its unit is KiB, on macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensor_of(storage: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0):
    """A tensor that says that it is larger than its storage: what torch would write, if there were one."""

    class Lie:
        def __reduce__(self):
            arguments = (storage.untyped_storage(), offset, size, stride, False, OrderedDict())
            typed = (torch.storage.TypedStorage(wrap_storage=arguments[0], dtype=storage.dtype, _internal=True),)
            return torch._utils._rebuild_tensor_v2, typed + arguments[1:]

    return Lie()


def statistics(tensor) -> dict:
    return {"a.running_mean": tensor, "a.running_var": torch.ones(3)}


HUGE = {
    "bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "text": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"abc.",
    "more than any": lambda: b"\x80\x05\x96" + b"\xff" * 8 + b"abc.",
    "long": lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "negative long": lambda: b"\x80\x02\x8b" + struct.pack("<i", -1) + b"abc.",
    "digits": lambda: b"L" + b"9" * 1_000_000 + b"L\n.",
    "frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "memo index": lambda: b"\x80\x02}r\xff\xff\xff\xff.",
    "expanded": lambda: torch_file(statistics(tensor_of(torch.ones(1), (10**12,), (0,)))),
    "expanded, in the old format": lambda: torch_file(
        statistics(tensor_of(torch.ones(1), (10**12,), (0,))), _use_new_zipfile_serialization=False
    ),
    "expanded in two dimensions": lambda: torch_file(statistics(tensor_of(torch.ones(1), (2**40, 2**40), (0, 0)))),
    "sizes without end": lambda: torch_file(statistics(tensor_of(torch.ones(1), (2**70,) * 3, (0, 0, 0)))),
    "beyond its storage": lambda: torch_file(statistics(tensor_of(torch.ones(4), (3,), (1,), 2))),
    "far beyond": lambda: torch_file(statistics(tensor_of(torch.ones(4), (3,), (2**50,)))),
    "negative": lambda: torch_file(statistics(tensor_of(torch.ones(4), (3,), (-1,), 3))),
    "many expanded": lambda: torch_file(
        {f"{i}.{name}": tensor_of(ONE, (10**6,), (0,)) for i in range(100) for name in ("running_mean", "running_var")}
    ),
    "objects": lambda: b"\x80\x02(" + b"]" * 200_000 + b"l.",
    "sets": lambda: b"\x80\x04(" + b"\x8f" * 200_000 + b"l.",
    "marks": lambda: b"\x80\x02" + b"(" * 200_000 + b".",
    "memo": lambda: b"\x80\x04N" + b"\x94" * 200_000 + b".",
    "state dicts": lambda: b"\x80\x02](X\x0c\x00\x00\x00running_meanq\x00" + b"}h\x00Ns" * 20_000 + b"e.",
    "a long key": lambda: (
        b"\x80\x02}X"
        + struct.pack("<I", 10**6)
        + b"k" * 10**6
        + b"](X\x0c\x00\x00\x00running_meanq\x00"
        + b"}h\x00Ns" * 900
        + b"es."
    ),
    "array": lambda: pickle.dumps(statistics(np.zeros(3, "f4")), 2).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
}
ONE = torch.ones(1)


@pytest.mark.parametrize("what", list(HUGE))
def test_memory_is_bounded_whatever_a_file_declares(tmp_path, what, monkeypatch):
    monkeypatch.setattr(Budget, "LEAST", 8 << 20)  # a sooner end to what would take seconds
    path = tmp_path / "huge.pt"
    path.write_bytes(HUGE[what]())
    before = peak()
    said = attempt(path)
    assert isinstance(said, str)
    assert peak() - before <= Budget.LEAST + Budget.PER_BYTE * path.stat().st_size + (16 << 20)
    if what in ("expanded", "objects", "sets", "marks", "memo", "a long key", "many expanded", "array"):
        assert "declares more data than fits into it" in said or "of a storage that has" in said


def test_members_of_an_archive_that_lie_about_their_size(tmp_path):
    whole = torch_file(net().state_dict())
    path = tmp_path / "lying.pt"
    directory = whole.index(b"PK\x01\x02")
    rng = random.Random(2)
    for _ in range(80):
        lying = bytearray(whole)
        position = directory + rng.randrange(len(whole) - directory - 4)
        lying[position : position + 4] = struct.pack("<I", rng.choice((2**31, 2**32 - 1, 2**20, 0)))
        path.write_bytes(lying)
        before = peak()
        attempt(path)
        assert peak() - before <= Budget.LEAST + (16 << 20)


def test_a_storage_of_the_old_format_that_lies_about_its_size(tmp_path):
    whole = torch_file({"n.running_mean": torch.ones(3)}, _use_new_zipfile_serialization=False)
    path = tmp_path / "lying.pt"
    size = len(whole) - 12 - 8
    assert struct.unpack("<q", whole[size : size + 8]) == (3,)
    for declared in (2**62, -1, 4, -(2**63)):
        path.write_bytes(whole[:size] + struct.pack("<q", declared) + whole[size + 8 :])
        said = attempt(path)
        assert isinstance(said, str)
        assert "was cut off, or declares more bytes" in said


def test_ordinary_files_are_far_from_the_bound(tmp_path):
    """A file of half precision with hundreds of small layers, and a long history beside it."""
    layers = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(300))).half()
    history = [{"epoch": i, "loss": i / 7, "note": f"step {i}"} for i in range(5_000)]
    path = tmp_path / "ordinary.pt"
    path.write_bytes(torch_file({"history": history, "state_dict": layers.state_dict()}))
    from runningbn.inspection import formats

    with formats.loaded(path) as (checkpoint, budget):
        for name, value in checkpoint.contents["state_dict"].entries.items():
            assert checkpoint.tensor(value).read(budget).shape in ((2,), ()), name
        assert budget.spent < budget.limit / 3
