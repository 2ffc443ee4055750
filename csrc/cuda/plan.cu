// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>

#include "launch.h"
#include "ops.h"
#include "plan.cuh"
#include "workspace.h"

namespace switchgear::cuda {
namespace {

// Up to this size one block takes about as long as three launches.
constexpr int64_t kSmallPairs = 8192;
constexpr int64_t kMinChunkPairs = 2048;  // 8 steps per warp: about 128 blocks for 32768 tokens with 8 choices
constexpr int64_t kMaxChunks = 1024;      // 8 steps of the scan

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_small(int64_t num_pairs, int64_t num_experts) {
  return num_pairs <= kSmallPairs && num_experts <= kSmallCounters;
}

// At least one pair per counter, so that counters never cost more than pairs.
int64_t chunk_pairs_of(int64_t num_pairs, int64_t num_experts) {
  const int64_t pairs = std::max({kMinChunkPairs, num_experts, ceil_div(num_pairs, kMaxChunks)});
  return ceil_div(pairs, kPlanThreads) * kPlanThreads;
}

int64_t num_chunks_of(int64_t num_pairs, int64_t num_experts) {
  return std::max<int64_t>(1, ceil_div(num_pairs, chunk_pairs_of(num_pairs, num_experts)));
}

}  // namespace

int64_t plan_workspace_size(int64_t num_slots, int64_t num_experts) {
  if (is_small(num_slots, num_experts)) return 0;
  return num_experts * (num_chunks_of(num_slots, num_experts) + 1) * static_cast<int64_t>(sizeof(int32_t));
}

void plan(const PlanArgs& args, void* workspace, const PlanExtras& extras, void* stream) {
  const int64_t num_pairs = args.topk_ids.numel();
  const int64_t num_experts = args.plan.expert_offsets.shape[0] - 1;
  PlanParams params{.topk_ids = args.topk_ids.as<const int32_t>(),
                    .expert_offsets = args.plan.expert_offsets.as<int32_t>(),
                    .token_indices = args.plan.token_indices.as<int32_t>(),
                    .slot_indices = args.plan.slot_indices.as<int32_t>(),
                    .extras = extras,
                    .num_pairs = num_pairs,
                    .chunk_pairs = chunk_pairs_of(num_pairs, num_experts),
                    .num_chunks = static_cast<int>(num_chunks_of(num_pairs, num_experts)),
                    .num_experts = static_cast<int>(num_experts),
                    .top_k = static_cast<int>(args.topk_ids.shape[1])};
  if (is_small(num_pairs, num_experts)) {
    const int64_t threads = std::clamp<int64_t>(ceil_div(std::max(num_pairs, num_experts), 32) * 32, 32, kSmallThreads);
    const int64_t segments = std::min(threads / 32, kSmallCounters / num_experts);
    launch(plan_small_kernel, dim3(1), dim3(static_cast<unsigned>(threads)),
           static_cast<size_t>(segments * num_experts) * sizeof(int32_t), stream, params, static_cast<int>(segments));
    return;
  }
  params.counts = static_cast<int32_t*>(workspace);
  params.totals = params.counts + num_experts * params.num_chunks;
  const dim3 blocks(static_cast<unsigned>(params.num_chunks),
                    static_cast<unsigned>(ceil_div(num_experts, kPlanWindow)));
  launch(plan_count_kernel, blocks, dim3(kPlanThreads), 0, stream, params);
  launch(plan_scan_kernel, dim3(static_cast<unsigned>(ceil_div(num_experts, kPlanWarps))), dim3(kPlanThreads), 0,
         stream, params);
  launch(plan_place_kernel, blocks, dim3(kPlanThreads), 0, stream, params);
}

void plan(const PlanArgs& args, Execution exec) {
  const int64_t bytes = plan_workspace_size(args.topk_ids.numel(), args.plan.expert_offsets.shape[0] - 1);
  plan(args, allocate(exec, bytes), {}, exec.stream);
}

}  // namespace switchgear::cuda
