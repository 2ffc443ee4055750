// SPDX-License-Identifier: BSD-3-Clause
// Conformance of memory that threads share: release and acquire between multiprocessors, all blocks at once, and memory that another
// process writes.
#pragma once
#include <unistd.h>

#include <stdexcept>

#include "conformance_case.cuh"

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

// A block with all the shared memory it may have is alone on its multiprocessor.
inline size_t most_shared() {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) != cudaSuccess) bytes = 99 << 10;
  return static_cast<size_t>(bytes);
}

inline void zero(uint32_t* words, int count) {
#if defined(ON_DEVICE)
  cudaMemset(words, 0, static_cast<size_t>(count) * sizeof(uint32_t));
#else
  std::memset(words, 0, static_cast<size_t>(count) * sizeof(uint32_t));
#endif
}

#if defined(ON_DEVICE)
// A process of its own maps the memory of a handle, in hexadecimal, and writes it.
inline int write_shared_memory(const char* text) {
  cudaIpcMemHandle_t handle;
  for (size_t i = 0; i < sizeof handle; ++i) {
    unsigned byte = 0;
    std::sscanf(text + 2 * i, "%2x", &byte);
    reinterpret_cast<unsigned char*>(&handle)[i] = static_cast<unsigned char>(byte);
  }
  void* memory = nullptr;
  if (cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) return 3;
  write_kernel<<<1, 256>>>(static_cast<uint32_t*>(memory), 4096);
  return cudaDeviceSynchronize() == cudaSuccess && cudaIpcCloseMemHandle(memory) == cudaSuccess ? 0 : 4;
}

inline void share_memory(uint32_t* out) {
  // Smaller allocations share a block of 2 MB, which a handle describes as a whole.
  void* shared = nullptr;
  cudaIpcMemHandle_t handle;
  if (cudaMalloc(&shared, 2 << 20) != cudaSuccess || cudaIpcGetMemHandle(&handle, shared) != cudaSuccess) {
    throw std::runtime_error("cudaIpcGetMemHandle");
  }
  std::string text;
  for (size_t i = 0; i < sizeof handle; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", reinterpret_cast<const unsigned char*>(&handle)[i]);
    text += digits;
  }
  char self[4096] = {};
  if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) throw std::runtime_error("readlink");
  const int status = std::system(("'" + std::string(self) + "' --ipc " + text).c_str());
  if (status != 0) throw std::runtime_error("the other process ended with status " + std::to_string(status));
  cudaMemcpy(out, shared, 4096 * sizeof(uint32_t), cudaMemcpyDeviceToDevice);
  cudaFree(shared);
}
#else
inline int write_shared_memory(const char*) { return 2; }
#endif

inline void add_memory(std::vector<Case>& cases) {
  cases.push_back({"messages between multiprocessors",
                   [](uint32_t* in, uint32_t* out) {
                     zero(in, kPairs * kWordsOfPair);
                     launch_cooperative(messages_kernel, dim3(2 * kPairs), dim3(32), most_shared(), nullptr, in, out);
                   },
                   [](const Numbers& words) { return all_equal(words, 32 * kPairs, 0, "lanes saw wrong words"); }});
  cases.push_back({"all blocks at once",
                   [](uint32_t* in, uint32_t* out) {
                     zero(in, 1);
                     launch_cooperative(together_kernel, dim3(kTogether), dim3(1), 0, nullptr, in, out);
                   },
                   [](const Numbers& words) { return all_equal(words, kTogether, 1, "blocks did not run"); }});
#if defined(ON_DEVICE)
  cases.push_back({"memory of another process", [](uint32_t*, uint32_t* out) { share_memory(out); },
                   [](const Numbers& words) {
                     size_t right = 0;
                     while (right < words.size() && words[right] == mix(static_cast<uint32_t>(right) + 77)) ++right;
                     return right == 4096 ? "" : std::to_string(right) + " of 4096 words arrived";
                   }});
#endif
}

}  // namespace switchgear::cuda::conformance
