# SPDX-License-Identifier: BSD-3-Clause
"""Experts: the weights of all experts of a layer, under the names and in the layouts of Hugging Face."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from switchgear.compress.compact import compact as compress_compact
from switchgear.compress.compact import expand
from switchgear.compress.formats import Format, QuantizedExperts, format_of
from switchgear.compress.lora import lora_forward, lora_of
from switchgear.functional import moe
from switchgear.packing import FINDERS, Layout, pack_weights, unpack_weights
from switchgear.pages import advise_huge_pages
from switchgear.panels import pack_panels, unpack_panels
from switchgear.reference import ACTIVATIONS, check_choice
from switchgear.stored import compressed_of, stored_of

if TYPE_CHECKING:
    from switchgear.parallel import ExpertParallel


class Experts(nn.Module):
    """E feed-forward networks with stacked weights: y = Σ_k w_k · (glu(x · W_guᵀ + b_gu) · W_dᵀ + b_d).

    Args:
        hidden_size, intermediate_size, num_experts: H, I, E.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swiglu_oai" (gated only).
        gated: act(gate) ⊙ up; otherwise act(h), and the first projection is called up_proj.
        bias: learned biases of both projections.
        interleaved: gates and ups alternate in the rows of gate_up_proj, instead of gates first.
        transposed: store the projections as [E,in,out] instead of [E,out,in].
        alpha, limit: see `glu`.

    Parameters (the checkpoints of Hugging Face load as they are):
        gate_up_proj [E,2I,H] (up_proj [E,I,H] if not gated), down_proj [E,H,I]; transposed [E,H,2I] and [E,I,H]
        gate_up_proj_bias [E,2I] (up_proj_bias [E,I]), down_proj_bias [E,H] if bias

    Every parameter gets a gradient at every step, zero for experts without tokens.

    Weights of 8 or 4 bits, and adapters: switchgear.compress.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: float = 1.702,
        limit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        if not gated and (interleaved or activation == "swiglu_oai"):
            raise ValueError(f"gated: expected True for {'interleaved' if interleaved else activation}, got False")
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.activation, self.gated, self.alpha, self.limit = activation, gated, alpha, limit
        self.interleaved, self.transposed = interleaved, transposed
        self._first = "gate_up_proj" if gated else "up_proj"

        def parameter(*shape: int) -> nn.Parameter:
            data = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            advise_huge_pages(data)
            return nn.Parameter(data)

        def projection(size_in: int, size_out: int) -> nn.Parameter:
            return parameter(size_in, size_out) if transposed else parameter(size_out, size_in)

        width = 2 * intermediate_size if gated else intermediate_size
        self.register_parameter(self._first, projection(hidden_size, width))
        self.register_parameter("down_proj", projection(intermediate_size, hidden_size))
        self.register_parameter(f"{self._first}_bias", parameter(width) if bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises each expert as two torch.nn.Linear: uniform within ±1/√fan_in."""
        for name, fan_in in ((self._first, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., H], topk_ids [..., K] (-1 for none) and topk_weights [..., K] -> [..., H]; see `moe`."""
        compressed, lora = compressed_of(self), lora_of(self)
        options: dict[str, Any] = {
            "activation": self.activation,
            "gated": self.gated,
            "interleaved": self.interleaved,
            "gate_up_bias": getattr(self, f"{self._first}_bias"),
            "down_bias": self.down_proj_bias,
            "alpha": self.alpha,
            "limit": self.limit,
        }
        if compressed is not None:
            if lora is None:
                return compressed.moe(self, hidden_states, topk_ids, topk_weights, **options)
            weights: Any = (
                compressed.matrices(self) if isinstance(compressed, QuantizedExperts) else compressed.weights(self)
            )
            return lora_forward(self, lora, weights, hidden_states, topk_ids, topk_weights)
        # Each attribute is read once: under a parametrization every access makes the weight anew.
        gate_up_proj: Tensor = getattr(self, self._first)
        down_proj: Tensor = self.down_proj
        if self.transposed:
            gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
        if lora is not None:
            return lora_forward(self, lora, (gate_up_proj, down_proj), hidden_states, topk_ids, topk_weights)
        return moe(hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, **options)

    @property
    def format(self) -> Format | None:
        """The format of quantised weights, None for plain ones; see switchgear.compress."""
        return format_of(self)

    def pack_(self, *, panels: bool = False, compact: bool = False) -> Experts:
        """Lays transposed projections in the order that the CPU reads best, see `pack_weights`; no change to others.

        panels: lay all projections for inference instead: see `pack_panels`.
        compact: store them in 4 bits fewer each instead, without loss, for decoding: see `compress.compact`.
        """
        if panels and compact:
            raise ValueError("panels: expected either panels or compact, got both")
        (pack_panels if panels else compress_compact if compact else pack_weights)(self)
        return self

    def unpack_(self) -> Experts:
        """Takes pack_ back."""
        for take_back in (expand, unpack_panels, unpack_weights):
            take_back(self)
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.hidden_size}, {self.intermediate_size}, num_experts={self.num_experts}", self.activation]
        parts += ["gated" if self.gated else "plain"]
        parts += [name for name in ("interleaved", "transposed") if getattr(self, name)]
        if self.down_proj_bias is not None:
            parts.append("bias")
        if self.limit is not None:
            parts.append(f"limit={self.limit}")
        if self.format is not None:
            parts.append(str(self.format))
        if (stored := stored_of(self)) is not None:
            parts.append(stored.form.name)
        return ", ".join(parts)


def experts_class(parallel: ExpertParallel | None) -> Callable[..., Experts]:
    """Experts, or what makes those that are distributed over the ranks of `parallel`."""
    if parallel is None:
        return Experts
    from switchgear.parallel import ParallelExperts  # imports torch.distributed, which others do not need

    return functools.partial(ParallelExperts, parallel=parallel)


def _layout_of(module: nn.Module) -> Layout | None:
    if not isinstance(module, Experts) or compressed_of(module) is not None:
        return None
    return Layout((module._first, "down_proj"), module.transposed, module.gated and not module.interleaved)


FINDERS.append(_layout_of)
