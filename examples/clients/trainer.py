# SPDX-License-Identifier: BSD-3-Clause
"""transformers' Trainer with gradient accumulation, checkpointing and bfloat16."""

from __future__ import annotations

import tempfile

import small
from transformers import Trainer, TrainingArguments

import switchgear.integrations.transformers  # noqa: F401  registers experts_implementation="switchgear"


def train(experts_implementation: str) -> float:
    """The last loss."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, bf16=True, use_cpu=True,
            gradient_checkpointing=True, learning_rate=1e-3, logging_steps=1, report_to=[], disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(small.model(experts_implementation), arguments, train_dataset=small.pieces())
        trainer.train()
        return next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row)


def main() -> None:
    small.compare("transformers' Trainer", train, 0.05)  # bfloat16 after 8 steps


if __name__ == "__main__":
    main()
