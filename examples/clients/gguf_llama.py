# SPDX-License-Identifier: BSD-3-Clause
"""llama.cpp: small models, trained until they know texts by heart, as GGUF files of several types, and adapters
that are trained on such files. llama.cpp must choose the tokens that the model of `load_gguf` chooses."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import small
import torch
from llama_cpp import Llama
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import switchgear

SIZES = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2,
    "num_experts": 8, "num_local_experts": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {"olmoe": {}, "qwen3_moe": {"norm_topk_prob": True}, "mixtral": {}, "gpt_oss": {}}
TYPES = "f16", "q8_0", "q6_k", "q4_k_m"
LINEARS, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]
PROMPT, NEW = 16, 48


def train(model: Any, texts: torch.Tensor) -> None:
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for _ in range(500):
        loss = model(input_ids=texts, labels=texts).loss
        if loss < 0.05:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def compare(name: str, model: Any, path: Path, texts: torch.Tensor, adapter: Path | None = None) -> None:
    """Prints a row: of the tokens after the prompts those that both choose, those that continue the texts, and how far
    logits are from those of the decoded weights."""
    other = Llama(str(path), n_ctx=256, verbose=False, lora_path=adapter and str(adapter))
    same, known = 0, 0
    for text in texts[:, : PROMPT + NEW]:
        prompt, wanted = text.split((PROMPT, NEW))
        ours = model.generate(input_ids=prompt[None], max_new_tokens=NEW, do_sample=False)[0, PROMPT:]
        other.reset()
        theirs = torch.tensor(list(itertools.islice(other.generate(prompt.tolist(), temp=0.0), NEW)))
        same, known = same + int((ours == theirs).sum()), known + int((ours == wanted).sum())
    with torch.no_grad():
        logits = model(input_ids=texts).logits
        with switchgear.use_backend("reference"):
            decoded = model(input_ids=texts).logits
    error = float((logits - decoded).norm() / decoded.norm())
    print(f"| {name} | {same} of {NEW * len(texts)} | {known} | {error:.1e} |", flush=True)
    if same != NEW * len(texts) or not error < 0.05:
        raise AssertionError(f"{name}: other tokens, or other logits than those of the decoded weights")


def main(folder: Path) -> None:
    print("| file | same tokens | of the texts | logits differ by |")
    texts, others = torch.stack([piece["input_ids"] for piece in small.pieces()])[:8, :96].split(4)
    for family, options in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **options))
        switchgear.accelerate(model)
        train(model, texts)
        for type in TYPES:
            switchgear.save_gguf(model, path := folder / f"{family}-{type}.gguf", type)
            compare(f"{family}, {type}", switchgear.load_gguf(path), path, texts)
        lora = LoraConfig(r=8, target_modules=LINEARS, target_parameters=EXPERTS)
        adapted = get_peft_model(switchgear.load_gguf(path), lora)
        train(adapted, others)
        switchgear.save_gguf_adapter(adapted, adapter := folder / f"{family}-adapter.gguf")
        compare(f"{family}, {type} and an adapter", adapted, path, others, adapter)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
