# SPDX-License-Identifier: BSD-3-Clause
"""llama.cpp as a competitor of `bench --generate`: an OLMoE of transformers, written as a GGUF file and decoded.

It needs the packages `llama-cpp-python` and `gguf`. The file has no vocabulary: tokens are numbers.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .competitors import Skip, look_in_folder

# Names of a layer's tensors, here and in transformers. Vectors are float32 in GGUF.
TENSORS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip


def _package(name: str) -> Any:
    look_in_folder()
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise Skip(f"{name}: {error}") from None


def write_gguf(model: Any, path: Path, experts: str) -> None:
    """Writes an OlmoeForCausalLM; `experts`: the type of the experts' weights, such as "BF16" or "Q4_0"."""
    gguf = _package("gguf")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, value: Tensor, kind: str = "BF16") -> None:
        kind = "F32" if value.ndim == 1 else kind
        data = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd", state["model.embed_tokens.weight"])
    add("output_norm", state["model.norm.weight"])
    add("output", state["lm_head.weight"])
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        for name, theirs in TENSORS.items():
            add(f"blk.{i}.{name}", state[f"{prefix}.{theirs}.weight"])
        gate, up = state[f"{prefix}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        down = state[f"{prefix}.mlp.experts.down_proj"]
        for name, value in (("gate", gate), ("up", up), ("down", down)):
            add(f"blk.{i}.ffn_{name}_exps", value, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """The model in llama.cpp, on torch's number of threads."""

    def __init__(self, model: Any, folder: str, experts: str) -> None:
        self._library = library = _package("llama_cpp")
        path = Path(folder, f"{experts}.gguf")
        write_gguf(model, path, experts)
        self._vocabulary = model.config.vocab_size
        library.llama_backend_init()
        self._quiet = library.llama_log_callback(lambda *_: None)  # kept alive
        library.llama_log_set(self._quiet, None)
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file")
        options = library.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = (
            512,
            torch.get_num_threads(),
            torch.get_num_threads(),
        )
        self._context = library.llama_init_from_model(self._model, options)

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _next(self, tokens: list[int]) -> Tensor:
        array = (self._library.llama_token * len(tokens))(*tokens)
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocabulary)).contents
        return torch.frombuffer(values, dtype=torch.float32)

    def logits(self, prompt: list[int]) -> Tensor:
        self._forget()
        return self._next(prompt).clone()

    def decode(self, first: int, count: int) -> list[int]:
        self._forget()
        tokens = [first]
        for _ in range(count):
            tokens.append(int(self._next(tokens[-1:]).argmax()))
        return tokens[1:]
