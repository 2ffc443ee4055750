// SPDX-License-Identifier: BSD-3-Clause
// exchange: all-to-all of rows between the GPUs of one machine that map each other's memory, in chunks. One cooperative
// kernel on each of W ranks; it ends when this rank has all rows that are sent to it.
//
//   rows [T, vectors]        this rank's; row_tokens lists the row of each send, in the order (chunk, target)
//   windows[r]               in the memory of rank r, written by this rank: its rows for r, in the order of chunks
//   received [R, vectors]    in the order (chunk, source)
//   traffic                  each row read and written twice, once over the link; bound by the link
//
// A lane is one (this rank, other rank) pair in one direction, and has kBlocks blocks, which share the rows of each chunk.
// Sending lanes push rows into the target's window. A block that is done with its part of a chunk counts (acquire and
// release), and the one that counts last raises the chunk's flag in the target's memory (release, system): what the other
// blocks wrote is behind it, since counting also acquires. Receiving lanes wait for the flags of their source (acquire,
// system), copy its rows out of the window, and the last block to finish says in the source's memory that the window has been
// read. Before it writes to a window, a sending lane waits for that, from the exchange before.
//
// Flags and counts only grow, with the number of the exchange, so nothing is reset, and an old flag is never taken for a new
// one. Every chunk has flags of its own: chunks may complete in any order.
//
// A rank that is gone raises no flags. After `patience` polls of one flag the kernel ends with *stalled = that rank + 1, and
// the host asks who is still there. Nothing traps, so the context lives on.
//
// Numeric contract: copies of rows of whole 16-byte vectors, aligned to them.
#pragma once
#include "vector.cuh"

#include "ptx.cuh"

namespace switchgear::cuda {

constexpr int kMaxRanks = 16;  // of one machine
constexpr int kExchangeThreads = 128;
constexpr int kLaneBlocks = 2;  // of each lane

using Vector = uint4;

struct ExchangeParams {
  int rank, num_ranks, num_chunks;
  uint32_t number;  // of this exchange, from 0 on
  int vectors;      // of a row
  const Vector* rows;
  const int32_t* row_tokens;
  const int32_t* send_counts;     // [num_chunks, W] rows for each target
  const int32_t* receive_counts;  // [num_chunks, W] rows of each source
  Vector* received;

  Vector* windows[kMaxRanks];          // [r]: of this rank, in the memory of r
  const Vector* inboxes[kMaxRanks];    // [s]: the window of s, here
  uint32_t* arrived_there[kMaxRanks];  // [r]: [num_chunks] flags of this rank, in the memory of r
  const uint32_t* arrived_here;        // [W, num_chunks]
  uint32_t* read_there[kMaxRanks];     // [s]: how many exchanges this rank has read, in the memory of s
  const uint32_t* read_here;           // [W]
  uint32_t* sent;                      // [W, num_chunks] counts of blocks, of this device
  uint32_t* taken;                     // [W] counts of blocks
  uint32_t* stalled;                   // 0, or the rank that was waited for in vain, plus 1
  int64_t patience;                    // polls
};

// Whether *flag reaches `value`. One thread.
__device__ inline bool reaches(const uint32_t* flag, uint32_t value, const ExchangeParams& p, int whom) {
  for (int64_t polls = 0; polls < p.patience; ++polls) {
    if (static_cast<int32_t>(ptx::ld_acquire_sys(flag) - value) >= 0) return true;
    if (ptx::ld_relaxed_gpu(p.stalled) != 0) return false;
  }
  ptx::st_relaxed_gpu(p.stalled, static_cast<uint32_t>(whom) + 1);
  return false;
}

// Whether *flag reaches `value`, for all threads of the block.
__device__ inline bool block_reaches(const uint32_t* flag, uint32_t value, const ExchangeParams& p, int whom) {
  SHARED_VALUE(bool, reached);
  if (threadIdx.x == 0) reached = reaches(flag, value, p, whom);
  __syncthreads();
  const bool result = reached;
  __syncthreads();
  return result;
}

// Counts this block; whether it is the last of its lane. All threads, after what they wrote; the answer is for thread 0.
__device__ inline bool counts_last(uint32_t* count, uint32_t number) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  return ptx::atom_add_acq_rel_gpu(count, 1) + 1 == (number + 1) * kLaneBlocks;
}

__device__ inline void copy_row(Vector* to, const Vector* from, int vectors) {
  for (int v = static_cast<int>(threadIdx.x); v < vectors; v += static_cast<int>(blockDim.x)) to[v] = from[v];
}

__device__ inline int64_t sum_of(const int32_t* counts, int64_t begin, int64_t end, int64_t step = 1) {
  int64_t total = 0;
  for (int64_t i = begin; i < end; i += step) total += counts[i];
  return total;
}

__device__ inline void exchange_send(const ExchangeParams& p, int target, int block) {
  const int W = p.num_ranks;
  const bool own = target == p.rank;
  if (!own && !block_reaches(p.read_here + target, p.number, p, target)) return;
  int64_t place = 0;  // in the window
  for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
    const int32_t* const counts = p.send_counts + chunk * W;
    const int64_t first = sum_of(p.send_counts, 0, chunk * W + target);
    // Rows of this rank for itself go where they are received.
    Vector* const to = own ? p.received + sum_of(p.receive_counts, 0, chunk * W + target) * p.vectors
                           : p.windows[target] + place * p.vectors;
    for (int row = block; row < counts[target]; row += kLaneBlocks) {
      copy_row(to + int64_t{row} * p.vectors, p.rows + int64_t{p.row_tokens[first + row]} * p.vectors, p.vectors);
    }
    place += counts[target];
    if (own) continue;
    if (counts_last(p.sent + target * p.num_chunks + chunk, p.number)) {
      ptx::st_release_sys(p.arrived_there[target] + chunk, p.number + 1);
    }
  }
}

__device__ inline void exchange_receive(const ExchangeParams& p, int source, int block) {
  const int W = p.num_ranks;
  int64_t place = 0;
  for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
    const uint32_t* const flag = p.arrived_here + source * p.num_chunks + chunk;
    if (!block_reaches(flag, p.number + 1, p, source)) return;
    const int32_t count = p.receive_counts[chunk * W + source];
    Vector* const to = p.received + sum_of(p.receive_counts, 0, chunk * W + source) * p.vectors;
    const Vector* const from = p.inboxes[source] + place * p.vectors;
    for (int row = block; row < count; row += kLaneBlocks) {
      copy_row(to + int64_t{row} * p.vectors, from + int64_t{row} * p.vectors, p.vectors);
    }
    place += count;
  }
  if (counts_last(p.taken + source, p.number)) ptx::st_release_sys(p.read_there[source], p.number + 1);
}

inline int exchange_blocks(int num_ranks) { return 2 * num_ranks * kLaneBlocks; }

// blockIdx.x: the sending lanes, then the receiving ones. Each rank begins with another target, lest all send to one.
__device__ inline void exchange(const ExchangeParams& p) {
  const int lane = static_cast<int>(blockIdx.x) / kLaneBlocks, block = static_cast<int>(blockIdx.x) % kLaneBlocks;
  const int other = (p.rank + 1 + lane) % p.num_ranks;
  if (lane < p.num_ranks) {
    exchange_send(p, other, block);
  } else if (other != p.rank) {
    exchange_receive(p, other, block);
  }
}

__global__ void __launch_bounds__(kExchangeThreads) exchange_kernel(ExchangeParams p) { exchange(p); }

}  // namespace switchgear::cuda
