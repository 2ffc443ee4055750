// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps of experts in tensors of their own, for gemm_sm90.cuh: one per expert, written on the device.
//
// The maps of a projection differ in an address and in a number of rows, and the host encodes one of them, as for a packed
// tensor. A thread per expert copies it to device memory and replaces the two fields, once per product: E·256 bytes, one
// small launch, which the list of addresses needs on sm_80 too. The addresses are kernel parameters, so nothing outlives the
// call, and a CUDA graph keeps them. See docs/decisions.md.
//
// TMA reads maps through a proxy of its own, and may have cached what was there before. So the writer ends with a release to
// that proxy, and a producer acquires a map before it uses it, once per tile.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   write_maps_sm90_kernel: 32 registers
#pragma once
#include "expert_weights.h"
#include "hopper.cuh"
#include "launch.h"

namespace switchgear::cuda::sm90 {

constexpr int kMapThreads = 128;

// Dimension 0 or 1 of the maps is the matrices' rows.
template <int kRowDimension>
__global__ void __launch_bounds__(kMapThreads)
    write_maps_sm90_kernel(const __grid_constant__ SeparateMatrices matrices, const __grid_constant__ CUtensorMap like,
                           SeparateMatrix* out, int count) {
  const int e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (e >= count) return;
  SeparateMatrix& to = out[e];
  const auto [data, rows] = matrices.items[e];
  const auto* const from = reinterpret_cast<const uint4*>(&like);
  auto* const map = reinterpret_cast<uint4*>(to.tensor_map);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(CUtensorMap) / sizeof(uint4)); ++i) map[i] = from[i];
  to.data = data;
  to.rows = rows;
  if (rows > 0) {  // else nothing is read from the map
    ptx::tensor_map_replace_address(to.tensor_map, data);
    ptx::tensor_map_replace_size<kRowDimension>(to.tensor_map, static_cast<uint32_t>(rows));
  }
  ptx::fence_tensor_map_release();
}

// Queues the writing of b.separate, with maps like `like`.
inline void write_maps(const ExpertOperand& b, const CUtensorMap& like, int64_t num_experts, void* stream) {
  const auto kernel = b.rows_are_n == b.k_contiguous() ? write_maps_sm90_kernel<1> : write_maps_sm90_kernel<0>;
  launch(kernel, dim3(static_cast<unsigned>((num_experts + kMapThreads - 1) / kMapThreads)), dim3(kMapThreads), 0,
         stream, SeparateMatrices(b.list, num_experts), like, b.separate, static_cast<int>(num_experts));
}

// Acquires the map of an expert in a tensor of its own; called by the thread that loads, for each tile. Returns the expert, or
// ~expert if it has no rows: producers have no register for a map's address.
__device__ inline int32_t acquire_map(const ExpertOperand& b, int32_t expert) {
  if (b.separate == nullptr) return expert;
  const SeparateMatrix& matrix = b.separate[expert];
  ptx::fence_tensor_map_acquire(reinterpret_cast<const CUtensorMap*>(matrix.tensor_map));
  return matrix.rows > 0 ? expert : ~expert;
}

// The map that TMA reads an expert's weights from, and their place in its last dimension. `packed` has all experts.
struct WeightMap {
  const CUtensorMap* map;
  int place;

  __device__ WeightMap(const SeparateMatrix* separate, const CUtensorMap& packed, int32_t acquired)
      : map(&packed), place(acquired < 0 ? ~acquired : acquired) {
    if (separate == nullptr) return;
    map = reinterpret_cast<const CUtensorMap*>(separate[place].tensor_map);
    place = acquired < 0 ? 1 : 0;  // outside: zeros
  }
};

}  // namespace switchgear::cuda::sm90
