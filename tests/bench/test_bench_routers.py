# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench routers` compares equal routings and reports so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from switchgear import plan
from switchgear.cli import main
from switchgear_bench import plain_routers, routers, timing
from switchgear_bench.router_policies import Policy, policies
from switchgear_bench.routers import same
from switchgear_bench.shapes import ROUTER_SHAPES, Shape

pytest.importorskip("rich", reason="rich is not installed")

SMALL = Shape(16, 8, 16, 4, "a small one")
DRAWS = plain_routers.Draws()
DRAWS.shared = True
POLICIES = {policy.name: policy for policy in policies(SMALL, 512, DRAWS)}
BLIND = ("random", "lookup by token id")  # these ignore the logits


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_those_of_plain_torch(name: str) -> None:
    policy = POLICIES[name]
    logits = torch.randn(512, SMALL.num_experts) + 3 * torch.randn(SMALL.num_experts)
    DRAWS.generator.manual_seed(3)
    ours = policy.ours(logits)
    DRAWS.generator.manual_seed(3)
    theirs = policy.plain(logits)
    assert same(ours, theirs, SMALL.num_experts)
    if name not in BLIND:
        DRAWS.generator.manual_seed(3)
        assert not same(ours, policy.plain(logits.roll(1, 0)), SMALL.num_experts)
    other_weights = theirs[0], theirs[1] * 1.01
    assert not same(ours, other_weights, SMALL.num_experts)


def test_plain_plan() -> None:
    ids = torch.randint(-1, 7, (40, 3), dtype=torch.int32)
    offsets, tokens, slots = plain_routers.plan(ids, 7)
    wanted = plan(ids, 7)
    used = int(offsets[-1])
    assert torch.equal(offsets, wanted.expert_offsets.long())
    assert torch.equal(tokens[:used], wanted.token_indices[:used].long())
    assert torch.equal(slots, wanted.slot_indices.long())


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(ROUTER_SHAPES, "olmoe", SMALL)
    monkeypatch.setattr(routers, "TOKENS", 512)
    monkeypatch.setattr(routers, "SECONDS", 0.0)
    monkeypatch.setattr(routers, "TRIES", 1)
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-9)
    monkeypatch.setattr(routers, "MOST_BYTES", 3 * 16 * 8 * 16)  # a slice of the layer
    page, file = tmp_path / "routers.md", tmp_path / "routers.json"
    page.write_text("# Costs\n\n<!-- bench:routers -->\nold\n<!-- /bench:routers -->\n\nThe end.\n")
    arguments = ["bench", "routers", "--shapes", "olmoe", "--threads", "1", "--markdown", str(page)]
    assert main([*arguments, "--json", str(file)]) == 0
    assert "balanced assignment" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(
        "# Costs\n\n<!-- bench:routers -->\n- olmoe: H = 16, I = 8, E = 16, K = 4, T = 512; the layer takes"
    )
    assert text.endswith("<!-- /bench:routers -->\n\nThe end.\n")
    assert "of the 16 experts take for" in text
    assert all(f"\n| {name} " in text for name in POLICIES)

    (measured,) = json.loads(file.read_text())["shapes"]
    assert measured["parts"] * measured["timed_tokens"] == 512
    again = tmp_path / "again.md"
    assert main(["bench", "routers", "--from", str(file), "--markdown", str(again)]) == 0
    assert again.read_text() in text

    wrong = Policy("wrong", POLICIES["top-k"].ours, POLICIES["rank-k"].plain)
    monkeypatch.setattr(routers, "policies", lambda *_: [wrong])
    assert main(arguments) == 1
    assert "| not equal |" in page.read_text()


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"schema": "switchgear-bench/2"}')
    assert main(["bench", "routers", "--from", str(file)]) == 2
    assert "--from: expected a file of switchgear-bench-routers/1" in capsys.readouterr().err


def test_unknown_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "routers", "--shapes", "mixtral"]) == 2
    assert "--shapes: expected a list of olmoe, deepseek-v3" in capsys.readouterr().err
