// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps of row-major matrices of 16-bit elements, for tests, made through the driver's entry point as in launchers.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

inline CUresult encode_map(CUtensorMap* map, const void* start, const std::vector<cuuint64_t>& size,
                           const std::vector<cuuint64_t>& stride, const std::vector<cuuint32_t>& box,
                           CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status{};
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  if (function == nullptr) throw std::runtime_error("no cuTensorMapEncodeTiled");
  const std::vector<cuuint32_t> element_stride(size.size(), 1);
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(size.size()), const_cast<void*>(start),
      size.data(), stride.data(), box.data(), element_stride.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// [rows, columns], read in boxes of [box_rows, box_columns].
inline CUtensorMap matrix_map(const void* start, cuuint64_t rows, cuuint64_t columns, cuuint32_t box_rows,
                              cuuint32_t box_columns, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  const CUresult result = encode_map(&map, start, {columns, rows}, {2 * columns}, {box_columns, box_rows}, swizzle);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: " + std::to_string(result));
  return map;
}

}  // namespace simt
