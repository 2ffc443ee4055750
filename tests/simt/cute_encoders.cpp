// SPDX-License-Identifier: BSD-3-Clause
// CuTe's own encoders, run on the host: descriptors of shared-memory operands, and tensor maps, for which CuTe calls the
// driver. The call goes to the driver of the shim.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>

#define __CUDACC_VER_MAJOR__ 13  // without it CuTe leaves the call to the driver out
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1  // shared memory starts at address 0
static size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }
#include <cute/tensor.hpp>  // before its parts

#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "cute_layouts.h"

extern "C" {

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* start,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status{};
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  if (function == nullptr) return CUDA_ERROR_NOT_FOUND;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, type, rank, start, size, stride, box, element_stride, interleave, swizzle, promotion, fill);
}

// Older drivers have a fault that CuTe works around in the encoded bits.
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13020;
  return cudaSuccess;
}

}  // extern "C"

namespace cute_layouts {
namespace {

using namespace cute;
using Element = bfloat16_t;

template <int kBox>
CUtensorMap k_major_map(const Matrices& m) {
  const auto source = make_tensor(make_gmem_ptr(static_cast<const Element*>(m.data)),
                                  make_shape(m.rows, m.columns, m.count), make_stride(m.stride, _1{}, m.matrix_stride));
  const auto tile = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kBox>, _64>{});
  CUtensorMap map;
  std::memcpy(&map, make_tma_copy(SM90_TMA_LOAD{}, source, tile).get_tma_descriptor(), sizeof map);
  return map;
}

CUtensorMap mn_major_map(const Matrices& m) {
  const auto source = make_tensor(make_gmem_ptr(static_cast<const Element*>(m.data)),
                                  make_shape(m.columns, m.rows, m.count), make_stride(_1{}, m.stride, m.matrix_stride));
  const auto tile = tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<_64, _64>{});
  CUtensorMap map;
  std::memcpy(&map, make_tma_copy(SM90_TMA_LOAD{}, source, tile).get_tma_descriptor(), sizeof map);
  return map;
}

// Depths 16 k to 16 k + 15 of a tile.
template <SM90::GMMA::Major kMajor, typename Layout>
uint64_t descriptor_of(Layout layout, int k) {
  const auto tile = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), layout);
  const auto slice = local_tile(tile, make_shape(size<0>(layout), _16{}), make_coord(0, k));
  return SM90::GMMA::make_gmma_desc<kMajor>(slice).desc_;
}

}  // namespace

CUtensorMap map_of(const Matrices& m, int box_rows, bool along_rows) {
  if (!along_rows) return mn_major_map(m);
  switch (box_rows) {
    case 16: return k_major_map<16>(m);
    case 64: return k_major_map<64>(m);
    case 96: return k_major_map<96>(m);
    case 128: return k_major_map<128>(m);
    case 192: return k_major_map<192>(m);
    default: throw std::runtime_error("no such box");
  }
}

uint64_t k_major_descriptor(int k) {
  return descriptor_of<SM90::GMMA::Major::K>(
      tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{}, Shape<_64, _64>{}), k);
}

uint64_t mn_major_descriptor(int k) {
  return descriptor_of<SM90::GMMA::Major::MN>(
      tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<_128, _64>{}, Step<_2, _1>{}), k);
}

}  // namespace cute_layouts
