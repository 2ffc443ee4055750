# SPDX-License-Identifier: BSD-3-Clause
"""FSDP2 around a Hugging Face model on two processes, by torch's fully_shard.

torchrun --nproc-per-node 2 examples/clients/fsdp2.py
"""

from __future__ import annotations

import small
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

import switchgear.integrations.transformers  # noqa: F401  registers experts_implementation="switchgear"


def train(experts_implementation: str) -> float:
    """The last loss of this rank's batch."""
    model = small.model(experts_implementation)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    rows = torch.stack([piece["input_ids"] for piece in small.pieces()][rank::size])
    for batch in rows.split(4)[:6]:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    if distributed.get_rank() == 0:
        small.compare("FSDP2, 2 processes", train, 1e-3)
    else:
        for name in ("grouped_mm", "switchgear") * 2:  # the turns of `compare`
            train(name)
    distributed.destroy_process_group()
