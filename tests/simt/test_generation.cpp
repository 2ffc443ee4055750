// SPDX-License-Identifier: BSD-3-Clause
// The switch that makes a device of sm_90 run the kernels of sm_80.
#include <cstdlib>

#include "cuda/ops.h"
#include "expect.h"
#include "gemm_problem.h"
#include "switchgear/backend.h"

namespace switchgear::test {
namespace {

constexpr Case kSmall{"small", 40, 64, 64, 2, 1};  // I is N, H is C

// Whether the product runs on wgmma; its result is checked either way.
bool uses_wgmma() {
  simt::device() = simt::sm_90();
  const uint64_t before = simt::statistics().wgmma;
  const GemmProblem p{kSmall, kPrecisions[2], Storage::kPacked, Rows::kAligned, true, false};
  check_forward(p);
  check_wgrad(p);
  return simt::statistics().wgmma > before;
}

// First, since the variable is read once.
TEST(generation_is_named_by_the_environment) {
  setenv("SWITCHGEAR_CUDA_KERNELS", "sm_70", 1);
  CHECK_FAILS("SWITCHGEAR_CUDA_KERNELS: expected one of auto, sm_80, got sm_70", cuda_kernels());
  setenv("SWITCHGEAR_CUDA_KERNELS", "sm_80", 1);
  CHECK(cuda_kernels() == "sm_80", "got ", cuda_kernels());
  CHECK(!uses_wgmma());
  setenv("SWITCHGEAR_CUDA_KERNELS", "auto", 1);
  CHECK(cuda_kernels() == "sm_80", "the variable is read once");
}

TEST(generation_is_set) {
  set_cuda_kernels("auto");
  CHECK(uses_wgmma());
  set_cuda_kernels("sm_80");
  CHECK(!uses_wgmma());
  CHECK_FAILS("kernels: expected one of auto, sm_80, got sm_90", set_cuda_kernels("sm_90"));
  CHECK(cuda_kernels() == "sm_80");
  set_cuda_kernels("auto");
}

}  // namespace
}  // namespace switchgear::test
