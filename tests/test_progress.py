# SPDX-License-Identifier: BSD-3-Clause
"""Loops that take long show a bar on terminals alone."""

from __future__ import annotations

import io
import itertools
import sys

import pytest

from switchgear.utils.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_after_seconds_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    clock, shown = itertools.count(step=2), {}
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(show_progress(range(9), "storing")) == [*range(9)]
        shown[stream.isatty()] = stream.getvalue()
    assert "storing" in shown[True]
    assert not shown[False]


def test_without_tqdm_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(show_progress(range(9), "storing")) == [*range(9)]
