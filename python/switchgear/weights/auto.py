# SPDX-License-Identifier: BSD-3-Clause
"""The forms that store(model, "auto") tries on this machine, the best first.

The thresholds are measured (docs/weights.md, docs/performance.md). With few rows per expert a layer is bound by memory,
so the form with the fewest bytes is fastest. With more rows it is bound by compute, and only the order matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from switchgear import backends, ops
from switchgear.complaints import at_least, check_switch
from switchgear.weights.layout import Layout, layout_of
from switchgear.weights.module import stored_of

FEW_ROWS = 4  # per expert; up to this number compact weights were faster than plain ones in every measured case
TOP_K_FIELDS = (  # names of top_k in configs of Hugging Face models
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k",
)  # fmt: skip
WIDE_VECTORS = ("avx512", "amx")  # ISAs that unpack compact weights as fast as memory delivers them


class Candidate(NamedTuple):
    """A form to try."""

    form: str
    reason: str
    options: dict[str, Any]
    is_last: bool = False  # no other form follows


def candidates(
    model: nn.Module, tokens_per_step: int = 1, lossless: bool = True, bits: int | Sequence[int] | None = None
) -> list[Candidate]:
    """The forms to try, in order. Raises ValueError if tokens_per_step is below 1, or for bits of lossless forms."""
    check_switch("lossless", lossless)
    if bits is not None and lossless:
        raise ValueError(f"bits: expected none of a lossless form, got {bits}; pass lossless=False")
    tokens_per_step = at_least(1, "tokens_per_step", tokens_per_step)
    devices = {
        p.device.type for module in model.modules() if layout_of(module) is not None for p in module.parameters()
    }
    if devices - {"cpu"}:
        where = ", ".join(sorted(devices - {"cpu"}))
        return [Candidate("plain", f"kernels on {where} multiply plain weights alone", {}, True)]
    if backends.backend() == "reference":
        return [Candidate("plain", "the reference gains nothing from another form", {}, True)]
    rows = rows_per_expert(model, tokens_per_step)
    text = f"about {rows:.3g} tokens for an expert on {ops.cpu_isa()}"
    plain = Candidate("plain", f"{text}: plain weights on huge pages", {}, True)
    panels = Candidate("panels", f"{text}: the order of the kernels", {})
    if bits is not None:
        reason = f"{text}: the requested number of bits"
        return [Candidate("groups", reason, {"bits": bits, "symmetric": False}, True)]
    if not lossless:
        if rows <= FEW_ROWS:
            return [Candidate("int4", f"{text}: memory is the limit, so the fewest bits", {"symmetric": False}), plain]
        return [Candidate("int8", f"{text}: multiplications are the limit, and those of int8 are fast", {}), plain]
    if rows <= FEW_ROWS and ops.cpu_isa().startswith(WIDE_VECTORS):
        return [Candidate("compact", f"{text}: memory is the limit, so fewer bytes", {}), panels, plain]
    return [panels, plain] if rows > 1 else [plain]


def rows_per_expert(model: nn.Module, tokens_per_step: int) -> float:
    """The average number of rows per step of an expert that has any."""
    most = 0.0
    for module in model.modules():
        if (layout := layout_of(module)) is None:
            continue
        experts = _num_experts(module, layout)
        share = min(1.0, _top_k(model, module, experts) / experts)
        touched = experts * (1 - (1 - share) ** tokens_per_step)
        most = max(most, tokens_per_step * share * experts / touched)
    return most


def _num_experts(module: nn.Module, layout: Layout) -> int:
    if (stored := stored_of(module)) is not None:
        return stored.weights(module)[1].shape[0]
    weight: torch.Tensor = getattr(module, layout.names[1])
    return len(weight)


def _top_k(model: nn.Module, module: nn.Module, experts: int) -> int:
    """Choices per token: from the model's config, or from a router with as many experts; 2 if neither has it."""
    config = getattr(module, "config", None)
    for name in (*TOP_K_FIELDS, "top_k"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    for router in model.modules():
        if getattr(router, "num_experts", None) == experts and isinstance(value := getattr(router, "top_k", None), int):
            return value
    return min(2, experts)
