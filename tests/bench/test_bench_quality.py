# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench quality` (LibMoE, row 37): a router swap changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from switchgear.cli import main
from switchgear_bench import quality
from switchgear_bench.tiny.text import Domain


@pytest.mark.parametrize("router", quality.ROUTERS)
@pytest.mark.some(2)
def test_row37_a_router_swap_changes_nothing_else(router: str) -> None:
    base, other = quality.build("SMoE", 3), quality.build(router, 3)
    mine, theirs = (
        {name: value for name, value in model.state_dict().items() if ".gate." not in name} for model in (base, other)
    )
    assert mine.keys() == theirs.keys()
    assert len(mine) == 4 + 6 * quality.LAYERS
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("router", quality.ROUTERS)
@pytest.mark.some(2)
def test_row37_every_router_trains_and_equals_the_sum_over_its_experts(router: str) -> None:
    torch.manual_seed(0)
    moe = quality.layer(router)
    x = torch.randn(12, quality.HIDDEN, requires_grad=True)
    y = moe(x)
    routing = moe.gate(x)
    gate_up, down = moe.experts.gate_up_proj.double(), moe.experts.down_proj.double()
    want = torch.zeros(12, quality.HIDDEN, dtype=torch.float64)
    for token in range(12):
        for expert, weight in zip(routing.topk_ids[token].tolist(), routing.topk_weights[token].double(), strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            want[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    assert torch.allclose(y.double(), want, atol=1e-5)
    torch.autograd.backward(y.square().sum())
    assert x.grad is not None
    trained = [parameter for parameter in moe.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)


def test_row37_tables_follow_from_the_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = torch.randint(256, (4, 2, 2048), dtype=torch.uint8)
    domains = [Domain(name, "of the test", *rows) for name, rows in zip("abcd", text, strict=True)]
    monkeypatch.setattr(quality, "load_domains", lambda: domains)
    results = tmp_path / "quality.json"
    assert main(["bench", "quality", "--quick", "--json", str(results)]) == 0
    assert "HyperRouter" in capsys.readouterr().out
    found = json.loads(results.read_text())
    assert [row["router"] for row in found["results"]] == list(quality.ROUTERS)
    rows = [{"router": "a", "losses": [1.0, 1.1, 1.2]}, {"router": "b", "losses": [1.1, 1.2, 1.3]}]
    assert quality.verdict({"results": rows}) == (
        "a and b are 0.100 nat apart, within twice the deviation of seeds (0.100).\n"
    )
    rows[1]["losses"] = [1.6, 1.7, 1.8]
    assert "beyond" in quality.verdict({"results": rows})


def test_row37_the_document_has_the_table_of_the_results() -> None:
    from switchgear_bench.report import fill_blocks
    from switchgear_bench.results import read_json

    root = Path(__file__).parents[2]
    results = read_json(str(root / "bench" / "results" / "quality-avx512bf16.json"), "--from", quality.SCHEMA)
    text = (root / "docs" / "benchmarks.md").read_text()
    assert "| X-MoE |" in text
    assert fill_blocks(text, {"quality": lambda: quality.markdown(results)}) == text
