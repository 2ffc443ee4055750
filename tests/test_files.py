# SPDX-License-Identifier: BSD-3-Clause
"""Files and folders are complete or not there: full disks, two writers, planted links, interrupted runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import raises
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


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 120)  # 240 bytes
    files.write_whole(path, "text")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


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
