// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps for TMA describe the boxes of a 16-bit tensor that a kernel loads, in rows of 128 bytes with the 128B swizzle.
#pragma once
#include <cuda.h>  // CUtensorMap

#include <array>
#include <cstdint>

#include "switchgear/tensor.h"

namespace switchgear::cuda {

// Three dimensions, the contiguous one first. `data` and all strides are multiples of 16 bytes.
struct TensorMapArgs {
  const void* data;
  DType dtype;                    // bfloat16 or float16
  std::array<int64_t, 3> size;    // elements; reads outside return zeros
  std::array<int64_t, 2> stride;  // elements, of dimensions 1 and 2
  int box_rows;                   // a box is 64 x box_rows x 1
};

// Computed on the host from plain numbers: reads no data, queues and allocates nothing.
CUtensorMap make_tensor_map(const TensorMapArgs& args);

}  // namespace switchgear::cuda
