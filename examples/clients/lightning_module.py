# SPDX-License-Identifier: BSD-3-Clause
"""A LightningModule in bfloat16."""

from __future__ import annotations

import lightning
import small
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import switchgear.integrations.transformers  # noqa: F401  registers experts_implementation="switchgear"


class Module(lightning.LightningModule):
    def __init__(self, experts_implementation: str) -> None:
        super().__init__()
        self.model = small.model(experts_implementation)
        self.loss = float("nan")

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.loss = loss.item()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(experts_implementation: str) -> float:
    """The last loss."""
    lightning.seed_everything(0, verbose=False)
    module = Module(experts_implementation)
    trainer = lightning.Trainer(
        max_steps=8, precision="bf16-mixed", accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(small.pieces(), batch_size=8, shuffle=True))
    return module.loss


if __name__ == "__main__":
    small.compare("Lightning", train, 0.05)
