// SPDX-License-Identifier: BSD-3-Clause
// exchange: all-to-all between ranks of one machine that map each other's memory. One cooperative kernel on each of W ranks. It
// ends when this rank has sent all its bytes and has received all bytes sent to it.
//
//   rows, received   ordered by rank: bytes send_begin[r] … send_begin[r + 1] go to rank r; bytes from rank r are written to
//                    receive_begin[r] … receive_begin[r + 1]. Any sizes and alignments.
//   segment          one per rank, mapped by all: Flags, then a window for each source, of kSlots slots of slot_bytes
//   traffic          each byte is read and written twice, once over the link; bound by the link, if enough loads are in flight:
//                    4 of 16 bytes a thread, 16 KB a block
//
// A lane is one (this rank, other rank) pair in one direction. It has kLaneBlocks blocks, which share the bytes of each piece.
// A transfer is cut into pieces of slot_bytes. Both ranks know the sizes, so both number the pieces alike, from the first
// exchange on. A sending lane waits until the slot of a piece has been read, then writes the piece into the target's window.
// Each finished block increments a count (acquire and release). The last one raises `arrived` in the target's segment (release,
// system scope); its acquire orders the writes of the other blocks before this release. A receiving lane waits for `arrived`
// (acquire, system scope) and copies the piece out; its last block raises `read` in the source's segment. With two slots, one
// piece is written while another is read.
//
// Flags and counts only grow, with the number of the piece. Nothing is reset, and an old flag is never mistaken for a new one.
// Each slot has its own count: one block of a lane may be one piece ahead of the other, but not two, since a slot is free only
// after all blocks have read it.
//
// A dead rank raises no flags. Whoever detects that sets *stop in host memory, and the kernel ends. Nothing traps, so the CUDA
// context survives.
//
// Numeric contract: a copy.
#pragma once
#include "platform.cuh"
#include "ptx.cuh"

namespace switchgear::cuda {

constexpr int kMaxRanks = 16;  // on one machine
constexpr int kExchangeThreads = 256;
constexpr int kLaneBlocks = 2;  // per lane
constexpr int kSlots = 2;       // per window
constexpr int kBatch = 4;  // loads of a thread in flight: a load over a link takes longer than all its instructions
constexpr uint32_t kPollsPerStop =
    1024;  // a read of *stop crosses PCIe, about 1 us; a poll of a flag stays on the device

struct Flags {                        // all zero initially
  uint32_t arrived[kMaxRanks];        // [s]: pieces sent by rank s; rank s raises it
  uint32_t read[kMaxRanks];           // [t]: pieces of this rank that rank t has read; rank t raises it
  uint32_t sent[kMaxRanks][kSlots];   // counts of this rank's blocks
  uint32_t taken[kMaxRanks][kSlots];  // counts of this rank's blocks
};
constexpr int64_t kFlagBytes = 512;
static_assert(sizeof(Flags) <= kFlagBytes);

struct ExchangeParams {
  int rank, num_ranks;
  int64_t slot_bytes;  // a multiple of 16
  const unsigned char* rows;
  unsigned char* received;
  int64_t send_begin[kMaxRanks + 1], receive_begin[kMaxRanks + 1];
  uint32_t first_sent[kMaxRanks], first_received[kMaxRanks];  // number of the first piece
  unsigned char* segments[kMaxRanks];                         // [r]: segment of rank r, at its address in this process
  const uint32_t* stop;

  __device__ Flags& flags(int r) const { return *reinterpret_cast<Flags*>(segments[r]); }
  __device__ unsigned char* slot(int target, int source, uint32_t piece) const {
    return segments[target] + kFlagBytes + (int64_t{source} * kSlots + piece % kSlots) * slot_bytes;
  }
};

// Waits until *flag is at least `value`; returns false if *stop is set. Called by one thread.
__device__ inline bool reaches(const uint32_t* flag, uint32_t value, const uint32_t* stop) {
  for (uint32_t polls = 1; static_cast<int32_t>(ptx::ld_acquire_sys(flag) - value) < 0; ++polls) {
    if (polls % kPollsPerStop == 0 && ptx::ld_relaxed_sys(stop) != 0) return false;
  }
  return true;
}

// The same for a whole block.
__device__ inline bool block_reaches(const uint32_t* flag, uint32_t value, const uint32_t* stop) {
  SHARED_VALUE(bool, reached);
  if (threadIdx.x == 0) reached = reaches(flag, value, stop);
  __syncthreads();
  const bool result = reached;
  __syncthreads();
  return result;
}

// Counts this block; true if it is the last of its lane. Called by all threads, after their copies; only thread 0 gets true.
__device__ inline bool counts_last(uint32_t* counts, uint32_t piece) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  return ptx::atom_add_acq_rel_gpu(counts + piece % kSlots, 1) + 1 == (piece / kSlots + 1) * kLaneBlocks;
}

// `to` and `from` may be the same memory for all the compiler knows, so it never moves a load before a store: a batch is loaded
// first, then stored.
template <typename Unit>
__device__ inline int64_t copy_units(unsigned char* to, const unsigned char* from, int64_t bytes, int64_t thread) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Unit)), step = int64_t{kLaneBlocks} * blockDim.x;
  Unit* const target = reinterpret_cast<Unit*>(to);
  const Unit* const source = reinterpret_cast<const Unit*>(from);
  int64_t i = thread;
  for (; i + (kBatch - 1) * step < count; i += kBatch * step) {
    Unit batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) batch[j] = source[i + j * step];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) target[i + j * step] = batch[j];
  }
  for (; i < count; i += step) target[i] = source[i];
  return count * static_cast<int64_t>(sizeof(Unit));
}

// Called by all threads of all blocks of a lane.
__device__ inline void copy(unsigned char* to, const unsigned char* from, int64_t bytes, int block) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  const int64_t thread = int64_t{block} * blockDim.x + threadIdx.x;
  int64_t done = 0;
  if (bits % 16 == 0) {
    done = copy_units<uint4>(to, from, bytes, thread);
  } else if (bits % 4 == 0) {
    done = copy_units<uint32_t>(to, from, bytes, thread);
  }
  copy_units<unsigned char>(to + done, from + done, bytes - done, thread);
}

__device__ inline int64_t piece_bytes(const ExchangeParams& p, int64_t at, int64_t end) {
  return end - at < p.slot_bytes ? end - at : p.slot_bytes;
}

__device__ inline void exchange_send(const ExchangeParams& p, int target, int block) {
  const int64_t begin = p.send_begin[target], end = p.send_begin[target + 1];
  if (target == p.rank) return copy(p.received + p.receive_begin[target], p.rows + begin, end - begin, block);
  Flags& own = p.flags(p.rank);
  uint32_t piece = p.first_sent[target];
  for (int64_t at = begin; at < end; at += p.slot_bytes, ++piece) {
    if (!block_reaches(own.read + target, piece + 1 - kSlots, p.stop)) return;
    copy(p.slot(target, p.rank, piece), p.rows + at, piece_bytes(p, at, end), block);
    if (counts_last(own.sent[target], piece)) ptx::st_release_sys(p.flags(target).arrived + p.rank, piece + 1);
  }
}

__device__ inline void exchange_receive(const ExchangeParams& p, int source, int block) {
  Flags& own = p.flags(p.rank);
  const int64_t end = p.receive_begin[source + 1];
  uint32_t piece = p.first_received[source];
  for (int64_t at = p.receive_begin[source]; at < end; at += p.slot_bytes, ++piece) {
    if (!block_reaches(own.arrived + source, piece + 1, p.stop)) return;
    copy(p.received + at, p.slot(p.rank, source, piece), piece_bytes(p, at, end), block);
    if (counts_last(own.taken[source], piece)) ptx::st_release_sys(p.flags(source).read + p.rank, piece + 1);
  }
}

constexpr int exchange_blocks(int num_ranks) { return 2 * num_ranks * kLaneBlocks; }

// blockIdx.x: the sending lanes, then the receiving ones. Each rank starts with a different target to spread the load.
__device__ inline void exchange(const ExchangeParams& p) {
  const int lane = static_cast<int>(blockIdx.x) / kLaneBlocks, block = static_cast<int>(blockIdx.x) % kLaneBlocks;
  const int other = (p.rank + 1 + lane) % p.num_ranks;
  if (lane < p.num_ranks) {
    exchange_send(p, other, block);
  } else if (other != p.rank) {
    exchange_receive(p, other, block);
  }
}

}  // namespace switchgear::cuda
