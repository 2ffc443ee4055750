// SPDX-License-Identifier: BSD-3-Clause
#include "assign_capped.cuh"

#include <algorithm>
#include <cmath>

#include "launch.h"
#include "members.h"
#include "ops.h"

namespace switchgear::cuda {
namespace {

constexpr int64_t kLongRow =
    2 * kChunk;  // mean tokens of a sequence from which a warp would add more than a chunk a half

struct Memory {
  Members tokens;
  float *by_token, *by_expert, *of_expert, *of_token;
  uint32_t *moved_in, *last_move, *arrived;

  Memory(Workspace& memory, const AssignCappedArgs& args)
      : tokens(memory, args.sequence_ids.numel(), args.sequence_ids.defined() ? args.limits.shape[0] : 0),
        by_token(memory.take<float>(args.values.numel())),
        by_expert(memory.take<float>(args.values.numel())),
        of_expert(memory.take<float>(args.limits.shape[0] * args.values.shape[1])),
        of_token(memory.take<float>(args.values.shape[0])),
        moved_in(memory.take<uint32_t>(2 * args.limits.shape[0])),
        last_move(memory.take<uint32_t>(1)),
        arrived(memory.take<uint32_t>(1)) {}
};

int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(error));
  return count;
}

unsigned blocks_of(int64_t count, int64_t of_block) { return static_cast<unsigned>((count + of_block - 1) / of_block); }

}  // namespace

void assign_capped(const AssignCappedArgs& args, Execution exec) {
  const int64_t num_tokens = args.values.shape[0], num_experts = args.values.shape[1];
  if (num_tokens == 0) return;
  const bool several = args.sequence_ids.defined();
  const int64_t num_sequences = several ? args.limits.shape[0] : 1;
  Workspace sizes;
  const Memory layout(sizes, args);
  Workspace memory(allocate(exec, sizes.size()));
  const Memory m(memory, args);
  const bool capped = args.cap < num_experts;
  const AssignCappedParams params{.values = args.values.data,
                                  .row_stride = args.values.stride[0],
                                  .dtype = args.values.dtype,
                                  .sequence_ids = args.sequence_ids.as<const int32_t>(),
                                  .limits = args.limits.as<const int32_t>(),
                                  .assignment = args.assignment.as<float>(),
                                  .sequence_offsets = several ? m.tokens.offsets() : nullptr,
                                  .tokens = several ? m.tokens.items() : nullptr,
                                  .by_token = m.by_token,
                                  .by_expert = m.by_expert,
                                  .of_expert = m.of_expert,
                                  .of_token = m.of_token,
                                  .moved_in = m.moved_in,
                                  .last_move = m.last_move,
                                  .arrived = m.arrived,
                                  .cap = static_cast<double>(args.cap),
                                  .tolerance = args.tolerance,
                                  .iterations = capped ? std::min<int64_t>(args.iterations, INT32_MAX) : 0,
                                  .entropy = static_cast<float>(args.entropy),
                                  .huge = static_cast<float>(std::sqrt(static_cast<double>(FLT_MAX))),
                                  .num_tokens = static_cast<int>(num_tokens),
                                  .num_experts = static_cast<int>(num_experts),
                                  .num_sequences = static_cast<int>(num_sequences),
                                  .long_rows = num_tokens > kLongRow * num_sequences};
  if (several) m.tokens.list(params.sequence_ids, exec.stream);
  const int64_t items = std::max({num_tokens * num_experts, num_sequences * num_experts, 2 * num_sequences});
  launch(capped_read_kernel, dim3(blocks_of(items, kCappedThreads)), dim3(kCappedThreads), 0, exec.stream, params);
  // All blocks are resident, one on each multiprocessor, and none is without work.
  const int64_t useful = std::max<int64_t>(num_sequences * num_experts, blocks_of(num_tokens, kCappedWarps));
  const int64_t blocks = std::min(useful, multiprocessors());
  launch_cooperative(assign_capped_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kCappedThreads), 0, exec.stream,
                     params);
}

}  // namespace switchgear::cuda
