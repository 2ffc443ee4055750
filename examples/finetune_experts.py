# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tune a few experts alone (ESFT, arXiv:2407.01906). A byte model learns Python from the standard library; then
it learns English from the help texts of pydoc, with all of its parameters and with the experts that English uses.

    python examples/finetune_experts.py [--steps 200]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from switchgear import finetune

HIDDEN, EXPERTS, LENGTH, BATCH = 64, 32, 64, 16


class Block(nn.Module):
    """Causal attention, then experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = switchgear.MoE(HIDDEN, 64, EXPERTS, 4, normalize=True, balance=[switchgear.routing.SwitchLoss(1e-2)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(mixed)
        y: Tensor = x + self.moe(self.norms[1](x))
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


def windows(text: Tensor, seed: int) -> Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH + 1)].long()


def loss_of(model: nn.Module, text: Tensor, seed: int) -> Tensor:
    rows = windows(text, seed)
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor) -> float:
    return sum(float(loss_of(model, text, seed)) for seed in range(10**6, 10**6 + 8)) / 8


def train(model: nn.Module, parameters: list[nn.Parameter], text: Tensor, steps: int) -> float:
    """Returns the milliseconds of the fastest step."""
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    fastest = float("inf")
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        (loss_of(model, text, step) + switchgear.balance_loss(model)).backward()
        optimizer.step()
        fastest = min(fastest, time.perf_counter() - start)
    return 1000 * fastest


class Result(NamedTuple):
    english: float  # held-out loss in nats per byte
    python: float
    milliseconds: float
    kilobytes: float


def main(steps: int = 200) -> dict[str, Result]:
    torch.manual_seed(0)
    library = sorted(Path(os.__file__).parent.glob("*.py"))[:80]
    python = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in library)), dtype=torch.uint8)
    english = torch.frombuffer(bytearray("".join(topics.topics.values()).encode()), dtype=torch.uint8)
    base = Model()
    train(base, list(base.parameters()), python, steps)
    print(f"before:    English {held_out(base, english):.3f}, Python {held_out(base, python):.3f} nats per byte")

    with switchgear.RoutingTrace(base) as trace, torch.no_grad():
        for seed in range(8):
            base(windows(english, seed)[:, :-1])
    selection = finetune.select_experts(trace, mass=0.2)
    print("selected: ", "; ".join(f"{name} {experts}" for name, experts in selection.items()))

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("all", "selected"):
            model, path = copy.deepcopy(base), Path(folder) / name
            is_part = name == "selected"
            parameters = finetune.freeze_except(model, selection) if is_part else list(model.parameters())
            milliseconds = train(model, parameters, english, steps // 2)
            if is_part:
                finetune.save_selected(model, path)
                fresh = copy.deepcopy(base)
                finetune.load_selected(fresh, path)
                assert held_out(fresh, english) == held_out(model, english)
            else:
                torch.save(model.state_dict(), path)
            losses = held_out(model, english), held_out(model, python)
            results[name] = Result(*losses, milliseconds, path.stat().st_size / 1000)
            english_loss, python_loss, _, kilobytes = results[name]
            print(
                f"{name + ':':<10} English {english_loss:.3f}, Python {python_loss:.3f}; "
                f"{milliseconds:.1f} ms a step, a file of {kilobytes:,.0f} kB"
            )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
