// SPDX-License-Identifier: BSD-3-Clause
// The vocabulary in which ops.cpp states what it expects. A Dim is a size that the tensors of a call share: the first tensor
// that has it defines it, the others must agree. A Call sees every tensor of one call, so it can compare them.
#pragma once
#include <array>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <vector>

#include "names.h"
#include "switchgear/backend.h"

namespace switchgear {

struct Dim {
  static constexpr int64_t kUnknown = -1;

  const char* name;
  int64_t minimum = 1;
  int64_t size = kUnknown;
};

// kFloat is one of three dtypes, the same throughout a call.
enum class Kind : uint8_t { kFloat, kFloat32, kFloat16, kInt32, kInt8, kUInt8 };

enum class Layout : uint8_t {
  kContiguous,
  kExperts,   // contiguous, or the parts of the first dimension are and lie any multiple of 64 bytes apart
  kParts,     // the last two dimensions are contiguous, the others have any stride
  kRows,      // the last dimension is contiguous, the others have any stride
  kMatrices,  // [experts, rows, columns]: any strides, but the rows or the columns are contiguous
};

void check_threads(Execution exec);

class Call {
 public:
  using Shape = std::initializer_list<Dim*>;

  explicit Call(Execution exec);

  void input(const char* name, const TensorView& tensor, Kind kind, Shape shape, Layout layout = Layout::kContiguous);
  void input(const char* name, const Weight& weight, Shape shape);  // plain
  void output(const char* name, const TensorView& tensor, Kind kind, Shape shape, Layout layout = Layout::kContiguous);
  void optional_input(const char* name, const TensorView& tensor, Kind kind, Shape shape,
                      Layout layout = Layout::kContiguous) {
    if (tensor.defined()) input(name, tensor, kind, shape, layout);
  }
  void optional_output(const char* name, const TensorView& tensor, Kind kind, Shape shape,
                       Layout layout = Layout::kContiguous) {
    if (tensor.defined()) output(name, tensor, kind, shape, layout);
  }

  // Replaces int32 indices by a copy that lives as long as the call. Kernels trust indices, so no other thread may change
  // them between their check and their use. Memory of a device stays: its kernels check what they read.
  void own(TensorView& indices);

  // The backend of the device of the tensors so far.
  const Backend& backend() const { return *backend_; }

  template <typename Args>
  void run(void (*Backend::*op)(const Args&, Execution), const Args& args, Execution exec) const {
    if (backend_->*op == nullptr)
      throw std::runtime_error(join("the backend ", backend_->name, " has no kernel for this op"));
    (backend_->*op)(args, exec);
  }

  // The first tensor of Kind::kFloat, and its dtype, which all others share.
  const char* float_name() const { return float_name_; }
  DType float_dtype() const { return float_dtype_; }

  // Called after the last tensor: no output may share memory with another tensor.
  void check_overlap() const;

 private:
  static constexpr int kMaxTensors = 40;  // moe_backward with integers and adapters has 34

  struct Entry {
    const char* name = nullptr;
    const TensorView* tensor = nullptr;
    const Weight* separate = nullptr;  // matrices with their own base pointers, described by `tensor`
    bool output = false;
  };

  void check_type(const char* name, const TensorView& tensor, Kind kind, Shape shape);
  void check_device(const char* name, const TensorView& tensor);

  const Backend* backend_ = nullptr;
  Device device_;
  const char* first_name_ = nullptr;  // the tensor that determined both
  std::array<Entry, kMaxTensors> entries_;
  int count_ = 0;
  const char* float_name_ = nullptr;
  DType float_dtype_ = DType::kFloat32;

  std::array<int32_t, 256> few_;  // the first copies, which need no allocation
  size_t few_used_ = 0;
  std::vector<std::unique_ptr<int32_t[]>> many_;
};

// Checks of contents that an op uses as indices. They come last, since they read memory. Memory of a CUDA device is not read:
// its kernels skip what is out of range.
inline bool readable(const TensorView& tensor) { return tensor.device.type == DeviceType::kCPU; }
void check_pointer(const char* name, const void* data, DType dtype);  // not null, and aligned to elements
void check_host(const char* name, const TensorView& tensor);          // on the CPU, and its pointer
bool share_memory(const TensorView& a, const TensorView& b);
void check_range(const char* name, const TensorView& indices, int64_t low, int64_t high);  // all in [low, high)
// Ascending, all in [0, num_experts).
void check_experts(const char* name, const TensorView& experts, int64_t num_experts);
void check_offsets(const char* name, const TensorView& expert_offsets, int64_t num_slots);

// ---- weights, in weight_checks.cpp ---

// A weight [E,N,C] of any format that the device takes. Called after a float tensor of the call has been checked.
void weight_input(Call& call, const WeightNames& names, const Weight& weight, Dim& E, Dim& N, Dim& C);

// Copies a weight's slots and records and checks them. Called after the last tensor of the call, since it reads memory.
void check_slots(Call& call, const WeightNames& names, Weight& weight);

}  // namespace switchgear
