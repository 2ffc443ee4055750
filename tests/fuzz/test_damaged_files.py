# SPDX-License-Identifier: BSD-3-Clause
"""A short run of the program, and what it reports for readers that are broken."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import damaged_files
import pytest
import torch
from file_formats import FORMATS, Tensors, read_trace

from full_disk import full_disk
from switchgear.files import DiskFull

pytest.importorskip("transformers", reason="transformers is not installed")


def test_damaged_files() -> None:
    assert [fault for number in range(6 * len(FORMATS)) if (fault := damaged_files.check(1, number))] == []


def test_a_case_depends_on_the_seed_and_its_number() -> None:
    titles = [damaged_files.title(seed, 11) for seed in range(20)]
    assert titles[7] == damaged_files.title(7, 11)
    assert len(set(titles)) > 5


@pytest.mark.parametrize("name", FORMATS)
def test_links_are_read_through(name: str, tmp_path: Path) -> None:
    """As the Hub's cache keeps files."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    FORMATS[name].write(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert damaged_files.judge(FORMATS[name], folder) is None


@pytest.fixture
def five_seconds() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("the reader waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


OPTIONAL = ("generation_config.json", "model.safetensors.index.json")
OURS = [name for name in FORMATS if not name.startswith("stored ")]  # the others are read by safetensors alone


@pytest.mark.parametrize("name", OURS)
def test_what_is_no_file_is_refused(name: str, tmp_path: Path, five_seconds: None) -> None:
    FORMATS[name].write(tmp_path)
    instead: list[Callable[[Path], None]] = [os.mkfifo, Path.mkdir, lambda file: file.symlink_to("/dev/zero")]
    for file in [file for file in sorted(tmp_path.iterdir()) if file.name not in OPTIONAL]:
        file.rename(tmp_path / "aside")
        for make in instead:
            make(file)
            with pytest.raises((Exception,)) as error:
                FORMATS[name].read(tmp_path)
            assert FORMATS[name].is_documented(error.value) or isinstance(error.value, OSError), error.value
            file.rmdir() if file.is_dir() else file.unlink()
        (tmp_path / "aside").rename(file)


@pytest.mark.parametrize("name", ["parallel", "peft, experts", "selected experts", "trace"])
def test_a_full_disk_leaves_files_as_they_were(name: str, tmp_path: Path) -> None:
    FORMATS[name].write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for size in (10, 1500):
        with full_disk(size), pytest.raises(DiskFull) as error:
            FORMATS[name].write(tmp_path)
        assert str(tmp_path) in str(error.value.filename)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def that_raises_another_error(folder: Path) -> Tensors:
    raise KeyError("expected")


def that_raises_beside_exceptions(folder: Path) -> Tensors:
    raise GeneratorExit("expected")


def that_explains_nothing(folder: Path) -> Tensors:
    raise ValueError("invalid")


def that_leaves_out_a_tensor(folder: Path) -> Tensors:
    return dict(list(read_trace(folder).items())[1:])


def that_rounds(folder: Path) -> Tensors:
    return {key: tensor * (1 + 2**-50) if tensor.is_floating_point() else tensor
            for key, tensor in read_trace(folder).items()}  # fmt: skip


def that_widens(folder: Path) -> Tensors:
    return {key: tensor.double() for key, tensor in read_trace(folder).items()}


BROKEN: dict[Callable[[Path], Tensors], str] = {
    that_raises_another_error: "raises KeyError",
    that_raises_beside_exceptions: "raises GeneratorExit",
    that_explains_nothing: "raises ValueError: invalid",
    that_leaves_out_a_tensor: "gives other tensors",
    that_rounds: "gives other numbers in",
    that_widens: "as torch.float64",
}


@pytest.mark.parametrize("reader", BROKEN, ids=lambda reader: reader.__name__)
def test_faults(reader: Callable[[Path], Tensors], tmp_path: Path) -> None:
    format = FORMATS["trace"]
    format.write(tmp_path)
    assert damaged_files.judge(format, tmp_path) is None
    assert BROKEN[reader] in str(damaged_files.judge(format._replace(read=reader), tmp_path))


def test_a_file_that_only_the_reader_accepts(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"")
    format = FORMATS["trace"]._replace(read=lambda folder: {"": torch.zeros(1)})
    assert "but the plain reader raises" in str(damaged_files.judge(format, tmp_path))
