# SPDX-License-Identifier: BSD-3-Clause
"""TRL's SFTTrainer with LoRA on the experts, through PEFT's target_parameters."""

from __future__ import annotations

import tempfile

import small
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import switchgear.integrations.transformers  # noqa: F401  registers experts_implementation="switchgear"

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def train(experts_implementation: str) -> float:
    """The last loss."""
    rows = [{"input_ids": piece["input_ids"].tolist()} for piece in small.pieces()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, bf16=True, use_cpu=True,
            logging_steps=1, report_to=[], max_length=small.LENGTH, disable_tqdm=True, save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        lora = LoraConfig(r=8, target_modules=[], target_parameters=TARGETS, lora_dropout=0.0)
        trainer = SFTTrainer(
            small.model(experts_implementation), arguments, train_dataset=Dataset.from_list(rows), peft_config=lora,
            processing_class=small.tokenizer(),
        )  # fmt: skip
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]


if __name__ == "__main__":
    small.compare("TRL's SFTTrainer, PEFT", train, 0.05)
