# SPDX-License-Identifier: BSD-3-Clause
"""Experts: the weights of all experts of a layer, with the names and layouts of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Count, Finite, FloatDtype, Size, checked
from switchgear.functional import moe
from switchgear.functional.arguments import Limit
from switchgear.reference.activations import AnyActivation
from switchgear.utils.modules import replicate
from switchgear.weights import Layout, advise_huge_pages, stored_of, weights_of
from switchgear.weights.module import attribute, explain_stored_keys
from switchgear.weights.state import extend


class Experts(nn.Module):
    """E feed-forward networks with stacked weights: y = Σ_k w_k · (glu(x · W_guᵀ + b_gu) · W_dᵀ + b_d).

    Args:
        hidden_size, intermediate_size, num_experts: H, I, E.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swiglu_oai" (gated only); or a function of gate
            and up [S,I], or of h [S,I] if not gated, that returns [S,I]. Rows are ordered by expert; those of empty
            choices are zeros. A module is registered as `activation`, so its parameters train. Not for offloaded
            experts. See `moe` for its speed.
        gated: act(gate) ⊙ up; otherwise act(h), and the first projection is called up_proj.
        bias: learned biases of both projections.
        interleaved: gates and ups alternate in the rows of gate_up_proj, instead of gates first.
        transposed: store the projections as [E,in,out] instead of [E,out,in].
        alpha, limit: see `glu`.

    Parameters (Hugging Face checkpoints load without conversion):
        gate_up_proj [E,2I,H] (up_proj [E,I,H] if not gated), down_proj [E,H,I]; transposed [E,H,2I] and [E,I,H]
        gate_up_proj_bias [E,2I] (up_proj_bias [E,I]), down_proj_bias [E,H] if bias

    Every parameter gets a gradient at every step; it is zero for experts without tokens.

    switchgear.store converts the projections to other forms; switchgear.adapters adds adapters.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None
    activation: Any  # a name or a function; code for named ones checks

    @checked
    def __init__(
        self,
        hidden_size: Size,
        intermediate_size: Size,
        num_experts: Count,  # a rank may have none
        *,
        activation: AnyActivation = "silu",
        gated: bool = True,
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: Finite = 1.702,
        limit: Limit | None = None,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
    ) -> None:
        super().__init__()
        if not gated and (interleaved or activation == "swiglu_oai"):
            raise ValueError(f"gated: expected True for {'interleaved' if interleaved else activation}, got False")
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.activation, self.gated, self.alpha, self.limit = activation, gated, alpha, limit
        self.interleaved, self.transposed = interleaved, transposed
        self._first = "gate_up_proj" if gated else "up_proj"
        self._first_bias = f"{self._first}_bias"
        self.slice_counts: Sequence[int] | None = None  # of experts that are slices: how many make up theirs
        self._layout = Layout((self._first, "down_proj"), transposed, gated and not interleaved)

        def parameter(*shape: int) -> nn.Parameter:
            data = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            advise_huge_pages(data)
            return nn.Parameter(data)

        def projection(size_in: int, size_out: int) -> nn.Parameter:
            return parameter(size_in, size_out) if transposed else parameter(size_out, size_in)

        width = 2 * intermediate_size if gated else intermediate_size
        self.register_parameter(self._first, projection(hidden_size, width))
        self.register_parameter("down_proj", projection(intermediate_size, hidden_size))
        self.register_parameter(self._first_bias, parameter(width) if bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises each expert as two torch.nn.Linear: uniform within ±1/√fan_in."""
        for name, fan_in in ((self._first, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self._shrink_slices()

    @torch.no_grad()
    def _shrink_slices(self) -> None:
        """The fan_in of a slice's down_proj is that of the whole expert."""
        if self.slice_counts is not None:
            down = self.down_proj
            factors = [1 / math.sqrt(count) for count in self.slice_counts]
            down.mul_(replicate(torch.tensor(factors, dtype=down.dtype, device=down.device)[:, None, None], down))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., H], topk_ids [..., K] (-1 for none) and topk_weights [..., K] -> [..., H]; see `moe`."""
        gate_up_proj, down_proj = weights_of(self, self._layout)
        return moe(
            hidden_states,
            gate_up_proj,
            down_proj,
            topk_ids,
            topk_weights,
            activation=self.activation,
            gated=self.gated,
            interleaved=self.interleaved,
            gate_up_bias=attribute(self, self._first_bias),
            down_bias=attribute(self, "down_proj_bias"),
            alpha=self.alpha,
            limit=self.limit,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        *_, unexpected, errors = args
        if stored_of(self) is not None:
            return
        given = {name: state_dict.get(prefix + name) for name in self._layout.names}
        lacking = [name for name, tensor in given.items() if tensor is None or tensor.itemsize == 1]  # 1: of fp8
        if lacking and (reason := explain_stored_keys(lacking, prefix, unexpected)):
            errors.append(reason)

    def extra_repr(self) -> str:
        parts = [
            f"{self.hidden_size}, {self.intermediate_size}, num_experts={self.num_experts}",
            _name(self.activation),
        ]
        parts += ["gated" if self.gated else "plain"]
        parts += [name for name in ("interleaved", "transposed") if getattr(self, name)]
        if self.down_proj_bias is not None:
            parts.append("bias")
        if self.limit is not None:
            parts.append(f"limit={self.limit}")
        if (stored := stored_of(self)) is not None:
            parts.append(str(stored.form))
        return ", ".join(parts)


def _name(activation: str | Callable[..., Tensor]) -> str:
    return activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)


extend("layout", lambda module: module._layout if isinstance(module, Experts) else None)
