// SPDX-License-Identifier: BSD-3-Clause
// The encoder is a driver function. It is looked up at run time, since the library does not link against libcuda.
#include "tensor_map.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace switchgear::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  constexpr unsigned kCudaVersion = 12000;  // the first with this function
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kCudaVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: expected one for CUDA 12.0 or later");
  }
  return reinterpret_cast<Encode>(function);
}

}  // namespace

CUtensorMap make_tensor_map(const TensorMapArgs& args) {
  static const Encode encode = find_encoder();
  const cuuint64_t size[] = {static_cast<cuuint64_t>(args.size[0]), static_cast<cuuint64_t>(args.size[1]),
                             static_cast<cuuint64_t>(args.size[2])};
  const cuuint64_t stride_bytes[] = {2 * static_cast<cuuint64_t>(args.stride[0]),
                                     2 * static_cast<cuuint64_t>(args.stride[1])};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(args.box_rows), 1};
  const cuuint32_t element_stride[] = {1, 1, 1};
  // The driver requires an aligned map, and g++ does not always align returned values that way.
  std::byte memory[sizeof(CUtensorMap) + alignof(CUtensorMap)];
  void* place = memory;
  size_t space = sizeof memory;
  std::align(alignof(CUtensorMap), sizeof(CUtensorMap), place, space);
  const CUresult result =
      encode(static_cast<CUtensorMap*>(place),
             args.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
             const_cast<void*>(args.data), size, stride_bytes, box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  }
  CUtensorMap map;
  std::memcpy(&map, place, sizeof map);
  return map;
}

}  // namespace switchgear::cuda
