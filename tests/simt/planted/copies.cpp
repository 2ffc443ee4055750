// SPDX-License-Identifier: BSD-3-Clause
// cp.async, ldmatrix, and the bounds of memory.
#include "hopper.cuh"
#include "planted.h"

using namespace switchgear::cuda;

namespace {

// Each thread copies 16 bytes per stage, two stages ahead, and reads its neighbour's.
__global__ void pipeline_kernel(const float* x, float* y, int stages, bool planted) {
  SHARED_DYN(float, tile);
  const unsigned t = threadIdx.x;
  const auto load = [&](int stage) {
    if (stage < stages) ptx::cp_async16(tile + stage % 3 * 256 + 4 * t, x + stage * 256 + 4 * t, true);
    ptx::cp_async_commit();
  };
  load(0);
  load(1);
  float sum = 0.0f;
  for (int stage = 0; stage < stages; ++stage) {
    if (planted) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    __syncthreads();
    sum += tile[stage % 3 * 256 + 4 * (t ^ 1)];
    load(stage + 2);
  }
  ptx::cp_async_wait<0>();
  y[t] = sum;
}
PLANT(cp_async_wait_too_lax, kByRace) {
  std::vector<float> x(6 * 256, 1.0f), y(64);
  launch(pipeline_kernel, 1, 64, 3 * 256 * 4, nullptr, x.data(), y.data(), 6, planted);
}

enum class CopyMistake { kNone, kNoWait, kExit, kMisaligned, kBounds };

__global__ void copy_kernel(const float* x, float* y, int n, CopyMistake mistake) {
  SHARED_DYN(float, tile);
  const int t = static_cast<int>(threadIdx.x);
  const bool valid = mistake == CopyMistake::kBounds || 4 * t < n;
  ptx::cp_async16(tile + 4 * t, x + 4 * t + (mistake == CopyMistake::kMisaligned ? 1 : 0), valid);
  ptx::cp_async_commit();
  if (mistake == CopyMistake::kExit) return;
  if (mistake != CopyMistake::kNoWait) ptx::cp_async_wait<0>();
  y[t] = tile[4 * t];
  ptx::cp_async_wait<0>();
}
void run_copy(CopyMistake mistake) {
  std::vector<float> x(100, 1.0f), y(32);
  launch(copy_kernel, 1, 32, 512, nullptr, x.data(), y.data(), 100, mistake);
}
PLANT(cp_async_without_wait, kByRace) { run_copy(planted ? CopyMistake::kNoWait : CopyMistake::kNone); }
PLANT(exit_with_cp_async_pending, kByBoth) { run_copy(planted ? CopyMistake::kExit : CopyMistake::kNone); }
PLANT(misaligned_cp_async, kByBoth) { run_copy(planted ? CopyMistake::kMisaligned : CopyMistake::kNone); }
PLANT(missing_predicate_of_cp_async, kByAsan) { run_copy(planted ? CopyMistake::kBounds : CopyMistake::kNone); }

__global__ void tracked_copy_kernel(const float* x, float* y, bool planted) {
  SHARED_DYN(float, tile);
  SHARED_VALUE(uint64_t, bar);
  if (threadIdx.x == 0) ptx::mbar_init(&bar, 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    if (planted) ptx::cp_async_mbar_arrive(&bar);
    ptx::cp_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
    if (!planted) ptx::cp_async_mbar_arrive(&bar);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  } else {
    ptx::mbar_wait(&bar, 0);
    y[threadIdx.x - 32] = tile[4 * (threadIdx.x - 32)];
  }
}
PLANT(mbarrier_arrival_before_the_copies, kByRace) {
  std::vector<float> x(128, 1.0f), y(32);
  launch(tracked_copy_kernel, 1, 64, 512, nullptr, x.data(), y.data(), planted);
}

__global__ void ldmatrix_kernel(uint32_t* y, bool planted) {
  SHARED_ARRAY(uint32_t, tile, 192);
  for (unsigned i = threadIdx.x; i < 192; i += 32) tile[i] = i;
  __syncwarp();
  uint32_t r[4];
  // Rows of 16 bytes; 20 if planted.
  ptx::ldmatrix_x4(r, tile + threadIdx.x * (planted ? 5 : 4));
  y[threadIdx.x] = r[0];
}
PLANT(misaligned_ldmatrix, kByBoth) {
  std::vector<uint32_t> y(32);
  launch(ldmatrix_kernel, 1, 32, 0, nullptr, y.data(), planted);
}

__global__ void ldmatrix_race_kernel(uint32_t* y, bool planted) {
  SHARED_ARRAY(uint32_t, tile, 128);
  for (unsigned i = threadIdx.x; i < 128; i += 32) tile[i] = i;
  if (!planted) __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, tile + threadIdx.x * 4);
  y[threadIdx.x] = r[0];
}
PLANT(ldmatrix_without_syncwarp, kByRace) {
  std::vector<uint32_t> y(32);
  launch(ldmatrix_race_kernel, 1, 32, 0, nullptr, y.data(), planted);
}

__global__ void dynamic_overflow_kernel(float* y, bool planted) {
  SHARED_DYN(float, tile);
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x + (planted ? 1 : 0)];
}
PLANT(dynamic_shared_overflow, kByAsan) {
  std::vector<float> y(64);
  launch(dynamic_overflow_kernel, 1, 64, 256, nullptr, y.data(), planted);
}

__global__ void static_overflow_kernel(float* y, bool planted) {
  SHARED_ARRAY(float, tile, 64);
  const unsigned shift = planted ? 1 : 0;
  (&tile[0])[threadIdx.x + shift] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}
PLANT(static_shared_overflow, kByAsan) {
  std::vector<float> y(64);
  launch(static_overflow_kernel, 1, 64, 0, nullptr, y.data(), planted);
}

__global__ void global_overflow_kernel(float* y, int n, bool planted) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (planted || i < n) y[i] = 1.0f;
}
PLANT(missing_predicate_of_store, kByAsan) {
  std::vector<float> y(100);
  launch(global_overflow_kernel, 2, 64, 0, nullptr, y.data(), 100, planted);
}

// A static array cannot be read before it is written: it holds NaN.
__global__ void uninitialised_kernel(float* y, bool planted) {
  SHARED_ARRAY(float, sums, 32);
  if (!planted) sums[threadIdx.x] = 0.0f;
  sums[threadIdx.x] += 1.0f;
  y[threadIdx.x] = sums[threadIdx.x];
}
PLANT(uninitialised_shared_memory, kByBoth) {
  std::vector<float> y(32);
  launch(uninitialised_kernel, 1, 32, 0, nullptr, y.data(), planted);
  for (const float v : y) simt::planted::expect(v == 1.0f, "a sum is not 1");
}

}  // namespace
