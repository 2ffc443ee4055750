# SPDX-License-Identifier: BSD-3-Clause
"""The ops that choose experts: route, and those of routing policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchgear import reference, reference_policies
from switchgear.ops.native import Kernels
from switchgear.ops.registration import _dense, _matrix, _register, _rows

# ---- route -----------------------------------------------------------------------------------------------------------


def _allocate_route(router_logits: Tensor, selection_bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens = _matrix("router_logits", router_logits).shape[0]
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    topk_ids = router_logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, top_k, dtype=reference.weight_dtype(router_logits.dtype))


def _route(
    kernels: Kernels,
    router_logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    outputs = _allocate_route(router_logits, selection_bias, top_k)
    kernels.module.route(
        _rows(router_logits), _dense(selection_bias), *outputs, score_function, normalize, scale,
        num_groups, topk_groups, group_score, kernels.execution(),
    )  # fmt: skip
    return outputs


route: Callable[..., tuple[Tensor, Tensor]] = _register(
    "route(Tensor router_logits, Tensor? selection_bias, int top_k, str score_function, bool normalize, float scale, "
    "int num_groups, int topk_groups, str group_score) -> (Tensor topk_ids, Tensor topk_weights)",
    _route,
    _allocate_route,
)


def _allocate_route_backward(grad_topk_weights: Tensor, router_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def _route_backward(
    kernels: Kernels,
    grad_topk_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    score_function: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    grad_router_logits = _allocate_route_backward(grad_topk_weights, router_logits)
    kernels.module.route_backward(
        grad_topk_weights.contiguous(), _rows(router_logits), topk_ids.contiguous(), grad_router_logits,
        score_function, normalize, scale, kernels.execution(),
    )  # fmt: skip
    return grad_router_logits


route_backward: Callable[..., Tensor] = _register(
    "route_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, str score_function, "
    "bool normalize, float scale) -> Tensor",
    _route_backward,
    _allocate_route_backward,
)


# ---- routing policies ------------------------------------------------------------------------------------------------


def _allocate_route_dynamic(
    router_logits: Tensor, selection_bias: Tensor | None, max_experts: int, *_: Any
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = _matrix("router_logits", router_logits).shape
    if not 1 <= max_experts <= num_experts:
        raise ValueError(f"max_experts: expected 1 to {num_experts}, got {max_experts}")
    topk_ids = router_logits.new_empty(num_tokens, max_experts, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, max_experts, dtype=reference.weight_dtype(router_logits.dtype))


def _route_dynamic(
    kernels: Kernels, router_logits: Tensor, selection_bias: Tensor | None, max_experts: int, *options: Any
) -> tuple[Tensor, Tensor]:
    outputs = _allocate_route_dynamic(router_logits, selection_bias, max_experts)
    kernels.module.route_dynamic(_rows(router_logits), _dense(selection_bias), *outputs, *options, kernels.execution())
    return outputs


route_dynamic: Callable[..., tuple[Tensor, Tensor]] = _register(
    "route_dynamic(Tensor router_logits, Tensor? selection_bias, int max_experts, int min_experts, str score_function, "
    "float top_p, float threshold, bool normalize, float scale) -> (Tensor topk_ids, Tensor topk_weights)",
    _route_dynamic,
    _allocate_route_dynamic,
    reference_policies,
)


def _allocate_column_topk(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(_matrix("values", values).shape, dtype=torch.int32)


def _column_topk(kernels: Kernels, values: Tensor, sequence_ids: Tensor | None, limits: Tensor) -> Tensor:
    topk_ids = _allocate_column_topk(values)
    kernels.module.column_topk(_rows(values), _dense(sequence_ids), limits.contiguous(), topk_ids, kernels.execution())
    return topk_ids


column_topk: Callable[..., Tensor] = _register(
    "column_topk(Tensor values, Tensor? sequence_ids, Tensor limits) -> Tensor",
    _column_topk,
    _allocate_column_topk,
    reference_policies,
)


def _allocate_fit_capacity(topk_ids: Tensor, *_: Any) -> Tensor:
    return topk_ids.new_empty(_matrix("topk_ids", topk_ids).shape)


def _fit_capacity(
    kernels: Kernels,
    topk_ids: Tensor,
    priorities: Tensor | None,
    scores: Tensor | None,
    sequence_ids: Tensor | None,
    limits: Tensor,
    num_experts: int,
    drop: str,
    candidates: int,
) -> Tensor:
    kept_ids = _allocate_fit_capacity(topk_ids)
    kernels.module.fit_capacity(
        topk_ids.contiguous(), _dense(priorities), _dense(scores), _dense(sequence_ids), limits.contiguous(), kept_ids,
        num_experts, drop, candidates, kernels.execution(),
    )  # fmt: skip
    return kept_ids


fit_capacity: Callable[..., Tensor] = _register(
    "fit_capacity(Tensor topk_ids, Tensor? priorities, Tensor? scores, Tensor? sequence_ids, Tensor limits, "
    "int num_experts, str drop, int candidates) -> Tensor",
    _fit_capacity,
    _allocate_fit_capacity,
    reference_policies,
)


def _allocate_assign_balanced(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(_matrix("values", values).shape[:1], dtype=torch.int32)


def _assign_balanced(
    kernels: Kernels, values: Tensor, sequence_ids: Tensor | None, num_sequences: int, eps: float, max_iterations: int
) -> Tensor:
    expert_ids = _allocate_assign_balanced(values)
    kernels.module.assign_balanced(
        values.contiguous(), _dense(sequence_ids), expert_ids, num_sequences, eps, max_iterations, kernels.execution()
    )
    return expert_ids


assign_balanced: Callable[..., Tensor] = _register(
    "assign_balanced(Tensor values, Tensor? sequence_ids, int num_sequences, float eps, int max_iterations) -> Tensor",
    _assign_balanced,
    _allocate_assign_balanced,
    reference_policies,
)


def _allocate_assign_capped(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(_matrix("values", values).shape, dtype=reference.weight_dtype(values.dtype))


def _assign_capped(
    kernels: Kernels,
    values: Tensor,
    sequence_ids: Tensor | None,
    limits: Tensor,
    cap: int,
    entropy: float,
    iterations: int,
    longest: int | None = None,
    largest: int | None = None,
) -> Tensor:
    assignment = _allocate_assign_capped(values)
    kernels.module.assign_capped(
        _rows(values), _dense(sequence_ids), limits.contiguous(), assignment, cap, entropy, iterations,
        kernels.execution(),
    )  # fmt: skip
    return assignment


assign_capped: Callable[..., Tensor] = _register(
    "assign_capped(Tensor values, Tensor? sequence_ids, Tensor limits, int cap, float entropy, int iterations, "
    "int? longest=None, int? largest=None) -> Tensor",
    _assign_capped,
    _allocate_assign_capped,
    reference_policies,
)
