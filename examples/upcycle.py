# SPDX-License-Identifier: BSD-3-Clause
"""Upcycle a dense byte model: train it on Python's standard library, copy its feed-forward networks into experts, and
train on. The MoE model starts at the loss of the dense one, since its experts are copies (arXiv:2412.09952).

    python examples/upcycle.py [--steps 150]
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from switchgear import convert
from switchgear.layers import SharedExperts

HIDDEN, WIDTH, LENGTH, BATCH = 64, 128, 64, 16


class Block(nn.Module):
    """Causal attention, then a dense feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = SharedExperts(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(mixed)
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.embedding(input_ids) + self.position.weight[: input_ids.shape[1]]))
        return y


def loss_of(model: nn.Module, text: Tensor, seed: int) -> Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    rows = text[starts + torch.arange(LENGTH + 1)].long()
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor) -> float:
    return sum(float(loss_of(model, text, seed)) for seed in range(16)) / 16


def train(model: nn.Module, text: Tensor, steps: int, first: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        (loss_of(model, text, first + step) + switchgear.balance_loss(model)).backward()
        optimizer.step()


def main(steps: int = 150) -> dict[str, float]:
    torch.manual_seed(0)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    data = [
        torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in library if file.stat().st_size
    ]
    text, fresh = torch.cat(data[:100]), torch.cat(data[100:])

    dense = Model()
    train(dense, text, steps, 0)
    moe = copy.deepcopy(dense)
    done = convert.upcycle(moe, num_experts=8, top_k=2, balance=[switchgear.routing.SwitchLoss(1e-2)])
    print(done)
    losses = {"dense": held_out(dense, fresh), "upcycled": held_out(moe, fresh)}

    train(dense, text, steps, steps)
    train(moe, text, steps, steps)
    losses |= {"dense, trained on": held_out(dense, fresh), "upcycled, trained on": held_out(moe, fresh)}
    for name, loss in losses.items():
        print(f"{name + ':':<22} {loss:.4f} nats per byte")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
