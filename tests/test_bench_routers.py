# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench --routers` compares like with like, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from switchgear import plan
from switchgear.cli import bench_routers, main, plain_routers
from switchgear.cli.bench_routers import Policy, policies, same
from switchgear.cli.shapes import ROUTER_SHAPES, Shape

pytest.importorskip("rich", reason="rich is not installed")

SMALL = Shape(16, 8, 16, 4, "a small one")
POLICIES = {policy.name: policy for policy in policies(SMALL)}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_those_of_plain_torch(name: str) -> None:
    policy = POLICIES[name]
    logits = torch.randn(512, SMALL.num_experts)
    ours, theirs = policy.ours(logits), policy.plain(logits)
    assert same(ours, theirs, SMALL.num_experts)
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
    monkeypatch.setattr(bench_routers, "TOKENS", 512)
    monkeypatch.setattr(bench_routers, "SECONDS", 0.0)
    monkeypatch.setattr(bench_routers, "MOST_BYTES", 3 * 16 * 8 * 16)  # a slice of the layer
    path = tmp_path / "routers.md"
    arguments = ["bench", "--routers", "--shapes", "olmoe", "--threads", "1", "--markdown", str(path)]
    assert main(arguments) == 0
    assert "balanced assignment" in capsys.readouterr().out
    table = path.read_text()
    assert table.startswith("olmoe: E = 16, K = 4, T = 512; the layer takes")
    assert all(f"| {name} |" in table for name in POLICIES)

    wrong = Policy("wrong", POLICIES["top-k"].ours, POLICIES["rank-k"].plain)
    monkeypatch.setattr(bench_routers, "policies", lambda shape: [wrong])
    assert main(arguments) == 1
    assert "| NO |" in path.read_text()


def test_unknown_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--routers", "--shapes", "mixtral"]) == 2
    assert "--shapes: expected a list of olmoe, deepseek-v3" in capsys.readouterr().err
