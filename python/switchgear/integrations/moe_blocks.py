# SPDX-License-Identifier: BSD-3-Clause
"""The MoE blocks of a model, ours or of Hugging Face: where the gate, the experts and their weights are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from switchgear.adapters.wrappers import is_wrapper
from switchgear.integrations.modules import recognize
from switchgear.routing.router import Router
from switchgear.weights.store import TOP_K_FIELDS

_GATES = ("gate", "router")  # transformers has no third name
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases", "moe_statics.e_score_correction_bias")
_LINEARS = ("gate", "layer", "classifier", "wg", "proj")  # where a router holds its weight, if not itself
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class ConfigFields(NamedTuple):
    """The config of a Hugging Face block, and the names of its fields; None if it has no such field."""

    config: Any
    num_experts: str | None
    top_k: str | None


@dataclass(frozen=True)
class MoeBlock:
    """A module with a gate and experts.

    Attributes:
        name, block: the module that holds both, as in model.named_modules(). In Gemma 4 it is the decoder layer, since
            no module holds them alone.
        gate: the router, a submodule of block. None if the block has none.
        experts: the module of the experts; of JetMoE the block itself.
        num_experts: E. Routers may have more classes: those of skipped tokens (Zaya) or of identities (LongCat) follow.
            Our virtual experts count.
        top_k: choices per token; None if it varies.
        shared: the shared experts.
        layer: the name of the block in a RoutingTrace: that of our router, or that of Hugging Face's experts.
    """

    name: str
    block: nn.Module
    gate: nn.Module | None
    experts: nn.Module
    num_experts: int
    top_k: int | None
    shared: nn.Module | None
    layer: str
    model_config: Any = None

    @property
    def is_ours(self) -> bool:
        return isinstance(self.gate, Router)

    @property
    def num_real(self) -> int:
        """The experts that have weights. Virtual ones follow them."""
        return int(getattr(self.experts, "num_real", self.num_experts))

    def gate_weight(self) -> nn.Parameter | None:
        """The weight of a linear gate, [E,H] (more rows if it has more classes); None for other gates."""
        for owner in (self.gate, *(getattr(self.gate, name, None) for name in _LINEARS)):
            weight = getattr(owner, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 2:
                return weight
        return None

    def selection_bias(self, flat: bool = True) -> Tensor | None:
        """What is added to the scores for the choice only, a value per class, such as e_score_correction_bias. [C], or
        the tensor of the module itself if not flat."""
        for owner in (self.gate, self.block):
            for name in _BIASES:
                bias: Any = owner
                for part in name.split("."):
                    bias = getattr(bias, part, None)
                if isinstance(bias, Tensor):
                    return bias.reshape(-1) if flat and bias.dim() > 1 else bias
        return None

    def groups(self) -> tuple[int, int] | None:
        """(n_group, topk_group) of a router that selects groups of experts first; None for others."""
        gate: Any = self.gate
        names = ("num_groups", "topk_groups") if self.is_ours else ("num_group", "topk_group")
        groups, chosen = (getattr(gate, name, None) for name in names)
        if not groups or not chosen or groups == 1:
            return None
        if getattr(gate, "topk_method", "") == "greedy":
            return None
        return int(groups), int(chosen)

    def config_fields(self) -> ConfigFields:
        """Where a Hugging Face config says the number of experts and top_k. Raises ValueError for other models."""
        for config in _list_configs(self):
            fields = vars(config)
            num_experts = next((n for n in _NUM_EXPERTS if _is_meant(fields.get(n), self.num_experts)), None)
            if num_experts is not None:
                return ConfigFields(config, num_experts, next((n for n in TOP_K_FIELDS if n in fields), None))
        raise ValueError(f"{self.name or 'model'}: expected a block of a Hugging Face model, got one without a config")

    @property
    def config(self) -> Any:
        return self.config_fields().config


def moe_blocks(model: nn.Module) -> dict[str, MoeBlock]:
    """All blocks of a model by name, in the order of model.named_modules(). Empty if there are none.

    Ours are modules with a Router `gate` and `experts` (MoE). Those of Hugging Face are the parents of the experts
    modules that switchgear knows, whatever runs them now. Blocks without a router per token are left out.
    """
    ours = {block.name: block for block in _find_ours(model)}
    return ours or {block.name: block for block in _find_hugging_face(model)}


def _find_ours(model: nn.Module) -> Iterator[MoeBlock]:
    module: Any
    for name, module in model.named_modules():
        gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
        if isinstance(gate, Router) and isinstance(experts, nn.Module):
            layer = f"{name}.gate" if name else "gate"
            shared = getattr(module, "shared_experts", None)
            top_k = gate.top_k if gate.top_k is not None else getattr(gate.select, "top_k", None)
            yield MoeBlock(name, module, gate, experts, gate.num_experts, top_k, shared, layer)


def _find_hugging_face(model: nn.Module) -> Iterator[MoeBlock]:
    config = getattr(model, "config", None)
    for name, module in model.named_modules():
        found = recognize(module)
        if found is None or not found.has_choice:
            continue
        if _find_child(module, _GATES) is not None:  # Llama 4, JetMoE: the table's entry is the block
            block: Any = module
            block_name, experts = name, getattr(module, "experts", module)
        else:
            block_name = name.rpartition(".")[0]
            while block_name and _wraps_experts(model.get_submodule(block_name)):
                block_name = block_name.rpartition(".")[0]
            block, experts = (model.get_submodule(block_name) if name else module), module
        gate = _find_child(block, _GATES)
        num_experts = _count_experts(experts, gate)
        shared = _find_child(block, SHARED)
        top_k = _find_top_k(gate, block, experts)
        yield MoeBlock(block_name, block, gate, experts, num_experts, top_k, shared, name, config)


def _wraps_experts(module: nn.Module) -> bool:
    """Whether a parent of experts is a wrapper: of PEFT, with copies in a ModuleDict, or one that passes attributes on,
    as those of torch.compile and torch's checkpointing do."""
    return is_wrapper(module) or isinstance(module, nn.ModuleDict) or hasattr(module, "_apply_gate")


def is_expert_parallel(experts: Any) -> bool:
    """Whether transformers has spread the experts over ranks. Then experts.num_experts counts those of this rank, while
    the ids that they are called with count all."""
    return getattr(experts, "_is_expert_parallel", False) is True


def _find_child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if (child := module._modules.get(name)) is not None), None)


def _count_experts(experts: Any, gate: Any) -> int:
    if is_expert_parallel(experts):
        return int(next(iter(experts._parameters.values())).shape[0])  # a DTensor has the experts of all ranks
    for owner, name in ((experts, "num_routed_experts"), (experts, "num_experts"), (gate, "num_experts")):
        if isinstance(count := getattr(owner, name, None), int):
            return count
    raise ValueError(f"model: expected a number of experts in {type(experts).__name__}, got none")


def _find_top_k(gate: Any, block: Any, experts: Any) -> int | None:
    name = type(block).__name__
    if "SwitchTransformers" in name:
        return 1
    if "Nllb" in name:
        return 2
    for owner in (gate, block):
        if isinstance(top_k := getattr(owner, "top_k", None), int):
            return top_k
    for config in (getattr(owner, "config", None) for owner in (gate, experts)):
        for field in TOP_K_FIELDS:
            if isinstance(top_k := getattr(config, field, None), int):
                return top_k
    return None


def is_transposed(experts: Any) -> bool:
    """Whether the weights of stacked experts are [E,in,out]."""
    if "Llama4" in type(experts).__name__:
        return True
    return bool(getattr(experts, "is_transposed", getattr(experts, "transposed", False)))


def _list_configs(block: MoeBlock) -> Iterator[Any]:
    """Configs that may describe the block: its own first, then the model's and the parts of that."""
    seen: set[int] = set()
    waiting = [getattr(owner, "config", None) for owner in (block.experts, block.gate, block.block)]
    waiting.append(block.model_config)
    while waiting:
        config = waiting.pop(0)
        if config is None or id(config) in seen or not hasattr(config, "sub_configs"):
            continue
        seen.add(id(config))
        yield config
        waiting += [getattr(config, name, None) for name in config.sub_configs]


def _is_meant(value: Any, num_experts: int) -> bool:
    return value == num_experts or (isinstance(value, (list, tuple)) and num_experts in value)
