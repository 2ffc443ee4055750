# SPDX-License-Identifier: BSD-3-Clause
"""Low-rank adapters of experts (LoRA, arXiv:2106.09685): y = W·x + alpha/rank · B·(A·x) for each expert, W frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.compress.formats import QuantizedMatrix, quantized_grouped_gemm, quantized_of
from switchgear.functional import combine, glu, grouped_gemm, plan
from switchgear.stored import stored_of

if TYPE_CHECKING:
    from switchgear.experts import Experts


class Lora(NamedTuple):
    """What `add_lora` added to a module."""

    names: tuple[str, str]  # of the projections; the adapters are <name>_lora_A and <name>_lora_B
    scale: float


def add_lora(
    experts: Experts, rank: int, *, alpha: float | None = None, dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    """Adds adapters to both projections of every expert, and freezes the projections, plain or quantised.

    Args:
        experts: a module `Experts` of this process alone.
        rank: r of the adapters A [E,r,in] (Kaiming-uniform) and B [E,out,r] (zeros, so that nothing changes at first).
        alpha: the adapters count alpha / rank; by default rank.
        dtype: of the adapters, which is that of activations; by default that of the weights.

    Returns the adapters, for an optimizer. Their keys in the state dict are gate_up_proj_lora_A, ….

    Raises:
        ValueError: a rank below 1, or experts that have adapters already, are compact or in panels, or distributed over
            processes.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if (parallel := getattr(experts, "parallel", None)) is not None:
        raise ValueError(f"experts: expected all of them in this process, got those of {parallel}")
    if lora_of(experts) is not None:
        raise ValueError("experts: expected none with adapters already")
    if (stored := stored_of(experts)) is not None:
        raise ValueError(
            f"experts: expected plain or quantised projections, got {stored.form.noun}; take that back first"
        )
    quantized = quantized_of(experts)
    names = (experts._first, "down_proj")
    width = experts.intermediate_size * (2 if experts.gated else 1)
    sizes = ((experts.hidden_size, width), (experts.intermediate_size, experts.hidden_size))
    adapters = []
    for name, (size_in, size_out) in zip(names, sizes, strict=True):
        weight = getattr(experts, f"{name}_values" if quantized else name)
        kind = dtype or (quantized.dtype if quantized else weight.dtype)
        a = torch.empty(experts.num_experts, rank, size_in, dtype=kind, device=weight.device)
        nn.init.uniform_(a, -(size_in**-0.5), size_in**-0.5)
        b = torch.zeros(experts.num_experts, size_out, rank, dtype=kind, device=weight.device)
        for suffix, tensor in (("A", a), ("B", b)):
            experts.register_parameter(f"{name}_lora_{suffix}", nn.Parameter(tensor))
            adapters.append(getattr(experts, f"{name}_lora_{suffix}"))
        if not quantized:
            weight.requires_grad_(False)
    experts._switchgear_lora = Lora(names, (rank if alpha is None else alpha) / rank)  # type: ignore[assignment]
    return adapters


def lora_of(module: nn.Module) -> Lora | None:
    """What `add_lora` added to a module, None where it added nothing."""
    return vars(module).get("_switchgear_lora")


def lora_forward(
    module: Any,
    lora: Lora,
    weights: tuple[Tensor, Tensor] | tuple[QuantizedMatrix, QuantizedMatrix],
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """Experts.forward in stages, since the adapters come between them. x [..., H] -> [..., H]."""
    slots = plan(topk_ids.reshape(-1, topk_ids.shape[-1]), module.num_experts)
    rows = x.reshape(-1, x.shape[-1])

    def project(index: int, rows: Tensor, token_indices: Tensor | None) -> Tensor:
        name, weight = lora.names[index], weights[index]
        bias, places = getattr(module, f"{name}_bias"), {"token_indices": token_indices}
        if isinstance(weight, QuantizedMatrix):
            out = quantized_grouped_gemm(rows, weight, slots.expert_offsets, bias=bias, **places)
        else:
            out = grouped_gemm(rows, weight, slots.expert_offsets, bias=bias, **places)
        low = grouped_gemm(rows, getattr(module, f"{name}_lora_A"), slots.expert_offsets, **places)
        return out + lora.scale * grouped_gemm(low, getattr(module, f"{name}_lora_B"), slots.expert_offsets)

    h = project(0, rows, slots.token_indices)
    a = glu(
        h, module.activation, gated=module.gated, interleaved=module.interleaved, alpha=module.alpha, limit=module.limit
    )
    y = combine(project(1, a, None), slots, topk_weights.reshape(-1, topk_weights.shape[-1]))
    return y.reshape(x.shape)
