// SPDX-License-Identifier: BSD-3-Clause
// The models of the instructions in hopper.cuh: mbarriers, TMA with its swizzles and edges, wgmma in all layouts and widths.
// planted/ has their misuses.
#include "hopper.cuh"

#include <cstring>
#include <memory>
#include <vector>

#include "expect.h"
#include "launch.h"
#include "tensor_maps.h"

using namespace switchgear::cuda;

namespace {

using Bf16 = __nv_bfloat16;

// Small integers, exact in every sum.
Bf16 number(int i) { return __float2bfloat16(static_cast<float>(i % 7 - 3)); }

// ---- mbarrier -----------------------------------------------------------------------------------------------------------

__global__ void phases_kernel(int* seen) {
  SHARED_VALUE(uint64_t, bar);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbar_init(&bar, 64);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (thread == 0) seen[0] = ptx::mbar_test_wait(&bar, 1) && !ptx::mbar_test_wait(&bar, 0);
  __syncthreads();
  for (uint32_t round = 0; round < 5; ++round) {
    if (thread < 64) seen[1 + 64 * round + thread] = thread;
    if (thread < 64) ptx::mbar_arrive(&bar);
    ptx::mbar_wait(&bar, round % 2);
    if (seen[1 + 64 * round + 63 - thread % 64] != 63 - thread % 64) seen[0] = 0;
    __syncthreads();
  }
  if (thread == 0) {
    ptx::mbar_inval(&bar);
    ptx::mbar_init(&bar, 1);  // memory may be reused after mbarrier.inval
  }
}
TEST(mbarrier_phases_alternate) {
  std::vector<int> seen(1 + 5 * 64);
  launch(phases_kernel, 1, 96, 0, nullptr, seen.data());
  CHECK(seen[0] == 1);
}

__global__ void more_arrivals_kernel() {
  SHARED_VALUE(uint64_t, bar);
  ptx::mbar_init(&bar, 2);
  ptx::mbar_expect_tx(&bar, 16);
  ptx::mbar_arrive(&bar);
  ptx::mbar_arrive(&bar);
}
TEST(an_arrival_too_many) {
  CHECK_FAILS("more arrivals than it expects", launch(more_arrivals_kernel, 1, 1, 0, nullptr));
}

// cp.async arrives on its own, after its data has landed.
__global__ void arriving_copies_kernel(const int* from, int* to) {
  SHARED_DYN(int, tile);
  SHARED_VALUE(uint64_t, bar);
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbar_init(&bar, 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (thread < 32) {
    ptx::cp_async16(tile + 4 * thread, from + 4 * thread, true);
    ptx::cp_async_mbar_arrive(&bar);
  } else {
    ptx::mbar_wait(&bar, 0);
    for (unsigned i = thread - 32; i < 128; i += 32) to[i] = tile[i];
  }
}
TEST(cp_async_arrives_when_it_has_landed) {
  alignas(16) int from[128];
  int to[128] = {};
  for (int i = 0; i < 128; ++i) from[i] = 3 * i;
  launch(arriving_copies_kernel, 1, 64, 512, nullptr, from, to);
  for (int i = 0; i < 128; ++i) CHECK(to[i] == 3 * i, "i = ", i);
}

// ---- TMA ----------------------------------------------------------------------------------------------------------------

template <int kRank>
__global__ void load_box_kernel(const __grid_constant__ CUtensorMap map, int x, int y, int z, int bytes,
                                uint16_t* out) {
  SHARED_DYN(uint16_t, tile);
  SHARED_VALUE(uint64_t, bar);
  if (threadIdx.x == 0) {
    ptx::mbar_init(&bar, 1);
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&map);
    ptx::mbar_expect_tx(&bar, static_cast<uint32_t>(bytes));
    if constexpr (kRank == 2) {
      ptx::tma_load_2d(tile, &map, &bar, x, y);
    } else {
      ptx::tma_load_3d(tile, &map, &bar, x, y, z);
    }
  }
  __syncthreads();
  ptx::mbar_wait(&bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 2; i += 32) out[i] = tile[i];
}

// Byte offset of column c of row r in a box with rows of `width` bytes: 16-byte columns are swapped within the pattern.
int swizzled_offset(int row, int column, int width) {
  const int plain = row * width + 2 * column, bits = width == 128 ? 3 : width == 64 ? 2 : width == 32 ? 1 : 0;
  return plain ^ (plain / 128 % (1 << bits)) * 16;
}

TEST(tma_loads_boxes_with_every_swizzle_and_zeros_outside) {
  constexpr int kRows = 21, kColumns = 72;
  std::vector<uint16_t> matrix(kRows * kColumns);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  for (const auto& [swizzle, width] :
       {std::pair{CU_TENSOR_MAP_SWIZZLE_128B, 128}, std::pair{CU_TENSOR_MAP_SWIZZLE_64B, 64},
        std::pair{CU_TENSOR_MAP_SWIZZLE_32B, 32}}) {
    const int box_columns = width / 2, box_rows = 16;
    const CUtensorMap map =
        simt::matrix_map(matrix.data(), kRows, kColumns, box_rows, static_cast<cuuint32_t>(box_columns), swizzle);
    for (const auto& [x, y] :
         {std::pair{0, 0}, std::pair{8, 5}, std::pair{kColumns - 8, kRows - 3}, std::pair{-3, -2}, std::pair{200, 0}}) {
      std::vector<uint16_t> out(static_cast<size_t>(box_rows * box_columns), 7);
      launch(load_box_kernel<2>, 1, 32, out.size() * 2, nullptr, map, x, y, 0, box_rows * width, out.data());
      for (int r = 0; r < box_rows; ++r) {
        for (int c = 0; c < box_columns; ++c) {
          const bool inside = y + r >= 0 && y + r < kRows && x + c >= 0 && x + c < kColumns;
          const int expected = inside ? (y + r) * kColumns + x + c + 1 : 0;
          CHECK(out[static_cast<size_t>(swizzled_offset(r, c, width) / 2)] == expected, "width ", width, " row ", r,
                " column ", c);
        }
      }
    }
  }
}

TEST(tma_loads_boxes_of_three_dimensions) {
  constexpr int kExperts = 3, kRows = 10, kColumns = 64, kStride = 72;  // strides exceed rows
  std::vector<uint16_t> memory(kExperts * kRows * kStride);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<uint16_t>(i + 1);
  CUtensorMap map;
  CHECK(simt::encode_map(&map, memory.data(), {kColumns, kRows, kExperts}, {2 * kStride, 2 * kRows * kStride},
                         {64, 8, 1}, CU_TENSOR_MAP_SWIZZLE_128B) == CUDA_SUCCESS);
  for (const int expert : {0, 2, 3}) {
    std::vector<uint16_t> out(8 * 64);
    launch(load_box_kernel<3>, 1, 32, out.size() * 2, nullptr, map, 0, 5, expert, 8 * 128, out.data());
    for (int r = 0; r < 8; ++r) {
      for (int c = 0; c < 64; ++c) {
        const int expected = expert < kExperts && 5 + r < kRows ? (expert * kRows + 5 + r) * kStride + c + 1 : 0;
        CHECK(out[static_cast<size_t>(swizzled_offset(r, c, 128) / 2)] == expected, "expert ", expert, " row ", r);
      }
    }
  }
}

// ---- tensor maps in device memory -----------------------------------------------------------------------------------------

enum class MapUse { kAsDocumented, kNotReleased, kNotAcquired, kChangedLater };

// Thread 0 copies `like` to `map`, with another address and number of rows.
__global__ void replace_kernel(const __grid_constant__ CUtensorMap like, CUtensorMap* map, const uint16_t* data,
                               uint32_t rows, MapUse use) {
  if (threadIdx.x != 0) return;
  __builtin_memcpy(static_cast<void*>(map), &like, sizeof like);  // also where it is not aligned
  ptx::tensor_map_replace_address(map, data);
  ptx::tensor_map_replace_size<1>(map, rows);
  if (use != MapUse::kNotReleased) ptx::fence_tensor_map_release();
}
__global__ void load_replaced_kernel(CUtensorMap* map, uint16_t* out, MapUse use) {
  SHARED_DYN(uint16_t, tile);
  SHARED_VALUE(uint64_t, bar);
  if (threadIdx.x == 0) {
    ptx::mbar_init(&bar, 1);
    ptx::fence_barrier_init();
    if (use != MapUse::kNotAcquired) ptx::fence_tensor_map_acquire(map);
    if (use == MapUse::kChangedLater) ptx::tensor_map_replace_size<1>(map, 9);
    ptx::mbar_expect_tx(&bar, 8 * 128);
    ptx::tma_load_2d(tile, map, &bar, 0, 0);
  }
  __syncthreads();
  ptx::mbar_wait(&bar, 0);
  for (unsigned i = threadIdx.x; i < 8 * 64; i += 32) out[i] = tile[i];
}
void load_replaced(MapUse use, size_t offset = 0) {
  std::vector<uint16_t> first(8 * 64, 1), second(8 * 64), out(8 * 64);
  for (size_t i = 0; i < second.size(); ++i) second[i] = static_cast<uint16_t>(i + 1);
  const CUtensorMap like = simt::matrix_map(first.data(), 8, 64, 8, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  struct alignas(256) DeviceMemory {
    std::byte bytes[512];
  };
  const auto memory = std::make_unique<DeviceMemory>();
  auto* const map = reinterpret_cast<CUtensorMap*>(memory->bytes + offset);
  launch(replace_kernel, 1, 32, 0, nullptr, like, map, second.data(), 5, use);
  launch(load_replaced_kernel, 1, 32, out.size() * 2, nullptr, map, out.data(), use);
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < 64; ++c) {
      CHECK(out[static_cast<size_t>(swizzled_offset(r, c, 128) / 2)] == (r < 5 ? r * 64 + c + 1 : 0), "row ", r);
    }
  }
}
TEST(tma_takes_maps_that_kernels_wrote) {
  for (const size_t offset : {0, 128}) load_replaced(MapUse::kAsDocumented, offset);
}
TEST(maps_that_kernels_write_are_aligned_to_128_bytes) {
  CHECK_FAILS("tensor map not aligned to 128 bytes", load_replaced(MapUse::kAsDocumented, 64));
}
TEST(maps_need_both_fences) {
  CHECK_FAILS("nobody released this tensor map", load_replaced(MapUse::kNotReleased));
  CHECK_FAILS("without a fence.proxy.tensormap", load_replaced(MapUse::kNotAcquired));
  CHECK_FAILS("changed after its fence.proxy.tensormap", load_replaced(MapUse::kChangedLater));
}

__global__ void bulk_kernel(const uint16_t* from, uint16_t* to, int bytes) {
  SHARED_DYN(uint16_t, tile);
  SHARED_VALUE(uint64_t, bar);
  if (threadIdx.x == 0) {
    ptx::mbar_init(&bar, 1);
    ptx::fence_barrier_init();
    ptx::mbar_expect_tx(&bar, static_cast<uint32_t>(bytes));
    ptx::bulk_load(tile, from, static_cast<uint32_t>(bytes), &bar);
  }
  __syncthreads();
  ptx::mbar_wait(&bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 2; i += 32) to[i] = tile[i];
}
TEST(bulk_loads) {
  alignas(16) uint16_t from[64];
  uint16_t to[64] = {};
  for (int i = 0; i < 64; ++i) from[i] = static_cast<uint16_t>(i + 9);
  launch(bulk_kernel, 1, 32, 128, nullptr, from, to, 128);
  for (int i = 0; i < 64; ++i) CHECK(to[i] == i + 9, "i = ", i);
}

__global__ void store_box_kernel(const __grid_constant__ CUtensorMap map, int x, int y) {
  SHARED_DYN(uint16_t, tile);
  for (unsigned i = threadIdx.x; i < 16 * 64; i += 32) tile[i] = static_cast<uint16_t>(i + 1);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&map, tile, x, y);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}
TEST(tma_stores_what_lies_inside) {
  constexpr int kRows = 19, kColumns = 72, kX = 16, kY = 7;
  std::vector<uint16_t> out(kRows * kColumns, 0);
  launch(store_box_kernel, 1, 32, 16 * 128, nullptr,
         simt::matrix_map(out.data(), kRows, kColumns, 16, 64, CU_TENSOR_MAP_SWIZZLE_128B), kX, kY);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      const bool inside = r >= kY && r < kY + 16 && c >= kX && c < kX + 64;
      const int expected = inside ? swizzled_offset(r - kY, c - kX, 128) / 2 + 1 : 0;
      CHECK(out[static_cast<size_t>(r * kColumns + c)] == expected, "row ", r, " column ", c);
    }
  }
}

// ---- wgmma --------------------------------------------------------------------------------------------------------------

// a [64,16] and b [N,16] in 128-byte rows: K-major with 64 columns of which 16 are used, or MN-major in blocks of 64.
struct Operand {
  bool transposed;
  // Byte offset of element (i, k).
  __host__ __device__ int offset(int i, int k) const {
    if (!transposed) return swizzle(i * 128 + 2 * k);
    return swizzle(i / 64 * 2048 + k * 128 + 2 * (i % 64));
  }
  __host__ __device__ static int swizzle(int plain) { return plain ^ (plain / 128 % 8) * 16; }
  __device__ uint64_t descriptor(uint32_t start) const {
    return transposed ? ptx::descriptor(start, 2048, 1024, ptx::Swizzle::k128B) : ptx::desc_k128(start);
  }
};
constexpr int kOperandBytes = 256 * 128;

template <int kN, bool kTransposeA, bool kTransposeB>
__global__ void wgmma_kernel(const Bf16* a, const Bf16* b, float* out, bool from_registers) {
  SHARED_DYN(unsigned char, memory);
  constexpr Operand kA{kTransposeA}, kB{kTransposeB};
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, first_row = thread / 32 * 16;
  for (int i = thread; i < 64 * 16; i += 128) {
    *reinterpret_cast<Bf16*>(memory + kA.offset(i / 16, i % 16)) = a[i];
  }
  for (int i = thread; i < kN * 16; i += 128) {
    *reinterpret_cast<Bf16*>(memory + kOperandBytes + kB.offset(i / 16, i % 16)) = b[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = 1.0f;
  const uint32_t start = ptx::smem_u32(memory);
  const uint64_t b_tile = kB.descriptor(start + kOperandBytes);
  uint32_t registers[4];
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
    std::memcpy(&registers[i], a + row * 16 + k, 4);
  }
  ptx::wgmma_fence();
  for (int round = 0; round < 2; ++round) {  // d = a·b, then d += a·b
    if (from_registers) {
      ptx::wgmma<Bf16, kN, kTransposeB>(d, registers, b_tile, round);
    } else {
      ptx::wgmma<Bf16, kN, kTransposeA, kTransposeB>(d, kA.descriptor(start), b_tile, round);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
  for (int i = 0; i < kN / 2; ++i) {
    out[(first_row + lane / 4 + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

template <int kN, bool kTransposeA, bool kTransposeB>
void check_wgmma() {
  std::vector<Bf16> a(64 * 16), b(kN * 16);
  for (size_t i = 0; i < a.size(); ++i) a[i] = number(static_cast<int>(3 * i + i / 16));
  for (size_t i = 0; i < b.size(); ++i) b[i] = number(static_cast<int>(5 * i + i / 16));
  for (const bool from_registers : {false, true}) {
    std::vector<float> out(64 * kN);
    launch(wgmma_kernel<kN, kTransposeA, kTransposeB>, 1, 128, 2 * kOperandBytes, nullptr, a.data(), b.data(),
           out.data(), from_registers);
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < kN; ++column) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += __bfloat162float(a[row * 16 + k]) * __bfloat162float(b[column * 16 + k]);
        CHECK(out[static_cast<size_t>(row * kN + column)] == 2 * sum, "N ", kN, " row ", row, " column ", column);
      }
    }
  }
}
TEST(wgmma_in_all_layouts) {
  check_wgmma<16, false, false>();
  check_wgmma<16, true, false>();
  check_wgmma<64, false, true>();
  check_wgmma<128, true, true>();
  check_wgmma<192, false, false>();
  check_wgmma<256, true, true>();
}

__global__ void stmatrix_kernel(uint16_t* out, bool transposed) {
  SHARED_DYN(uint16_t, tile);
  const unsigned lane = threadIdx.x;
  uint32_t r[4];
  for (unsigned m = 0; m < 4; ++m) r[m] = (64 * m + 2 * lane) | (64 * m + 2 * lane + 1) << 16;
  transposed ? ptx::stmatrix_x4_trans(tile + 8 * lane, r) : ptx::stmatrix_x4(tile + 8 * lane, r);
  __syncwarp();
  for (unsigned i = lane; i < 256; i += 32) out[i] = tile[i];
}
TEST(stmatrix_is_the_inverse_of_ldmatrix) {
  for (const bool transposed : {false, true}) {
    std::vector<uint16_t> out(256);
    launch(stmatrix_kernel, 1, 32, 512, nullptr, out.data(), transposed);
    for (int m = 0; m < 4; ++m) {
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) {
          CHECK(out[static_cast<size_t>(64 * m + 8 * r + c)] == 64 * m + (transposed ? 8 * c + r : 8 * r + c), "row ",
                r);
        }
      }
    }
  }
}

__global__ void elect_kernel(unsigned* elected) {
  if (ptx::elect_one()) atomicAdd(elected, 1u);
}
TEST(one_lane_is_elected) {
  unsigned elected = 0;
  launch(elect_kernel, 1, 64, 0, nullptr, &elected);
  CHECK(elected == 2);
}

TEST(hopper_is_refused_elsewhere) {
  std::vector<uint16_t> matrix(64 * 64), out(64 * 64);
  const CUtensorMap map = simt::matrix_map(matrix.data(), 64, 64, 8, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  simt::device() = simt::sm_80();
  CHECK_FAILS("needs sm_90", launch(load_box_kernel<2>, 1, 32, 1024, nullptr, map, 0, 0, 0, 1024, out.data()));
  simt::device() = simt::sm_90();
}

}  // namespace
