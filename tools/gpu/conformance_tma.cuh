// SPDX-License-Identifier: BSD-3-Clause
// Conformance of TMA: boxes past the edges of a matrix, in and out, those of the GEMM's tensor maps, and a map that the device edits.
#pragma once
#include <stdexcept>

#include "conformance_hopper.cuh"
#include "tensor_map.h"
#include "tensor_maps.h"

namespace switchgear::cuda::conformance {

// Boxes of 64 x 32 elements that extend past the edges of a matrix of 100 x 72.
__global__ void tma_load_2d_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, int x, int y) {
  SHARED_DYN(uint32_t, tile);
  if (thread() == 0) ptx::prefetch_tensor_map(&map);
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::tma_load_2d(tile, &map, reinterpret_cast<uint64_t*>(tile + 1024), x, y); });
}

__global__ void tma_load_3d_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, int x, int y, int z) {
  SHARED_DYN(uint32_t, tile);
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::tma_load_3d(tile, &map, reinterpret_cast<uint64_t*>(tile + 1024), x, y, z); });
}

// A copy of `like` in device memory, `offset` bytes past a multiple of 256, with another address and fewer rows. Its place in
// `out` is poisoned again afterwards, since the bytes of a map are not compared.
__global__ void tensor_map_replaced_kernel(const __grid_constant__ CUtensorMap like, const uint32_t* data,
                                           uint32_t* out, int offset) {
  SHARED_DYN(uint32_t, tile);
  auto* const map =
      reinterpret_cast<CUtensorMap*>((reinterpret_cast<uintptr_t>(out + 4096) + 255) / 256 * 256 + offset);
  if (thread() == 0) {
    *map = like;
    ptx::tensor_map_replace_address(map, data);
    ptx::tensor_map_replace_size<1>(map, 20);
    ptx::fence_tensor_map_release();
    ptx::fence_tensor_map_acquire(map);
  }
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::tma_load_2d(tile, map, reinterpret_cast<uint64_t*>(tile + 1024), 0, 0); });
  __syncthreads();
  for (int i = thread(); i < 160; i += 32) out[4096 + i] = kPoison;
}

template <int kDimensions>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, int x, int y) {
  SHARED_DYN(uint32_t, tile);
  fill_shared(tile, 1024, [](uint32_t i) { return mix(i); });
  ptx::fence_proxy_async();
  __syncthreads();
  if (thread() != 0) return;
  if constexpr (kDimensions == 2) {
    ptx::tma_store_2d(&map, tile, x, y);
  } else {
    ptx::tma_store_3d(&map, tile, x, y, 1);
  }
  ptx::tma_store_commit();
  ptx::tma_store_wait_read<0>();
  ptx::tma_store_wait<0>();
}

// Loads one box of a map of tensor_map.h, and writes it to out.
__global__ void box_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, int bytes, int x, int y, int z) {
  SHARED_DYN(uint64_t, shared);
  uint32_t* const tile = reinterpret_cast<uint32_t*>(shared) + 256;
  fill_shared(tile, bytes / 4, [](uint32_t i) { return ~mix(i); });
  ptx::fence_proxy_async();
  if (thread() == 0) {
    ptx::mbar_init(shared, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (thread() == 0) {
    ptx::mbar_expect_tx(shared, static_cast<uint32_t>(bytes));
    ptx::tma_load_3d(tile, &map, shared, x, y, z);
  }
  ptx::mbar_wait(shared, 0);
  for (int i = thread(); i < bytes / 4; i += static_cast<int>(blockDim.x)) out[i] = tile[i];
}

constexpr cuuint64_t kColumns = 72, kRows = 50, kDepths = 2;

inline CUtensorMap map_of(void* data, int dimensions, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  std::vector<cuuint64_t> size = {kColumns, dimensions == 2 ? kRows * kDepths : kRows}, stride = {2 * kColumns};
  std::vector<cuuint32_t> box = {64, 32};
  if (dimensions == 3) size.push_back(kDepths), stride.push_back(2 * kColumns * kRows), box.push_back(1);
  if (simt::encode_map(&map, data, size, stride, box, swizzle) != CUDA_SUCCESS)
    throw std::runtime_error("no tensor map");
  return map;
}

inline void add_tensor_copies(std::vector<Case>& cases) {
  struct Kind {
    const char* name;
    CUtensorMapSwizzle swizzle;
  };
  // A box of 64 elements is 128 bytes wide, too wide for the narrower swizzles.
  for (const Kind kind : {Kind{"128B", CU_TENSOR_MAP_SWIZZLE_128B}, Kind{"plain", CU_TENSOR_MAP_SWIZZLE_NONE}}) {
    for (const int x : {0, 24, -8}) {
      const std::string end = std::string(" ") + kind.name + " x=" + std::to_string(x);
      cases.push_back({"tma_load_2d" + end, [=](uint32_t* in, uint32_t* out) {
                         launch(tma_load_2d_kernel, dim3(1), dim3(32), kShared, nullptr, map_of(in, 2, kind.swizzle),
                                out, x, 80);
                       }});
      cases.push_back({"tma_load_3d" + end, [=](uint32_t* in, uint32_t* out) {
                         launch(tma_load_3d_kernel, dim3(1), dim3(32), kShared, nullptr, map_of(in, 3, kind.swizzle),
                                out, x, 30, 1);
                       }});
      cases.push_back({"tma_store_2d" + end, [=](uint32_t*, uint32_t* out) {
                         launch(tma_store_kernel<2>, dim3(1), dim3(32), kShared, nullptr, map_of(out, 2, kind.swizzle),
                                x, 80);
                       }});
      cases.push_back({"tma_store_3d" + end, [=](uint32_t*, uint32_t* out) {
                         launch(tma_store_kernel<3>, dim3(1), dim3(32), kShared, nullptr, map_of(out, 3, kind.swizzle),
                                x, 30);
                       }});
    }
  }
}

inline void add_replaced_map(std::vector<Case>& cases) {
  for (const int offset : {0, 128}) {
    cases.push_back({"tensor_map_replaced at " + std::to_string(offset), [=](uint32_t* in, uint32_t* out) {
                       launch(tensor_map_replaced_kernel, dim3(1), dim3(32), kShared, nullptr,
                              map_of(in, 2, CU_TENSOR_MAP_SWIZZLE_128B), in + 64, out, offset);
                     }});
  }
}

// The boxes of the GEMM's tensor maps, at the edges of a matrix of 72 columns and 220 rows of 2 experts.
inline void add_production_maps(std::vector<Case>& cases) {
  for (const int rows : {16, 64, 96, 128, 192}) {
    for (const int x : {0, 24}) {
      cases.push_back(
          {"tensor map of " + std::to_string(rows) + " rows x=" + std::to_string(x), [=](uint32_t* in, uint32_t* out) {
             const CUtensorMap map =
                 make_tensor_map({in, switchgear::DType::kBFloat16, {72, 220, 2}, {72, 72 * 220}, rows});
             launch(box_kernel, dim3(1), dim3(32), size_t{26} << 10, nullptr, map, out, rows * 128, x, 100, 1);
           }});
    }
  }
}

inline void add_tma(std::vector<Case>& cases) {
  add_tensor_copies(cases);
  add_production_maps(cases);
  add_replaced_map(cases);
}

}  // namespace switchgear::cuda::conformance
