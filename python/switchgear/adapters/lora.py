# SPDX-License-Identifier: BSD-3-Clause
"""Low-rank adapters of experts (LoRA, arXiv:2106.09685): y = W·x + alpha/rank · B·(A·x) for each expert, W frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.weights import AdaptedWeight, Weight, stored_of
from switchgear.weights.selected import selection_of


class Lora(NamedTuple):
    """The adapters that `add_lora` added to a module."""

    names: tuple[str, str]  # of the projections; the adapters are <name>_lora_A and <name>_lora_B
    scale: float

    def around(self, module: nn.Module, *weights: Tensor | Weight) -> tuple[AdaptedWeight, ...]:
        """The projections of `module` with their adapters."""

        def adapter(name: str, letter: str) -> Any:
            return getattr(module, f"{name}_lora_{letter}")

        return tuple(
            AdaptedWeight(weight, adapter(name, "A"), adapter(name, "B"), self.scale)
            for name, weight in zip(self.names, weights, strict=True)
        )


def add_lora(
    experts: Experts, rank: int, *, alpha: float | None = None, dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    """Adds adapters to both projections of every expert, and freezes the projections, whatever their form.

    Args:
        experts: a module `Experts` that is not distributed over processes.
        rank: r of the adapters A [E,r,in] (Kaiming-uniform) and B [E,out,r] (zeros, so that outputs do not change yet).
        alpha: the adapters are scaled by alpha / rank; by default alpha is rank.
        dtype: dtype of the adapters, equal to that of activations; by default that of the weights.

    Returns the adapters, for an optimizer. Their keys in the state dict are gate_up_proj_lora_A, ….

    Raises:
        TypeError: another module than `Experts`.
        ValueError: a rank below 1, or experts that already have adapters, or are distributed over processes.
    """
    if not isinstance(experts, Experts):
        raise TypeError(
            f"experts: expected switchgear.Experts (the attribute experts of a MoE), got {type(experts).__name__}; "
            "experts of Hugging Face models take adapters of peft, with LoraConfig(target_parameters=[…])"
        )
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if (parallel := getattr(experts, "parallel", None)) is not None:
        raise ValueError(f"experts: expected all of them in this process, got those of {parallel}")
    if lora_of(experts) is not None:
        raise ValueError("experts: expected none with adapters already")
    if selection_of(experts) is not None:
        raise ValueError("experts: expected none that train alone; call finetune.unfreeze(model) first")
    stored = stored_of(experts)
    names = (experts._first, "down_proj")
    width = experts.intermediate_size * (2 if experts.gated else 1)
    sizes = ((experts.hidden_size, width), (experts.intermediate_size, experts.hidden_size))
    made: dict[str, nn.Parameter] = {}
    for name, (size_in, size_out) in zip(names, sizes, strict=True):
        weight = stored.weights(experts)[names.index(name)] if stored is not None else getattr(experts, name)
        kind = dtype or weight.dtype
        a = torch.empty(experts.num_experts, rank, size_in, dtype=kind, device=weight.device)
        nn.init.uniform_(a, -(size_in**-0.5), size_in**-0.5)
        b = torch.zeros(experts.num_experts, size_out, rank, dtype=kind, device=weight.device)
        made |= {f"{name}_lora_A": nn.Parameter(a), f"{name}_lora_B": nn.Parameter(b)}
    for name, adapter in made.items():
        experts.register_parameter(name, adapter)
    for name in names:
        if stored is None:
            getattr(experts, name).requires_grad_(False)
    experts._switchgear_adapters = Lora(names, (rank if alpha is None else alpha) / rank)  # type: ignore[assignment]
    return list(made.values())


def lora_of(module: nn.Module) -> Lora | None:
    """The adapters of a module, or None."""
    return vars(module).get("_switchgear_adapters")
