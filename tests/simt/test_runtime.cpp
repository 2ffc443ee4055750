// SPDX-License-Identifier: BSD-3-Clause
// Threads, blocks, shared memory, barriers, and the error messages for a kernel that hangs.
#include <numeric>
#include <vector>

#include "expect.h"
#include "launch.h"
#include "ptx.cuh"

using namespace switchgear::cuda;

namespace {

__global__ void indices_kernel(int* out) {
  const int thread = static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  const int block = static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  out[block * threads + thread] += block * threads + thread + 1;
}
TEST(every_thread_of_every_block_runs_once) {
  std::vector<int> out(3 * 2 * 2 * 5 * 3 * 7);
  launch(indices_kernel, dim3(3, 2, 2), dim3(5, 3, 7), 0, nullptr, out.data());
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == static_cast<int>(i) + 1, "i = ", i);
}

__global__ void reverse_kernel(const float* x, float* y, int n) {
  SHARED_ARRAY(float, tile, 256);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  tile[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  if (i < n) y[i] = tile[blockDim.x - 1 - threadIdx.x];
}
TEST(threads_exchange_through_shared_memory) {
  std::vector<float> x(512), y(512);
  std::iota(x.begin(), x.end(), 0.0f);
  launch(reverse_kernel, 2, 256, 0, nullptr, x.data(), y.data(), 512);
  for (int i = 0; i < 512; ++i) CHECK(y[i] == x[i / 256 * 256 + 255 - i % 256], "i = ", i);
}

// Two arrays, a value and the dynamic memory, all separate. Every block finds them filled with NaN.
__global__ void arrays_kernel(int* fresh, uint32_t* addresses) {
  SHARED_ARRAY(float, a, 3);
  SHARED_ARRAY(float, b, 5);
  SHARED_VALUE(float, c);
  SHARED_DYN(float, d);
  fresh[blockIdx.x] = a[2] != a[2] && b[4] != b[4] && c != c && d[15] != d[15];
  a[2] = b[4] = c = d[15] = 1.0f;
  if (blockIdx.x > 0) return;
  addresses[0] = ptx::smem_u32(a);
  addresses[1] = ptx::smem_u32(b);
  addresses[2] = ptx::smem_u32(&c);
  addresses[3] = ptx::smem_u32(d);
}
TEST(shared_memory_is_a_blocks_own_and_starts_as_nan) {
  simt::options().resident_blocks = 1;
  std::vector<int> fresh(4);
  uint32_t addresses[4];
  launch(arrays_kernel, 4, 1, 64, nullptr, fresh.data(), addresses);
  simt::options().resident_blocks = 4;
  for (const int f : fresh) CHECK(f == 1);
  for (int i = 0; i < 4; ++i) {
    CHECK(addresses[i] % 16 == 0 && addresses[i] < (1u << 21), "i = ", i, ", address ", addresses[i]);
    for (int j = 0; j < i; ++j) CHECK(addresses[i] != addresses[j]);
  }
  CHECK(addresses[3] % 1024 == 0);
}

// A ring of warps: each waits for its predecessor and then releases its successor.
__global__ void ring_kernel(int* order) {
  SHARED_VALUE(int, next);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  if (warp > 0) ptx::bar_sync(warp, 64);
  if (threadIdx.x % 32 == 0) order[warp] = next++;
  __syncwarp();
  if (warp < 3) ptx::bar_arrive(warp + 1, 64);
}
TEST(named_barriers) {
  std::vector<int> order(4, -1);
  launch(ring_kernel, 1, 128, 0, nullptr, order.data());
  for (int i = 0; i < 4; ++i) CHECK(order[i] == i);
}

__global__ void bad_barrier_kernel(int id, int threads) { ptx::bar_sync(id, threads); }
TEST(named_barriers_are_checked) {
  CHECK_FAILS("a number below 16", launch(bad_barrier_kernel, 1, 64, 0, nullptr, 16, 64));
  CHECK_FAILS("multiple of 32", launch(bad_barrier_kernel, 1, 64, 0, nullptr, 1, 48));
}

__global__ void left_arrivals_kernel() {
  if (threadIdx.x < 32) ptx::bar_arrive(3, 64);
}
TEST(arrivals_that_nobody_waits_for) {
  CHECK_FAILS("arrivals left in barrier 3", launch(left_arrivals_kernel, 1, 64, 0, nullptr));
}

__global__ void hang_kernel() {
  if (threadIdx.x < 40) __syncthreads();
  if (threadIdx.x >= 40) ptx::bar_sync(1, 64);
}
TEST(a_deadlock_names_the_lines) {
  CHECK_FAILS("40 thread(s) in __syncthreads at test_runtime.cpp:", launch(hang_kernel, 1, 64, 0, nullptr));
  CHECK_FAILS("24 thread(s) in a named barrier at test_runtime.cpp:", launch(hang_kernel, 1, 64, 0, nullptr));
}

__global__ void poll_kernel(const uint32_t* flag) {
  while (ptx::ld_acquire_gpu(flag) == 0) {
  }
}
__global__ void poll_by_atomics_kernel(unsigned* flag) {
  while (atomicCAS(flag, 1u, 0u) == 0) {
  }
}
TEST(a_livelock_names_the_line) {
  uint32_t flag = 0;
  CHECK_FAILS("64 thread(s) in a loop that polls at test_runtime.cpp:", launch(poll_kernel, 1, 64, 0, nullptr, &flag));
  CHECK_FAILS("livelock", launch(poll_by_atomics_kernel, 1, 64, 0, nullptr, &flag));
}

// Without a cooperative launch, blocks need not be resident together: waiting for a later one hangs in some order.
__global__ void wait_for_all_kernel(uint32_t* arrived) {
  atomicAdd(arrived, 1u);
  while (ptx::ld_acquire_gpu(arrived) != gridDim.x) {
  }
}
TEST(only_cooperative_blocks_may_wait_for_each_other) {
  uint32_t arrived = 0;
  CHECK_FAILS("livelock", launch(wait_for_all_kernel, 8, 1, 0, nullptr, &arrived));
  arrived = 0;
  launch_cooperative(wait_for_all_kernel, 8, 1, 0, nullptr, &arrived);
  CHECK(arrived == 8);
}

struct Big {
  int64_t values[500];
};
__global__ void by_value_kernel(Big big, int64_t* sum) {
  for (const int64_t v : big.values)
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(v));
}
TEST(arguments_are_copies) {
  Big big;
  std::iota(std::begin(big.values), std::end(big.values), 0);
  int64_t sum = 0;
  launch(by_value_kernel, 2, 3, 0, nullptr, big, &sum);
  CHECK(sum == 6 * 500 * 499 / 2);
}

__global__ void trap_kernel(int* y) {
  __syncthreads();
  if (threadIdx.x == 3) __trap();
  y[threadIdx.x] = 1;
}
TEST(errors_name_thread_and_line_and_leave_nothing_behind) {
  std::vector<int> y(64);
  for (int i = 0; i < 50; ++i)
    CHECK_FAILS("block (0,0,0) thread (3,0,0), test_runtime.cpp:", launch(trap_kernel, 1, 64, 0, nullptr, y.data()));
  launch(indices_kernel, 1, 64, 0, nullptr, y.data());
}

}  // namespace
