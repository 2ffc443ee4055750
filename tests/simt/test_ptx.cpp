// SPDX-License-Identifier: BSD-3-Clause
// Compares the models of the instructions in ptx.cuh with what the PTX manual defines for each lane. test_ptx.py tests the asm.
#include "ptx.cuh"

#include <cstring>
#include <vector>

#include "expect.h"
#include "launch.h"

using namespace switchgear::cuda;

namespace {

using Bf16 = __nv_bfloat16;

// ---- mma ----------------------------------------------------------------------------------------------------------------

enum class Kind { kBf16, kF16, kTf32 };

__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d, Kind kind) {
  const unsigned lane = threadIdx.x;
  float sum[4];
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) sum[i] = d[4 * lane + i], left[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  if (kind == Kind::kBf16) ptx::mma_bf16(sum, left, right);
  if (kind == Kind::kF16) ptx::mma_f16(sum, left, right);
  if (kind == Kind::kTf32) ptx::mma_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}

// Small integers, which are exact in all types and sums.
float left_value(int row, int k) { return static_cast<float>((3 * row + 5 * k) % 7 - 3); }
float right_value(int k, int column) { return static_cast<float>((2 * k + 3 * column) % 5 - 2); }

uint32_t pair(Kind kind, float low, float high) {
  if (kind == Kind::kTf32) return __float_as_uint(low);
  const auto bits = [&](float v) -> uint32_t {
    uint16_t result;
    if (kind == Kind::kBf16) {
      const Bf16 half = __float2bfloat16(v);
      std::memcpy(&result, &half, 2);
    } else {
      const __half half = __float2half(v);
      std::memcpy(&result, &half, 2);
    }
    return result;
  };
  return bits(low) | bits(high) << 16;
}

TEST(mma_multiplies_fragments_as_the_manual_lays_them_out) {
  for (const Kind kind : {Kind::kBf16, Kind::kF16, Kind::kTf32}) {
    const int step = kind == Kind::kTf32 ? 1 : 2, depth = 8 * step;  // elements of a register
    std::vector<uint32_t> a(128), b(64);
    std::vector<float> d(128);
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, first = lane % 4 * step;
      for (int i = 0; i < 4; ++i) {
        const int row = group + i % 2 * 8, k = first + i / 2 * 4 * step;
        a[4 * lane + i] = pair(kind, left_value(row, k), left_value(row, k + 1));
        d[4 * lane + i] = static_cast<float>(group + i / 2 * 8 - lane % 4 * 2 - i % 2);  // row - column
      }
      for (int i = 0; i < 2; ++i) {
        const int k = first + i * 4 * step;
        b[2 * lane + i] = pair(kind, right_value(k, group), right_value(k + 1, group));
      }
    }
    launch(mma_kernel, 1, 32, 0, nullptr, a.data(), b.data(), d.data(), kind);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = static_cast<float>(row - column);
        for (int k = 0; k < depth; ++k) sum += left_value(row, k) * right_value(k, column);
        CHECK(d[4 * lane + i] == sum, "kind ", static_cast<int>(kind), " row ", row, " column ", column);
      }
    }
  }
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------------

// Four consecutive 8x8 matrices; row r of matrix m starts with 64 m + 8 r.
__global__ void ldmatrix_kernel(uint32_t* out, int matrices, bool transposed) {
  SHARED_DYN(uint16_t, tile);
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 8; ++i) tile[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncwarp();
  if (matrices == 4) {
    uint32_t r[4];
    transposed ? ptx::ldmatrix_x4_trans(r, tile + 8 * lane) : ptx::ldmatrix_x4(r, tile + 8 * lane);
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
  } else {
    uint32_t r[2];
    transposed ? ptx::ldmatrix_x2_trans(r, tile + 8 * (lane % 16)) : ptx::ldmatrix_x2(r, tile + 8 * (lane % 16));
    for (int i = 0; i < 2; ++i) out[4 * lane + i] = r[i];
  }
}
TEST(ldmatrix_hands_each_lane_two_neighbours) {
  for (const int matrices : {2, 4}) {
    for (const bool transposed : {false, true}) {
      std::vector<uint32_t> out(128);
      launch(ldmatrix_kernel, 1, 32, 512, nullptr, out.data(), matrices, transposed);
      for (int lane = 0; lane < 32; ++lane) {
        for (int m = 0; m < matrices; ++m) {
          for (int j = 0; j < 2; ++j) {
            const int along = lane % 4 * 2 + j, across = lane / 4;
            const int element = 64 * m + (transposed ? 8 * along + across : 8 * across + along);
            CHECK((out[4 * lane + m] >> (16 * j) & 0xffff) == static_cast<uint32_t>(element), "lane ", lane);
          }
        }
      }
    }
  }
}

TEST(ldmatrix_counts_bank_conflicts) {
  std::vector<uint32_t> out(128);
  const auto before = simt::statistics().bank_conflicts;
  launch(ldmatrix_kernel, 1, 32, 512, nullptr, out.data(), 4, false);
  CHECK(simt::statistics().bank_conflicts == before);
}

// ---- cp.async -----------------------------------------------------------------------------------------------------------

__global__ void copies_kernel(const uint8_t* from, uint8_t* to) {
  SHARED_DYN(uint8_t, tile);
  ptx::cp_async16(tile, from, true);
  ptx::cp_async16(tile + 16, from, false);
  ptx::cp_async16_zeros(tile + 32, from + 16, 5);
  ptx::cp_async8(tile + 48, from + 8, true);
  ptx::cp_async8(tile + 56, from, false);
  ptx::cp_async4(tile + 64, from + 4, true);
  ptx::cp_async4(tile + 68, from, false);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 72; ++i) to[i] = tile[i];
}
TEST(cp_async_copies_or_writes_zeros) {
  alignas(16) uint8_t from[32];
  uint8_t to[72];
  for (int i = 0; i < 32; ++i) from[i] = static_cast<uint8_t>(i + 1);
  launch(copies_kernel, 1, 1, 72, nullptr, from, to);
  const auto expected = [&](int i) -> int {
    if (i < 16) return i + 1;
    if (i >= 32 && i < 37) return i - 32 + 17;
    if (i >= 48 && i < 56) return i - 48 + 9;
    if (i >= 64 && i < 68) return i - 64 + 5;
    return 0;
  };
  for (int i = 0; i < 72; ++i) CHECK(to[i] == expected(i), "byte ", i);
}

// ---- ordered loads, stores and sums -----------------------------------------------------------------------------------------

__global__ void ordered_kernel(uint32_t* p, uint32_t* out) {
  ptx::st_relaxed_gpu(p, 1);
  out[0] = ptx::ld_relaxed_gpu(p);
  ptx::st_release_cta(p, 2);
  out[1] = ptx::ld_acquire_cta(p);
  ptx::st_release_gpu(p, 3);
  out[2] = ptx::ld_acquire_gpu(p);
  ptx::st_release_sys(p, 4);
  out[3] = ptx::ld_acquire_sys(p);
  out[4] = ptx::atom_add_relaxed_gpu(p, 10);
  out[5] = ptx::atom_add_release_gpu(p, 10);
  out[6] = ptx::atom_add_acq_rel_gpu(p, 10);
  out[7] = ptx::atom_add_acq_rel_sys(p, 10);
  ptx::st_relaxed_sys(p + 1, 5);
  out[8] = ptx::ld_relaxed_sys(p + 1);
}
TEST(ordered_loads_stores_and_sums) {
  uint32_t p[2] = {}, out[9];
  launch(ordered_kernel, 1, 1, 0, nullptr, p, out);
  const uint32_t expected[] = {1, 2, 3, 4, 4, 14, 24, 34, 5};
  for (int i = 0; i < 9; ++i) CHECK(out[i] == expected[i], "result ", i);
  CHECK(p[0] == 44);
}

}  // namespace
