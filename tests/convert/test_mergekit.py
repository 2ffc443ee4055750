# SPDX-License-Identifier: BSD-3-Clause
"""Beside mergekit, where it is installed: the same tensors but for routers, and the same merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mergekit", reason="mergekit is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from mergekit.merge_methods.generalized_task_arithmetic import get_mask  # noqa: E402
from mergekit.moe.config import MoEMergeConfig  # noqa: E402
from mergekit.moe.mixtral import MixtralMoE  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from mergekit.sparsify import magnitude  # noqa: E402

from switchgear import convert  # noqa: E402


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """A base and three models."""
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, head_dim=8, sliding_window=None,
    )  # fmt: skip
    for seed in range(4):
        torch.manual_seed(seed)
        transformers.MistralForCausalLM(config).save_pretrained(tmp_path / f"{seed}")
    return [tmp_path / f"{seed}" for seed in range(4)]


def state(path: Path) -> dict[str, Tensor]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path)
    return dict(model.state_dict())


def test_row58_mergekit_moe_has_the_same_tensors(paths: list[Path], tmp_path: Path) -> None:
    experts = [{"source_model": str(path), "positive_prompts": ["a"]} for path in paths[1:]]
    recipe = {"base_model": str(paths[0]), "gate_mode": "random", "dtype": "float32", "experts": experts}
    config = MoEMergeConfig.model_validate(recipe)
    MixtralMoE().write_model(str(tmp_path / "theirs"), config, MergeOptions(), list(torch.randn(2, 3, 32)))
    convert.run({"operation": "experts", "merge": "base", "base": str(paths[0])}, paths[1:], tmp_path / "ours")
    ours, theirs = state(tmp_path / "ours"), state(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if not torch.equal(ours[key], theirs[key])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }


@pytest.mark.parametrize("shares", [[1.0, 2.0, 1.0], [0.3, -0.7, 1.1], [1.0, -1.0, 1.0]])
def test_row61_mergekit_ties_has_the_same_bits(paths: list[Path], shares: list[float]) -> None:
    base, *models = [state(path) for path in paths]
    ours = convert.merge_models(models, "ties", base=base, density=0.3, weights=shares)
    for key, origin in base.items():
        deltas = torch.stack([magnitude(model[key] - origin, 0.3) for model in models])
        weights = torch.tensor(shares).view(-1, *[1] * origin.dim())
        mask = get_mask(deltas * weights)
        divisor = (weights * mask).sum(0)
        divisor[divisor == 0] = 1
        assert torch.equal(ours[key], origin + (deltas * weights * mask).sum(0) / divisor)
