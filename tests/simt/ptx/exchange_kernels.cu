// SPDX-License-Identifier: BSD-3-Clause
// The kernels of ../test_exchange.cpp for nvcc. The names are those of the test, which runs them by name.
#include "exchange.cuh"

namespace switchgear::test {

__global__ void exchange_once(cuda::ExchangeParams params) { cuda::exchange(params); }

__global__ void exchange_twice(cuda::ExchangeParams first, cuda::ExchangeParams second) {
  cuda::exchange(first);
  cuda::exchange(second);
}

__global__ void stop_later(uint32_t* stop, int polls) {
  for (int i = 0; i < polls; ++i) cuda::ptx::ld_relaxed_sys(stop);
  cuda::ptx::st_relaxed_sys(stop, 1);
}

}  // namespace switchgear::test
