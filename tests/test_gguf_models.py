# SPDX-License-Identifier: BSD-3-Clause
"""Models out of GGUF files, and back: values, bytes, and files that do not hold a whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from errors import raises
from switchgear.integrations.gguf import ARCHITECTURES
from switchgear.integrations.gguf_file import Array, GgufFile, GgufTensor, Value, read_gguf, write_gguf
from switchgear.layers import StoredEmbedding, StoredLinear
from switchgear.weights import stored_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = dict(
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
    intermediate_size=256, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts_per_tok=2,
    max_position_embeddings=128, initializer_range=0.05,
)  # fmt: skip
OWN = {
    "qwen3moe": dict(head_dim=32, num_experts=4, norm_topk_prob=True),
    "llama": dict(num_local_experts=4),
    "granitemoe": dict(
        num_local_experts=4, embedding_multiplier=2.0, attention_multiplier=0.1, logits_scaling=0.5,
        residual_multiplier=0.25, tie_word_embeddings=True,
    ),
}  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 7 % 96
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    fields = {**SIZES, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    fields |= OWN.get(name, {"num_experts": 4})
    config = transformers.AutoConfig.for_model(ARCHITECTURES[name].model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    switchgear.accelerate(model)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@architectures
def test_a_plain_file_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    switchgear.save_gguf(model, tmp_path / "a.gguf", "f32")
    loaded = switchgear.load_gguf(tmp_path / "a.gguf")
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert torch.equal(logits_of(loaded), logits_of(model))


@architectures
@pytest.mark.parametrize("type", ["q8_0", "q4_k_m"])
def test_stored_weights_are_those_of_the_file(name: str, type: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    switchgear.save_gguf(make_model(name), path, type)
    model = switchgear.load_gguf(path)
    for part in model.modules():
        assert not isinstance(part, torch.nn.Linear) or isinstance(part, StoredLinear) or part.out_features == 1
        assert not isinstance(part, torch.nn.Embedding) or isinstance(part, StoredEmbedding)
    plain = copy.deepcopy(model)
    with pytest.warns(RuntimeWarning, match="rounded"):
        switchgear.restore(plain)
    wanted = logits_of(plain)
    assert distance(logits_of(model), wanted) < 0.02  # a product may round activations to 8 bits
    switchgear.save_gguf(model, tmp_path / "b.gguf", like=path)
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()
    switchgear.accelerate(model, whole_layers=True)
    assert distance(logits_of(model), wanted) < 0.02
