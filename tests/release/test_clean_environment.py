# SPDX-License-Identifier: BSD-3-Clause
"""The wheel that is tried is the one in the folder."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import clean_environment
import pytest

import switchgear


def test_the_index_is_asked_for_torch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def note(words: list[str], **_: Any) -> None:
        commands.append(words)

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setattr("sys.argv", ["clean_environment.py", str(tmp_path), "--torch", "2.8"])
    assert clean_environment.main() == 0
    installed = [words for words in commands if "install" in words]
    assert [words[-1] for words in installed if "--no-index" not in words] == ["torch==2.8.*"]
    (ours,) = (words for words in installed if "--no-index" in words)
    assert ours[ours.index("--find-links") + 1] == str(tmp_path)
    assert ours[-1] == f"switchgear=={switchgear.__version__}"
