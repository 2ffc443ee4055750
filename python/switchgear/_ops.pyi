# SPDX-License-Identifier: BSD-3-Clause
"""The ops that `_C` and `_cuda` have in common; not a module itself. Arrays are passed through DLPack; ops write their
results to output arguments.

Shapes and formats are those of include/switchgear/ops.h; a weight is its tensors and its form (reference/formats.py).
The last argument of an op is a number of threads for `_C` (0: the OpenMP default) and an Execution for `_cuda`. Every
op raises ValueError or TypeError, naming the argument, before it writes anything.
"""

from collections.abc import Sequence
from typing import Any, Protocol

class _Array(Protocol):
    def __dlpack__(self) -> Any: ...

def route(
    router_logits: _Array,
    selection_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    execution: Any,
    /,
) -> None: ...
def gate(
    x: _Array,
    weight: _Array,
    bias: _Array | None,
    router_logits: _Array,
    execution: Any,
    /,
) -> None: ...
def gate_route(
    x: _Array,
    weight: _Array,
    bias: _Array | None,
    selection_bias: _Array | None,
    router_logits: _Array,
    topk_ids: _Array,
    topk_weights: _Array,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    execution: Any,
    /,
) -> None: ...
def route_backward(
    grad_topk_weights: _Array,
    router_logits: _Array,
    topk_ids: _Array,
    grad_router_logits: _Array,
    score_function: str,
    normalize: bool,
    scale: float,
    execution: Any,
    /,
) -> None: ...
def route_dynamic(
    router_logits: _Array,
    selection_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
    min_experts: int,
    score_function: str,
    top_p: float,
    threshold: float,
    normalize: bool,
    scale: float,
    execution: Any,
    /,
) -> None: ...
def column_topk(
    values: _Array, sequence_ids: _Array | None, limits: _Array, topk_ids: _Array, execution: Any, /
) -> None: ...
def fit_capacity(
    topk_ids: _Array,
    priorities: _Array | None,
    scores: _Array | None,
    sequence_ids: _Array | None,
    limits: _Array,
    kept_ids: _Array,
    num_experts: int,
    drop: str,
    candidates: int,
    execution: Any,
    /,
) -> None: ...
def assign_balanced(
    values: _Array,
    sequence_ids: _Array | None,
    expert_ids: _Array,
    num_sequences: int,
    eps: float,
    max_iterations: int,
    execution: Any,
    /,
) -> None: ...
def assign_capped(
    values: _Array,
    sequence_ids: _Array | None,
    limits: _Array,
    assignment: _Array,
    cap: int,
    entropy: float,
    iterations: int,
    tolerance: float,
    execution: Any,
    /,
) -> None: ...
def plan(
    topk_ids: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    execution: Any,
    /,
) -> None: ...
def permute(
    x: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    topk_weights: _Array | None,
    permuted_x: _Array,
    execution: Any,
    /,
) -> None: ...
def combine(
    permuted_y: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    topk_weights: _Array | None,
    y: _Array,
    execution: Any,
    /,
) -> None: ...
def combine_weight_backward(
    grad_y: _Array,
    permuted_y: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    grad_topk_weights: _Array,
    execution: Any,
    /,
) -> None: ...
def grouped_gemm(
    x: _Array,
    weight: _Array | Sequence[_Array],
    form: Sequence[int],
    bias: _Array | None,
    expert_offsets: _Array,
    token_indices: _Array | None,
    out: _Array,
    transposed: bool,
    input_gradient: bool,
    execution: Any,
    /,
) -> None: ...
def grouped_gemm_wgrad(
    grad_out: _Array,
    x: _Array,
    expert_offsets: _Array,
    token_indices: _Array | None,
    experts: _Array | None,
    grad_weight: _Array,
    execution: Any,
    /,
) -> None: ...
def glu(
    h: _Array,
    a: _Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    execution: Any,
    /,
) -> None: ...
def glu_backward(
    grad_a: _Array,
    h: _Array,
    grad_h: _Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    execution: Any,
    /,
) -> None: ...
def moe_forward(
    x: _Array,
    gate_up_proj: _Array | Sequence[_Array],
    gate_up_form: Sequence[int],
    down_proj: _Array | Sequence[_Array],
    down_form: Sequence[int],
    gate_up_bias: _Array | None,
    down_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
    y: _Array,
    h: _Array | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    execution: Any,
    gate_up_adapter: Sequence[_Array] | None = None,
    down_adapter: Sequence[_Array] | None = None,
    dropout_seed: _Array | None = None,
    dropout: Sequence[float] | None = None,
    /,
) -> None: ...
def moe_accumulate(
    x: _Array,
    gate_up_proj: _Array | Sequence[_Array],
    gate_up_form: Sequence[int],
    down_proj: _Array | Sequence[_Array],
    down_form: Sequence[int],
    gate_up_bias: _Array | None,
    down_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
    sums: _Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    execution: Any,
    gate_up_adapter: Sequence[_Array] | None = None,
    down_adapter: Sequence[_Array] | None = None,
    /,
) -> None: ...
def moe_backward(
    grad_y: _Array,
    x: _Array,
    h: _Array,
    gate_up_proj: _Array | Sequence[_Array],
    gate_up_form: Sequence[int],
    down_proj: _Array | Sequence[_Array],
    down_form: Sequence[int],
    gate_up_bias: _Array | None,
    down_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
    experts: _Array | None,
    grad_x: _Array | None,
    grad_gate_up_proj: _Array | None,
    grad_down_proj: _Array | None,
    grad_gate_up_bias: _Array | None,
    grad_down_bias: _Array | None,
    grad_topk_weights: _Array | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    execution: Any,
    gate_up_adapter: Sequence[_Array] | None = None,
    down_adapter: Sequence[_Array] | None = None,
    dropout_seed: _Array | None = None,
    dropout: Sequence[float] | None = None,
    grad_gate_up_a: _Array | None = None,
    grad_gate_up_b: _Array | None = None,
    grad_down_a: _Array | None = None,
    grad_down_b: _Array | None = None,
    adds: bool = False,
    /,
) -> None: ...
