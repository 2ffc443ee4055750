# SPDX-License-Identifier: BSD-3-Clause
"""The ops that choose experts: gate and route, and those of routing policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from switchgear import reference
from switchgear.ops.native import host
from switchgear.ops.registration import dense, matrix, register, rows
from switchgear.reference import policies

__all__ = [
    "assign_balanced", "assign_capped", "column_topk", "fit_capacity", "gate", "gate_route", "gate_route_on_host",
    "route", "route_backward", "route_dynamic",
]  # fmt: skip

# ---- route -----------------------------------------------------------------------------------------------------------


def _allocate_choices(name: str, router_logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk_ids and topk_weights [T,count]. name: of `count`, an argument."""
    num_tokens, num_experts = matrix("router_logits", router_logits).shape
    if num_experts < 1:
        raise ValueError(f"router_logits: expected E of at least 1, got {list(router_logits.shape)}")
    if not 1 <= count <= num_experts:  # before memory for them is allocated
        raise ValueError(f"{name}: expected 1 to E={num_experts}, got {count}")
    reference.check_slots("router_logits", num_tokens, count)
    topk_ids = router_logits.new_empty(num_tokens, count, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, count, dtype=reference.weight_dtype(router_logits.dtype))


route: Callable[..., tuple[Tensor, Tensor]] = register(
    "route(Tensor router_logits, Tensor? selection_bias, int top_k, str score_function, bool normalize, float scale, "
    "int num_groups, int topk_groups, str group_score) -> (Tensor topk_ids, Tensor topk_weights)",
    lambda router_logits, _, top_k, *__: _allocate_choices("top_k", router_logits, top_k),
    lambda router_logits, selection_bias, _, *options: ((rows(router_logits), dense(selection_bias)), options),
)


route_backward: Callable[..., Tensor] = register(
    "route_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, str score_function, "
    "bool normalize, float scale) -> Tensor",
    lambda grad_topk_weights, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    lambda grad_topk_weights, router_logits, topk_ids, *options: (
        (dense(grad_topk_weights), rows(router_logits), dense(topk_ids)),
        options,
    ),
)


# ---- gate ------------------------------------------------------------------------------------------------------------


def _gate_flops(x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any) -> int:
    return 2 * x[0] * prod(weight)


def _allocate_gate(x: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> Tensor:
    shape = matrix("x", x).shape[0], matrix("weight", weight).shape[0]
    return x.new_empty(shape, dtype=reference.logits_dtype(weight, float32))


gate: Callable[..., Tensor] = register(
    "gate(Tensor x, Tensor weight, Tensor? bias, bool float32) -> Tensor",
    _allocate_gate,
    lambda x, weight, bias, _: ((rows(x), rows(weight), dense(bias)), ()),
    flops=_gate_flops,
)


def _allocate_gate_route(
    x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor | None, float32: bool, top_k: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_slots("x", matrix("x", x).shape[0], top_k)
    router_logits = _allocate_gate(x, weight, bias, float32)
    return router_logits, *_allocate_choices("top_k", router_logits, top_k)


gate_route: Callable[..., tuple[Tensor, Tensor, Tensor]] = register(
    "gate_route(Tensor x, Tensor weight, Tensor? bias, Tensor? selection_bias, bool float32, int top_k, "
    "str score_function, bool normalize, float scale, int num_groups, int topk_groups, str group_score) "
    "-> (Tensor router_logits, Tensor topk_ids, Tensor topk_weights)",
    _allocate_gate_route,
    lambda x, weight, bias, selection_bias, float32, top_k, *options: (
        (rows(x), rows(weight), dense(bias), dense(selection_bias)),
        options,
    ),
    flops=_gate_flops,
)


def gate_route_on_host(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    float32: bool,
    top_k: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """gate_route for tensors that need no dispatch."""
    if top_k < 1 or weight.dim() != 2 or (float32 and weight.dtype is not torch.float32):
        outputs = _allocate_gate_route(x, weight, bias, selection_bias, float32, top_k)
    else:  # the same, without keywords, which cost half a microsecond each
        num_tokens = x.shape[0]
        topk_ids = x.new_empty(num_tokens, top_k, dtype=torch.int32)
        topk_weights = topk_ids.new_empty(num_tokens, top_k, dtype=torch.float32)
        outputs = weight.new_empty(num_tokens, weight.shape[0]), topk_ids, topk_weights
    inputs = (rows(x), rows(weight), dense(bias), dense(selection_bias))
    host.module.gate_route(inputs, options, outputs, host.execution())
    return outputs


# ---- routing policies ------------------------------------------------------------------------------------------------


route_dynamic: Callable[..., tuple[Tensor, Tensor]] = register(
    "route_dynamic(Tensor router_logits, Tensor? selection_bias, int max_experts, int min_experts, str score_function, "
    "float top_p, float threshold, bool normalize, float scale) -> (Tensor topk_ids, Tensor topk_weights)",
    lambda router_logits, _, max_experts, *__: _allocate_choices("max_experts", router_logits, max_experts),
    lambda router_logits, selection_bias, _, *options: ((rows(router_logits), dense(selection_bias)), options),
    specified_in=policies,
)


column_topk: Callable[..., Tensor] = register(
    "column_topk(Tensor values, Tensor? sequence_ids, Tensor limits) -> Tensor",
    lambda values, *_: values.new_empty(matrix("values", values).shape, dtype=torch.int32),
    lambda values, sequence_ids, limits: ((rows(values), dense(sequence_ids), dense(limits)), ()),
    specified_in=policies,
)


fit_capacity: Callable[..., Tensor] = register(
    "fit_capacity(Tensor topk_ids, Tensor? priorities, Tensor? scores, Tensor? sequence_ids, Tensor limits, "
    "int num_experts, str drop, int candidates) -> Tensor",
    lambda topk_ids, *_: topk_ids.new_empty(matrix("topk_ids", topk_ids).shape),
    lambda *args: (tuple(map(dense, args[:5])), args[5:]),
    specified_in=policies,
)


assign_balanced: Callable[..., Tensor] = register(
    "assign_balanced(Tensor values, Tensor? sequence_ids, int num_sequences, float eps, int max_iterations) -> Tensor",
    lambda values, *_: values.new_empty(matrix("values", values).shape[:1], dtype=torch.int32),
    lambda values, sequence_ids, *options: ((dense(values), dense(sequence_ids)), options),
    specified_in=policies,
)


assign_capped: Callable[..., Tensor] = register(
    "assign_capped(Tensor values, Tensor? sequence_ids, Tensor limits, int cap, float entropy, int iterations, "
    "float tolerance=0.0, int? longest=None, int? largest=None) -> Tensor",
    lambda values, *_: values.new_empty(matrix("values", values).shape, dtype=reference.weight_dtype(values.dtype)),
    lambda values, sequence_ids, limits, *options: ((rows(values), dense(sequence_ids), dense(limits)), options[:4]),
    specified_in=policies,
)
