# SPDX-License-Identifier: BSD-3-Clause
"""Whole models in llama.cpp: the weights of transformers as a GGUF file, and logits of its tokens.

Needs the packages `gguf` and `llama-cpp-python`. The files have no vocabulary: tokens are numbers.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .competitors import Skip, look_in_folder

_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def packages() -> tuple[Any, Any]:
    """gguf and llama_cpp. Raises Skip if one is missing."""
    look_in_folder()
    try:
        return importlib.import_module("gguf"), importlib.import_module("llama_cpp")
    except (ImportError, OSError) as error:
        raise Skip(str(error)) from None


def write_gguf(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], experts: str = "BF16",
               linears: str = "BF16") -> None:  # fmt: skip
    """Writes a model of bfloat16 weights: its config and state dict, of OLMoE or Qwen3-MoE.

    `experts` and `linears` are the types of weights, such as "BF16" or "Q4_0"; the embedding is BF16. Norms and routers
    are float32, as llama.cpp's own converter makes them.
    """
    gguf, _ = packages()
    heads, wide = config["num_attention_heads"], config.get("moe_intermediate_size", config["intermediate_size"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(path), config["model_type"].replace("_", ""))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(wide)
    writer.add_expert_feed_forward_length(wide)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("none")

    def add(name: str, tensor: Tensor, kind: str = "BF16") -> None:
        if tensor.dim() == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(f"{name}.weight", tensor.float().numpy())
            return
        data = tensor.contiguous().view(torch.uint8).numpy()
        if kind != "BF16":
            data = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd", tensors["model.embed_tokens.weight"])
    add("output_norm", tensors["model.norm.weight"])
    add("output", tensors["lm_head.weight"], linears)
    for layer in range(config["num_hidden_layers"]):
        at, block = f"model.layers.{layer}", f"blk.{layer}"
        for theirs, name in _NAMES.items():
            add(f"{block}.{name}", tensors[f"{at}.{theirs}.weight"], linears)
        gates, ups = tensors[f"{at}.mlp.experts.gate_up_proj"].chunk(2, 1)
        add(f"{block}.ffn_gate_exps", gates, experts)
        add(f"{block}.ffn_up_exps", ups, experts)
        add(f"{block}.ffn_down_exps", tensors[f"{at}.mlp.experts.down_proj"], experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A GGUF file, mapped, in llama.cpp on the CPU. length: of the longest text, in tokens.
    sequences: texts at once at most. adapter: a file of LoRA adapters."""

    def __init__(
        self, path: Path, vocab_size: int, length: int, threads: int, sequences: int = 1, adapter: Path | None = None
    ) -> None:
        _, self._library = packages()
        library, self._vocab_size = self._library, vocab_size
        library.llama_backend_init()
        self._silent = library.llama_log_callback(lambda *_: None)  # must live as long as the library
        library.llama_log_set(self._silent, None)
        options = library.llama_model_default_params()
        options.n_gpu_layers, options.use_mmap = 0, True
        model = library.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise RuntimeError("llama.cpp does not load the model")
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = length * sequences, length, sequences
        self._batch = library.llama_batch_init(sequences, 0, 1)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.llama_init_from_model(model, settings)
        if adapter is not None:
            made = library.llama_adapter_lora_init(model, str(adapter).encode())
            if not made:
                raise RuntimeError("llama.cpp does not load the adapter")
            pointers = (library.llama_adapter_lora_p_ctypes * 1)(made)
            library.llama_set_adapters_lora(self._context, pointers, 1, (ctypes.c_float * 1)(1.0))

    def step(self, ids: list[int], place: int | None = None) -> Tensor:
        """Token ids that follow those before -> logits [V] of the last one. place: of the ids, each of a text of its
        own; None: all are of one text."""
        library = self._library
        if place is None:
            array = (library.llama_token * len(ids))(*ids)  # which the batch points into
            batch = library.llama_batch_get_one(array, len(ids))
        else:
            batch = self._batch
            batch.n_tokens = len(ids)
            for text, token in enumerate(ids):
                batch.token[text], batch.pos[text], batch.logits[text] = token, place, 1
                batch.n_seq_id[text], batch.seq_id[text][0] = 1, text
        if library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp does not decode")
        logits = library.llama_get_logits_ith(self._context, -1)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return torch.frombuffer(values, dtype=torch.float32).clone()

    def forget(self) -> None:
        """Starts a new text."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
