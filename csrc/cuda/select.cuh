// SPDX-License-Identifier: BSD-3-Clause
// Selects the largest of many keys without a sort: the cut is a key that the selected ones reach and no other does. It is found
// digit by digit.
//
// Keys are distinct integers of up to 64 bits: a value, if there is one, above the item's place, so that ties go to the lowest
// place (key_at). Each step counts, by next digit, the keys that begin with the digits found so far; the bin of the last
// selected key gives the digit. If a whole bin is selected, the lower digits stay 0: only ties need the digits of the place.
#pragma once
#include "platform.cuh"
#include "scan.cuh"
#include "score.cuh"

namespace switchgear::cuda {

// Appends the place to a key; places are below 2^place_bits.
__device__ inline uint64_t key_at(uint32_t key, uint32_t place, int place_bits) {
  return (static_cast<uint64_t>(key) << place_bits) | (((1u << place_bits) - 1) - place);
}

// Whether `key` and `prefix` have the same digits above the digit of `digit_bits` bits at `shift`.
__device__ inline bool begins_with(uint64_t key, uint64_t prefix, int shift, int digit_bits) {
  return key >> shift >> digit_bits == prefix >> shift >> digit_bits;
}

// ---- by a block, in one list or several of the same length -----------------------------------------------------------------

constexpr int kBins = 256;
constexpr int kBinStride = kBins + 1;  // puts the same bin of adjacent columns in adjacent banks

template <int kColumns>
struct Selection {  // in shared memory
  uint64_t cut[kColumns];
  int32_t rest[kColumns];  // how many keys that begin like the cut are still to be selected; 0 once the cut is found
  int32_t num_open;        // columns whose cut is still open
  int32_t histogram[kColumns * kBinStride];
};

// Finds s.cut[c] for the `count` largest of the keys key(i, c), i < n; 0 < count < n. Called by all threads of the block; their
// number is a multiple of 32 and of kColumns, and adjacent threads handle adjacent columns. Keys have up to `bits` bits.
template <int kColumns, typename Key>
__device__ inline void find_cuts(Selection<kColumns>& s, int32_t n, int32_t count, int bits, const Key& key) {
  constexpr int kDigit = 8, kBinsOfLane = kBins / 32;
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, column = thread % kColumns;
  __syncthreads();  // earlier results have been read
  if (thread < kColumns) {
    s.cut[thread] = 0;
    s.rest[thread] = count;
  }
  if (thread == 0) s.num_open = kColumns;
  for (int i = thread; i < kColumns * kBinStride; i += num_threads) s.histogram[i] = 0;
  __syncthreads();
  for (int shift = (bits - 1) / kDigit * kDigit; shift >= 0 && s.num_open > 0; shift -= kDigit) {
    if (s.rest[column] > 0) {
      const uint64_t prefix = s.cut[column];
      for (int32_t i = thread / kColumns; i < n; i += num_threads / kColumns) {
        const uint64_t k = key(i, column);
        if (begins_with(k, prefix, shift, kDigit)) {
          atomicAdd(&s.histogram[column * kBinStride + static_cast<int>(k >> shift & (kBins - 1))], 1);
        }
      }
    }
    __syncthreads();                                                  // all keys are counted
    for (int c = thread / 32; c < kColumns; c += num_threads / 32) {  // a warp per column, lower lanes have higher bins
      int32_t* const bins = s.histogram + c * kBinStride + kBins - (lane + 1) * kBinsOfLane;
      const int32_t rest = s.rest[c];
      int32_t own = 0;
      for (int j = 0; j < kBinsOfLane; ++j) own += bins[j];
      const int32_t before = inclusive_sum(own) - own;
      __syncwarp();                                 // other lanes have read their bins
      if (before < rest && rest <= before + own) {  // true in one lane, unless the cut is found
        int32_t left = rest - before;
        int j = kBinsOfLane - 1;
        while (left > bins[j]) left -= bins[j--];
        const bool found = left == bins[j];
        s.cut[c] |= static_cast<uint64_t>(kBins - (lane + 1) * kBinsOfLane + j) << shift;
        s.rest[c] = found ? 0 : left;
        if (found) atomicSub(&s.num_open, 1);
      }
      for (int j = 0; j < kBinsOfLane; ++j) bins[j] = 0;
    }
    __syncthreads();  // cuts, and bins that are empty again
  }
}

// ---- by a block, in many lists at once -----------------------------------------------------------------------------------

constexpr int kGroupBins = 16;
constexpr int kGroupWords = 4 + kGroupBins;  // of memory per group

struct GroupCuts {  // memory of the block
  __device__ GroupCuts(uint32_t* words, int num_groups)
      : num_groups(num_groups),
        cut(reinterpret_cast<uint64_t*>(words)),
        rest(reinterpret_cast<int32_t*>(cut + num_groups)),
        size(rest + num_groups),
        counters(size + num_groups) {}

  int num_groups;
  uint64_t* cut;
  int32_t* rest;      // as in Selection
  int32_t* size;      // of each group
  int32_t* counters;  // [kGroupBins, num_groups]
};

// Finds cut[g] for the limit(g) largest keys of each group, and its size; the cut is 0 if all fit. group(i) is negative for
// an item in no group. Each thread calls the functions only for items thread, thread + blockDim.x, …
template <typename Group, typename Key, typename Limit>
__device__ inline void find_group_cuts(const GroupCuts& m, int32_t num_items, int bits, const Group& group,
                                       const Key& key, const Limit& limit) {
  constexpr int kDigit = 4;
  SHARED_VALUE(int32_t, num_open);
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  __syncthreads();  // earlier results have been read
  if (thread == 0) num_open = 0;
  for (int g = thread; g < m.num_groups; g += num_threads) m.size[g] = 0;
  __syncthreads();
  for (int32_t i = thread; i < num_items; i += num_threads) {
    if (const int g = group(i); g >= 0) atomicAdd(&m.size[g], 1);
  }
  __syncthreads();
  for (int g = thread; g < m.num_groups; g += num_threads) {
    const int32_t most = limit(g);
    const bool too_many = m.size[g] > most;
    m.cut[g] = too_many && most == 0 ? ~uint64_t{0} : 0;
    m.rest[g] = too_many ? most : 0;
    if (m.rest[g] == 0) continue;
    atomicAdd(&num_open, 1);
    for (int bin = 0; bin < kGroupBins; ++bin) m.counters[bin * m.num_groups + g] = 0;
  }
  __syncthreads();
  for (int shift = (bits - 1) / kDigit * kDigit; shift >= 0 && num_open > 0; shift -= kDigit) {
    for (int32_t i = thread; i < num_items; i += num_threads) {
      const int g = group(i);
      if (g < 0 || m.rest[g] == 0) continue;
      const uint64_t k = key(i);
      if (!begins_with(k, m.cut[g], shift, kDigit)) continue;
      atomicAdd(&m.counters[static_cast<int>(k >> shift & (kGroupBins - 1)) * m.num_groups + g], 1);
    }
    __syncthreads();
    for (int g = thread; g < m.num_groups; g += num_threads) {
      int32_t left = m.rest[g];
      if (left == 0) continue;
      int digit = -1;
      bool found = false;
      for (int bin = kGroupBins - 1; bin >= 0; --bin) {
        int32_t& counter = m.counters[bin * m.num_groups + g];
        if (digit < 0 && left <= counter) {
          digit = bin;
          found = left == counter;
        }
        if (digit < 0) left -= counter;
        counter = 0;
      }
      m.cut[g] |= static_cast<uint64_t>(digit) << shift;
      m.rest[g] = found ? 0 : left;
      if (found) atomicSub(&num_open, 1);
    }
    __syncthreads();
  }
}

}  // namespace switchgear::cuda
