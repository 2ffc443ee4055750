// SPDX-License-Identifier: BSD-3-Clause
// The runtime itself: indices, shared memory, barriers, lanes, atomics, launches.
#include <numeric>
#include <vector>

#include "api.h"
#include "check.h"
#include "launch.h"

using namespace switchgear::cuda;

namespace {

__global__ void reverse_kernel(const float* x, float* y, int n) {
  SHARED_ARRAY(float, tile, 256);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  if (i < n) y[i] = tile[blockDim.x - 1 - threadIdx.x];
}

TEST(blocks_exchange_through_shared_memory) {
  std::vector<float> x(512), y(512);
  std::iota(x.begin(), x.end(), 0.0f);
  launch(reverse_kernel, 2, 256, 0, nullptr, x.data(), y.data(), 512);
  for (int i = 0; i < 512; ++i) CHECK(y[i] == x[i / 256 * 256 + 255 - i % 256], "i = ", i);
}

}  // namespace
