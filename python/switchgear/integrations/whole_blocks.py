# SPDX-License-Identifier: BSD-3-Clause
"""Whole MoE blocks of Hugging Face models in inference: router, choice and experts without a call of either module.

For small models the Python code of a block costs more than its kernels; for all models it does when it first runs after
the weights have evicted it from the caches. So a block of a known class goes from its input to `gate_route` and
`moe` directly. It does so only while calling its submodules would do nothing else: without gradients, hooks, replaced
forwards or traces. Otherwise the class's own forward runs.

The router's logits are sums of our own order, so they may differ from torch's in the last bit, and a choice between
experts whose logits are that close may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops
from switchgear.backends import in_autocast
from switchgear.functional import gate_route
from switchgear.functional.gradients import needs_autograd
from switchgear.integrations.experts import ExpertWeights, find_unreadable, run_experts
from switchgear.integrations.forwards import (
    Bypassed,
    PartClass,
    get_part,
    name_model_class,
    replace_forward,
    runs_own_forward,
)
from switchgear.integrations.gates import find_gate, get_own_gate

_has_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook


class BlockClass(NamedTuple):
    """A block whose router chooses by a softmax, and what is done to its weights."""

    block: PartClass
    router: PartClass
    experts: PartClass
    always_normalizes: bool  # else by the router's norm_topk_prob
    rounds: bool  # weights to the dtype of the logits


def _name_classes(folder: str, name: str, always_normalizes: bool, rounds: bool) -> BlockClass:
    parts = ("SparseMoeBlock", "TopKRouter", "Experts")
    block, router, experts = (name_model_class(folder, name + part) for part in parts)
    return BlockClass(block, router, experts, always_normalizes, rounds)


BLOCKS = (
    _name_classes("olmoe", "Olmoe", False, True),
    _name_classes("qwen3_moe", "Qwen3Moe", False, True),
    _name_classes("mixtral", "Mixtral", True, False),
)


def find_class(block: nn.Module) -> BlockClass | None:
    return next((known for known in BLOCKS if known.block.matches(type(block))), None)


def join(block: nn.Module, weights_of: Callable[[Any], ExpertWeights]) -> Callable[[], None] | None:
    """Lets a block run as a whole where it can, and returns an undo function; None if its class is not known, or its
    forward was replaced before. weights_of: those of an experts module that runs on switchgear."""
    known, own = find_class(block), type(block).forward
    if known is None or not runs_own_forward(block):
        return None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        y = _run_whole(self, known, weights_of, hidden_states) if type(self).forward is own else None
        return type(self).forward(self, hidden_states) if y is None else y

    return replace_forward(block, forward)


def _run_whole(
    block: Any, known: BlockClass, weights_of: Callable[[Any], ExpertWeights], hidden_states: Tensor
) -> Tensor | None:
    """The block's output, or None if its own forward has to run."""
    if torch.compiler.is_compiling() or _has_any_global_hook() or in_autocast(hidden_states.device.type):
        return None
    if block.training and getattr(block, "jitter_noise", 0.0) > 0:
        return None
    try:
        router: Any = get_part(block, "gate", known.router)
        experts: Any = get_part(block, "experts", known.experts)
    except Bypassed:
        return None
    if experts.config._experts_implementation != "switchgear":
        return None
    weight = router.weight
    x = hidden_states.view(-1, hidden_states.shape[-1])
    if needs_autograd(x, weight) or not ops.needs_no_dispatch(x, weight) or weight.dtype is not x.dtype:
        return None
    weights, gate = weights_of(experts), find_gate(experts)
    if gate is None or find_unreadable(weights) is not None:
        return None
    normalizes = known.always_normalizes or router.norm_topk_prob
    chosen = gate_route(x, weight, router.top_k, normalize=normalizes)
    topk_weights = chosen.topk_weights
    if known.rounds and x.dtype is not torch.float32:
        topk_weights = topk_weights.to(x.dtype)
    y = run_experts(x, chosen.topk_ids, topk_weights, weights, gate, get_own_gate(experts))
    return y.view(hidden_states.shape)
