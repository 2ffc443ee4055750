# SPDX-License-Identifier: BSD-3-Clause
"""GGUF files: what is read equals what was written, bytes are kept, and damaged files are refused by name. tests/fuzz/
has random damages."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from errors import raises
from fuzz.file_formats import gguf_pieces
from switchgear.cli import main
from switchgear.integrations.gguf_file import Array, GgufTensor, Value, read_gguf, write_gguf
from switchgear.reference import gguf

VALUES = {
    "general.architecture": Value("string", "olmoe"),
    "a.number": Value("uint64", 2**64 - 1),
    "a.float": Value("float64", 0.1),
    "a.bytes": Value("string", "\udcff no UTF-8"),
    "a.words": Value("array", Array("string", ["one", "", "\N{GREEK SMALL LETTER ALPHA}"])),
    "a.floats": Value("array", Array("float32", torch.tensor([0.5, -1.0]))),
    "a.lists": Value("array", Array("array", [Array("bool", torch.tensor([True])), Array("string", [])])),
}


def tensors() -> dict[str, GgufTensor]:
    torch.manual_seed(0)
    made = {
        "norm": GgufTensor("f32", (5,), torch.randn(5)),
        "router": GgufTensor("bf16", (3, 5), torch.randn(3, 5).bfloat16()),
        "scalar": GgufTensor("i32", (), torch.tensor(7, dtype=torch.int32)),
    }
    for name, kind in gguf.TYPES.items():
        shape = (2, 3, 2 * kind.columns)
        made[name] = GgufTensor(name, shape, torch.randint(0, 256, (2, 3, 2 * kind.bytes), dtype=torch.uint8))
    return made


def test_what_is_read_was_written_and_is_written_again(tmp_path: Path) -> None:
    made = tensors()
    write_gguf(tmp_path / "a.gguf", VALUES, made)
    file = read_gguf(tmp_path / "a.gguf")
    assert list(file.metadata) == list(VALUES)
    assert file.get("a.words") == ["one", "", "\N{GREEK SMALL LETTER ALPHA}"]
    assert file.get("a.lists") == [[True], []]
    assert file.get("a.number") == 2**64 - 1
    assert file.get("absent", 3) == 3
    assert list(file.tensors) == list(made)
    for name, tensor in file.tensors.items():
        assert tensor[:2] == made[name][:2]
        assert torch.equal(tensor.data, made[name].data)
    write_gguf(tmp_path / "b.gguf", file.metadata, file.tensors)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_tensors_are_views_of_one_map_that_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, VALUES | {"general.alignment": Value("uint32", 4096)}, tensors())
    before, file = path.read_bytes(), read_gguf(path)
    assert len({tensor.data.untyped_storage().data_ptr() for tensor in file.tensors.values()}) == 1
    assert all(tensor.data.data_ptr() % 4096 == 0 for tensor in file.tensors.values())
    file.tensors["norm"].data.zero_()
    assert path.read_bytes() == before


def write_split(folder: Path, count: int = 3, **changes: Value) -> list[Path]:
    paths = [folder / f"m-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    made = list(tensors().items())
    for number, path in enumerate(paths):
        keys = {"split.no": Value("uint16", number), "split.count": Value("uint16", count)} | changes
        keys["split.tensors.count"] = Value("int32", len(made))
        write_gguf(path, keys | (VALUES if number == 0 else {}), dict(made[number::count]))
    return paths


def test_split_files(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    made = tensors()
    for path in paths:
        file = read_gguf(path)
        assert file.path == paths[0]
        assert file.get("general.architecture") == "olmoe"
        assert file.tensors.keys() == made.keys()
        assert all(torch.equal(tensor.data, made[name].data) for name, tensor in file.tensors.items())
    paths[1].unlink()
    with raises(FileNotFoundError, paths[1].name):
        read_gguf(paths[0])


@pytest.mark.parametrize("key", ["split.no", "split.count"])
@pytest.mark.parametrize("value", [Value("uint16", 7), Value("string", "x")])
def test_split_files_that_do_not_belong_together(tmp_path: Path, key: str, value: Value) -> None:
    paths = write_split(tmp_path, **{key: value})
    with raises(ValueError, key):
        read_gguf(paths[0])


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with raises(ValueError, "split.no"):
        read_gguf(paths[0])
    write_gguf(paths[2], {}, {"norm": tensors()["norm"]})
    with raises(ValueError, "norm"):
        read_gguf(paths[0])


def replaced(old: bytes, new: bytes) -> Callable[[list[bytes]], None]:
    def change(pieces: list[bytes]) -> None:
        pieces[pieces.index(old)] = new

    return change


def after(name: bytes, places: int, number: int, code: str = "Q") -> Callable[[list[bytes]], None]:
    """Replaces the number that is so many pieces after a name."""

    def change(pieces: list[bytes]) -> None:
        pieces[pieces.index(name) + places] = struct.pack("<" + code, number)

    return change


DAMAGES = {
    "magic": (replaced(b"GGUF", b"GGML"), "header"),
    "version 1": (replaced(struct.pack("<I", 3), struct.pack("<I", 1)), "version"),
    "big-endian": (replaced(struct.pack("<I", 3), struct.pack(">I", 3)), "big-endian"),
    "billions of tensors": (after(b"GGUF", 2, 1 << 40), "tensors"),
    "billions of keys": (after(b"GGUF", 3, 1 << 62), "metadata"),
    "a string without end": (after(b"a.text", 2, 1 << 63), "a.text"),
    "an array without end": (after(b"a.numbers", 3, (1 << 62) + 1), "a.numbers"),
    "an unknown type": (after(b"a.bool", 1, 13, "I"), "a.bool"),
    "a bool of 2": (after(b"a.bool", 2, 2, "B"), "a.bool"),
    "a key twice": (replaced(b"a.text", b"a.bool"), "a.bool"),
    "an odd alignment": (after(b"general.alignment", 2, 24, "I"), "general.alignment"),
    "many dimensions": (after(b"f32", 1, 1 << 31, "I"), "f32"),
    "sizes that overflow": (after(b"f32", 2, 1 << 63), "f32"),
    "no size": (after(b"f32", 3, 0), "f32"),
    "half a block": (after(b"q4_k", 2, 128), "q4_k"),
    "an unknown type of numbers": (after(b"i8", 2, 4, "I"), "i8"),
    "an unaligned tensor": (after(b"q4_k", 6, 68), "q4_k"),
    "overlapping tensors": (after(b"q4_k", 6, 32), "q4_k"),
    "a tensor past the end": (after(b"i8", 3, 1 << 62), "i8"),
    "a tensor twice": (replaced(b"q8_0", b"q4_k"), "q4_k"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_named(tmp_path: Path, damage: str) -> None:
    change, name = DAMAGES[damage]
    path, pieces = tmp_path / "x.gguf", gguf_pieces()
    change(pieces)
    path.write_bytes(b"".join(pieces))
    with raises(ValueError, name) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_arrays_in_arrays_have_an_end(tmp_path: Path) -> None:
    nested = Array("uint8", torch.zeros(1, dtype=torch.uint8))
    for _ in range(100):
        nested = Array("array", [nested])
    write_gguf(tmp_path / "x.gguf", {"deep": Value("array", nested)}, {})
    with raises(ValueError, "deep"):
        read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("value", [Value("uint8", 256), Value("float16", 0.5), Value("int32", "x")])
def test_values_that_a_file_cannot_hold(tmp_path: Path, value: Value) -> None:
    with raises(ValueError, "metadata"):
        write_gguf(tmp_path / "x.gguf", {"a.key": value}, {})
    assert not (tmp_path / "x.gguf").exists()


BAD_TENSORS = {
    "type": GgufTensor("q3_0", (32,), torch.zeros(18, dtype=torch.uint8)),
    "columns": GgufTensor("q4_0", (33,), torch.zeros(18, dtype=torch.uint8)),
    "bytes": GgufTensor("q4_0", (32,), torch.zeros(17, dtype=torch.uint8)),
    "dtype": GgufTensor("f16", (32,), torch.zeros(32)),
    "dimensions": GgufTensor("f32", (1,) * 5, torch.zeros((1,) * 5)),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_a_file_cannot_hold(tmp_path: Path, case: str) -> None:
    with raises(ValueError, "tensors"):
        write_gguf(tmp_path / "x.gguf", {}, {"w": BAD_TENSORS[case]})


def test_inspect_prints_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"\x1b[2J": Value("string", "\x1b]0;x\x07")}
    write_gguf(tmp_path / "x.gguf", VALUES | hostile, tensors())
    assert main(["inspect", str(tmp_path / "x.gguf")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "'olmoe'" in out
    assert "2x3x512" in out
    assert "4.50" in out  # bits of a number in q4_k
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert main(["inspect", str(tmp_path / "x.gguf")]) == 2


def test_files_of_gguf_py(tmp_path: Path) -> None:
    """The package that llama.cpp's converter writes with, and reads back."""
    theirs = pytest.importorskip("gguf", reason="gguf is not installed")
    path = tmp_path / "x.gguf"
    writer = theirs.GGUFWriter(str(path), "olmoe")
    writer.add_array("tokens", ["a", "b"])
    writer.add_float32("eps", 1e-5)
    made = tensors()
    for name, kind in gguf.TYPES.items():
        writer.add_tensor(name, made[name].data.numpy(), raw_dtype=theirs.GGMLQuantizationType(kind.ggml))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.get("tokens") == ["a", "b"]
    for name in gguf.TYPES:
        assert file.tensors[name].shape == made[name].shape
        assert torch.equal(file.tensors[name].data, made[name].data)
    write_gguf(tmp_path / "y.gguf", file.metadata, file.tensors)
    assert (tmp_path / "y.gguf").read_bytes() == path.read_bytes()
