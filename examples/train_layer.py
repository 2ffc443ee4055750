# SPDX-License-Identifier: BSD-3-Clause
"""Train a MoE layer. Tokens come from four clusters, each with its own linear map, and the layer learns all four.

python examples/train_layer.py [--steps 200]
"""

from __future__ import annotations

import argparse

import torch

import switchgear

HIDDEN, CLUSTERS = 32, 4


def tokens_and_targets(centers: torch.Tensor, maps: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [count, H] around the centers, and the image of each x under the map of its cluster."""
    cluster = torch.randint(CLUSTERS, (count,))
    x = centers[cluster] + 0.3 * torch.randn(count, HIDDEN)
    return x, torch.einsum("th,thj->tj", x, maps[cluster])


def train(steps: int) -> list[float]:
    """The mean squared error of each step."""
    torch.manual_seed(0)
    centers, maps = torch.randn(CLUSTERS, HIDDEN), torch.randn(CLUSTERS, HIDDEN, HIDDEN) / HIDDEN**0.5
    moe = switchgear.MoE(HIDDEN, intermediate_size=64, num_experts=8, top_k=2, normalize=True, return_routing=True)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=5e-3)
    errors = []
    for step in range(steps):
        x, target = tokens_and_targets(centers, maps, 256)
        y, routing = moe(x)
        error = (y - target).square().mean()
        loss = error + 0.01 * switchgear.load_balancing_loss(routing.router_logits, routing.topk_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error.item())
        if step % 50 == 0 or step == steps - 1:
            tokens_per_expert = torch.bincount(routing.topk_ids.flatten(), minlength=routing.num_experts)
            print(f"step {step:4}  error {error.item():.4f}  tokens per expert {tokens_per_expert.tolist()}")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    train(parser.parse_args().steps)
