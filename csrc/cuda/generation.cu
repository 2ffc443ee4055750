// SPDX-License-Identifier: BSD-3-Clause
#include <atomic>
#include <cstdlib>

#include "gemm.h"
#include "names.h"
#include "switchgear/backend.h"

namespace switchgear {
namespace {

enum class Generation : int { kUnset, kAuto, kSm80 };
constexpr Names<Generation, 2> kGenerations{{{"auto", Generation::kAuto}, {"sm_80", Generation::kSm80}}};

std::atomic<Generation> chosen{Generation::kUnset};

Generation in_use() {
  const Generation now = chosen.load(std::memory_order_acquire);
  if (now != Generation::kUnset) return now;
  const char* const named = std::getenv("SWITCHGEAR_CUDA_KERNELS");
  const bool is_named = named != nullptr && *named != '\0';
  const Generation first = is_named ? parse("SWITCHGEAR_CUDA_KERNELS", kGenerations, named) : Generation::kAuto;
  Generation expected = Generation::kUnset;  // another thread may have called set_cuda_kernels
  return chosen.compare_exchange_strong(expected, first) ? first : expected;
}

}  // namespace

std::string cuda_kernels() { return in_use() == Generation::kSm80 ? "sm_80" : "auto"; }

void set_cuda_kernels(const std::string& kernels) {
  chosen.store(parse("kernels", kGenerations, kernels), std::memory_order_release);
}

bool cuda::only_sm80() { return in_use() == Generation::kSm80; }

}  // namespace switchgear
