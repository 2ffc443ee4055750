// SPDX-License-Identifier: BSD-3-Clause
// Atomics, flags and fences between blocks and between devices.
#include "planted.h"
#include "ptx.cuh"

using namespace switchgear::cuda;

namespace {

enum class Flag { kReleased, kPlain, kRelaxed, kBlockScope, kNoWait, kNever };

// Block 0 sends to block 1.
__global__ void send_kernel(const float* x, float* buffer, uint32_t* flag, float* y, Flag kind) {
  const unsigned t = threadIdx.x;
  if (blockIdx.x == 0) {
    buffer[t] = x[t];
    __syncthreads();
    if (t != 0) return;
    switch (kind) {
      case Flag::kPlain: *flag = 1; break;
      case Flag::kRelaxed: ptx::st_relaxed_gpu(flag, 1); break;
      case Flag::kBlockScope: ptx::st_release_cta(flag, 1); break;
      case Flag::kNever: break;
      default: ptx::st_release_gpu(flag, 1);
    }
  } else {
    if (t == 0 && kind != Flag::kNoWait) {
      while (ptx::ld_acquire_gpu(flag) != 1) {
      }
    }
    __syncthreads();
    y[t] = buffer[t];
  }
}
void run_send(Flag kind) {
  std::vector<float> x(64, 1.0f), buffer(64), y(64);
  uint32_t flag = 0;
  launch_cooperative(send_kernel, 2, 64, 0, nullptr, x.data(), buffer.data(), &flag, y.data(), kind);
}
PLANT(flag_by_a_plain_store, kByRace) { run_send(planted ? Flag::kPlain : Flag::kReleased); }
PLANT(flag_without_release, kByRace) { run_send(planted ? Flag::kRelaxed : Flag::kReleased); }
PLANT(block_scope_flag_across_blocks, kByRace) { run_send(planted ? Flag::kBlockScope : Flag::kReleased); }
PLANT(flag_not_waited_for, kByRace) { run_send(planted ? Flag::kNoWait : Flag::kReleased); }
PLANT(flag_never_raised, kByBoth) { run_send(planted ? Flag::kNever : Flag::kReleased); }

// A read through the read-only cache, of what the kernel has written before.
__global__ void reread_kernel(const float* x, float* buffer, float* y, bool planted) {
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float* const next = buffer + (threadIdx.x + 1) % blockDim.x;
  y[threadIdx.x] = planted ? __ldg(next) : *next + 0.0f * __ldg(x + threadIdx.x);
}
PLANT(read_only_cache_of_what_is_written, kByRace) {
  std::vector<float> x(64, 1.0f), buffer(64), y(64);
  launch(reread_kernel, 1, 64, 0, nullptr, x.data(), buffer.data(), y.data(), planted);
}

// The same between two devices, each with its own grid.
__global__ void exchange_kernel(float* mine, float* theirs, uint32_t* my_flag, uint32_t* their_flag, float* y,
                                bool planted) {
  theirs[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (planted) {
      ptx::st_release_gpu(their_flag, 1);
    } else {
      ptx::st_release_sys(their_flag, 1);
    }
    while (ptx::ld_acquire_sys(my_flag) != 1) {
    }
  }
  __syncthreads();
  y[threadIdx.x] = mine[threadIdx.x];
}
PLANT(device_scope_flag_across_devices, kByRace) {
  std::vector<float> a(32), b(32), y(64);
  uint32_t flags[2] = {};
  simt::run(
      {{1, 32, 0, simt::bind_kernel(exchange_kernel, a.data(), b.data(), flags, flags + 1, y.data(), planted)},
       {1, 32, 0, simt::bind_kernel(exchange_kernel, b.data(), a.data(), flags + 1, flags, y.data() + 32, planted)}});
}

enum class Fence { kBoth, kNoneBefore, kNoneAfter, kBlockScope };

// The last block to finish adds up what all blocks wrote.
__global__ void last_block_kernel(float* partial, unsigned* finished, float* sum, Fence fence) {
  SHARED_VALUE(bool, last);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 1.0f;
    if (fence == Fence::kBlockScope) {
      __threadfence_block();
    } else if (fence != Fence::kNoneBefore) {
      __threadfence();
    }
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    if (fence != Fence::kNoneAfter) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
  *sum = total;
}
void run_last_block(Fence fence) {
  std::vector<float> partial(6);
  unsigned finished = 0;
  float sum = 0.0f;
  launch(last_block_kernel, 6, 32, 0, nullptr, partial.data(), &finished, &sum, fence);
  simt::planted::expect(sum == 6.0f, "the sum over blocks");
}
PLANT(missing_threadfence, kByRace) { run_last_block(planted ? Fence::kNoneBefore : Fence::kBoth); }
PLANT(missing_second_threadfence, kByRace) { run_last_block(planted ? Fence::kNoneAfter : Fence::kBoth); }
PLANT(threadfence_of_block_scope, kByRace) { run_last_block(planted ? Fence::kBlockScope : Fence::kBoth); }

__global__ void count_kernel(int* count, bool planted) {
  if (planted) {
    *count = *count + 1;
  } else {
    atomicAdd(count, 1);
  }
}
PLANT(counter_without_atomic, kByRace) {
  int count = 0;
  launch(count_kernel, 4, 1, 0, nullptr, &count, planted);
}
PLANT(shared_counter_without_atomic, kByRace) {
  int count = 0;
  launch(count_kernel, 1, 64, 0, nullptr, &count, planted);
}

// The histogram is read while other threads still add to it.
__global__ void histogram_kernel(const int* ids, int* counts, bool planted) {
  SHARED_ARRAY(int, histogram, 8);
  if (threadIdx.x < 8) histogram[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&histogram[ids[threadIdx.x]], 1);
  if (!planted) __syncthreads();
  if (threadIdx.x < 8) counts[threadIdx.x] = histogram[threadIdx.x];
}
PLANT(atomics_not_waited_for, kByRace) {
  std::vector<int> ids(128), counts(8);
  for (int i = 0; i < 128; ++i) ids[i] = i % 8;
  launch(histogram_kernel, 1, 128, 0, nullptr, ids.data(), counts.data(), planted);
}

}  // namespace
