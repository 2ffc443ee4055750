# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench serve`: which answers are counted as wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("switchgear_bench", reason="switchgear_bench is not installed")

from switchgear_bench import serve


def test_mixed_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one server of two, when more than one client asks."""

    def ask(port: str, model: str, questions: list[str], clients: int, tokens: int) -> Any:
        texts = questions[::-1] if clients > 1 and port == "switchgear" else questions
        return [serve.Answer(text, 0.5, 2.0) for text in texts], 4.0 / clients

    monkeypatch.setattr(serve, "SERVERS", {name: serve.SERVERS[name] for name in ("transformers", "switchgear")})
    monkeypatch.setattr(serve, "Child", lambda name, *_: SimpleNamespace(receive=lambda: name, close=lambda: None))
    monkeypatch.setattr(serve, "ask", ask)
    monkeypatch.setattr(serve, "write_checkpoint", lambda name, folder: None)
    monkeypatch.setattr(serve, "wait_for_quiet", lambda longest: None)
    rows = serve.measure("tiny", (1, 2), 4, 8, 3, 1)["results"]
    assert {(row["server"], row["clients"]): (row["wrong"], row["answers"]) for row in rows} == {
        ("transformers", 1): (0, 12),
        ("switchgear", 1): (0, 12),
        ("transformers", 2): (0, 12),
        ("switchgear", 2): (12, 12),
    }
    assert [row["tokens_per_second"] for row in rows] == [8.0, 8.0, 16.0, 16.0]
