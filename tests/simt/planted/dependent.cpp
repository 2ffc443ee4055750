// SPDX-License-Identifier: BSD-3-Clause
// A kernel that may start before the one before it has ended, and its mistakes.
#include "hopper.cuh"
#include "planted.h"

using namespace switchgear::cuda;

namespace {

enum class Mistake { kNone, kReadBefore, kWriteBefore, kCopyBefore, kReadOfAnotherThread, kNoWait, kWaitOfOneThread };

// out[i] = 2 · in[i]; in is what the kernel before wrote.
__global__ void __launch_bounds__(64) doubling_kernel(const uint32_t* in, uint32_t* out, Mistake mistake) {
  SHARED_ARRAY(uint32_t, values, 64);
  SHARED_ARRAY(uint32_t, own, 64);  // shared memory is no other kernel's
  SHARED_VALUE(uint64_t, landed);
  if (threadIdx.x == 0) {
    ptx::mbar_init(&landed, 1);
    ptx::fence_barrier_init();
  }
  own[threadIdx.x] = 0;
  if (mistake == Mistake::kReadBefore) own[threadIdx.x] = in[threadIdx.x];
  if (mistake == Mistake::kWriteBefore) out[threadIdx.x] = 0;
  __syncthreads();
  const auto copy = [&] {
    if (threadIdx.x != 0) return;
    ptx::mbar_expect_tx(&landed, 256);
    ptx::bulk_load(values, in, 256, &landed);
  };
  if (mistake == Mistake::kCopyBefore) copy();
  if (mistake == Mistake::kReadOfAnotherThread && threadIdx.x == 40) out[40] = in[40];
  if (mistake != Mistake::kNoWait && (mistake != Mistake::kWaitOfOneThread || threadIdx.x == 0)) {
    ptx::wait_for_kernel_before();
  }
  __syncthreads();  // the waits of others order this thread's accesses too
  if (mistake != Mistake::kCopyBefore) copy();
  ptx::mbar_wait(&landed, 0);
  out[threadIdx.x] = 2 * values[threadIdx.x];
  ptx::start_kernel_after();
}

void run_doubling(Mistake mistake) {
  simt::device() = simt::sm_90();
  std::vector<uint32_t> in(64), out(64);
  for (uint32_t i = 0; i < 64; ++i) in[i] = i;
  launch_dependent(true, 1, doubling_kernel, dim3(1), dim3(64), 0, nullptr, in.data(), out.data(), mistake);
  for (uint32_t i = 0; i < 64; ++i) simt::planted::expect(out[i] == 2 * i, "the doubles");
}

#define DEPENDENT(name, mistake, seen) \
  PLANT(name, seen) { run_doubling(planted ? Mistake::mistake : Mistake::kNone); }
DEPENDENT(dependent_reads_before_it_waits, kReadBefore, kByRace)
DEPENDENT(dependent_writes_before_it_waits, kWriteBefore, kByRace)
DEPENDENT(dependent_copies_before_it_waits, kCopyBefore, kByRace)
DEPENDENT(dependent_reads_before_it_waits_in_one_thread, kReadOfAnotherThread, kByRace)
DEPENDENT(dependent_never_waits, kNoWait, kByBoth)
DEPENDENT(dependent_waits_in_one_thread, kWaitOfOneThread, kByBoth)

}  // namespace
