# SPDX-License-Identifier: BSD-3-Clause
"""Hook points of a Hugging Face block: which calls say where a token goes, and how to write another choice there.

The gate's output has the logits. The experts' arguments have the choice, after all that a block does to it. So most
blocks get a hook on both. In a few, only the router's output says who is chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from switchgear.integrations.experts import is_of, skips_the_last_id
from switchgear.integrations.moe_blocks import MoeBlock, is_expert_parallel
from switchgear.integrations.undecorated import read_jetmoe, read_nllb


class Choice(NamedTuple):
    """What the experts of a block get."""

    x: Tensor  # [T,H]
    topk_ids: Tensor  # [T,K], -1 for an empty slot; ids from num_experts on are classes without weights
    topk_weights: Tensor  # [T,K]
    router_logits: Tensor | None  # [T, classes of the router]


class Receiver(Protocol):
    """Receives each routing decision; may replace it."""

    logits: Tensor | None  # the gate's last output

    def receive(self, choice: Choice) -> Choice:
        """Returns the choice that the experts get instead; the same object if nothing changes it."""


class ExpertsHook:
    """A hook on experts called with (hidden_states, ids [T,K], weights [T,K])."""

    def read(self, block: MoeBlock, x: Tensor, ids: Tensor, weights: Tensor, logits: Tensor | None) -> Choice:
        ids = ids.reshape(-1, ids.shape[-1])
        classes = block.num_experts
        if logits is not None and not _has_apply_gate(block):
            classes = max(classes, logits.shape[-1])  # LongCat: identities
        ids = torch.where((ids < 0) | (ids >= classes), -1, ids)  # sentinels of expert parallelism
        return Choice(x.reshape(-1, x.shape[-1]), ids, weights.reshape(ids.shape), logits)

    def write(self, block: MoeBlock, choice: Choice) -> tuple[Tensor, Tensor]:
        """ids and weights as the experts take them. An empty slot has the id E if they skip it, else 0 with the weight
        0: transformers' grouped_mm would leave the rows of id E undefined."""
        empty = choice.topk_ids < 0
        if _has_apply_gate(block):
            empty = empty | (choice.topk_ids >= block.num_experts)  # Zaya: the class of skipped tokens
        ids = torch.where(empty, block.num_experts if _skips_the_last_id(block) else 0, choice.topk_ids)
        return ids.long(), choice.topk_weights.masked_fill(empty, 0)

    def register(self, block: MoeBlock, receiver: Receiver) -> list[Any]:
        def before(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            logits, receiver.logits = receiver.logits, None
            seen = self.read(block, given[names[0]], given[names[1]], given[names[2]], logits)
            choice = receiver.receive(seen)
            if choice is seen:
                return None
            ids, weights = self.write(block, choice)
            x = choice.x.reshape(given["hidden_states"].shape)
            return (x, ids, weights), {name: value for name, value in kwargs.items() if name not in names}

        handles = [block.experts.register_forward_pre_hook(before, with_kwargs=True)]
        if block.gate is not None:
            handles.append(_keep_logits(block, receiver))
        return handles


def _keep_logits(block: MoeBlock, receiver: Receiver) -> Any:
    def after(gate: nn.Module, args: Any, output: Any) -> None:
        receiver.logits = read_logits(block, output)

    assert block.gate is not None
    return block.gate.register_forward_hook(after)


def _has_apply_gate(block: MoeBlock) -> bool:
    return hasattr(block.experts, "_apply_gate")


def _skips_the_last_id(block: MoeBlock) -> bool:
    if is_expert_parallel(block.experts):  # the dispatch to ranks does not know this id
        return False
    implementation = getattr(getattr(block.experts, "config", None), "_experts_implementation", None)
    if not _has_apply_gate(block) or implementation not in ("eager", "switchgear"):
        return False
    return implementation == "switchgear" or skips_the_last_id(block.experts)


class _Zaya(ExpertsHook):
    """Tokens that skip the experts come as expert 0 with the weight 0."""

    def read(self, block: MoeBlock, x: Tensor, ids: Tensor, weights: Tensor, logits: Tensor | None) -> Choice:
        choice = super().read(block, x, ids, weights, logits)
        return choice._replace(topk_ids=choice.topk_ids.masked_fill(choice.topk_weights == 0, -1))


class _Nllb(ExpertsHook):
    """(hidden_states, router_mask [T,C], router_probs [T,C]): the mask's values are used as ids of experts; see
    undecorated.py. They are seen as they run, and cannot be overridden."""

    def register(self, block: MoeBlock, receiver: Receiver) -> list[Any]:
        def before(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, mask, probs = args
            weights, ids = read_nllb(mask, probs, block.num_experts)
            logits, receiver.logits = receiver.logits, None
            receiver.receive(Choice(x, ids, weights, logits))

        return [block.experts.register_forward_pre_hook(before), _keep_logits(block, receiver)]


class RouterHook(ABC):
    """A hook on a router whose output says all; `read` and `write` translate it."""

    @abstractmethod
    def read(self, block: MoeBlock, x: Tensor, output: Any) -> Choice: ...

    @abstractmethod
    def write(self, block: MoeBlock, choice: Choice, output: Any) -> Any: ...

    def register(self, block: MoeBlock, receiver: Receiver) -> list[Any]:
        def after(gate: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            seen = self.read(block, args[0], output)
            choice = receiver.receive(seen)
            return None if choice is seen else self.write(block, choice, output)

        assert block.gate is not None
        return [block.gate.register_forward_hook(after)]


class _Llama4(RouterHook):
    """(scores [T,E], 0 for all others; logits). The scores multiply the experts' input."""

    def read(self, block: MoeBlock, x: Tensor, output: Any) -> Choice:
        scores, logits = output
        weights, ids = scores.topk(block.top_k, dim=-1)
        return Choice(x.reshape(-1, x.shape[-1]), ids, weights, logits)

    def write(self, block: MoeBlock, choice: Choice, output: Any) -> Any:
        scores, logits = output
        empty = choice.topk_ids < 0
        weights = choice.topk_weights.masked_fill(empty, 0).to(scores.dtype)
        return torch.zeros_like(scores).scatter_add(1, choice.topk_ids.clamp(min=0).long(), weights), logits


class _JetMoe(RouterHook):
    """(order of the choices by expert, their tokens, their weights, counts of the experts, logits)."""

    def read(self, block: MoeBlock, x: Tensor, output: Any) -> Choice:
        assert block.top_k is not None
        return Choice(x.reshape(-1, x.shape[-1]), *read_jetmoe(output, block.top_k), output[4])

    def write(self, block: MoeBlock, choice: Choice, output: Any) -> Any:
        empty = choice.topk_ids < 0
        experts, order = choice.topk_ids.clamp(min=0).long().flatten().sort(stable=True, dim=0)
        gates = choice.topk_weights.masked_fill(empty, 0).to(output[2].dtype).flatten()[order]
        tokens = order.div(choice.topk_ids.shape[1], rounding_mode="trunc")
        return order, tokens, gates, torch.bincount(experts, minlength=block.num_experts).tolist(), output[4]


class _Switch(RouterHook):
    """(mask [..., E], all zeros for a token past its expert's capacity; weight [..., 1]; logits [..., E])."""

    def read(self, block: MoeBlock, x: Tensor, output: Any) -> Choice:
        mask, weights, logits = output
        taken, ids = mask.reshape(-1, mask.shape[-1]).max(dim=-1, keepdim=True)
        ids = torch.where(taken > 0, ids, -1)
        return Choice(x.reshape(-1, x.shape[-1]), ids, weights.reshape(ids.shape), logits.flatten(0, -2))

    def write(self, block: MoeBlock, choice: Choice, output: Any) -> Any:
        mask, weights, logits = output
        ids = choice.topk_ids.long()
        if ids.shape[1] != 1:
            raise ValueError(f"{block.name}: expected a selection of one expert per token, got {ids.shape[1]}")
        changed = torch.zeros_like(mask.reshape(-1, mask.shape[-1]))
        changed = changed.scatter(1, ids.clamp(min=0), (ids >= 0).to(mask.dtype)).view_as(mask)
        gate: Any = block.gate
        changed = changed * (changed.cumsum(-2) <= gate.expert_capacity)  # the router drops the same
        return changed, choice.topk_weights.reshape(weights.shape).to(weights.dtype), logits


# Routers that return probabilities in place of logits.
_PROBABILITIES = ("DiffusionGemmaTextRouter", "Gemma4TextRouter")

HookPoint = ExpertsHook | RouterHook
_HOOK_POINTS: dict[str, HookPoint] = {
    "JetMoeMoE": _JetMoe(),
    "Llama4TextMoe": _Llama4(),
    "NllbMoeSparseMLP": _Nllb(),
    "SwitchTransformersSparseMLP": _Switch(),
    "ZayaSparseMoeBlock": _Zaya(),
}


def find_hook_point(block: MoeBlock) -> HookPoint:
    return next((point for name, point in _HOOK_POINTS.items() if is_of(block.block, name)), ExpertsHook())


def read_choice(block: MoeBlock, x: Tensor, output: Any) -> Choice | None:
    """The choice in the output of the router for x [T,H]; None if the output does not say."""
    point = find_hook_point(block)
    if isinstance(point, _Nllb):
        return None
    if isinstance(point, RouterHook):
        return point.read(block, x, output)
    logits = read_logits(block, output)
    choose = getattr(block.block, "route_tokens_to_experts", None)
    if isinstance(output, Tensor) and choose is not None:  # DBRX: the block chooses
        weights, ids = choose(logits)
    elif isinstance(output, (tuple, list)) and len(output) >= 3:
        _, weights, ids, *_ = _put_logits_first(output)
    else:
        return None
    return point.read(block, x, ids, weights, logits)


def _put_logits_first(output: Sequence[Any]) -> Sequence[Any]:
    """(logits, weights, ids, …) of a gate. Before transformers 5.21 Granite's returns (ids, weights, logits)."""
    first = output[0]
    return output[::-1] if isinstance(first, Tensor) and not first.is_floating_point() else output


def read_logits(block: MoeBlock, output: Any) -> Tensor | None:
    """router_logits [T,E] in the output of the gate: the tensor itself, or the item that transformers records."""
    if isinstance(output, Tensor):
        return output.reshape(-1, output.shape[-1])
    if not isinstance(output, (tuple, list)) or not output:
        return None
    logits = output[2] if isinstance(find_hook_point(block), _Nllb) else _put_logits_first(output)[0]
    if not isinstance(logits, Tensor):
        return None
    logits = logits.reshape(-1, logits.shape[-1])
    if type(block.gate).__name__ in _PROBABILITIES:
        return logits.clamp(min=torch.finfo(logits.dtype).tiny).log()  # logits up to a constant per token
    return logits
