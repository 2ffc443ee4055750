# SPDX-License-Identifier: BSD-3-Clause
"""The ops of `_C` on CUDA devices, which CUDA devices there are, and what this build has for them. Only there if nvcc
was at build time; imports without a driver.

Ops are queued on a stream and return. Values in device memory are not checked: ids out of range count as empty slots.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict

class _Array(Protocol):
    def __dlpack__(self) -> Any: ...

class _DeviceInfo(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    total_memory: int  # bytes, as the next two
    l2_cache: int
    shared_memory_per_block: int
    kernel_ok: bool  # a kernel of this build ran
    kernel_arch: int  # __CUDA_ARCH__ of that kernel, e.g. 900
    kernel_error: str | None

def device_count() -> int: ...
def device_info(index: int) -> _DeviceInfo: ...
def driver_version() -> int: ...
def runtime_version() -> int: ...
def built_archs() -> list[str]: ...

class Execution:
    """How an op runs on a device.

    stream: a cudaStream_t; 0 is the default stream.
    allocate: takes a number of bytes and returns a flat array of that size on the device, whose memory is given away
        again in the order of the stream.
    allow_tf32: whether float32 products may round their factors to TF32.
    """

    def __init__(self, stream: int, allocate: Callable[[int], _Array], allow_tf32: bool = False) -> None: ...

def exchange_segment_bytes(num_ranks: int, slot_bytes: int) -> int:
    """Of the memory of a rank that all map: zero at first."""

def exchange(
    rows: _Array,
    received: _Array,
    send_bytes: Sequence[int],
    receive_bytes: Sequence[int],
    first_sent: Sequence[int],
    first_received: Sequence[int],
    segments: Sequence[int],
    rank: int,
    slot_bytes: int,
    stop: int,
    execution: Execution,
) -> None:
    """Sends send_bytes[r] of rows to each rank r, in order, and receives receive_bytes[r] from it, through the ranks'
    segments (addresses in this process). first_sent and first_received [W]: pieces of slot_bytes of all calls before.
    A word at the address `stop` that is not zero ends the kernel."""

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
    execution: Execution,
) -> None: ...
def route_backward(
    grad_topk_weights: _Array,
    router_logits: _Array,
    topk_ids: _Array,
    grad_router_logits: _Array,
    score_function: str,
    normalize: bool,
    scale: float,
    execution: Execution,
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
    execution: Execution,
) -> None: ...
def column_topk(
    values: _Array, sequence_ids: _Array | None, limits: _Array, topk_ids: _Array, execution: Execution
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
    execution: Execution,
) -> None: ...
def assign_balanced(
    values: _Array,
    sequence_ids: _Array | None,
    expert_ids: _Array,
    num_sequences: int,
    eps: float,
    max_iterations: int,
    execution: Execution,
) -> None: ...
def plan(
    topk_ids: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    execution: Execution,
) -> None: ...
def permute(
    x: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    topk_weights: _Array | None,
    permuted_x: _Array,
    execution: Execution,
) -> None: ...
def combine(
    permuted_y: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    topk_weights: _Array | None,
    y: _Array,
    execution: Execution,
) -> None: ...
def combine_weight_backward(
    grad_y: _Array,
    permuted_y: _Array,
    expert_offsets: _Array,
    token_indices: _Array,
    slot_indices: _Array,
    grad_topk_weights: _Array,
    execution: Execution,
) -> None: ...
def grouped_gemm(
    x: _Array,
    weight: _Array | Sequence[_Array],
    bias: _Array | None,
    expert_offsets: _Array,
    token_indices: _Array | None,
    out: _Array,
    execution: Execution,
    input_gradient: bool = False,
) -> None: ...
def grouped_gemm_wgrad(
    grad_out: _Array,
    x: _Array,
    expert_offsets: _Array,
    token_indices: _Array | None,
    grad_weight: _Array,
    execution: Execution,
) -> None: ...
def glu(
    h: _Array,
    a: _Array,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    execution: Execution,
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
    execution: Execution,
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
    execution: Execution,
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
    execution: Execution,
) -> None: ...
