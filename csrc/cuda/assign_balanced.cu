// SPDX-License-Identifier: BSD-3-Clause
#include "assign_balanced.cuh"

#include <algorithm>
#include <bit>
#include <cmath>

#include "launch.h"
#include "members.h"
#include "ops.h"
#include "warp_rows.h"

namespace switchgear::cuda {
namespace {

struct Memory {
  Members tokens;
  int32_t* places;
  uint32_t *paid, *scratch;

  Memory(Workspace& memory, const AssignBalancedArgs& args, int64_t scratch_words)
      : tokens(memory, args.sequence_ids.numel(), args.sequence_ids.defined() ? args.num_sequences : 0),
        places(memory.take<int32_t>(args.values.shape[0])),
        paid(memory.take<uint32_t>(args.values.shape[0])),
        scratch(memory.take<uint32_t>(scratch_words)) {}
};

}  // namespace

void assign_balanced(const AssignBalancedArgs& args, Execution exec) {
  const int64_t num_tokens = args.values.shape[0], num_experts = args.values.shape[1];
  if (num_tokens == 0) return;
  const bool several = args.sequence_ids.defined();
  const int64_t blocks = several ? args.num_sequences : 1, words = kAssignWords * num_experts;
  const bool in_shared = 4 * words <= kSharedBytes;
  const int64_t scratch_words = in_shared ? 0 : blocks * words;
  Workspace sizes;
  const Memory layout(sizes, args, scratch_words);
  Workspace memory(allocate(exec, sizes.size()));
  const Memory m(memory, args, scratch_words);
  const double huge = std::sqrt(static_cast<double>(FLT_MAX));
  const AssignBalancedParams params{
      .values = args.values.as<const float>(),
      .sequence_ids = args.sequence_ids.as<const int32_t>(),
      .expert_ids = args.expert_ids.as<int32_t>(),
      .sequence_offsets = several ? m.tokens.offsets() : nullptr,
      .tokens = several ? m.tokens.items() : nullptr,
      .places = m.places,
      .paid = m.paid,
      .scratch = in_shared ? nullptr : m.scratch,
      .max_iterations = args.max_iterations,
      .eps = args.eps < 0 ? -1.0f : static_cast<float>(args.eps),
      .huge = static_cast<float>(huge),
      .never_paid = static_cast<float>(1e4 * huge),
      .num_tokens = static_cast<int>(num_tokens),
      .num_experts = static_cast<int>(num_experts),
      .num_sequences = static_cast<int>(args.num_sequences),
      .place_bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(num_tokens - 1)))};
  if (several) m.tokens.list(params.sequence_ids, exec.stream);
  const int64_t threads = std::clamp<int64_t>((num_tokens / blocks + 31) / 32 * 32, 32, kAssignThreads);
  launch(assign_balanced_kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
         in_shared ? static_cast<size_t>(4 * words) : 0, exec.stream, params);
}

}  // namespace switchgear::cuda
