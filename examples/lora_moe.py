# SPDX-License-Identifier: BSD-3-Clause
"""Two LoRA adapters, one for code and one for English, become the experts of one model, which is better than either on
both. The text is Python's own: its standard library, and the topics of its help().

Adapters are trained for `steps` on their text; the mixture, routers and adapters together, for as many on both. The
last row is the alternative without a router: one adapter of twice the rank, trained on both for twice the steps.

    python examples/lora_moe.py
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.adapters import Adapter, LowRank, add_lora_experts, mixture

HIDDEN, HEADS, LAYERS, LENGTH, BATCH, RANK = 96, 4, 2, 96, 16, 8
TARGETS = ["qkv", "out", "up", "down"]
Split = tuple[Tensor, Tensor]  # bytes for training, and held-out ones


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256)

    def forward(self, text: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.embedding(text) + self.positions.weight[: text.shape[1]])))
        return y


def split(text: bytes) -> Split:
    """Every tenth slice of 2 KB is held out."""
    slices = [text[i : i + 2048] for i in range(0, len(text), 2048)]
    held_out = bytearray(b"".join(slices[9::10]))
    train = bytearray(b"".join(piece for i, piece in enumerate(slices) if i % 10 != 9))
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def domains() -> dict[str, Split]:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    code = b"".join(file.read_bytes() for file in files)
    english = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    return {"code": split(code[: 2 * 2**20]), "english": split(english)}


def loss_of(model: nn.Module, text: Tensor, generator: torch.Generator, batch: int = BATCH) -> Tensor:
    """Of random windows, in nats per byte."""
    starts = torch.randint(len(text) - LENGTH, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(LENGTH + 1)].long()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(model: nn.Module, parameters: Iterable[nn.Parameter], texts: list[Tensor], steps: int, rate: float) -> None:
    """Each step sees one window after another of all texts."""
    generator = torch.Generator().manual_seed(0)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(loss_of(model, text, generator, BATCH // len(texts)) for text in texts).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, windows: int) -> float:
    return float(loss_of(model, text, torch.Generator().manual_seed(1), windows))


def train_adapter(model: Model, text: Tensor, steps: int) -> Adapter:
    """A LoRA of its own for one domain. A mixture of one expert with weight 1 is a LoRA."""
    model = copy.deepcopy(model)
    mix = add_lora_experts(model, 1, RANK, alpha=2 * RANK, targets=TARGETS)
    train(model, mix.expert_parameters(), [text], steps, 1e-2)
    experts = {name: layer.low_rank for name, layer in mix.layers.items()}
    return Adapter({n: LowRank(e.lora_A[0].detach(), e.lora_B[0].detach().T, 2 * RANK) for n, e in experts.items()})


def main(steps: int = 150, windows: int = 300) -> dict[str, dict[str, float]]:
    """The held-out loss of each model on each domain."""
    torch.manual_seed(0)
    texts = domains()
    base = Model()
    train(base, base.parameters(), [text for text, _ in texts.values()], steps, 3e-3)
    adapters = {name: train_adapter(base, text, steps) for name, (text, _) in texts.items()}
    models: dict[str, Model] = {"base": base}
    for name, adapter in adapters.items():
        models[f"adapter {name}"] = copy.deepcopy(base)
        mixture(models[f"adapter {name}"], [adapter])
    models["mixture"] = copy.deepcopy(base)
    mix = mixture(models["mixture"], list(adapters.values()), scale=2.0)  # the mean weight of both is 1
    both = [text for text, _ in texts.values()]
    train(models["mixture"], mix.parameters(), both, steps, 5e-3)
    models["one adapter of both"] = copy.deepcopy(base)
    one = add_lora_experts(models["one adapter of both"], 1, 2 * RANK, alpha=4 * RANK, targets=TARGETS)
    train(models["one adapter of both"], one.expert_parameters(), both, 2 * steps, 1e-2)

    results = {
        name: {domain: evaluate(m, held, windows) for domain, (_, held) in texts.items()} for name, m in models.items()
    }
    print(f"{'held-out loss, nats per byte':28} {'code':>8} {'english':>8}")
    for name, losses in results.items():
        print(f"{name:28} {losses['code']:8.3f} {losses['english']:8.3f}")
    return results


if __name__ == "__main__":
    main()
