# SPDX-License-Identifier: BSD-3-Clause
"""The native ops of switchgear. Arrays come through DLPack; outputs are passed in and written.

Shapes and formats are those of include/switchgear/ops.h. num_threads 0 means the OpenMP default. Every op raises
ValueError or TypeError, naming the argument, before it writes anything.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

class _Array(Protocol):
    def __dlpack__(self) -> Any: ...

class _BuildInfo(TypedDict):
    compiler: str
    flags: str
    isas: list[str]
    openmp: bool
    cuda: bool

version: str

def available_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(isa: str) -> None: ...
def build_info() -> _BuildInfo: ...
def fma_rate(dtype: str, num_threads: int = 0) -> float: ...
def read_bandwidth(num_threads: int = 0) -> float: ...
def read(tensors: Sequence[_Array], num_threads: int = 0) -> None: ...
def advise_huge_pages(tensor: _Array) -> None: ...
def collapse_into_huge_pages(tensor: _Array) -> int: ...
def pack_compact(weight: _Array, compact: _Array, num_threads: int = 0) -> int: ...
def panel_layout(dtype: str) -> tuple[int, int]: ...
def expand_compact(compact: _Array, weight: _Array, num_threads: int = 0) -> None: ...
def release_workspaces() -> None: ...
def kept_bytes() -> int: ...

class Buffer:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

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
    num_threads: int,
) -> None: ...
def route_backward(
    grad_topk_weights: _Array,
    router_logits: _Array,
    topk_ids: _Array,
    grad_router_logits: _Array,
    score_function: str,
    normalize: bool,
    scale: float,
    num_threads: int,
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
    num_threads: int,
) -> None: ...
def column_topk(
    values: _Array, sequence_ids: _Array | None, limits: _Array, topk_ids: _Array, num_threads: int
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
    num_threads: int,
) -> None: ...
def assign_balanced(
    values: _Array,
    sequence_ids: _Array | None,
    expert_ids: _Array,
    num_sequences: int,
    eps: float,
    max_iterations: int,
    num_threads: int,
) -> None: ...
def assign_capped(
    values: _Array,
    sequence_ids: _Array | None,
    limits: _Array,
    assignment: _Array,
    cap: int,
    entropy: float,
    iterations: int,
    num_threads: int,
) -> None: ...
def plan(
    topk_ids: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    num_threads: int,
) -> None: ...
def permute(
    x: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    topk_weights: _Array | None,
    permuted_x: _Array,
    num_threads: int,
) -> None: ...
def combine(
    permuted_y: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    topk_weights: _Array | None,
    y: _Array,
    num_threads: int,
) -> None: ...
def combine_weight_backward(
    grad_y: _Array,
    permuted_y: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    grad_topk_weights: _Array,
    num_threads: int,
) -> None: ...
def grouped_gemm(
    x: _Array,
    weight: _Array | Sequence[_Array],
    bias: _Array | None,
    expert_offsets: _Array,
    token_indices: _Array | None,
    out: _Array,
    num_threads: int,
    input_gradient: bool = False,
) -> None: ...
def grouped_gemm_wgrad(
    grad_out: _Array,
    x: _Array,
    expert_offsets: _Array,
    token_indices: _Array | None,
    grad_weight: _Array,
    num_threads: int,
) -> None: ...
def glu(
    h: _Array,
    a: _Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_threads: int,
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
    num_threads: int,
) -> None: ...
def moe_forward(
    x: _Array,
    gate_up_proj: _Array,
    down_proj: _Array,
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
    num_threads: int,
) -> None: ...
def moe_backward(
    grad_y: _Array,
    x: _Array,
    h: _Array,
    gate_up_proj: _Array,
    down_proj: _Array,
    gate_up_bias: _Array | None,
    down_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
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
    num_threads: int,
) -> None: ...
def quantized_grouped_gemm(
    x: _Array,
    weight: _Array,
    weight_scales: _Array,
    weight_row_scales: _Array,
    weight_zeros: _Array | None,
    bias: _Array | None,
    expert_offsets: _Array,
    token_indices: _Array | None,
    out: _Array,
    rows: int,
    columns: int,
    parts: int,
    bits: int,
    group_size: int,
    transposed: bool,
    num_threads: int,
) -> None: ...
def quantized_moe_forward(
    x: _Array,
    gate_up_proj: _Array,
    gate_up_proj_scales: _Array,
    gate_up_proj_row_scales: _Array,
    gate_up_proj_zeros: _Array | None,
    down_proj: _Array,
    down_proj_scales: _Array,
    down_proj_row_scales: _Array,
    down_proj_zeros: _Array | None,
    gate_up_bias: _Array | None,
    down_bias: _Array | None,
    topk_ids: _Array,
    topk_weights: _Array,
    y: _Array,
    h: _Array | None,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_threads: int,
) -> None: ...
