// SPDX-License-Identifier: BSD-3-Clause
// The argument type of every op: a typed, strided view of memory owned by someone else. No torch, no Python.
#pragma once
#include <array>
#include <cstdint>
#include <string>

namespace switchgear {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kInt8, kUInt8 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kInt64: return 8;
    case DType::kInt8:
    case DType::kUInt8: return 1;
  }
  return 0;
}

const char* name_of(DType dtype);  // "float32", "bfloat16", …

enum class DeviceType : uint8_t { kCPU, kCUDA };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;
};

// Strides count elements, not bytes. A view with `data == nullptr` and `ndim == 0` means an absent argument.
struct TensorView {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> stride{};

  bool defined() const { return ndim > 0; }
  int64_t numel() const {
    int64_t n = defined() ? 1 : 0;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  int64_t extent() const {  // bytes from the first element to the end of the last
    int64_t last = 0;
    for (int i = 0; i < ndim; ++i) last += (shape[i] - 1) * stride[i];
    return numel() == 0 ? 0 : (last + 1) * size_of(dtype);
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  // Whether tensor[i] is contiguous for each i, any multiple of 64 bytes after tensor[i - 1].
  bool contiguous_apart() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i > 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return stride[0] >= 0 && stride[0] * size_of(dtype) % 64 == 0;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// A contiguous view of `data`, for C++ callers, tests and benchmarks.
template <typename... Sizes>
TensorView view(void* data, DType dtype, Sizes... sizes) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = sizeof...(sizes);
  v.shape = {static_cast<int64_t>(sizes)...};
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    v.stride[i] = stride;
    stride *= v.shape[i];
  }
  return v;
}

// A dimension of size 1 may have any stride. Sets that with which it continues the dimensions after it, so that one row, or
// one expert's matrix, is as aligned as each of several; 1 for the rows of a matrix whose columns are not contiguous.
void set_unused_strides(TensorView& tensor);

std::string describe(const TensorView& tensor);  // "bfloat16[16, 64]", with strides if not contiguous

}  // namespace switchgear
