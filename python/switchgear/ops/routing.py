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

# ---- route -----------------------------------------------------------------------------------------------------------


def _allocate_route(router_logits: Tensor, selection_bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = matrix("router_logits", router_logits).shape
    if num_experts < 1:
        raise ValueError(f"router_logits: expected E of at least 1, got {list(router_logits.shape)}")
    if not 1 <= top_k <= num_experts:  # before memory for them is allocated
        raise ValueError(f"top_k: expected 1 to E={num_experts}, got {top_k}")
    topk_ids = router_logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, top_k, dtype=reference.weight_dtype(router_logits.dtype))


route: Callable[..., tuple[Tensor, Tensor]] = register(
    "route(Tensor router_logits, Tensor? selection_bias, int top_k, str score_function, bool normalize, float scale, "
    "int num_groups, int topk_groups, str group_score) -> (Tensor topk_ids, Tensor topk_weights)",
    _allocate_route,
    lambda router_logits, selection_bias, _, *options: ((rows(router_logits), dense(selection_bias)), options),
)


def _allocate_route_backward(grad_topk_weights: Tensor, router_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


route_backward: Callable[..., Tensor] = register(
    "route_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, str score_function, "
    "bool normalize, float scale) -> Tensor",
    _allocate_route_backward,
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
    router_logits = _allocate_gate(x, weight, bias, float32)
    return router_logits, *_allocate_route(router_logits, None, top_k)


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


def _allocate_route_dynamic(
    router_logits: Tensor, selection_bias: Tensor | None, max_experts: int, *_: Any
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = matrix("router_logits", router_logits).shape
    if not 1 <= max_experts <= num_experts:
        raise ValueError(f"max_experts: expected 1 to {num_experts}, got {max_experts}")
    topk_ids = router_logits.new_empty(num_tokens, max_experts, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, max_experts, dtype=reference.weight_dtype(router_logits.dtype))


route_dynamic: Callable[..., tuple[Tensor, Tensor]] = register(
    "route_dynamic(Tensor router_logits, Tensor? selection_bias, int max_experts, int min_experts, str score_function, "
    "float top_p, float threshold, bool normalize, float scale) -> (Tensor topk_ids, Tensor topk_weights)",
    _allocate_route_dynamic,
    lambda router_logits, selection_bias, _, *options: ((rows(router_logits), dense(selection_bias)), options),
    specified_in=policies,
)


def _allocate_column_topk(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(matrix("values", values).shape, dtype=torch.int32)


column_topk: Callable[..., Tensor] = register(
    "column_topk(Tensor values, Tensor? sequence_ids, Tensor limits) -> Tensor",
    _allocate_column_topk,
    lambda values, sequence_ids, limits: ((rows(values), dense(sequence_ids), dense(limits)), ()),
    specified_in=policies,
)


def _allocate_fit_capacity(topk_ids: Tensor, *_: Any) -> Tensor:
    return topk_ids.new_empty(matrix("topk_ids", topk_ids).shape)


fit_capacity: Callable[..., Tensor] = register(
    "fit_capacity(Tensor topk_ids, Tensor? priorities, Tensor? scores, Tensor? sequence_ids, Tensor limits, "
    "int num_experts, str drop, int candidates) -> Tensor",
    _allocate_fit_capacity,
    lambda *args: (tuple(map(dense, args[:5])), args[5:]),
    specified_in=policies,
)


def _allocate_assign_balanced(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(matrix("values", values).shape[:1], dtype=torch.int32)


assign_balanced: Callable[..., Tensor] = register(
    "assign_balanced(Tensor values, Tensor? sequence_ids, int num_sequences, float eps, int max_iterations) -> Tensor",
    _allocate_assign_balanced,
    lambda values, sequence_ids, *options: ((dense(values), dense(sequence_ids)), options),
    specified_in=policies,
)


def _allocate_assign_capped(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(matrix("values", values).shape, dtype=reference.weight_dtype(values.dtype))


assign_capped: Callable[..., Tensor] = register(
    "assign_capped(Tensor values, Tensor? sequence_ids, Tensor limits, int cap, float entropy, int iterations, "
    "float tolerance=0.0, int? longest=None, int? largest=None) -> Tensor",
    _allocate_assign_capped,
    lambda values, sequence_ids, limits, *options: ((rows(values), dense(sequence_ids), dense(limits)), options[:4]),
    specified_in=policies,
)
