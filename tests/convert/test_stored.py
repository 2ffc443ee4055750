# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints that are stored tensor by tensor, against models that are stored in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import switchgear
from errors import raises
from switchgear.cli import main
from switchgear.convert import store_checkpoint
from switchgear.integrations.transformers import accelerate
from switchgear.weights import Int4
from tiny_models import build, example_inputs


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**example_inputs(model)).logits
    return result


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "source", tmp_path / "target"


@pytest.mark.parametrize("linears", [None, "int8"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "olmoe"])
def test_as_in_memory(model_type: str, linears: str | None, folders: tuple[Path, Path]) -> None:
    source, target = folders
    build(model_type).save_pretrained(source)
    seen: list[str] = []
    done = store_checkpoint(
        source, target, "int4", linears=linears, group_size=16, max_shard_size=50_000,
        progress=lambda done, total, name: seen.append(f"{done} {total}"),
    )  # fmt: skip
    assert seen == [f"{i} {len(seen)}" for i in range(1, len(seen) + 1)]
    assert len(list(target.glob("*.safetensors"))) > 1
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    accelerate(model)
    in_memory = switchgear.store(model, Int4(group_size=16), linears=linears)
    assert (done.experts, done.linears) == (in_memory.modules, in_memory.linears.modules if in_memory.linears else 0)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(target)), logits(model))
    assert list(folders[0].parent.iterdir()) in ([source, target], [target, source])


def test_dense_models(folders: tuple[Path, Path]) -> None:
    source, target = folders
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )).eval()  # fmt: skip
    model.save_pretrained(source)
    assert main(["store", str(source), "--linears", "nf4", "--skip", "o_proj", "--out", str(target)]) == 0
    switchgear.store(model, None, linears="nf4", skip=["o_proj"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(target)), logits(model))
    with raises(ValueError, "form"):
        store_checkpoint(source, source.with_name("other"), "int4")


def test_errors_leave_nothing(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, target = folders
    model = build("olmoe")
    model.model.layers[-1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(source)
    with raises(ValueError, "model.layers.3.self_attn.q_proj.weight"):
        store_checkpoint(source, target, "int8", linears="int8")
    with raises(ValueError, "form"):
        store_checkpoint(source, target, None)
    with raises(ValueError, "linears"):
        store_checkpoint(source, target, None, linears="int8", skip=["*"])
    assert main(["store", str(source), "--form", "int3", "--out", str(target)]) == 2
    assert "form" in capsys.readouterr().err
    assert list(source.parent.iterdir()) == [source]
    target.mkdir()
    with raises(ValueError, "target"):
        store_checkpoint(source, target, "int8")
