// SPDX-License-Identifier: BSD-3-Clause
// column_topk: values [T,E] -> topk_ids [T,E]: each expert takes the best tokens of each sequence (expert choice). A row lists
// the experts that took the token, ascending, then -1.
//
//   traffic T·E·size per digit pass (3 or 4, up to 3 more for equal values) plus one pass, mostly from L2; 4·T·E bytes of
//   results. Bound by this traffic, or by latency where T·E / 8 gives too few blocks.
//
//   column_cuts_kernel   one block per sequence and 8 columns (a 32-byte sector of float32): finds the cut after the last
//                        token taken, for all 8 columns at once (select.cuh)                            -> cuts [B,E]
//   column_list_kernel   one warp per token: compares its row with the cuts of its sequence, 32 experts at a time; a ballot
//                        gives each expert its position
// With several sequences, plan first lists the tokens of each.
//
// Integers only: the same choices as csrc/cpu/column_topk.cpp, for any bit pattern of values. No expert takes tokens with a
// sequence id out of range.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   column_cuts_kernel: 48 registers, 8328 bytes of shared memory
//   column_list_kernel: 40 registers
#pragma once
#include "platform.cuh"
#include "ranking.cuh"
#include "score.cuh"
#include "select.cuh"
#include "switchgear/tensor.h"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kColumns = 8;
constexpr int kCutThreads = 1024;
constexpr int kListThreads = 128;

struct ColumnTopkParams {
  const void* values;
  int64_t row_stride;
  DType dtype;
  const int32_t* sequence_ids;  // or null
  const int32_t* limits;
  int32_t* topk_ids;
  const int32_t* sequence_offsets;  // [B + 1], or null for a single sequence
  const int32_t* tokens;            // [T] by sequence, or null for a single sequence
  uint64_t* cuts;                   // [B,E]
  int num_tokens, num_experts, num_sequences;
  int place_bits;  // tokens are below 2^place_bits

  __device__ uint64_t key(int32_t token, int expert) const {
    const float value = load_float(values, dtype, static_cast<int64_t>(token) * row_stride + expert);
    return key_at(key_of(sanitise(value)), token, place_bits);
  }
};

// Blocks loop over pieces of 8 columns, sequence by sequence.
__global__ void __launch_bounds__(kCutThreads) column_cuts_kernel(ColumnTopkParams p) {
  SHARED_VALUE(Selection<kColumns>, selection);
  const int pieces = (p.num_experts + kColumns - 1) / kColumns, thread = static_cast<int>(threadIdx.x);
  for (int64_t task = blockIdx.x; task < static_cast<int64_t>(p.num_sequences) * pieces; task += gridDim.x) {
    const int sequence = static_cast<int>(task / pieces), first = static_cast<int>(task % pieces) * kColumns;
    const int32_t begin = p.tokens != nullptr ? p.sequence_offsets[sequence] : 0;
    const int32_t end = p.tokens != nullptr ? p.sequence_offsets[sequence + 1] : p.num_tokens;
    const int32_t limit = p.limits[sequence];
    const bool some = limit > 0 && limit < end - begin;
    if (some) {
      find_cuts(selection, end - begin, limit, 32 + p.place_bits, [&](int32_t i, int column) {
        return p.key(p.tokens != nullptr ? p.tokens[begin + i] : i, min(first + column, p.num_experts - 1));
      });
    }
    if (thread < kColumns && first + thread < p.num_experts) {
      const uint64_t all_or_none = limit > 0 ? 0 : ~uint64_t{0};
      p.cuts[static_cast<int64_t>(sequence) * p.num_experts + first + thread] =
          some ? selection.cut[thread] : all_or_none;
    }
  }
}

__global__ void __launch_bounds__(kListThreads) column_list_kernel(ColumnTopkParams p) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kListThreads / 32) + threadIdx.x / 32;
  if (token >= p.num_tokens) return;  // whole warps leave
  const int32_t sequence = p.sequence_ids != nullptr ? p.sequence_ids[token] : 0;
  const bool real = sequence >= 0 && sequence < p.num_sequences;
  const uint64_t* const cuts = p.cuts + static_cast<int64_t>(real ? sequence : 0) * p.num_experts;
  int32_t* const ids = p.topk_ids + token * p.num_experts;
  int count = 0;
  for (int base = 0; base < p.num_experts; base += 32) {
    const int expert = base + lane;
    const bool taken = real && expert < p.num_experts && p.key(static_cast<int32_t>(token), expert) >= cuts[expert];
    const uint32_t all = __ballot_sync(kAllLanes, taken);
    if (taken) ids[count + __popc(all & ((1u << lane) - 1))] = expert;
    count += __popc(all);
  }
  for (int k = count + lane; k < p.num_experts; k += 32) ids[k] = -1;
}

}  // namespace switchgear::cuda
