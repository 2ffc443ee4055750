# SPDX-License-Identifier: BSD-3-Clause
"""Files and folders are complete or not there: full disks, two writers, planted links, interrupted runs."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errors import raises
from forked import CTX
from full_disk import full_disk
from switchgear import files
from switchgear.files import DiskFull, Kind, Unfinished


class WriteError(OSError):
    pass


class Full(WriteError, DiskFull):
    pass


KIND = Kind("book", "path", "chapters", "title", WriteError, Full)


def opened(target: Path, resume: bool = True, identity: Any = "title") -> Any:
    return Unfinished.opened(KIND, target, identity, resume)


def write(target: Path, chapters: int, resume: bool = True) -> list[str]:
    """Writes chapters and fails, or all five; returns those that an earlier run had finished."""
    with opened(target, resume) as unfinished:
        found = sorted(unfinished.pieces)
        for number in range(5):
            if number == chapters:
                raise KeyError
            if str(number) not in unfinished.pieces:
                files.write_whole(unfinished.folder / str(number), "text")
                unfinished.add(str(number), {"words": 1})
        unfinished.commit()
        return found


# ---- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x" * 1000, torch.zeros(1000)], ids=["text", "tensor"])
def test_a_full_disk_leaves_the_file_as_it_was(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with full_disk(), pytest.raises(DiskFull) as error:
        (files.write_whole if isinstance(value, str) else files.save_whole)(path, value)
    assert error.value.filename == str(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.writing(path) as first:
        first.write(b"first")
        with files.writing(path) as second:
            second.write(b"second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("keep")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    files.unfinished_of(tmp_path / "file").symlink_to(mine)
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "file", "text")
    partial = tmp_path / "book.partial"
    partial.mkdir()
    (partial / "lock").symlink_to(mine)
    with pytest.raises(WriteError):
        write(tmp_path / "book", 1)
    assert mine.read_text() == "keep"


@pytest.mark.parametrize("link", ["", "journal.json", "0", "9"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_planted_link_in_a_folder_is_not_followed(resume: bool, link: str, tmp_path: Path) -> None:
    """The folder itself, the journal, a piece that is to be written, or any other."""
    mine, partial = tmp_path / "mine", tmp_path / "book.partial"
    mine.mkdir()
    (mine / "0").write_text("keep")
    with pytest.raises(KeyError):
        write(tmp_path / "book", 2)
    if link:
        (partial / link).unlink(missing_ok=True)
        (partial / link).symlink_to(mine / "0")
    else:
        partial.rename(tmp_path / "elsewhere")
        partial.symlink_to(mine)
    with raises(WriteError, "path"):
        write(tmp_path / "book", 5, resume)
    assert [(file.name, file.read_text()) for file in mine.iterdir()] == [("0", "keep")]


def save_often(path: Path, number: int, count: int) -> None:
    for _ in range(count):
        files.save_whole(path, torch.full((1000,), number))


def test_processes_that_save_to_one_path(tmp_path: Path) -> None:
    """None fails, every read is whole, and nothing is left."""
    path = tmp_path / "value"
    files.save_whole(path, torch.zeros(1000))
    writers = [CTX.Process(target=save_often, args=(path, number, 50)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert len(files.load_saved(path).unique()) == 1
        reads += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reads
    assert [file.name for file in tmp_path.iterdir()] == ["value"]


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 120)  # 240 bytes
    files.write_whole(path, "text")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---- files of others -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "device", "link"])
def endless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path that blocks a reader, or that a reader never comes to the end of."""
    path = tmp_path / "endless"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path if request.param != "device" else Path("/dev/zero")


@pytest.mark.parametrize("read", [files.read_json, files.load_saved], ids=lambda read: read.__name__)
def test_pipes_and_devices_are_not_read(read: Any, endless: Path) -> None:
    with raises(ValueError, "path"):
        read(endless)


def test_links_are_read_through(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "value.json", "[1]")
    files.save_whole(tmp_path / "value.pt", [1])
    (tmp_path / "link.json").symlink_to("value.json")
    (tmp_path / "link.pt").symlink_to(tmp_path / "value.pt")
    assert files.read_json(tmp_path / "link.json") == files.load_saved(tmp_path / "link.pt") == [1]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 10_000, "\0", '"\\ud8"', "\udcff"])
def test_what_is_not_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "value.json").write_bytes(text.encode(errors="surrogateescape"))
    with raises(ValueError):
        files.read_json(tmp_path / "value.json")
    with raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")


def test_long_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_JSON", 10)
    (tmp_path / "value.json").write_text(" " * 9 + "1")
    assert files.read_json(tmp_path / "value.json") == 1
    (tmp_path / "value.json").write_text(" " * 10 + "1")
    with raises(ValueError, "path"):
        files.read_json(tmp_path / "value.json")


def compressed(file: Any) -> None:
    whole = io.BytesIO()
    torch.save(torch.zeros(1 << 20), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def doubled(levels: int) -> Any:
    """A list that has 2^levels entries for whoever walks through it."""
    value: Any = []
    for _ in range(levels):
        value = [value, value]
    return value


ONE, MANY = torch.ones(1), torch.zeros(1000)
DESCRIBED: dict[str, Any] = {
    "a stride of 0": ONE.expand(10**8),
    "the same inside": {"layers": [(ONE.expand(1 << 20, 1 << 20),)]},
    "overlapping rows": torch.zeros(12000).as_strided((4000, 4000), (2, 1)),
    "many of one memory": [MANY[number % 9 :] for number in range(9999)],
    "one tensor many times": [MANY] * 9999,
    "a list that doubles": doubled(64),
    "a sparse tensor": torch.sparse_coo_tensor(MANY[None, :0].long(), MANY[:0], (10**12,), check_invariants=False),
    "a tensor on meta": torch.zeros(1 << 40, device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DESCRIBED, "compressed", "text", "another archive"])
def test_what_describes_more_than_it_holds(name: str, tmp_path: Path) -> None:
    path = tmp_path / "value.pt"
    with path.open("wb") as file:
        if name in DESCRIBED:
            torch.save(DESCRIBED[name], file)
        elif name == "compressed":
            compressed(file)
        else:
            file.write(b"root:x:0:0:root:/root:/bin/sh\n" if name == "text" else b"PK\3\4 no archive")
    with raises(ValueError, "path"):
        files.load_saved(path)


def test_what_torch_save_writes_is_loaded(tmp_path: Path) -> None:
    value = {
        "a": torch.arange(5),
        "b": [ONE, (torch.zeros(0), None, 1.5)],
        "c": torch.eye(4)[1:, :2],
        "d": nn.Parameter(ONE),
        "tied": [MANY, MANY],
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(value, tmp_path / "value.pt", **options)
        loaded = files.load_saved(tmp_path / "value.pt")
        assert all(torch.equal(loaded[name], value[name]) for name in "acd")
        assert loaded["b"][1][2] == 1.5


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "book"
    with pytest.raises(KeyError):
        write(target, 2)
    (tmp_path / "book.partial" / "2.unfinished").touch()  # by a run that was killed
    assert not target.exists()
    assert write(target, 5) == ["0", "1"]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["0", "1", "2", "3", "4", "book"]


def test_a_fresh_run_discards_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write(tmp_path / "book", 3)
    with pytest.raises(KeyError):
        write(tmp_path / "book", 1, resume=False)
    assert sorted(file.name for file in (tmp_path / "book.partial").iterdir()) == ["0", "journal.json", "lock"]


def test_nothing_stays_of_a_run_without_a_finished_piece(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write(tmp_path / "book", 0)
    with full_disk(10), raises(Full):
        write(tmp_path / "book", 5)
    assert not list(tmp_path.iterdir())


def test_finished_pieces_stay_if_the_disk_is_full(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write(tmp_path / "book", 3)
    with full_disk(10), pytest.raises(Full):
        write(tmp_path / "book", 5)
    assert write(tmp_path / "book", 5) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "journal", ["", "[]", "{}", '{"identity": "title", "chapters": 3}', '{"identity": "another", "chapters": {}}']
)
def test_a_journal_of_something_else_is_refused_and_kept(journal: str, tmp_path: Path) -> None:
    partial = tmp_path / "book.partial"
    partial.mkdir()
    (partial / "journal.json").write_text(journal)
    (partial / "0").write_text("mine")
    with raises(WriteError, "path"):
        write(tmp_path / "book", 5)
    assert (partial / "0").read_text() == "mine"
    assert (partial / "journal.json").read_text() == journal


def test_folders_inside_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "book.partial" / "thesis").mkdir(parents=True)
    (tmp_path / "book.partial" / "journal.json").write_text(json.dumps({"identity": "title", "chapters": {}}))
    with pytest.raises(KeyError):
        write(tmp_path / "book", 0)
    assert [file.name for file in (tmp_path / "book.partial").iterdir()] == ["thesis"]
