# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face Mixtral with one argument changed: transformers' eager experts and switchgear, on the same weights.

The model is small and has random weights, so nothing is downloaded. A checkpoint takes the same argument:
AutoModelForCausalLM.from_pretrained(path, experts_implementation="switchgear").

    python examples/mixtral.py
"""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import switchgear.integrations.transformers  # noqa: F401  registers the name "switchgear"


def build(experts_implementation: str) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None,
        experts_implementation=experts_implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def main() -> float:
    """The largest difference between logits, relative to the largest logit."""
    models = {name: build(name) for name in ("eager", "switchgear")}
    prompt = torch.tensor([list(b"Route tokens to experts")])
    with torch.no_grad():
        logits = {name: model(prompt).logits for name, model in models.items()}
    error = ((logits["eager"] - logits["switchgear"]).abs().max() / logits["eager"].abs().max()).item()
    print(f"largest difference of the logits: {error:.1e} of the largest logit")
    for name, model in models.items():
        tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        print(f"{name:>10}: {tokens[0, prompt.shape[1] :].tolist()}")
    return error


if __name__ == "__main__":
    main()
