// SPDX-License-Identifier: BSD-3-Clause
#include "switchgear/tensor.h"

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
