# SPDX-License-Identifier: BSD-3-Clause
"""Layer-wise distillation: each feed-forward layer is replaced by experts trained to give its output (LaDiMo,
arXiv:2408.04278)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Count, NotNegative, Seed, Size, checked, explain_rows
from switchgear.convert.modules import (
    call_model,
    choose_layers,
    find_dense_layers,
    is_feed_forward,
    replace_modules,
    watch_rows,
)
from switchgear.convert.partitions import Method
from switchgear.convert.plans import derive_seed
from switchgear.convert.split import split_dense
from switchgear.modules import MoE, after_step, balance_loss
from switchgear.routing.router import Router
from switchgear.routing.selection import Threshold, TopK
from switchgear.utils.modules import set_eval


@dataclass(frozen=True)
class Distilled:
    """A layer's mean squared error, before and after training, relative to the mean square of the dense output."""

    name: str
    before: float
    after: float
    num_tokens: int


@dataclass(frozen=True)
class Distillation:
    """What `distill_layers` returns: the model, and of each layer the errors before and after training."""

    model: nn.Module
    layers: tuple[Distilled, ...]


@checked
def distill_layers(
    model: nn.Module,
    num_experts: Size,
    batches: Iterable[Any],
    top_k: Size = 2,
    *,
    layers: str | Sequence[int] = "all",
    tokens: Size = 100_000,
    steps: Count = 200,
    batch_size: Size = 1024,
    lr: NotNegative = 1e-3,
    method: Method = "random",
    seed: Seed = 0,
    **options: Any,
) -> Distillation:
    """Replaces the dense feed-forward modules of a model, in place, by MoE layers that were trained on their inputs and
    outputs in eval(). All or none are replaced. Their dropout is not kept.

    Args:
        model: called with each batch (a mapping is passed as keywords); for one feed-forward module, batches of rows,
            and the result's `model` is the MoE.
        num_experts, top_k, method, options: of split_dense, which makes the initial experts. Weights are
            E · softmax over the chosen experts. importance may be a dict by layer.
        tokens: how many inputs of each layer are kept; 100,000 in the paper (unverified). Padding (attention_mask 0) is
            left out.
        steps, batch_size, lr, seed: of Adam. Experts and router train, on the losses of `balance` too, if given.

    Raises:
        ValueError: the model has no dense feed-forward modules, or batches has no tokens. Nothing is changed.
    """
    options = {"weights": "softmax", **options}
    if is_feed_forward(model):
        chosen = {0: ("", model)}
    else:
        found = find_dense_layers(model)
        chosen = {index: found[index] for index in choose_layers(layers, len(found))}
    importance = options.pop("importance", None)
    with set_eval(model):
        inputs = _collect_inputs(model, dict(chosen.values()), batches, tokens)
    made: dict[nn.Module, MoE] = {}
    done: list[Distilled] = []
    for index, (name, module) in chosen.items():
        x = inputs.pop(name)
        with torch.no_grad(), set_eval(module):
            y = torch.cat([module(part) for part in torch.split(x, batch_size)])
        given = importance.get(index) if isinstance(importance, Mapping) else importance
        moe = split_dense(
            module, num_experts, top_k, method=method, importance=given, seed=derive_seed(seed, index), **options
        )
        before = compute_error(moe, x, y)
        _train(moe, x, y, steps, batch_size, lr, seed)
        made[module] = moe.train(module.training)
        done.append(Distilled(name, before, compute_error(moe, x, y), len(x)))
    if model in made:
        return Distillation(made[model], tuple(done))
    replace_modules(model, made)
    return Distillation(model, tuple(done))


@torch.no_grad()
def compute_error(layer: nn.Module, x: Tensor, y: Tensor) -> float:
    """mean (layer(x) - y)² / mean y² in eval()."""
    error = 0.0
    with set_eval(layer):
        for rows, wanted in zip(torch.split(x, 4096), torch.split(y, 4096), strict=True):
            error += float((layer(rows) - wanted).float().square().sum())
    return error / max(float(y.float().square().sum()), 1e-30)


def use_threshold(moe: MoE, x: Tensor, experts_per_token: float) -> float:
    """Replaces the layer's TopK by a Threshold at which tokens get experts_per_token on average over x [T,H]. Returns
    the threshold. The weights are scaled as before: their sum stays the one of top-k."""
    if not isinstance(getattr(moe, "gate", None), Router):  # torch.compile's wrapper has it, too
        raise TypeError(f"moe: expected MoE, got {type(moe).__name__}")
    explain_rows("x", x, moe.gate.hidden_size, moe.gate.weight)
    select: Any = moe.gate.select
    if not isinstance(select, TopK) or select.score_function != "softmax" or moe.gate.weight is None:
        raise ValueError(f"moe: expected a linear router with TopK by softmax, got {type(select).__name__}")
    with torch.no_grad(), set_eval(moe.gate):  # training counts the tokens, and may add noise
        logits = moe.gate(x).router_logits
    threshold = Threshold.calibrate(logits, experts_per_token)
    moe.gate.select = Threshold(threshold, normalize=select.normalize, scale=select.scale)
    return threshold


def _collect_inputs(
    model: nn.Module, modules: dict[str, nn.Module], batches: Iterable[Any], tokens: int
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    if "" in modules:
        rows[""] = [batch.reshape(-1, batch.shape[-1]) for batch in batches]
    else:
        with watch_rows(model, modules, lambda name, x: rows[name].append(x)), torch.no_grad():
            for batch in batches:
                call_model(model, batch)
                if all(sum(map(len, kept)) >= tokens for kept in rows.values()):
                    break
    found = {name: torch.cat(kept)[:tokens] if kept else torch.empty(0) for name, kept in rows.items()}
    if empty := [name for name, x in found.items() if not len(x)]:
        raise ValueError(f"batches: expected tokens for each layer, got none for {empty[0] or 'the module'}")
    return found


@torch.enable_grad()
def _train(moe: MoE, x: Tensor, y: Tensor, steps: int, batch_size: int, lr: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(moe.parameters(), lr)
    scale = y.float().square().mean().clamp(min=1e-30)
    moe.train()
    for step in range(steps):
        for group in optimizer.param_groups:  # linear decay
            group["lr"] = lr * (1 - step / steps)
        index = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator).to(x.device)
        optimizer.zero_grad()
        loss = (moe(x[index]) - y[index]).float().square().mean() / scale + balance_loss(moe)
        loss.backward()
        optimizer.step()
        after_step(moe)
