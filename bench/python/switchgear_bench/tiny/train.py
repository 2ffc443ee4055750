# SPDX-License-Identifier: BSD-3-Clause
"""Trains the tiny model: cross entropy of the next byte, and a balance loss over the whole batch, layer by layer.

A batch has equally many windows of each domain, and the balance loss sees all of them together. So an expert may serve
one domain alone; a loss per sequence would forbid that (arXiv:2501.11873). transformers' own loss concatenates the
layers, which lets one layer neglect the experts that another prefers; here each layer has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.routing import load_balancing_loss

from .model import build, gates_of
from .text import Domain, windows


class Recipe(NamedTuple):
    """How the model is trained. A step reads 4 · sequences · length bytes."""

    steps: int = 5000
    sequences: int = 2  # of each domain in a batch
    length: int = 128
    learning_rate: float = 3e-3
    balance: float = 0.003  # coefficient of the balance loss
    weight_decay: float = 0.1
    seed: int = 0


FULL = Recipe()  # 5.1 million bytes: ten minutes on two cores
QUICK = Recipe(steps=700)  # 90 seconds
Report = Callable[[int, int, str], None]


def train(recipe: Recipe, domains: Sequence[Domain], report: Report = lambda done, total, words: None) -> Any:
    """The trained model, in eval mode."""
    model = build(recipe.seed)
    model.train()
    optimizer = torch.optim.AdamW(_groups(model, recipe), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe.steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        batch = torch.cat([windows(d.train, recipe.sequences, recipe.length, generator) for d in domains])
        cross_entropy, balance = losses(model, batch)
        torch.autograd.backward(cross_entropy + recipe.balance * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19 or step + 1 == recipe.steps:
            words = f"{float(cross_entropy.detach()):.3f} nats per byte, balance {float(balance.detach()):.2f}"
            report(step + 1, recipe.steps, words)
    return model.eval()


def rate(step: int, steps: int) -> float:
    """Up in 50 steps, level for half of the training, then down to 2 % in a line."""
    left = 1 - step / max(steps, 1)
    return min((step + 1) / 50, 1.0) * max(0.02, min(1.0, 2 * left))


def losses(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy of the next byte, and the mean of the layers' balance losses; top_k is an even load."""
    routed: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for gate in gates_of(model):
            hook = gate.register_forward_hook(lambda module, args, output: routed.append((output[0], output[2])))
            stack.callback(hook.remove)
        logits = model(input_ids=batch, use_cache=False).logits
    cross_entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    balance = torch.stack([load_balancing_loss(*layer) for layer in routed]).mean()
    return cross_entropy, balance


def _groups(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """Norms are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
