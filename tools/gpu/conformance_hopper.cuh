// SPDX-License-Identifier: BSD-3-Clause
// Conformance of the instructions of hopper.cuh that are neither TMA nor wgmma: mbarriers, bulk copies, stmatrix, elect.
#pragma once
#include "conformance_case.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::conformance {

KERNEL(mbarrier) {
  SHARED_DYN(uint64_t, bar);
  if (thread() == 0) {
    ptx::mbar_init(bar, 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (uint32_t phase = 0; phase < 3; ++phase) {
    const uint32_t parity = phase & 1;
    const bool before = ptx::mbar_test_wait(bar, parity), last = ptx::mbar_test_wait(bar, parity ^ 1);
    __syncthreads();
    ptx::mbar_arrive(bar);
    ptx::mbar_wait(bar, parity);
    const bool after = ptx::mbar_test_wait(bar, parity);
    out[phase * 32 + static_cast<uint32_t>(thread())] = (before ? 1 : 0) + (last ? 2 : 0) + (after ? 4 : 0);
    __syncthreads();
  }
  if (thread() == 0) ptx::mbar_inval(bar);
}

KERNEL(cp_async_mbar_arrive) {
  SHARED_DYN(uint64_t, memory);
  uint32_t* const data = reinterpret_cast<uint32_t*>(memory + 1);
  if (thread() == 0) {
    ptx::mbar_init(memory, 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::cp_async4(data + thread(), in + thread(), true);
  ptx::cp_async_mbar_arrive(memory);
  ptx::mbar_wait(memory, 0);
  out[thread()] = data[31 - thread()];
}

// Starts a copy that counts bytes, waits for it, and writes what it loaded to out.
template <typename Copy>
__device__ inline void copied(uint32_t* out, uint32_t* tile, uint64_t* bar, int bytes, const Copy& copy) {
  fill_shared(tile, bytes / 4, [](uint32_t i) { return ~mix(i); });
  ptx::fence_proxy_async();
  if (thread() == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (thread() == 0) {
    ptx::mbar_expect_tx(bar, static_cast<uint32_t>(bytes));
    copy();
  }
  ptx::mbar_wait(bar, 0);
  for (int i = thread(); i < bytes / 4; i += static_cast<int>(blockDim.x)) out[i] = tile[i];
}

KERNEL(bulk_load) {
  SHARED_DYN(uint32_t, tile);
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::bulk_load(tile, in, 4096, reinterpret_cast<uint64_t*>(tile + 1024)); });
}

#define STORE_MATRIX(name)                                                                                      \
  KERNEL(name) {                                                                                                \
    SHARED_DYN(uint32_t, shared);                                                                               \
    fill_shared(shared, 128, [](uint32_t i) { return ~mix(i); });                                               \
    const uint32_t r[4] = {in[4 * thread()], in[4 * thread() + 1], in[4 * thread() + 2], in[4 * thread() + 3]}; \
    ptx::name(shared + thread() * 5 % 32 * 4, r);                                                               \
    __syncthreads();                                                                                            \
    put(out, shared + 4 * thread(), 4);                                                                         \
  }
STORE_MATRIX(stmatrix_x4)
STORE_MATRIX(stmatrix_x4_trans)

KERNEL(elect_one) {
  const unsigned elected = __ballot_sync(0xffffffffu, ptx::elect_one());
  out[thread()] = static_cast<uint32_t>(__popc(elected));
}

inline void add_hopper(std::vector<Case>& cases) {
  cases.insert(cases.end(), {SIMPLE(mbarrier, 32), SIMPLE(cp_async_mbar_arrive, 32), SIMPLE(bulk_load, 32),
                             SIMPLE(stmatrix_x4, 32), SIMPLE(stmatrix_x4_trans, 32), SIMPLE(elect_one, 32)});
}

}  // namespace switchgear::cuda::conformance
