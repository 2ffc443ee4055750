// SPDX-License-Identifier: BSD-3-Clause
#include "switchgear/tensor.h"

#include <algorithm>
#include <sstream>

namespace switchgear {
namespace {

void write_list(std::ostream& out, const std::array<int64_t, TensorView::kMaxDims>& values, int count) {
  out << '[';
  for (int i = 0; i < count; ++i) out << (i > 0 ? ", " : "") << values[i];
  out << ']';
}

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
  }
  return "unknown";
}

void set_unused_strides(TensorView& tensor) {
  int64_t next = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const bool is_row_of_gaps = i + 2 == tensor.ndim && tensor.stride[i + 1] != 1;
    if (tensor.shape[i] == 1) tensor.stride[i] = is_row_of_gaps ? 1 : next;
    next = std::max(next, tensor.shape[i] * tensor.stride[i]);
  }
}

std::string describe(const TensorView& tensor) {
  if (!tensor.defined()) return "none";
  std::ostringstream out;
  out << name_of(tensor.dtype);
  write_list(out, tensor.shape, tensor.ndim);
  if (!tensor.contiguous()) {
    out << " with strides ";
    write_list(out, tensor.stride, tensor.ndim);
  }
  if (tensor.device.type == DeviceType::kCUDA) out << " on cuda:" << tensor.device.index;
  return out.str();
}

}  // namespace switchgear
