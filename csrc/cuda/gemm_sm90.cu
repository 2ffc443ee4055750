// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <string>
#include <utility>

#include "gemm_sm90.cuh"
#include "gemm_sm90_wgrad.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace switchgear::cuda {
namespace sm90 {
namespace {

// ---- what the kernels support --------------------------------------------------------------------------------------------

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(error));
  return value;
}

// Whether rows consist of vectors of 16 bytes: 8 elements.
bool eights(int64_t elements) { return elements % 8 == 0; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool half_precision(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// Whether a tensor map can have a dimension of this size; the box coordinates past its end must fit too.
bool fits_coordinate(int64_t size) { return size > 0 && size < int64_t{1} << 30; }

bool takes_rows(const Rows& rows, int64_t columns) {
  return aligned(rows.data) && eights(rows.stride) && rows.stride >= columns && fits_coordinate(rows.stride) &&
         fits_coordinate(rows.count);
}

bool takes_weights(const Gemm& g, const ExpertOperand& b) {
  if (b.ends != nullptr || !aligned(b.data)) return false;
  const int64_t unit = std::min(b.n_stride, b.k_stride), other = std::max(b.n_stride, b.k_stride);
  if (b.separate != nullptr) return b.aligned && unit == 1 && other > 0;
  return unit == 1 && eights(other) && other > 0 &&
         (g.num_experts == 1 || (eights(b.expert_stride) && b.expert_stride > 0));
}

bool takes_low(const Gemm& g) {
  return g.low.rank == 0 || (eights(g.low.rank) && g.low.a.indices == nullptr && takes_rows(g.low.a, g.low.rank) &&
                             takes_weights(g, g.low.b));
}

bool takes_epilogue(const Gemm& g) {
  if (!aligned(g.out) || !eights(g.out_stride)) return false;
  if (g.bias != nullptr && (!aligned(g.bias) || !eights(g.bias_stride))) return false;
  if (g.epilogue == Epilogue::kStore) return true;
  if (g.h != nullptr && (!aligned(g.h) || !eights(g.h_stride))) return false;
  if (gate_halves(g)) return eights(g.n / 2);
  return aligned(g.weighted_a) && eights(g.weighted_a_stride);
}

// ---- tensor maps ---------------------------------------------------------------------------------------------------------

CUtensorMap map_of_rows(const Rows& rows, DType dtype, int64_t columns, int box_rows) {
  return make_tensor_map({rows.data, dtype, {columns, rows.count, 1}, {rows.stride, rows.stride}, box_rows});
}

// Boxes are 64 depths x `columns` columns of b [E][N,depth] if k is contiguous, else 64 columns x `depths` depths.
CUtensorMap map_of_weights(const Gemm& g, const ExpertOperand& b, int64_t depth, int columns, int depths) {
  const bool k_contiguous = g.b.k_contiguous();
  const int64_t row_stride = k_contiguous ? b.n_stride : b.k_stride;
  if (b.separate != nullptr) {  // a model for the experts' own; the memory is any that is aligned
    const std::array<int64_t, 3> size = {k_contiguous ? depth : g.n, k_contiguous ? g.n : depth, 1};
    return make_tensor_map({b.separate, g.dtype, size, {row_stride, row_stride}, k_contiguous ? columns : depths});
  }
  const int64_t expert_stride = g.num_experts == 1 ? row_stride : b.expert_stride;
  if (k_contiguous) {
    return make_tensor_map({b.data, g.dtype, {depth, g.n, g.num_experts}, {row_stride, expert_stride}, columns});
  }
  return make_tensor_map({b.data, g.dtype, {g.n, depth, g.num_experts}, {row_stride, expert_stride}, depths});
}

// Boxes of 16 rows x 64 columns, one warp's, of [planes][rows,columns].
CUtensorMap map_of_out(void* data, DType dtype, int64_t columns, int64_t rows, int64_t stride, int64_t planes = 1,
                       int64_t plane_stride = 0) {
  return make_tensor_map({data, dtype, {columns, rows, planes}, {stride, planes > 1 ? plane_stride : stride}, 16});
}

// ---- launches ------------------------------------------------------------------------------------------------------------

// One block per multiprocessor, in whole clusters, of which each has a tile.
unsigned grid_for(int64_t tiles, const Schedule& schedule, int cluster) {
  const int left = device_attribute(cudaDevAttrMultiProcessorCount) - schedule.reserved_multiprocessors;
  return static_cast<unsigned>(std::min<int64_t>(tiles, std::max(1, left / cluster)) * cluster);
}

template <typename T, Epilogue kEpilogue, typename C>
void launch_gemm(const Gemm& g, void* stream) {
  GemmParams params{};
  const int columns = gate_halves(g) || C::kCluster > 1 ? C::kColumns / 2 : C::kColumns, depths = kDepth / C::kCluster;
  params.maps.weights = map_of_weights(g, g.b, g.c, columns, depths);
  if (g.a.indices == nullptr) params.maps.slots = map_of_rows(g.a, g.dtype, g.c, C::kSlots);
  if (g.low.rank > 0) {
    params.low = {.weights = map_of_weights(g, g.low.b, g.low.rank, columns, depths),
                  .slots = map_of_rows(g.low.a, g.dtype, g.low.rank, C::kSlots)};
  }
  if constexpr (C::kCooperative) {
    params.out.out = map_of_out(g.out, g.dtype, out_columns(g), g.num_slots, g.out_stride);
    if (kEpilogue == Epilogue::kGlu && g.h != nullptr) {
      params.out.h = map_of_out(g.h, g.dtype, g.n, g.num_slots, g.h_stride);
    }
  }
  params.g = g;
  if (g.b.separate != nullptr) write_maps(g.b, params.maps.weights, g.num_experts, stream);
  const int64_t rows = row_tile_bound(g.num_slots, g.num_experts, C::kSlots * C::kCluster);
  const int64_t tiles = rows * ((g.n + C::kColumns - 1) / C::kColumns);
  launch_dependent(g.schedule.follows_kernel, C::kCluster, gemm_sm90_kernel<T, kEpilogue, C>,
                   dim3(grid_for(tiles, g.schedule, C::kCluster)), dim3(kThreads),
                   shared_bytes(C::kShape, C::kN, C::kStages), stream, params);
}

// The kernel of a row of the table.
template <Shape kShape, size_t kRow, bool kAlongN>
using ConfigOf = Config<kShape, kTiles[kRow].n, kTiles[kRow].stages, kAlongN, kTiles[kRow].cluster,
                        kTiles[kRow].cooperative, kTiles[kRow].band>;

// Calls launch.operator()<kRow>() for the row picked, of those that take `use`.
template <unsigned kUse, typename Launch>
void launch_row(int picked, const Launch& launch) {
  [&]<size_t... kRows>(std::index_sequence<kRows...>) {
    (
        [&] {
          if constexpr ((kTiles[kRows].takes & kUse) != 0) {
            if (picked == static_cast<int>(kRows)) launch.template operator()<kRows>();
          }
        }(),
        ...);
  }(std::make_index_sequence<std::size(kTiles)>());
}

template <typename T, Epilogue kEpilogue, bool kAlongN>
void launch_picked(const Gemm& g, void* stream) {
  launch_row<bit_of(kEpilogue)>(pick_tile(g), [&]<size_t kRow>() {
    launch_gemm<T, kEpilogue, ConfigOf<shape_of(kTiles[kRow]), kRow, kAlongN>>(g, stream);
  });
}

template <typename T, Epilogue kEpilogue>
void launch_layout(const Gemm& g, void* stream) {
  if (g.b.k_contiguous()) {
    launch_picked<T, kEpilogue, false>(g, stream);
  } else {
    launch_picked<T, kEpilogue, true>(g, stream);
  }
}

template <typename T>
void launch_type(const Gemm& g, void* stream) {
  switch (g.epilogue) {
    case Epilogue::kStore: return launch_layout<T, Epilogue::kStore>(g, stream);
    case Epilogue::kGlu: return launch_layout<T, Epilogue::kGlu>(g, stream);
    case Epilogue::kGluBackward: return launch_layout<T, Epilogue::kGluBackward>(g, stream);
  }
}

template <typename T, typename C>
void launch_wgrad(const Wgrad& g, void* stream) {
  const bool shares_b = C::kCluster > 1 && g.b.indices == nullptr;
  const bool shares_a = C::kCluster > 1 && !shares_b && g.a.indices == nullptr;
  WgradParams params{};
  params.a = map_of_rows(g.a, g.dtype, g.m, shares_a ? kDepth / 2 : kDepth);
  params.b = map_of_rows(g.b, g.dtype, g.n, shares_b ? kDepth / 2 : kDepth);
  if constexpr (C::kCooperative) {
    params.out = map_of_out(g.out, g.dtype, g.n, g.m, g.out_stride, g.num_matrices, g.out_expert_stride);
  }
  params.g = g;
  const int64_t height = shares_a ? kP : kP * C::kCluster, width = shares_a ? C::kN * C::kCluster : C::kN;
  const int64_t tiles = g.num_matrices * ((g.m + height - 1) / height) * ((g.n + width - 1) / width);
  launch_dependent(g.schedule.follows_kernel, C::kCluster, wgrad_sm90_kernel<T, C>,
                   dim3(grid_for(tiles, g.schedule, C::kCluster)), dim3(kThreads),
                   shared_bytes(C::kShape, C::kN, C::kStages), stream, params);
}

template <typename T>
void launch_type(const Wgrad& g, void* stream) {
  launch_row<kWgrad>(pick_tile(g),
                     [&]<size_t kRow>() { launch_wgrad<T, ConfigOf<Shape::kWgrad, kRow, true>>(g, stream); });
}

}  // namespace
}  // namespace sm90

using namespace sm90;

bool on_hopper() { return !only_sm80() && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

bool sm90_takes(const Gemm& g) {
  return half_precision(g.dtype) && g.num_experts > 0 && g.num_experts <= kMaxExperts && fits_coordinate(g.num_slots) &&
         eights(g.n) && eights(g.c) && fits_coordinate(g.n) && fits_coordinate(g.c) && takes_rows(g.a, g.c) &&
         takes_weights(g, g.b) && takes_low(g) && takes_epilogue(g) && on_hopper();
}

void gemm_sm90(const Gemm& g, void* stream) {
  if (g.dtype == DType::kFloat16) return launch_type<__half>(g, stream);
  launch_type<__nv_bfloat16>(g, stream);
}

bool sm90_takes(const Wgrad& g) {
  return half_precision(g.dtype) && g.num_experts > 0 && g.num_experts <= kMaxExperts && fits_coordinate(g.num_slots) &&
         eights(g.m) && eights(g.n) && fits_coordinate(g.m) && fits_coordinate(g.n) && takes_rows(g.a, g.m) &&
         takes_rows(g.b, g.n) && aligned(g.out) && eights(g.out_stride) && eights(g.out_expert_stride) && on_hopper();
}

void wgrad_sm90(const Wgrad& g, void* stream) {
  if (g.dtype == DType::kFloat16) return launch_type<__half>(g, stream);
  launch_type<__nv_bfloat16>(g, stream);
}

}  // namespace switchgear::cuda
