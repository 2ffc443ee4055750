// SPDX-License-Identifier: BSD-3-Clause
// The temporary memory of one op, in one allocation.
#pragma once
#include <cstddef>
#include <cstdint>

#include "switchgear/check.h"
#include "switchgear/ops.h"

namespace switchgear::cuda {

constexpr int64_t kWorkspaceAlignment = 256;

// Allocates `bytes` of device memory for the kernels that this op queues on exec.stream. ValueError without an allocator.
inline std::byte* allocate(const Execution& exec, int64_t bytes) {
  if (bytes == 0) return nullptr;
  SWITCHGEAR_CHECK(ValueError, exec.allocator.allocate != nullptr,
                   "allocator: expected one, since the op needs temporary memory, got none");
  return static_cast<std::byte*>(exec.allocator.allocate(exec.allocator.context, bytes));
}

// Lays out arrays one after another, each aligned. Built twice with the same calls: first over null, to get the size.
//
//   Workspace sizes;  layout(sizes);  Workspace memory(allocate(exec, sizes.size()));  layout(memory);
class Workspace {
 public:
  explicit Workspace(std::byte* memory = nullptr) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    std::byte* const at = memory_ == nullptr ? nullptr : memory_ + size_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    size_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return reinterpret_cast<T*>(at);
  }
  int64_t size() const { return size_; }

 private:
  std::byte* memory_;
  int64_t size_ = 0;
};

}  // namespace switchgear::cuda
