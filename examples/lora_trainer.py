# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tunes adapters of a Mixtral's experts with transformers' Trainer, the frozen experts in 4 bits.

The model is small and has random weights, so nothing is downloaded; the text is this file. The adapters are saved in
PEFT's format, loaded again into a fresh model, and merged into its weights.

    python examples/lora_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

import switchgear
from switchgear.adapters import add_lora, load_peft, merge, save_peft

LENGTH = 64  # bytes of an example


class Text(Dataset[dict[str, torch.Tensor]]):
    """Pieces of this file, as bytes."""

    def __init__(self) -> None:
        self.tokens = torch.tensor(list(Path(__file__).read_bytes()))

    def __len__(self) -> int:
        return len(self.tokens) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.tokens[index * LENGTH : (index + 1) * LENGTH]
        return {"input_ids": piece, "labels": piece}


def build() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


def loss_of(model: MixtralForCausalLM) -> float:
    text = Text()
    pieces = torch.stack([text[index]["input_ids"] for index in range(len(text))])
    with torch.no_grad():
        return model.eval()(pieces, labels=pieces).loss.item()


def train(steps: int, folder: str) -> dict[str, float]:
    """The losses before and after training, and of the loaded and the merged adapters."""
    model = build()
    switchgear.accelerate(model)
    switchgear.store(model, "int4")
    adapters = add_lora(model, rank=16, alpha=64, dropout=0.05)
    losses = {"before": loss_of(model)}
    total = sum(parameter.numel() for parameter in adapters)
    print(f"{total:,} trained parameters in {len(adapters)} adapters, experts in int4")
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=max(1, steps // 5),
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Text()).train()
    losses["after"] = loss_of(model)
    save_peft(model, folder)

    other = build()
    switchgear.accelerate(other)
    load_peft(other, folder)
    losses["loaded"] = loss_of(other)  # onto experts that are not rounded to 4 bits
    merge(other, keep_adapters=False)
    losses["merged"] = loss_of(other)
    return losses


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, loss in train(60, folder).items():
            print(f"{name:>7}: {loss:.3f} nats per byte")


if __name__ == "__main__":
    main()
