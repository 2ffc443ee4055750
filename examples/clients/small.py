# SPDX-License-Identifier: BSD-3-Clause
"""What the recipes share: a small Qwen3-MoE with random weights, text as bytes, and the time of a call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

LENGTH = 256
CONFIG = {
    **{"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256},
    **{"num_hidden_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512},
    **{"bos_token_id": None, "eos_token_id": None},
}


def model(
    experts_implementation: str, dtype: torch.dtype = torch.float32, changes: Mapping[str, int] = {}
) -> Qwen3MoeForCausalLM:
    """The same weights for each implementation."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**CONFIG | changes, experts_implementation=experts_implementation)
    return Qwen3MoeForCausalLM(config).to(dtype)


def pieces() -> list[dict[str, torch.Tensor]]:
    """Pieces of LENGTH bytes of the Python files of this folder."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    tokens = torch.tensor(list(text * (1 + 64 * LENGTH // len(text)))[: 64 * LENGTH]).view(64, LENGTH)
    return [{"input_ids": row, "labels": row} for row in tokens]


def compare(client: str, run: Callable[[str], float], tolerance: float, default: str = "grouped_mm") -> None:
    """Runs a recipe with transformers' experts and with ours, in turns, and prints a row: for each the time of the
    faster of two turns and the result, such as the last loss. The results may differ by `tolerance`."""
    seconds, results = {default: math.inf, "switchgear": math.inf}, {}
    for name in (default, "switchgear") * 2:
        begin = time.perf_counter()
        results[name] = run(name)
        seconds[name] = min(seconds[name], time.perf_counter() - begin)
    (theirs, ours), (wanted, got) = seconds.values(), results.values()
    if not abs(wanted - got) <= tolerance:
        raise AssertionError(f"{client}: {default} gives {wanted}, switchgear {got}")
    print(f"| {client} | {theirs:.1f} s | {ours:.1f} s | {theirs / ours:.2f}x | {wanted:.4f}, {got:.4f} |")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, latin-1."""
    vocabulary = {chr(byte): byte for byte in range(256)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0)))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=chr(0), eos_token=chr(0), bos_token=chr(1))
