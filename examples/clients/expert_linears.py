# SPDX-License-Identifier: BSD-3-Clause
"""Tools for linear layers, on experts that `switchgear.as_linears` shows as such: each gives what it gives on a model
whose experts are nn.Linear modules of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import small
import torch
from torch import Tensor, nn

import switchgear.integrations.transformers


class ExpertModules(nn.ModuleList):
    """An expert after the other, as before transformers stacked them."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        for gate_up, down in zip(stacked.gate_up_proj.detach(), stacked.down_proj.detach(), strict=True):
            expert = nn.ModuleDict()
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
                expert[name] = nn.Linear(*reversed(weight.shape), bias=False)
                expert[name].weight = nn.Parameter(weight.clone())
            self.append(expert)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            tokens, choices = torch.where(ids == e)
            if len(tokens):
                a = nn.functional.silu(expert["gate_proj"](x[tokens])) * expert["up_proj"](x[tokens])
                y = y.index_add(0, tokens, expert["down_proj"](a) * weights[tokens, choices, None])
        return y


@contextmanager
def unchanged(_: nn.Module) -> Iterator[None]:
    yield


def quantize(model: Any, inputs: Tensor) -> Tensor:
    """torchao: int8 weights, by output channel."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and ".experts." in name)
    with torch.no_grad():
        return model(inputs).logits


def adapt(model: Any, inputs: Tensor) -> Tensor:
    """PEFT: two steps of LoRA on all linears."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return adapted(inputs).logits


TOOLS = {"torchao": quantize, "peft": adapt}


def compare(name: str) -> None:
    inputs = torch.stack([piece["input_ids"] for piece in small.pieces()[:4]])[:, :64]
    results: list[Tensor] = []
    plain = small.model("switchgear").eval()
    with torch.no_grad():
        logits = plain(inputs).logits
    for show in (unchanged, switchgear.as_linears):
        model: Any = small.model("switchgear").eval()
        if show is unchanged:
            for layer in model.model.layers:
                layer.mlp.experts = ExpertModules(layer.mlp.experts)
        with show(model):
            results.append(TOOLS[name](model, inputs).detach())
        with torch.no_grad():
            results.append(model(inputs).logits)
    wanted, _, inside, outside = results
    difference = float((inside - wanted).abs().max() / wanted.abs().max())
    changed, left = float((results[1] - logits).abs().max()), float((outside - results[1]).abs().max())
    if not max(difference, left) <= 1e-4:
        raise AssertionError(f"{name}: differs by {difference} inside, {left} outside")
    print(f"| {name} | {difference:.1e} | {changed:.1e} | {left:.1e} |", flush=True)


if __name__ == "__main__":
    print("| tool | inside: difference of its result, relative | change of logits by it | difference of it outside |")
    for tool in sys.argv[1:] or TOOLS:
        compare(tool)
