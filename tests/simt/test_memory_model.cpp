// SPDX-License-Identifier: BSD-3-Clause
// Correct ways to order accesses, which must raise no alarm; and, in the race build, the subtler mistakes.
// planted/ has the simple mistakes.
#include <vector>

#include "expect.h"
#include "launch.h"
#include "ptx.cuh"
#include "race.h"

using namespace switchgear::cuda;

namespace {

#define CHECK_RACES(text, ...)        \
  if (simt::race::enabled) {          \
    CHECK_FAILS(text, __VA_ARGS__);   \
  } else {                            \
    try {                             \
      __VA_ARGS__;                    \
    } catch (const std::exception&) { \
    }                                 \
  }

// ---- counters -------------------------------------------------------------------------------------------------------------

// A ticket by acquire and release instead of fences.
__global__ void ticket_kernel(int* parts, uint32_t* finished, int* sum) {
  parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  if (ptx::atom_add_acq_rel_gpu(finished, 1) != gridDim.x - 1) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += parts[i];
}
TEST(acquire_and_release_by_read_modify_write) {
  std::vector<int> parts(10);
  uint32_t finished = 0;
  int sum = 0;
  launch(ticket_kernel, 10, 1, 0, nullptr, parts.data(), &finished, &sum);
  CHECK(sum == 55);
}

// A relaxed read-modify-write between release and acquire continues the release sequence; a relaxed store breaks it.
__global__ void sequence_kernel(int* data, uint32_t* flag, int* out, bool broken) {
  if (blockIdx.x == 0) {
    *data = 5;
    ptx::st_release_gpu(flag, 1);
  } else if (blockIdx.x == 1) {
    while (ptx::ld_relaxed_gpu(flag) != 1) {
    }
    if (broken) {
      ptx::st_relaxed_gpu(flag, 2);
    } else {
      ptx::atom_add_relaxed_gpu(flag, 1);
    }
  } else {
    while (ptx::ld_relaxed_gpu(flag) != 2) {
    }
    ptx::ld_acquire_gpu(flag);
    *out = *data;
  }
}
TEST(release_sequences) {
  int data = 0, out = 0;
  uint32_t flag = 0;
  launch_cooperative(sequence_kernel, 3, 1, 0, nullptr, &data, &flag, &out, false);
  CHECK(out == 5);
  flag = 0;
  CHECK_RACES("data race", launch_cooperative(sequence_kernel, 3, 1, 0, nullptr, &data, &flag, &out, true));
}

// ---- fences -----------------------------------------------------------------------------------------------------------------

enum class Kind { kVolatile, kRelaxed };
__global__ void fenced_flag_kernel(int* data, uint32_t* flag, int* out, Kind kind, bool fence_before,
                                   bool fence_after) {
  if (blockIdx.x == 0) {
    *data = 5;
    if (fence_before) __threadfence();
    if (kind == Kind::kVolatile) {
      *const_cast<volatile uint32_t*>(flag) = 1;
    } else {
      ptx::st_relaxed_gpu(flag, 1);
    }
  } else {
    while (ptx::ld_relaxed_gpu(flag) != 1) {
    }
    if (fence_after) __threadfence();
    *out = *data;
  }
}
TEST(fences_around_relaxed_and_volatile_flags) {
  for (const Kind kind : {Kind::kVolatile, Kind::kRelaxed}) {
    for (int fences = 0; fences < 4; ++fences) {
      int data = 0, out = 0;
      uint32_t flag = 0;
      const auto run = [&] {
        launch_cooperative(fenced_flag_kernel, 2, 1, 0, nullptr, &data, &flag, &out, kind, (fences & 1) != 0,
                           (fences & 2) != 0);
      };
      if (fences == 3) {
        run();
        CHECK(out == 5);
      } else {
        CHECK_RACES("data race", run());
      }
    }
  }
}

// A fence by one thread covers what other threads of its block did before a barrier.
__global__ void cumulative_kernel(int* data, uint32_t* flag, int* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      ptx::st_relaxed_gpu(flag, 1);
    }
  } else {
    if (threadIdx.x == 0) {
      while (ptx::ld_relaxed_gpu(flag) != 1) {
      }
      __threadfence();
    }
    __syncthreads();
    out[threadIdx.x] = data[63 - threadIdx.x];
  }
}
TEST(fences_are_cumulative) {
  std::vector<int> data(64), out(64);
  uint32_t flag = 0;
  launch_cooperative(cumulative_kernel, 2, 64, 0, nullptr, data.data(), &flag, out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 63 - i);
}

// ---- scopes -----------------------------------------------------------------------------------------------------------------

__global__ void block_flag_kernel(int* data, uint32_t* flag, int* out) {
  if (threadIdx.x == 0) {
    *data = 5;
    ptx::st_release_cta(flag, 1);
  } else if (threadIdx.x == 32) {
    while (ptx::ld_acquire_cta(flag) != 1) {
    }
    *out = *data;
  }
}
TEST(block_scope_inside_a_block) {
  int data = 0, out = 0;
  uint32_t flag = 0;
  launch(block_flag_kernel, 1, 64, 0, nullptr, &data, &flag, &out);
  CHECK(out == 5);
}

__global__ void chain_kernel(int* data, uint32_t* flags, int* out) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *data = 5;
    ptx::st_release_gpu(flags, 1);
  } else if (blockIdx.x == 1 && threadIdx.x == 0) {
    while (ptx::ld_acquire_gpu(flags) != 1) {
    }
    ptx::st_release_cta(flags + 1, 1);
  } else if (blockIdx.x == 1) {
    while (ptx::ld_acquire_cta(flags + 1) != 1) {
    }
    *out = *data;
  }
}
TEST(scopes_chain) {
  int data = 0, out = 0;
  uint32_t flags[2] = {};
  launch_cooperative(chain_kernel, 2, 2, 0, nullptr, &data, flags, &out);
  CHECK(out == 5);
}

__global__ void count_kernel(uint32_t* counter, bool block_scope) {
  if (block_scope) {
    atomicAdd_block(counter, 1u);
  } else {
    atomicAdd(counter, 1u);
  }
}
TEST(counters_need_the_scope_that_includes_all) {
  uint32_t counter = 0;
  launch(count_kernel, 20, 20, 0, nullptr, &counter, false);
  CHECK(counter == 400);
  launch(count_kernel, 1, 400, 0, nullptr, &counter, true);
  CHECK(counter == 800);
  CHECK_RACES("scopes do not include each other", launch(count_kernel, 20, 20, 0, nullptr, &counter, true));
}

// ---- peers ------------------------------------------------------------------------------------------------------------------

// Every rank writes its numbers into each window and raises a flag there.
struct Peers {
  int* window[4];
  uint32_t* flags[4];
};
__global__ void all_to_all_kernel(Peers peers, int rank, int* out) {
  const int peer = static_cast<int>(blockIdx.x), t = static_cast<int>(threadIdx.x);
  peers.window[peer][32 * rank + t] = 1000 * rank + 32 * peer + t;
  __syncthreads();
  if (t == 0) {
    ptx::st_release_sys(peers.flags[peer] + rank, 1);
    while (ptx::ld_acquire_sys(peers.flags[rank] + peer) != 1) {
    }
  }
  __syncthreads();
  out[32 * peer + t] = peers.window[rank][32 * peer + t];
}
TEST(four_ranks_exchange) {
  std::vector<std::vector<int>> windows(4, std::vector<int>(128)), outs(4, std::vector<int>(128));
  std::vector<std::vector<uint32_t>> flags(4, std::vector<uint32_t>(4));
  Peers peers;
  std::vector<simt::Grid> grids;
  for (int rank = 0; rank < 4; ++rank) {
    peers.window[rank] = windows[rank].data();
    peers.flags[rank] = flags[rank].data();
  }
  for (int rank = 0; rank < 4; ++rank)
    grids.push_back({4, 32, 0, simt::bind_kernel(all_to_all_kernel, peers, rank, outs[rank].data())});
  simt::run(grids);
  for (int rank = 0; rank < 4; ++rank) {
    for (int i = 0; i < 128; ++i)
      CHECK(outs[rank][i] == 1000 * (i / 32) + 32 * rank + i % 32, "rank ", rank, ", i ", i);
  }
}

// ---- crowds and bytes ---------------------------------------------------------------------------------------------------------

// More readers than a cell lists, then one write: ordered by the barrier, or racing with only one reader.
__global__ void crowd_kernel(int* value, int* out, bool planted) {
  if (!planted || threadIdx.x != 700) out[threadIdx.x] = *value;
  __syncthreads();
  if (threadIdx.x == 0) *value = 2;
  if (planted && threadIdx.x == 700) out[threadIdx.x] = *value;
}
TEST(a_write_races_with_any_of_a_thousand_readers) {
  int value = 1;
  std::vector<int> out(1024);
  launch(crowd_kernel, 1, 1024, 0, nullptr, &value, out.data(), false);
  CHECK_RACES("thread (700,0,0)", launch(crowd_kernel, 1, 1024, 0, nullptr, &value, out.data(), true));
}

__global__ void bytes_kernel(uint8_t* bytes, bool planted) {
  bytes[threadIdx.x / (planted ? 2 : 1)] = static_cast<uint8_t>(threadIdx.x);
}
TEST(neighbouring_bytes_are_apart) {
  std::vector<uint8_t> bytes(64);
  launch(bytes_kernel, 1, 64, 0, nullptr, bytes.data(), false);
  CHECK_RACES("data race", launch(bytes_kernel, 1, 64, 0, nullptr, bytes.data(), true));
}

// Blocks run one after another here, but nothing orders them.
__global__ void last_writer_kernel(int* value) { *value = static_cast<int>(blockIdx.x); }
TEST(blocks_are_unordered_even_if_never_resident_together) {
  simt::options().resident_blocks = 1;
  int value = 0;
  CHECK_RACES("data race", launch(last_writer_kernel, 3, 1, 0, nullptr, &value));
  simt::options().resident_blocks = 4;
}

TEST(launches_are_ordered) {
  int value = 0;
  for (int i = 0; i < 3; ++i) launch(last_writer_kernel, 1, 1, 0, nullptr, &value);
}

}  // namespace
