# SPDX-License-Identifier: BSD-3-Clause
"""The model of `switchgear bench offload` and its files: a Qwen3-MoE of random weights, larger than its memory.

Its text has the locality of a trained model. Token v is followed by v + 1, so greedy decoding never falls into a loop.
An embedding is the sum of a part of its topic, one of its own and one that all share, so that a router of random
weights prefers experts by topic, by token and always. TOPIC, SHARED and RUN are chosen so that a cache of LRU hits
about as often as on held-out text in the model of `switchgear train-tiny`, which has 16 experts and top_k 2 too: there
31, 37, 44 and 69 % with 2, 3, 4 and 8 slots; here 27, 37, 46 and 71 %.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import switchgear
from switchgear.cli.common import require
from switchgear.integrations.gguf import save_gguf

TOPIC, SHARED = 0.35, 0.1  # of the variance of an embedding; the rest is the token's own
TOPICS, RUN = 16, 4  # topics, and mean tokens until the next
SPREAD = 2.0  # standard deviation of router logits
HEAD_DIM = 64
CHECKPOINT, GGUF, STORE = "checkpoint", "model.gguf", "store"


class Spec(NamedTuple):
    """Sizes of the model."""

    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_layers: int = 8
    num_experts: int = 16
    top_k: int = 2
    vocab_size: int = 2048
    num_heads: int = 8
    num_kv_heads: int = 2

    @property
    def record_bytes(self) -> int:
        """Of an expert in bfloat16."""
        return 3 * self.hidden_size * self.intermediate_size * 2

    @property
    def expert_bytes(self) -> int:
        return self.num_layers * self.num_experts * self.record_bytes

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
            "hidden_size": self.hidden_size, "moe_intermediate_size": self.intermediate_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_layers,
            "num_experts": self.num_experts, "num_experts_per_tok": self.top_k, "vocab_size": self.vocab_size,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads, "head_dim": HEAD_DIM,
            "norm_topk_prob": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip


def write_checkpoint(spec: Spec, folder: Path) -> None:
    """A checkpoint of transformers, a shard per layer. Its experts are stacked, as the model has them in memory, so
    that everyone reads them where they are."""
    save_file = require("safetensors.torch").save_file
    path = folder / CHECKPOINT
    path.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, tensors in enumerate(_shards(spec)):
        name = f"model-{number:05d}.safetensors"
        save_file({key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, path / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    about = {"metadata": {}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(about))
    (path / "config.json").write_text(json.dumps(spec.config()))


def topics_of(spec: Spec, generator: torch.Generator) -> Tensor:
    """[vocab_size]: the topic of each token. The next token is of another topic once in RUN; topic t is 1/(t+1) times
    as likely."""
    drawn = torch.multinomial(1 / torch.arange(1.0, TOPICS + 1), spec.vocab_size, True, generator=generator)
    begins = torch.rand(spec.vocab_size, generator=generator) < 1 / RUN
    begins[0] = True
    return drawn[begins][begins.cumsum(0) - 1]


def _shards(spec: Spec) -> Iterable[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)

    hidden, wide, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * HEAD_DIM
    own = normal(spec.vocab_size, hidden).float()
    topic = normal(TOPICS, hidden).float()[topics_of(spec, generator)]
    embedding = TOPIC**0.5 * topic + SHARED**0.5 * normal(1, hidden).float() + (1 - TOPIC - SHARED) ** 0.5 * own
    yield {
        "model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": own.roll(1, 0) * hidden**-0.5,  # v + 1 follows v
    }  # fmt: skip
    ones = torch.ones
    for layer in range(spec.num_layers):
        at = f"model.layers.{layer}"
        # Outputs of a layer have about a tenth of the embedding's size: the router sees the text at each depth.
        yield {
            f"{at}.input_layernorm.weight": ones(hidden), f"{at}.post_attention_layernorm.weight": ones(hidden),
            f"{at}.self_attn.q_proj.weight": normal(heads, hidden, scale=hidden**-0.5),
            f"{at}.self_attn.k_proj.weight": normal(spec.num_kv_heads * HEAD_DIM, hidden, scale=hidden**-0.5),
            f"{at}.self_attn.v_proj.weight": normal(spec.num_kv_heads * HEAD_DIM, hidden, scale=hidden**-0.5),
            f"{at}.self_attn.o_proj.weight": normal(hidden, heads, scale=0.1 * heads**-0.5),
            f"{at}.self_attn.q_norm.weight": ones(HEAD_DIM), f"{at}.self_attn.k_norm.weight": ones(HEAD_DIM),
            f"{at}.mlp.gate.weight": normal(spec.num_experts, hidden, scale=SPREAD * hidden**-0.5),
            f"{at}.mlp.experts.gate_up_proj": normal(spec.num_experts, 2 * wide, hidden, scale=hidden**-0.5),
            f"{at}.mlp.experts.down_proj": normal(spec.num_experts, hidden, wide, scale=0.2 * wide**-0.5),
        }  # fmt: skip


def mapped_experts(folder: Path) -> dict[str, Tensor]:
    """The experts of the checkpoint by name, as pages of its files: nothing is read."""
    return {name: tensor for name, tensor in _mapped(folder).items() if ".experts." in name}


def _mapped(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files as views of mapped files. A file is the length of its header in 8
    bytes, the header, then the tensors."""
    found = {}
    for path in sorted((folder / CHECKPOINT).glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        for name, about in header.items():
            if name != "__metadata__":
                first, last = (8 + length + offset for offset in about["data_offsets"])
                found[name] = data[first:last].view(torch.bfloat16).view(about["shape"])
    return found


def write_llama(spec: Spec, folder: Path) -> None:
    """The same weights for llama.cpp."""
    transformers = require("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**spec.config()))
    model.load_state_dict(_mapped(folder), assign=True)
    switchgear.accelerate(model)
    save_gguf(model, folder / GGUF, "bf16")


def drop_pages(folder: Path) -> None:
    """Writes the folder's files to the disk and drops their pages, so that a run reads them from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
