# SPDX-License-Identifier: BSD-3-Clause
"""ExpertLayer: the weights of a block's experts, and what each expert computes, for switchgear's and Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.complaints import list_of_names
from switchgear.experts import Experts
from switchgear.functional import Plan, glu, grouped_gemm, plan
from switchgear.integrations.gates import get_own_gate
from switchgear.integrations.moe_blocks import MoeBlock, is_transposed, moe_blocks
from switchgear.layers.virtual import VirtualExperts
from switchgear.weights.checks import check_replaceable


class ExpertRows(NamedTuple):
    """What the experts compute, a row per choice, in the order of the plan: those of expert 0 first. n rows are
    assigned."""

    experts: Tensor  # [n] int64
    tokens: Tensor  # [n] int64
    weights: Tensor  # [n] float64, topk_weights of the row
    offsets: Tensor  # [E+1] int32
    inputs: Tensor  # [n,H], of the first projection
    hidden: Tensor  # [n,I], input of the second projection
    outputs: Tensor  # [n,H], before weighting


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of a block. Projections are views [E,out,in], whatever the layout of the parameters."""

    name: str
    block: MoeBlock
    experts: Any  # the module with the parameters
    first: str  # names of the parameters
    second: str
    transposed: bool
    activate: Callable[[Tensor], Tensor]  # [n,N] -> [n,I]
    scales_input: bool  # weights multiply the input of the experts (Llama 4)

    @property
    def num_experts(self) -> int:
        return len(self.projection(1))

    @property
    def hidden_size(self) -> int:
        return int(self.projection(1).shape[1])

    @property
    def intermediate_size(self) -> int:
        return int(self.projection(1).shape[2])

    def projection(self, index: int) -> Tensor:
        """[E,N,H], or [E,H,I] for index 1: a view of the parameter, without its gradient."""
        return self._projection(index).detach()

    def _projection(self, index: int) -> Tensor:
        weight: Tensor = self.owner(index)._parameters[self.key(index)]
        if index == 0:  # LongCat's has rows of zero experts, which nothing reads
            weight = weight[: len(self.owner(1)._parameters[self.key(1)])]
        return weight.mT if self.transposed else weight

    def _bias(self, index: int) -> Tensor | None:
        bias: Tensor | None = self.owner(index)._parameters.get(f"{self.key(index)}_bias")
        return bias

    def owner(self, index: int) -> Any:
        """The module that holds a projection."""
        path, _, _ = (self.first, self.second)[index].rpartition(".")
        return self.experts.get_submodule(path)

    def key(self, index: int) -> str:
        return (self.first, self.second)[index].rpartition(".")[2]

    def rows(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> ExpertRows:
        """The computation of the chosen experts for tokens x [T,H]."""
        weights = topk_weights.double()
        if self.scales_input:
            top_k = topk_ids.shape[1]
            x = (x[:, None] * topk_weights[..., None].to(x.dtype)).flatten(0, 1)
            rows = self._rows(x, topk_ids.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
            return rows._replace(tokens=rows.tokens // top_k)
        return self._rows(x, topk_ids, weights)

    def _rows(self, x: Tensor, topk_ids: Tensor, weights: Tensor) -> ExpertRows:
        table = plan(topk_ids.int(), self.num_experts)
        count = int(table.expert_offsets[-1])
        tokens = table.token_indices[:count].long()
        dtype = self.projection(0).dtype  # models may keep weights in a wider dtype
        inputs = x.to(dtype)[tokens]
        hidden, outputs = self.apply(inputs, table.expert_offsets)
        sizes = table.expert_offsets.long().diff()
        experts = torch.arange(self.num_experts, device=x.device).repeat_interleave(sizes)
        return ExpertRows(
            experts, tokens, _by_slot(weights, table, count), table.expert_offsets, inputs, hidden, outputs
        )  # fmt: skip

    def apply(self, inputs: Tensor, offsets: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Any:
        """(hidden, outputs) of rows grouped by expert, with other weights [E,out,in] if given. Differentiable."""
        first = self._projection(0) if first is None else first
        second = self._projection(1) if second is None else second
        h = grouped_gemm(inputs, first, offsets, bias=self._bias(0))
        hidden = self.activate(h)
        outputs = grouped_gemm(hidden, second, offsets, bias=self._bias(1))
        if getattr(self.experts, "has_post_expert_norm", False):
            outputs = self.experts.post_expert_norm(outputs)
        return hidden, outputs

    def every_expert(self, x: Tensor) -> Tensor:
        """[T,E,H] float32: what each expert returns for each token. Beside the result, one expert's rows are in
        memory at a time."""
        count, dtype = self.num_experts, self.projection(0).dtype
        result = x.new_empty(len(x), count, self.hidden_size, dtype=torch.float32)
        for expert in range(count):
            offsets = torch.zeros(count + 1, dtype=torch.int32, device=x.device)
            offsets[expert + 1 :] = len(x)
            result[:, expert] = self.apply(x.to(dtype), offsets)[1]
        return result


def _by_slot(weights: Tensor, table: Plan, count: int) -> Tensor:
    slots = table.slot_indices.long()
    assigned = slots >= 0
    result = weights.new_zeros(count)
    result[slots[assigned]] = weights[assigned]
    return result


def expert_layers(
    model: nn.Module, names: Collection[str] | None = None, argument: str = "layers"
) -> dict[str, ExpertLayer]:
    """The MoE layers of a model by the names of their blocks, all or some. Raises ValueError if there are none, and for
    unknown names, which came from `argument`."""
    blocks = moe_blocks(model)
    if not blocks:
        raise ValueError("model: expected MoE layers of switchgear or Hugging Face, got none")
    if names is not None:
        names = list_of_names(argument, names)
        if missing := [name for name in names if name not in blocks]:
            raise ValueError(f"{argument}: expected layers of {', '.join(blocks)}; got {missing[0]}")
        if not names:
            raise ValueError(f"{argument}: expected at least one layer of {', '.join(blocks)}, got none")
    return {name: expert_layer(block) for name, block in blocks.items() if names is None or name in names}


def expert_layer(block: MoeBlock) -> ExpertLayer:
    """Of a block. Raises ValueError, which names it, unless its experts are plain stacked parameters here."""
    name = block.name or "model"
    experts: Any = block.experts
    if isinstance(experts, VirtualExperts):
        experts = experts.experts
    check_replaceable(name, experts)
    if getattr(experts, "parallel", None) is not None:
        raise ValueError(f"{name}: expected all experts in this process, got {type(experts).__name__}")
    first, second = _names(name, experts)
    for path in (first, second):
        owner, _, key = path.rpartition(".")
        weight = experts.get_submodule(owner)._parameters.get(key)
        if type(weight) is not nn.Parameter:
            raise ValueError(f"{name}: expected a plain parameter {path}, got {type(weight).__name__}")
    scales_input = type(experts).__name__.startswith("Llama4") or bool(getattr(block.block, "scale_input", False))
    transposed = is_transposed(experts)
    return ExpertLayer(name, block, experts, first, second, transposed, _activation(experts), scales_input)


def _names(name: str, experts: nn.Module) -> tuple[str, str]:
    for first, second in (
        ("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"),
    ):  # fmt: skip
        if all(_is_stack(experts, path) for path in (first, second)):
            return first, second
    raise ValueError(f"{name}: expected experts stacked in two parameters [E,…], got {type(experts).__name__}")


def _is_stack(experts: nn.Module, path: str) -> bool:
    owner, _, key = path.rpartition(".")
    try:
        weight = experts.get_submodule(owner)._parameters.get(key)
    except AttributeError:
        return False
    return weight is not None and weight.dim() == 3


def _activation(experts: Any) -> Callable[[Tensor], Tensor]:
    if not isinstance(experts, Experts):
        return get_own_gate(experts)
    options: dict[str, Any] = {
        "activation": experts.activation, "gated": experts.gated, "interleaved": experts.interleaved,
        "alpha": experts.alpha, "limit": experts.limit,
    }  # fmt: skip
    return lambda h: glu(h, **options)
