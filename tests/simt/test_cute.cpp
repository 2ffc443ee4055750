// SPDX-License-Identifier: BSD-3-Clause
// Compares the models, and the layouts that the kernels assume, with CuTe's: operands are laid out as CuTe defines, and the
// product must be where CuTe defines.
#include <cstring>
#include <vector>

#include "cute_layouts.h"
#include "expect.h"
#include "hopper.cuh"
#include "launch.h"
#include "tensor_map.h"
#include "tensor_maps.h"

using namespace switchgear::cuda;

namespace {

using Bf16 = __nv_bfloat16;

// Small integers, exact in every type and sum.
float left(int row, int k) { return static_cast<float>((5 * row + 3 * k) % 7 - 3); }
float right(int k, int column) { return static_cast<float>((2 * k + 3 * column) % 5 - 2); }
float product(int row, int column, int depth) {
  float sum = 0.0f;
  for (int k = 0; k < depth; ++k) sum += left(row, k) * right(k, column);
  return sum;
}
uint32_t bits(float v) {
  const Bf16 half = __float2bfloat16(v);
  uint16_t result;
  std::memcpy(&result, &half, 2);
  return result;
}

__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d, bool tf32) {
  const unsigned lane = threadIdx.x;
  float sum[4] = {};
  uint32_t a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) a_registers[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b_registers[i] = b[2 * lane + i];
  tf32 ? ptx::mma_tf32(sum, a_registers, b_registers) : ptx::mma_bf16(sum, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}
TEST(fragments_of_mma) {
  for (const bool tf32 : {false, true}) {
    const int each = tf32 ? 1 : 2;
    std::vector<uint32_t> a(128), b(64);
    std::vector<float> d(128);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4 * each; ++i) {
        const auto [row, k] = cute_layouts::mma_a(lane, i, tf32);
        a[4 * lane + i / each] |= tf32 ? __float_as_uint(left(row, k)) : bits(left(row, k)) << (16 * (i % 2));
      }
      for (int i = 0; i < 2 * each; ++i) {
        const auto [column, k] = cute_layouts::mma_b(lane, i, tf32);
        b[2 * lane + i / each] |= tf32 ? __float_as_uint(right(k, column)) : bits(right(k, column)) << (16 * (i % 2));
      }
    }
    launch(mma_kernel, 1, 32, 0, nullptr, a.data(), b.data(), d.data(), tf32);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto [row, column] = cute_layouts::mma_d(lane, i, tf32);
        CHECK(d[4 * lane + i] == product(row, column, 8 * each), "tf32 ", tf32, " lane ", lane, " element ", i);
      }
    }
  }
}

// Row r of the 32 holds 8 r … 8 r + 7.
__global__ void ldmatrix_kernel(uint32_t* out, bool transposed) {
  SHARED_DYN(uint16_t, tile);
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 8; ++i) tile[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncwarp();
  uint32_t r[4];
  transposed ? ptx::ldmatrix_x4_trans(r, tile + 8 * lane) : ptx::ldmatrix_x4(r, tile + 8 * lane);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}
TEST(fragments_of_ldmatrix) {
  for (const bool transposed : {false, true}) {
    std::vector<uint32_t> out(128);
    launch(ldmatrix_kernel, 1, 32, 512, nullptr, out.data(), transposed);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const auto [row, element] = cute_layouts::ldmatrix(lane, i / 2, i % 2, transposed);
        CHECK((out[4 * lane + i / 2] >> (16 * (i % 2)) & 0xffff) == static_cast<uint32_t>(8 * row + element), "lane ",
              lane);
      }
    }
  }
}

// ---- wgmma and the swizzle ------------------------------------------------------------------------------------------------

constexpr int kTileBytes = 256 * 128;

// Tiles of operands as stored in shared memory, already swizzled. Both sides have the strides that gemm_sm90.cuh uses.
template <int kN, bool kAlong>
__global__ void wgmma_kernel(const unsigned char* a, const unsigned char* b, float* out) {
  SHARED_DYN(unsigned char, memory);
  for (unsigned i = threadIdx.x; i < kTileBytes; i += 128) {
    memory[i] = a[i];
    memory[kTileBytes + i] = b[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t start = ptx::smem_u32(memory);
  const auto operand = [](uint32_t from, int k) {
    return kAlong ? ptx::descriptor(from + 16 * k * 128, 64 * 128, 8 * 128, ptx::Swizzle::k128B)
                  : ptx::desc_k128(from + 32 * k);
  };
  float d[kN / 2];
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    ptx::wgmma<Bf16, kN, kAlong, kAlong>(d, operand(start, k), operand(start + kTileBytes, k), k > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * (kN / 2) + i] = d[i];
}

template <int kN, bool kAlong>
void check_wgmma() {
  std::vector<unsigned char> a(kTileBytes), b(kTileBytes);
  const auto offset_of = [](int i, int k) {
    // Atoms of CuTe's tiles of 64 (128) rows are adjacent.
    if (!kAlong) return i / 64 * 64 * 128 + cute_layouts::k_major(i % 64, k);
    return i / 128 * 128 * 128 + cute_layouts::mn_major(i % 128, k);
  };
  const auto put = [](std::vector<unsigned char>& tile, int offset, float value) {
    const auto half = static_cast<uint16_t>(bits(value));
    std::memcpy(&tile[static_cast<size_t>(offset)], &half, 2);
  };
  for (int k = 0; k < 64; ++k) {
    for (int row = 0; row < 64; ++row) put(a, offset_of(row, k), left(row, k));
    for (int column = 0; column < kN; ++column) put(b, offset_of(column, k), right(k, column));
  }
  std::vector<float> out(64 * kN);
  launch(wgmma_kernel<kN, kAlong>, 1, 128, 2 * kTileBytes, nullptr, a.data(), b.data(), out.data());
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {
      const auto [row, column] = cute_layouts::wgmma_d(kN, thread, i);
      CHECK(out[static_cast<size_t>(thread * (kN / 2) + i)] == product(row, column, 64), "N ", kN, " thread ", thread);
    }
  }
}
TEST(tiles_and_accumulators_of_wgmma) {
  check_wgmma<16, false>();
  check_wgmma<64, false>();
  check_wgmma<128, false>();
  check_wgmma<192, false>();
  check_wgmma<64, true>();
  check_wgmma<128, true>();
  check_wgmma<256, true>();
}

__global__ void load_kernel(const __grid_constant__ CUtensorMap map, uint16_t* out) {
  SHARED_DYN(uint16_t, tile);
  SHARED_VALUE(uint64_t, bar);
  if (threadIdx.x == 0) {
    ptx::mbar_init(&bar, 1);
    ptx::fence_barrier_init();
    ptx::mbar_expect_tx(&bar, 64 * 128);
    ptx::tma_load_2d(tile, &map, &bar, 0, 0);
  }
  __syncthreads();
  ptx::mbar_wait(&bar, 0);
  for (unsigned i = threadIdx.x; i < 64 * 64; i += 32) out[i] = tile[i];
}
TEST(descriptors_of_tiles) {
  for (int k = 0; k < 4; ++k) {
    const auto at = static_cast<uint32_t>(k);
    CHECK(ptx::desc_k128(32 * at) == cute_layouts::k_major_descriptor(k), "k ", k);
    CHECK(
        ptx::descriptor(16 * at * 128, 64 * 128, 8 * 128, ptx::Swizzle::k128B) == cute_layouts::mn_major_descriptor(k),
        "k ", k);
  }
}

// The maps that launchers make, with every box of gemm_sm90.cu.
TEST(tensor_maps_of_launchers) {
  alignas(128) static const uint16_t data[64] = {};
  const cute_layouts::Matrices kCases[] = {{data, 300, 136, 5, 144, 300 * 144},
                                           {data, 129, 64, 2, 64, 64 * 256},
                                           {data, 1000, 4096, 128, 4096, 1000 * 4096}};
  for (const cute_layouts::Matrices& m : kCases) {
    for (const int box_rows : {16, 64, 96, 128, 192}) {
      for (const bool along_rows : {true, false}) {
        if (!along_rows && box_rows != 64) continue;
        const CUtensorMap ours = make_tensor_map({m.data,
                                                  switchgear::DType::kBFloat16,
                                                  {m.columns, m.rows, m.count},
                                                  {m.stride, m.matrix_stride},
                                                  box_rows});
        const CUtensorMap theirs = cute_layouts::map_of(m, box_rows, along_rows);
        CHECK(std::memcmp(&ours, &theirs, sizeof ours) == 0, "box of ", box_rows, " rows of ", m.rows);
      }
    }
  }
}

TEST(swizzle_of_tma) {
  std::vector<uint16_t> matrix(64 * 64), out(64 * 64);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i);
  launch(load_kernel, 1, 32, 64 * 128, nullptr,
         simt::matrix_map(matrix.data(), 64, 64, 64, 64, CU_TENSOR_MAP_SWIZZLE_128B), out.data());
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      CHECK(out[static_cast<size_t>(cute_layouts::k_major(row, column) / 2)] == row * 64 + column, "row ", row);
    }
  }
}

}  // namespace
