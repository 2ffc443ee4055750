// SPDX-License-Identifier: BSD-3-Clause
// Kernels of conformance about memory that threads share: release and acquire between multiprocessors, all blocks at once, and
// memory that another process writes.
#pragma once
#include "conformance_data.cuh"

namespace switchgear::cuda::conformance {

#if defined(ON_DEVICE)
constexpr uint32_t kRounds = 20000;
constexpr int kPairs = 4;
#else
constexpr uint32_t kRounds = 20;
constexpr int kPairs = 2;  // the device of the model has four multiprocessors
#endif
constexpr int kPayload = 64;                // words: two a lane
constexpr int kWordsOfPair = 2 * kPayload;  // payload, flag, answer; 256 bytes apart

// Block 2p passes messages to block 2p + 1 through the same words again and again: a stale word of L1, or a flag that overtakes
// its payload, is a wrong word. Counts those at out[pair]. The blocks fill their multiprocessors, so that they are on different
// ones. memory: zeros.
__global__ void __launch_bounds__(1024) messages_kernel(uint32_t* memory, uint32_t* out) {
  const int pair = static_cast<int>(blockIdx.x) / 2;
  uint32_t* const payload = memory + pair * kWordsOfPair;
  uint32_t* const flag = payload + kPayload;
  uint32_t* const answer = flag + 1;
  if (threadIdx.x >= 32) return;
  const bool writes = blockIdx.x % 2 == 0;
  uint32_t wrong = 0;
  for (uint32_t round = 1; round <= kRounds; ++round) {
    if (writes) {
      for (int i = thread(); i < kPayload; i += 32) payload[i] = mix(round * kPayload + static_cast<uint32_t>(i));
      __syncwarp();
      if (thread() == 0) {
        ptx::st_release_gpu(flag, round);
        while (ptx::ld_acquire_gpu(answer) < round) {
        }
      }
      __syncwarp();
    } else {
      if (thread() == 0) {
        while (ptx::ld_acquire_gpu(flag) < round) {
        }
      }
      __syncwarp();
      for (int i = thread(); i < kPayload; i += 32) {
        wrong += payload[i] != mix(round * kPayload + static_cast<uint32_t>(i)) ? 1 : 0;
      }
      __syncwarp();
      if (thread() == 0) ptx::st_release_gpu(answer, round);
    }
  }
  if (!writes) out[pair * 32 + thread()] = wrong;
}

constexpr int kTogether = 64;  // blocks: fewer than the multiprocessors of any data center GPU

// Each block waits for all others, which ends only if all are resident.
__global__ void together_kernel(uint32_t* memory, uint32_t* out) {
  ptx::atom_add_acq_rel_gpu(memory, 1);
  while (ptx::ld_acquire_gpu(memory) < gridDim.x) {
  }
  out[blockIdx.x] = 1;
}

__global__ void write_kernel(uint32_t* words, int count) {
  for (int i = thread(); i < count; i += static_cast<int>(blockDim.x)) words[i] = mix(static_cast<uint32_t>(i) + 77);
}

}  // namespace switchgear::cuda::conformance
