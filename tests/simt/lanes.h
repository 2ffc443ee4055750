// SPDX-License-Identifier: BSD-3-Clause
// Barriers, and the exchange of values between the lanes of a warp. Only __syncwarp orders memory accesses; exchanges do not.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "models.h"

#define SIMT_AT ::simt::Location at = ::simt::Location::current()

namespace simt {

// A lane's input and output.
template <typename T>
struct Exchange {
  T given, taken;
  int source;
  bool from_absent_lane;
};

template <typename T>
SIMT_UNTRACKED void exchange_all(void* const* operands, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& mine = *static_cast<Exchange<T>*>(operands[lane]);
    if (mask >> mine.source & 1) {
      mine.taken = static_cast<const Exchange<T>*>(operands[mine.source])->given;
    } else {
      mine.from_absent_lane = true;
    }
  }
}

template <typename T>
T exchange(const char* name, uint32_t mask, T value, int source, Location at) {
  static_assert(std::is_trivially_copyable_v<T>);
  Exchange<T> operands{value, value, source, false};
  collective(name, mask, &operands, exchange_all<T>, at);
  if (operands.from_absent_lane) fail(std::string(name) + " from a lane that does not take part", at);
  return operands.taken;
}

// Every lane gets `reduce` of all lanes' values.
template <typename T, typename R>
struct Vote {
  T given;
  R taken;
};

template <typename T, typename R, R (*reduce)(const T* values, uint32_t mask, int lane)>
SIMT_UNTRACKED void vote_all(void* const* operands, uint32_t mask) {
  T values[32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) values[lane] = static_cast<const Vote<T, R>*>(operands[lane])->given;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<Vote<T, R>*>(operands[lane])->taken = reduce(values, mask, lane);
  }
}

template <typename T, typename R, R (*reduce)(const T* values, uint32_t mask, int lane)>
R vote(const char* name, uint32_t mask, T value, Location at) {
  Vote<T, R> operands{value, R{}};
  collective(name, mask, &operands, vote_all<T, R, reduce>, at);
  return operands.taken;
}

inline uint32_t lanes_that_hold(const bool* values, uint32_t mask, int) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= uint32_t{(mask >> i & 1) != 0 && values[i]} << i;
  return result;
}

template <typename T>
uint32_t lanes_that_match(const T* values, uint32_t mask, int lane) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    result |= uint32_t{(mask >> i & 1) != 0 && std::memcmp(&values[i], &values[lane], sizeof(T)) == 0} << i;
  }
  return result;
}

template <typename T, T (*combine)(T, T)>
T reduce_lanes(const T* values, uint32_t mask, int) {
  int i = 0;
  while (!(mask >> i & 1)) ++i;
  T result = values[i];
  while (++i < 32) {
    if (mask >> i & 1) result = combine(result, values[i]);
  }
  return result;
}

template <typename T>
T sum_of(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
template <typename T>
T least_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T greatest_of(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T and_of(T a, T b) {
  return a & b;
}
template <typename T>
T or_of(T a, T b) {
  return a | b;
}
template <typename T>
T xor_of(T a, T b) {
  return a ^ b;
}

}  // namespace simt

// ---- barriers -----------------------------------------------------------------------------------------------------------

inline void __syncthreads(SIMT_AT) { simt::block_barrier(at); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_AT) { simt::warp_barrier(mask, at); }

// ---- shuffles -----------------------------------------------------------------------------------------------------------

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_AT) {
  return simt::exchange("__shfl_sync", mask, value, (simt::lane_index() & ~(width - 1)) + (source & (width - 1)), at);
}
// A source outside the segment of `width` lanes returns the lane's own value.
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, SIMT_AT) {
  const int source = simt::lane_index() ^ lane_mask;
  const bool inside = source < (simt::lane_index() & ~(width - 1)) + width;
  return simt::exchange("__shfl_xor_sync", mask, value, inside ? source : simt::lane_index(), at);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_AT) {
  const int source = simt::lane_index() - static_cast<int>(delta);
  const bool inside = source >= (simt::lane_index() & ~(width - 1));
  return simt::exchange("__shfl_up_sync", mask, value, inside ? source : simt::lane_index(), at);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_AT) {
  const int source = simt::lane_index() + static_cast<int>(delta);
  const bool inside = source < (simt::lane_index() & ~(width - 1)) + width;
  return simt::exchange("__shfl_down_sync", mask, value, inside ? source : simt::lane_index(), at);
}

// ---- votes, matches, reductions -----------------------------------------------------------------------------------------

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_AT) {
  return simt::vote<bool, uint32_t, simt::lanes_that_hold>("__ballot_sync", mask, predicate != 0, at);
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_AT) {
  return simt::vote<bool, uint32_t, simt::lanes_that_hold>("__any_sync", mask, predicate != 0, at) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, SIMT_AT) {
  return simt::vote<bool, uint32_t, simt::lanes_that_hold>("__all_sync", mask, predicate != 0, at) == mask;
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, SIMT_AT) {
  return simt::vote<T, uint32_t, simt::lanes_that_match<T>>("__match_any_sync", mask, value, at);
}
template <typename T>
uint32_t __match_all_sync(uint32_t mask, T value, int* all_match, SIMT_AT) {
  const uint32_t lanes = simt::vote<T, uint32_t, simt::lanes_that_match<T>>("__match_all_sync", mask, value, at);
  *all_match = lanes == mask;
  return lanes == mask ? mask : 0;
}

#define SIMT_REDUCE(name, combine)                                                            \
  template <typename T>                                                                       \
  T name(uint32_t mask, T value, SIMT_AT) {                                                   \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);                     \
    return simt::vote<T, T, simt::reduce_lanes<T, simt::combine<T>>>(#name, mask, value, at); \
  }
SIMT_REDUCE(__reduce_add_sync, sum_of)
SIMT_REDUCE(__reduce_min_sync, least_of)
SIMT_REDUCE(__reduce_max_sync, greatest_of)
SIMT_REDUCE(__reduce_and_sync, and_of)
SIMT_REDUCE(__reduce_or_sync, or_of)
SIMT_REDUCE(__reduce_xor_sync, xor_of)
#undef SIMT_REDUCE

// Kernels must not depend on which lanes the compiler runs together: pass the mask.
uint32_t __activemask() = delete;
