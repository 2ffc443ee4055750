// SPDX-License-Identifier: BSD-3-Clause
#include <climits>
#include <vector>

#include "planted.h"
#include "switchgear/backend.h"

namespace switchgear::planted {
namespace {

void signed_overflow() { std::printf("%d\n", opaque(INT_MAX) + opaque(1)); }

void negative_shift() { std::printf("%d\n", 1 << opaque(-1)); }

void shift_past_the_width() { std::printf("%d\n", 1 << opaque(33)); }

void division_by_zero() { std::printf("%d\n", opaque(7) / opaque(0)); }

void null_dereference() {
  const Plan* p = opaque<const Plan*>(nullptr);
  std::printf("%d\n", p->expert_offsets.ndim);
}

void index_out_of_bounds() {
  int counts[4] = {};
  std::printf("%d\n", counts[opaque(4)]);
}

void invalid_bool() {
  char bytes[1] = {opaque<char>(7)};
  bool* normalize = reinterpret_cast<bool*>(bytes);
  std::printf("%d\n", *opaque(normalize) ? 1 : 0);
}

// Bypasses the checks with a plan of ids at an odd address: the report comes from plan.cpp.
void misaligned_load() {
  std::vector<int32_t> ids(5), offsets(2), tokens(4), slots(4);
  char* odd = reinterpret_cast<char*>(ids.data()) + opaque(1);
  cpu_backend().plan({.topk_ids = view(odd, DType::kInt32, 2, 2),
                      .plan = {.expert_offsets = view(offsets.data(), DType::kInt32, 2),
                               .token_indices = view(tokens.data(), DType::kInt32, 4),
                               .slot_indices = view(slots.data(), DType::kInt32, 2, 2)}},
                     {});
}

constexpr Bug kBugs[] = {
    {"signed_overflow", signed_overflow},
    {"negative_shift", negative_shift},
    {"shift_past_the_width", shift_past_the_width},
    {"division_by_zero", division_by_zero},
    {"null_dereference", null_dereference},
    {"index_out_of_bounds", index_out_of_bounds},
    {"invalid_bool", invalid_bool},
    {"misaligned_load", misaligned_load},
};

}  // namespace
}  // namespace switchgear::planted

int main(int argc, char** argv) { return switchgear::planted::run_named(switchgear::planted::kBugs, argc, argv); }
