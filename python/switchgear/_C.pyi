# SPDX-License-Identifier: BSD-3-Clause
"""The native ops of switchgear. Arrays come through DLPack; outputs are passed in and written.

Shapes and formats are those of include/switchgear/ops.h. num_threads 0 means the OpenMP default. Every op raises
ValueError or TypeError, naming the argument, before it writes anything.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

class Array(Protocol):
    def __dlpack__(self) -> Any: ...

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    isas: list[str]
    openmp: bool
    cuda: bool

version: str

def available_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(isa: str) -> None: ...
def build_info() -> BuildInfo: ...
def route(
    router_logits: Array,
    selection_bias: Array | None,
    topk_ids: Array,
    topk_weights: Array,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    num_threads: int,
) -> None: ...
def route_backward(
    grad_topk_weights: Array,
    router_logits: Array,
    topk_ids: Array,
    grad_router_logits: Array,
    score_function: str,
    normalize: bool,
    scale: float,
    num_threads: int,
) -> None: ...
def plan(
    topk_ids: Array,
    expert_offsets: Array,
    token_indices: Array,
    slot_indices: Array,
    num_threads: int,
) -> None: ...
def permute(
    x: Array,
    expert_offsets: Array,
    token_indices: Array,
    slot_indices: Array,
    topk_weights: Array | None,
    permuted_x: Array,
    num_threads: int,
) -> None: ...
def combine(
    permuted_y: Array,
    expert_offsets: Array,
    token_indices: Array,
    slot_indices: Array,
    topk_weights: Array | None,
    y: Array,
    num_threads: int,
) -> None: ...
def combine_weight_backward(
    grad_y: Array,
    permuted_y: Array,
    expert_offsets: Array,
    token_indices: Array,
    slot_indices: Array,
    grad_topk_weights: Array,
    num_threads: int,
) -> None: ...
def grouped_gemm(
    x: Array,
    weight: Array | Sequence[Array],
    bias: Array | None,
    expert_offsets: Array,
    token_indices: Array | None,
    out: Array,
    num_threads: int,
) -> None: ...
def grouped_gemm_wgrad(
    grad_out: Array,
    x: Array,
    expert_offsets: Array,
    token_indices: Array | None,
    grad_weight: Array,
    num_threads: int,
) -> None: ...
def glu(
    h: Array,
    a: Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_threads: int,
) -> None: ...
def glu_backward(
    grad_a: Array,
    h: Array,
    grad_h: Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_threads: int,
) -> None: ...
def moe_forward(
    x: Array,
    gate_up_proj: Array,
    down_proj: Array,
    gate_up_bias: Array | None,
    down_bias: Array | None,
    topk_ids: Array,
    topk_weights: Array,
    y: Array,
    h: Array | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_threads: int,
) -> None: ...
def moe_backward(
    grad_y: Array,
    x: Array,
    h: Array,
    gate_up_proj: Array,
    down_proj: Array,
    gate_up_bias: Array | None,
    down_bias: Array | None,
    topk_ids: Array,
    topk_weights: Array,
    grad_x: Array | None,
    grad_gate_up_proj: Array | None,
    grad_down_proj: Array | None,
    grad_gate_up_bias: Array | None,
    grad_down_bias: Array | None,
    grad_topk_weights: Array | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_threads: int,
) -> None: ...
