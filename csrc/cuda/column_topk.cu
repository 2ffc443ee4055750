// SPDX-License-Identifier: BSD-3-Clause
#include "column_topk.cuh"

#include <algorithm>
#include <bit>

#include "launch.h"
#include "members.h"
#include "ops.h"

namespace switchgear::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Memory {
  Members tokens;
  uint64_t* cuts;

  Memory(Workspace& memory, const ColumnTopkArgs& args)
      : tokens(memory, args.sequence_ids.numel(), args.sequence_ids.defined() ? args.limits.shape[0] : 0),
        cuts(memory.take<uint64_t>(args.limits.shape[0] * args.values.shape[1])) {}
};

}  // namespace

void column_topk(const ColumnTopkArgs& args, Execution exec) {
  const TensorView& values = args.values;
  const int64_t num_tokens = values.shape[0], num_experts = values.shape[1], num_sequences = args.limits.shape[0];
  if (num_tokens == 0) return;
  Workspace sizes;
  const Memory layout(sizes, args);
  Workspace memory(allocate(exec, sizes.size()));
  const Memory m(memory, args);
  const bool several = args.sequence_ids.defined();
  const ColumnTopkParams params{.values = values.data,
                                .row_stride = values.stride[0],
                                .dtype = values.dtype,
                                .sequence_ids = args.sequence_ids.as<const int32_t>(),
                                .limits = args.limits.as<const int32_t>(),
                                .topk_ids = args.topk_ids.as<int32_t>(),
                                .sequence_offsets = several ? m.tokens.offsets() : nullptr,
                                .tokens = several ? m.tokens.items() : nullptr,
                                .cuts = m.cuts,
                                .num_tokens = static_cast<int>(num_tokens),
                                .num_experts = static_cast<int>(num_experts),
                                .num_sequences = static_cast<int>(num_sequences),
                                .place_bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(num_tokens - 1)))};
  if (several) m.tokens.list(params.sequence_ids, exec.stream);
  const int64_t pieces = num_sequences * ceil_div(num_experts, kColumns);
  // About one value per thread and column.
  const int64_t threads = std::clamp<int64_t>(ceil_div(num_tokens / num_sequences, 32) * 32, 32, kCutThreads);
  launch(column_cuts_kernel, dim3(static_cast<unsigned>(std::min(pieces, kMaxBlocks))),
         dim3(static_cast<unsigned>(threads)), 0, exec.stream, params);
  launch(column_list_kernel, dim3(static_cast<unsigned>(ceil_div(num_tokens, kListThreads / 32))), dim3(kListThreads),
         0, exec.stream, params);
}

}  // namespace switchgear::cuda
