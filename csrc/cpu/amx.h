// SPDX-License-Identifier: BSD-3-Clause
// The AMX instructions that both kernels_amx.cpp files use. Tile numbers are template arguments.
//
//   tile_configure(config)      sets the shapes of this thread's 8 tiles
//   tile_release()              clears them, so that a context switch saves no tiles
//   tile_zero<t>()
//   tile_load<t>(p, stride)     rows from p on, `stride` bytes apart
//   tile_store<t>(p, stride)
//   tile_multiply<c, a, b>()    TDPBF16PS: c[m][n] += Σ_k a[m][k]·b[k][n]; a word of a or b holds two consecutive k
//   tile_multiply_bytes<…>()    TDPBSUD: the same with four consecutive k; a int8, b uint8, c int32
//
// They are inline assembly: the compilers' intrinsics accept only literal tile numbers, and GCC's do not declare that they
// access memory. With SWITCHGEAR_AMX_EMULATED the same functions are C++ (tests/cpp/amx_emulation.h).
#pragma once
#include <cstdint>

namespace switchgear::cpu {
namespace {

constexpr int kNumTiles = 8;

struct TileConfig {  // the operand of LDTILECFG
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace
}  // namespace switchgear::cpu

#if defined(SWITCHGEAR_AMX_EMULATED)
#include "amx_emulation.h"
#else

namespace switchgear::cpu {
namespace {

inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void tile_release() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
inline void tile_multiply_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace switchgear::cpu

#endif
