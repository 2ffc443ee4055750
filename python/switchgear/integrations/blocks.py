# SPDX-License-Identifier: BSD-3-Clause
"""The weights of a model's MoE blocks, read and written in one vocabulary by conversion, compression and distillation.

network        FeedForward: the weights of one feed-forward network, such as an expert or a shared expert
block          MoeBlock (moe_blocks.py): a module with a router and experts, switchgear's or Hugging Face's
expert layer   ExpertLayer: the experts of a block, with both projections as [E,out,in] in any layout of the parameters
expert tensor  ExpertTensor: a tensor of a block with a dimension of experts, which can be read and replaced
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import list_of_names
from switchgear.experts import Experts
from switchgear.functional import grouped_gemm, plan
from switchgear.integrations.gates import get_own_gate
from switchgear.integrations.moe_blocks import MoeBlock, is_transposed, moe_blocks
from switchgear.layers.shared import SharedExperts
from switchgear.layers.virtual import VirtualExperts
from switchgear.reference import activations
from switchgear.routing.router import Router
from switchgear.weights.module import check_plain
from switchgear.weights.selected import selection_of

STEP_COUNTS = "tokens_per_expert"  # a Router's attribute


# ---- networks --------------------------------------------------------------------------------------------------------

TENSORS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class FeedForward:
    """down · (act(gate · x) ⊙ (up · x)), or down · act(up · x) without a gate.

    gate and up [I,H], down [H,I]; up_bias and gate_bias [I], down_bias [H].
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    activation: str = "silu"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.up.shape[1])

    @property
    def intermediate_size(self) -> int:
        """I."""
        return int(self.up.shape[0])

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.gate is not None

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return self.down_bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        """x [...,H] -> [...,H], in torch."""
        h = F.linear(x, self.up, self.up_bias)
        if self.gate is not None:
            h = torch.cat((F.linear(x, self.gate, self.gate_bias), h), -1)
        a = activations.glu_of(h.flatten(0, -2), self.activation, self.gated, False, 1.702, 0.0)
        return F.linear(a.view(*h.shape[:-1], -1), self.down, self.down_bias)

    def map_tensors(self, function: Callable[[str, Tensor], Tensor], names: Sequence[str] = TENSORS) -> FeedForward:
        """The network with function(name, tensor) for each tensor of these names that there is."""
        found = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        made: dict[str, Any] = {name: function(name, tensor) for name, tensor in found.items()}
        return replace(self, **made)

    def neurons(self, index: Tensor, scale: float = 1.0) -> FeedForward:
        """The network of the neurons `index` [n] alone, its output multiplied by `scale`, down_bias included."""

        def select(name: str, tensor: Tensor) -> Tensor:
            if name == "down_bias":
                return tensor * scale
            return tensor[:, index] * scale if name == "down" else tensor[index]

        return self.map_tensors(select)

    def padded(self, width: int) -> FeedForward:
        """The same function with zero neurons up to `width`; act(0) · 0 = 0 for every activation."""
        more = width - self.intermediate_size

        def pad(name: str, tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, 0, 0, more) if name in ("gate", "up") else (0, more))

        return self.map_tensors(pad, [name for name in TENSORS if name != "down_bias"])

    def biased(self) -> FeedForward:
        """The same function with biases, zeros where there are none."""
        zeros: dict[str, Any] = {}
        for name in ("gate", "up", "down"):
            weight, bias = getattr(self, name), f"{name}_bias"
            if weight is not None and getattr(self, bias) is None:
                zeros[bias] = weight.new_zeros(len(weight))
        return replace(self, **zeros)

    def expert(self, interleaved: bool = False) -> dict[str, Tensor]:
        """Its weights by name of the parameters of Experts: gate_up_proj [2I,H] (up_proj [I,H]), down_proj [H,I], …."""
        first = "up_proj" if self.gate is None else "gate_up_proj"
        found = {first: join_gate(self.gate, self.up, interleaved), "down_proj": self.down}
        if self.down_bias is not None:
            assert self.up_bias is not None
            found[f"{first}_bias"] = join_gate(self.gate_bias, self.up_bias, interleaved)
            found["down_proj_bias"] = self.down_bias
        return found

    def options(self) -> dict[str, Any]:
        """The keyword arguments of Experts, SharedExperts and MoE that describe it."""
        return {
            "activation": self.activation, "gated": self.gated, "bias": self.has_bias,
            "device": self.up.device, "dtype": self.up.dtype,
        }  # fmt: skip

    def module(self) -> SharedExperts:
        """A SharedExperts with copies of these weights."""
        made = SharedExperts(self.hidden_size, self.intermediate_size, **self.options())
        write_shared(made, self)
        return made


def join_gate(gate: Tensor | None, up: Tensor, interleaved: bool = False) -> Tensor:
    """The rows of a first projection [2I,…], which has gate and up [I,…]; up itself without a gate."""
    if gate is None:
        return up
    return torch.stack((gate, up), 1).flatten(0, 1) if interleaved else torch.cat((gate, up))


def split_gate(rows: Tensor, gated: bool, interleaved: bool = False) -> tuple[Tensor | None, Tensor]:
    """(gate, up) of the rows of a first projection, the inverse of join_gate."""
    if not gated:
        return None, rows
    gate, up = (torch.cat((rows[0::2], rows[1::2])) if interleaved else rows).chunk(2)
    return gate, up


def read_network(experts: Experts, expert: int) -> FeedForward:
    """One of switchgear's experts. Shares the module's memory, unless its rows are interleaved."""
    first, down = experts.get_parameter(experts._first)[expert].detach(), experts.down_proj[expert].detach()
    if experts.transposed:
        first, down = first.mT, down.mT
    network = FeedForward(*split_gate(first, experts.gated, experts.interleaved), down, experts.activation)
    if experts.down_proj_bias is None:
        return network
    rows = experts.get_parameter(f"{experts._first}_bias")[expert].detach()
    gate_bias, up_bias = split_gate(rows, experts.gated, experts.interleaved)
    return replace(network, gate_bias=gate_bias, up_bias=up_bias, down_bias=experts.down_proj_bias[expert].detach())


@torch.no_grad()
def write_network(experts: Experts, expert: int, network: FeedForward) -> None:
    """Copies a network of the same sizes into one of switchgear's experts."""
    for name, tensor in network.expert(experts.interleaved).items():
        experts.get_parameter(name)[expert] = tensor.mT if experts.transposed and tensor.dim() == 2 else tensor


@torch.no_grad()
def write_shared(module: SharedExperts, network: FeedForward) -> None:
    """Copies a network of the same sizes into a module."""
    for name, linear in (("gate", module.gate_proj), ("up", module.up_proj), ("down", module.down_proj)):
        if linear is not None:
            linear.weight.copy_(getattr(network, name))
            if linear.bias is not None:
                linear.bias.copy_(getattr(network, f"{name}_bias"))


# ---- expert tensors --------------------------------------------------------------------------------------------------


class ExpertTensor(NamedTuple):
    """A tensor of a module, and its dimension of experts."""

    module: nn.Module
    name: str
    dim: int = 0

    @property
    def _holder(self) -> dict[str, Any]:
        """The dict of the module that has the tensor. A router's counts of a step are no buffer."""
        holders: tuple[Any, ...] = (self.module._parameters, self.module._buffers, vars(self.module))
        return next(holder for holder in holders if holder.get(self.name) is not None)

    @property
    def value(self) -> Tensor:
        """The parameter, buffer or attribute itself."""
        value: Tensor = self._holder[self.name]
        return value

    @property
    def tensor(self) -> Tensor:
        """The values, without their gradient."""
        return self.value.detach()

    def put(self, tensor: Tensor) -> None:
        """Replaces the tensor. In place of a parameter it becomes one, with the same requires_grad."""
        holder = self._holder
        old = holder[self.name]
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        holder[self.name] = tensor


def router_tensors(block: MoeBlock) -> list[ExpertTensor]:
    """The tensors of a router with a dimension of experts. Raises ValueError for routers that cannot be cut."""
    where = block.name or "model"
    weight = block.gate_weight()
    if weight is None or block.gate is None:
        score = getattr(block.gate, "score", None)
        if score is not None:
            raise ValueError(f"{where}: expected a linear router without score=, got score={type(score).__name__}(…)")
        raise ValueError(f"{where}: expected a linear router, got {type(block.gate).__name__}")
    classes, hidden_size = weight.shape
    if classes != block.num_experts:
        raise ValueError(f"{where}: expected a router of {block.num_experts} classes, as experts, got {classes}")
    found: list[ExpertTensor] = []
    if isinstance(block.gate, Router):
        if selection_of(block.gate) is not None:
            raise ValueError(f"{where}: expected no experts that train alone; call finetune.unfreeze(model) first")
        block.gate.check_resizable(where)
    beside = [m for m in block.block.children() if m not in (block.gate, block.experts, block.shared)]
    owners = [*block.gate.modules(), block.block, *(m for m in beside if not list(m.children()))]
    for owner in dict.fromkeys(owners):
        inside = owner in set(block.gate.modules())
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if tensor is weight:
                found.append(ExpertTensor(owner, name, 0))
                continue
            is_named = "bias" in name or "expert" in name
            if tensor.numel() == classes and classes in (tensor.shape[0], tensor.shape[-1]) and tensor.dim() <= 2:
                if is_named or (inside and classes != hidden_size):
                    found.append(ExpertTensor(owner, name, 0 if tensor.shape[0] == classes else tensor.dim() - 1))
            elif inside and not tensor.is_floating_point():
                raise ValueError(f"{where}: expected a router without tables, got {name} of {type(owner).__name__}")
    if isinstance(block.gate, Router) and block.gate.tokens_per_expert is not None:
        found.append(ExpertTensor(block.gate, STEP_COUNTS, 0))
    return found


def expert_tensors(layers: Iterable[ExpertLayer]) -> list[ExpertTensor]:
    """All tensors of blocks with a dimension of experts."""
    return [tensor for layer in layers for tensor in (*router_tensors(layer.block), *layer.tensors())]


# ---- expert layers ---------------------------------------------------------------------------------------------------


class ExpertRows(NamedTuple):
    """What the experts compute, a row per choice, in the order of the plan: expert 0 first. n rows are
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
    experts: Any  # the module that computes
    parameters: tuple[ExpertTensor, ExpertTensor]  # the first and the second projection
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
        weight = self.parameters[index].value
        if index == 0:  # LongCat's has rows of zero experts, which nothing reads
            weight = weight[: len(self.parameters[1].value)]
        return weight.mT if self.transposed else weight

    def _bias(self, index: int) -> Tensor | None:
        module, name, _ = self.parameters[index]
        return module._parameters.get(f"{name}_bias")

    def tensors(self) -> list[ExpertTensor]:
        """The tensors [E,…] of the experts: projections, biases, and what else there is per expert."""
        return [
            ExpertTensor(owner, name)
            for owner in dict.fromkeys(parameter.module for parameter in self.parameters)
            for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
            if tensor.dim() >= 2 and tensor.shape[0] == self.num_experts
        ]

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
        by_slot, slots = weights.new_zeros(count), table.slot_indices.long()
        by_slot[slots[slots >= 0]] = weights[slots >= 0]
        return ExpertRows(experts, tokens, by_slot, table.expert_offsets, inputs, hidden, outputs)

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
    """The experts of a block. Raises ValueError, which names it, unless they are plain stacked parameters here."""
    name = block.name or "model"
    experts: Any = block.experts
    if isinstance(experts, VirtualExperts):
        experts = experts.experts
    check_plain(name, experts, are_replaced=True)
    if getattr(experts, "parallel", None) is not None:
        raise ValueError(f"{name}: expected all experts in this process, got {type(experts).__name__}")
    parameters = _projections(name, experts)
    for parameter in parameters:
        if type(parameter.value) is not nn.Parameter:
            got = type(parameter.value).__name__
            raise ValueError(f"{name}: expected a plain parameter {parameter.name}, got {got}")
    scales_input = type(experts).__name__.startswith("Llama4") or bool(getattr(block.block, "scale_input", False))
    return ExpertLayer(name, block, experts, parameters, is_transposed(experts), get_own_gate(experts), scales_input)


def _projections(name: str, experts: nn.Module) -> tuple[ExpertTensor, ExpertTensor]:
    for names in (
        ("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"),
    ):  # fmt: skip
        first, second = (_stacked(experts, path) for path in names)
        if first is not None and second is not None:
            return first, second
    raise ValueError(f"{name}: expected experts stacked in two parameters [E,…], got {type(experts).__name__}")


def _stacked(experts: nn.Module, path: str) -> ExpertTensor | None:
    """A parameter of three dimensions at a path."""
    owner, _, name = path.rpartition(".")
    try:
        module = experts.get_submodule(owner)
    except AttributeError:
        return None
    weight = module._parameters.get(name)
    return None if weight is None or weight.dim() != 3 else ExpertTensor(module, name)
