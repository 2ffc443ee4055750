# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench quality`: five routers in the same small language model, trained on the same text.

LibMoE (arXiv:2411.00918) compared these routers on large models and found no winner. Here the model is small: two
layers that read bytes. All start from the same weights except the router's, see the same batches, and have the same
balance loss. The question is whether their losses differ by more than seeds do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear import MoE, RoutingTrace, balance_loss
from switchgear.cli.common import markdown_table, progress
from switchgear.routing import Cosine, Linear, SwitchLoss, TopK

from .options import add_files, add_quick, add_threads, begin
from .report import threads, write_outputs
from .results import read_json, rounded
from .tiny.text import Domain, evenly, load_domains, windows

HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS, HEADS = 64, 64, 8, 2, 2, 2
LENGTH, SEQUENCES = 64, 2  # of each domain in a batch
STEPS, QUICK_STEPS, SEEDS = 400, 3, 3
LEARNING_RATE, BALANCE = 3e-3, 1e-2
SCHEMA = "switchgear-bench-quality/1"


class HyperRouter(nn.Module):
    """x · Wᵀ, where a fixed random network makes W [E,H] of a trained vector (HyperRouter, arXiv:2312.07035)."""

    first: Tensor
    second: Tensor

    def __init__(self, hidden_size: int, num_experts: int, dim: int = 32, **place: Any) -> None:
        super().__init__()
        self.shape = (num_experts, hidden_size)
        self.vector = nn.Parameter(torch.randn(dim, **place))
        self.register_buffer("first", torch.randn(dim, dim, **place) / dim**0.5)
        second = torch.randn(num_experts * hidden_size, dim, **place)
        self.register_buffer("second", second / (dim * hidden_size) ** 0.5)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        weight: Tensor = self.second @ torch.relu(self.first @ self.vector)
        return x @ weight.view(self.shape).T


class Option(NamedTuple):
    score: Callable[..., nn.Module]
    sigmoid: bool = False


ROUTERS: dict[str, Option] = {
    "SMoE": Option(Linear),
    "sigma-MoE": Option(partial(Linear, equal_rows=True), sigmoid=True),
    "X-MoE": Option(partial(Cosine, dim=EXPERTS // 2)),
    "perturbed cosine": Option(partial(Cosine, dim=EXPERTS // 2, perturb=0.1)),
    "HyperRouter": Option(HyperRouter),
}


def layer(router: str) -> MoE:
    """An MoE layer with this router; all else is the same for every router."""
    option = ROUTERS[router]
    select = TopK(TOP_K, "sigmoid" if option.sigmoid else "softmax", normalize=True)
    return MoE(HIDDEN, WIDTH, EXPERTS, score=option.score, select=select, balance=[SwitchLoss(BALANCE)])


class Block(nn.Module):
    """Causal attention, then an MoE layer, each after a norm and beside a residual."""

    def __init__(self, router: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.moe = layer(router)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        y: Tensor = x + self.moe(self.norms[1](x))
        return y


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, router: str) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.Sequential(*(Block(router) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def build(router: str, seed: int) -> Model:
    """Weights outside the routers depend on the seed alone."""
    torch.manual_seed(seed)
    common = Model("SMoE").state_dict()
    torch.manual_seed(seed)
    model = Model(router)
    model.load_state_dict({name: value for name, value in common.items() if ".gate." not in name}, strict=False)
    return model


def loss_of(model: Model, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(router: str, seed: int, steps: int, domains: list[Domain]) -> dict[str, float]:
    """The held-out loss in nats per byte, and the largest load over the mean in the worst layer."""
    model = build(router, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        ids = torch.cat([windows(domain.train, SEQUENCES, LENGTH, generator) for domain in domains])
        torch.autograd.backward(loss_of(model, ids) + balance_loss(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad(), RoutingTrace(model) as trace:
        losses = [float(loss_of(model, evenly(domain.held_out, 64, LENGTH))) for domain in domains]
    return {"loss": mean(losses), "max_violation": max(row.max_violation for row in trace.summary())}


def measure(domains: list[Domain], steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with progress("training") as advance:
        for i, router in enumerate(ROUTERS):
            found = []
            for seed in range(SEEDS):
                found.append(train(router, seed, steps, domains))
                advance(i * SEEDS + seed + 1, len(ROUTERS) * SEEDS, f"{router}, {found[-1]['loss']:.3f} nats per byte")
            losses = [run["loss"] for run in found]
            violation = max(run["max_violation"] for run in found)
            rows.append(rounded({"router": router, "losses": losses, "max_violation": violation}))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_quick(parser, "few steps of training")
    add_threads(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
    else:
        torch.set_num_threads(args.threads)
        steps = QUICK_STEPS if args.quick else STEPS
        results = {"schema": SCHEMA, "machine": about, "steps": steps, "results": measure(load_domains(), steps)}
    print(table(results), verdict(results), sep="")
    write_outputs(args, results, {"quality": lambda: markdown(results)})
    return 0


def table(results: dict[str, Any]) -> str:
    rows = [
        [row["router"], f"{mean(row['losses']):.3f}", f"{stdev(row['losses']):.3f}", f"{row['max_violation'] + 1:.2f}"]
        for row in results["results"]
    ]
    return markdown_table(["router", "held-out loss", "deviation of seeds", "busiest expert, of mean"], rows)


def verdict(results: dict[str, Any]) -> str:
    """Whether the routers' mean losses lie closer together than twice the deviation of the seeds, pooled."""
    means = {row["router"]: mean(row["losses"]) for row in results["results"]}
    noise = mean(stdev(row["losses"]) ** 2 for row in results["results"]) ** 0.5
    best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    apart = means[worst] - means[best]
    words = "within" if apart <= 2 * noise else "beyond"
    return f"{best} and {worst} are {apart:.3f} nat apart, {words} twice the deviation of seeds ({noise:.3f}).\n"


def markdown(results: dict[str, Any]) -> str:
    about, read = results["machine"], results["steps"] * 4 * SEQUENCES * LENGTH
    return (
        f"{table(results)}\n{verdict(results)}{LAYERS} layers, H = {HIDDEN}, E = {EXPERTS}, K = {TOP_K}; "
        f"{read / 1e6:.2f} million bytes, {SEEDS} seeds. {about['model']}, "
        f"{threads(about['threads'])}, {about['isa']}.\n"
    )
