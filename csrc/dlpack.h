// SPDX-License-Identifier: BSD-3-Clause
// The part of DLPack's C ABI that arrays.cpp uses: borrowed and managed tensors, and the C exchange API of DLPack 1.3
// (https://dmlc.github.io/dlpack/latest/c_api.html). Layouts and names are DLPack's.
#pragma once
#include <cstdint>

namespace switchgear::dlpack {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 };
enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct DLPackVersion {
  uint32_t major, minor;
};

struct DLDevice {
  int32_t device_type, device_id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for a compact row-major tensor
  uint64_t byte_offset;
};

struct DLManagedTensor {  // in a capsule named "dltensor"
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {  // in a capsule named "dltensor_versioned"
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};
constexpr uint64_t kReadOnly = 1;  // a bit of flags

struct DLPackExchangeAPI {  // in a capsule named "dlpack_exchange_api", an attribute of the array's type
  DLPackVersion version;
  DLPackExchangeAPI* prev;
  int (*managed_tensor_allocator)(DLTensor*, DLManagedTensorVersioned**, void*,
                                  void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, DLManagedTensorVersioned**);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned*, void**);
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);  // borrows: valid while the object lives
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace switchgear::dlpack
