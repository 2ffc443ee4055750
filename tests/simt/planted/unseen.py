# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes of a review that had not seen kernels.py, which nothing detected at first: numbers of experts that are
multiples of 32, streams, limits of launches, offsets beyond 32 bits, loops over blocks, rows without padding.
test_sources.py has those that no run in C++ shows."""

from __future__ import annotations

from mistake import ASAN, BOTH, RACE, Mistake

_EXPERTS, _FAR, _LAUNCHERS = "simt_planted_many_experts", "simt_test_far", "simt_test_launchers"
_OTHERS = ("other_launches",)


def _of_experts(name: str, header: str, before: str, after: str, builds: tuple[str, ...] = BOTH) -> Mistake:
    return Mistake(name, builds, header, before, after, "tests/simt/planted/many_experts.cpp", _EXPERTS)


def _of_stream(op: str, before: str, after: str) -> Mistake:
    name = f"{op}: on the default stream"
    return Mistake(name, BOTH, f"{op}.cu", before, after, f"csrc/cuda/{op}.cu", _LAUNCHERS, _OTHERS)


UNSEEN = (
    _of_experts(
        "sm_90: no tiles for unassigned rows behind 32 experts",
        "gemm_sm90.cuh",
        "const int32_t each = (num_experts + 32) / 32",
        "const int32_t each = (num_experts + 31) / 32",
    ),
    _of_experts(
        "sm_80: no tiles for unassigned rows behind 32 experts",
        "gemm_schedule.cuh",
        "if (chunk_ + 32 > num_experts_) return false;",
        "if (chunk_ + 32 >= num_experts_) return false;",
    ),
    # A base aligned to 16 bytes leaves 16 of the slack, which hide up to four entries.
    _of_experts(
        "sm_90: a table of tiles that is too short",
        "gemm_sm90.cuh",
        "(kMaxExperts + 2) * 4;",
        "(kMaxExperts - 3) * 4;",
        ASAN,
    ),
    _of_experts(
        "sm_90: no slack to align the ring",
        "gemm_sm90.cuh",
        "  return 1024 + stages * stage_bytes(n)",
        "  return stages * stage_bytes(n)",
        ASAN,
    ),
    _of_experts(
        "sm_90: more registers than there are",
        "gemm_sm90.cuh",
        "kProducerRegisters = 504 - 2 * kConsumerRegisters;",
        "kProducerRegisters = 96;",
    ),
    _of_stream("route_dynamic", "rows.shared_bytes(), exec.stream,", "rows.shared_bytes(), nullptr,"),
    _of_stream(
        "column_topk",
        "dim3(static_cast<unsigned>(threads)), 0, exec.stream,",
        "dim3(static_cast<unsigned>(threads)), 0, nullptr,",
    ),
    _of_stream(
        "plan",
        "plan_place_kernel, blocks, dim3(kPlanThreads), 0, stream,",
        "plan_place_kernel, blocks, dim3(kPlanThreads), 0, nullptr,",
    ),
    Mistake(
        "plan: blocks above the launch bounds",
        BOTH,
        "plan.cuh",
        "__launch_bounds__(kSmallThreads) plan_small_kernel",
        "__launch_bounds__(kSmallThreads / 2) plan_small_kernel",
        "csrc/cuda/plan.cu",
        "simt_test_plan",
        ("plan_of_48_kb",),
    ),
    Mistake(
        "combine: offsets in 32 bits",
        BOTH,
        "combine.cuh",
        "p.permuted_y + slot * p.permuted_stride + column, count",
        "p.permuted_y + static_cast<int32_t>(slot) * static_cast<int32_t>(p.permuted_stride) + column, count",
        "csrc/cuda/combine.cu",
        _FAR,
        ("far_rows_of_stages",),
    ),
    Mistake(
        "sm_90: offsets of copied rows in 32 bits",
        BOTH,
        "gemm_sm90.cuh",
        "static_cast<int64_t>(row) * static_cast<int32_t>(from.stride) + column;",
        "row * static_cast<int32_t>(from.stride) + column;",
        "tests/simt/planted/many_experts.cpp",
        _EXPERTS,
    ),
    Mistake(
        "route: every token of a block has the first one's logits",
        BOTH,
        "route.cuh",
        "p.dtype, token * p.row_stride + e)); };",
        "p.dtype, blockIdx.x * p.row_stride + e)); };",
        "csrc/cuda/route.cu",
        "simt_test_route",
        ("route_of_more_tokens",),
    ),
    Mistake(
        "route: the second token of a block is the first one's neighbour",
        BOTH,
        "route.cuh",
        "token < p.num_tokens; token += gridDim.x) {",
        "token < p.num_tokens; token += gridDim.x + 1) {",
        "csrc/cuda/route.cu",
        "simt_test_route",
        ("route_of_more_tokens",),
    ),
    Mistake(
        "column_topk: only the first turn of a block",
        BOTH,
        "column_topk.cuh",
        "* pieces; task += gridDim.x) {",
        "* pieces; task += int64_t{1} << 16) {",
        "csrc/cuda/column_topk.cu",
        "simt_test_policies",
        ("column_topk",),
    ),
    Mistake(
        "exchange: the read-only cache for what is written meanwhile",
        RACE,
        "exchange.cuh",
        "  copy_units<unsigned char>(to + done, from + done, bytes - done, thread);",
        "  for (int64_t i = done + thread; i < bytes; i += int64_t{kLaneBlocks} * blockDim.x) to[i] = __ldg(from + i);",
        "tests/simt/test_exchange.cpp",
        "simt_test_exchange",
    ),
    Mistake(
        "route: whole vectors at the end of a row",
        ASAN,
        "route.cuh",
        "load_vector(row + first + i, count, aligned && count == kVector)",
        "load_vector(row + first + i, count, aligned && count > 0)",
        "csrc/cuda/route.cu",
        "simt_test_route",
        ("route_has_the_bits",),
    ),
)
