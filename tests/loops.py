# SPDX-License-Identifier: BSD-3-Clause
"""Shared by the tests of papers: small layers, and independent float64 loops to compare them with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear import balance_loss, presets
from switchgear.experts import Experts
from switchgear.testing import C

H, I, E = 16, 12, 8  # noqa: E741
Loop = Callable[[Any, Tensor], Any]


def layer_of(options: dict[str, Any], **changes: Any) -> Any:
    return presets.build(H, I, E, **{**options, **changes})


def linear(layer: Any, x: Tensor) -> Tensor:
    """Logits of the router's linear layer."""
    gate = layer.gate
    return x @ (gate.weight if gate.score is None else gate.score.weight).T


def counts_of(ids: Tensor, num_experts: int = E) -> list[int]:
    return [int((ids == e).sum()) for e in range(num_experts)]


def expert(experts: Experts, number: int, x: Tensor) -> Tensor:
    """Applies one expert to x: gated with silu, or plain with relu."""
    if not experts.gated:
        assert experts.activation == "relu"
        return (x @ experts.up_proj[number].T).relu() @ experts.down_proj[number].T
    gate, up = (x @ experts.gate_up_proj[number].T).chunk(2, -1)
    return (F.silu(gate) * up) @ experts.down_proj[number].T


def mixture(experts: Experts, x: Tensor, ids: Any, weights: Any) -> Tensor:
    """Σ_k weights[t][k] · expert ids[t][k] of x[t], for any number of choices per token; -1 is empty."""
    rows = []
    for row, choice, weight in zip(x, ids, weights, strict=True):
        chosen = choice.tolist() if isinstance(choice, Tensor) else choice
        terms = [weight[k] * expert(experts, e, row) for k, e in enumerate(chosen) if e >= 0]
        rows.append(torch.stack(terms).sum(0) if terms else torch.zeros_like(row))
    return torch.stack(rows)


def best(values: Tensor, count: int, allowed: list[int] | None = None) -> list[int]:
    """The ids of the `count` largest of values [E], ties to the lowest id."""
    ids = range(len(values)) if allowed is None else allowed
    values = values.detach()
    return sorted(ids, key=lambda e: (-float(values[e]), e))[:count]


def assert_same(actual: Tensor, wanted: Tensor, length: int, name: str) -> None:
    """Each element is the end of a chain of sums with `length` terms in total. Errors cancel like the terms, up to
    √length; the largest element measures their size."""
    unit = torch.finfo(actual.dtype).eps / 2
    bound = C * length * math.sqrt(length) * unit * max(float(wanted.abs().max()), 1e-3)
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")


def assert_agrees(module: nn.Module, loop: Loop, x: Tensor, length: int = 256, **context: Any) -> None:
    """Compares the float32 module and its float64 twin with loop(twin, x): outputs, and the gradients of x and all
    parameters, for a random projection of the output plus the balance losses. The loop returns y, or (y, losses)."""
    for parameter in module.parameters():
        parameter.grad = None
    twin = copy.deepcopy(module).double()
    parameters = trained(twin)
    direction = torch.randn(x.shape, dtype=torch.float64)

    def results(y: Any, loss: Any, x: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        total = (y * direction.to(y.dtype)).sum() + loss
        grads = torch.autograd.grad(total, [x, *parameters.values()], allow_unused=True, materialize_grads=True)
        return {"output": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}

    x64 = x.detach().double().requires_grad_()
    outcome = loop(twin, x64)
    y, loss = outcome if isinstance(outcome, tuple) else (outcome, None)
    wanted = results(y, 0 if loss is None else loss, x64, parameters)
    for layer, rows in ((twin, x64), (module, x.detach().requires_grad_())):
        sent = {name: cast(value, rows.dtype) for name, value in context.items()}
        y = layer(rows, **sent)
        y = y[0] if isinstance(y, tuple) else y
        loss = 0 if loss is None else balance_loss(layer)
        for name, actual in results(y, loss, rows, trained(layer)).items():
            assert_same(actual, wanted[name], length, f"{name}, {rows.dtype}")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def switch_loss(p: Tensor, ids: Any) -> Tensor:
    """E · Σ_e f_e · P_e of probabilities p [T,E] and lists of chosen ids."""
    num_tokens, num_experts = p.shape
    total = p.new_zeros(())
    for e in range(num_experts):
        chosen = sum(e in (choice.tolist() if isinstance(choice, Tensor) else choice) for choice in ids)
        total = total + chosen / num_tokens * sum(p[t, e] for t in range(num_tokens)) / num_tokens
    return num_experts * total
