// SPDX-License-Identifier: BSD-3-Clause
// Memory that is kept and reused, so that training steps do not fault in the same pages again. The system hands out a large
// block page by page and zeroes each, which costs half as much as the multiplications of a training step.
// release_workspaces() frees all idle blocks.
#pragma once
#include <cstddef>
#include <cstdint>

namespace switchgear::cpu {

// Temporary memory of one call.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `count` elements, aligned to a cache line. The sizes taken must add up to the size requested.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* take_bytes(int64_t bytes);

  static constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  char* block_;
  int64_t size_;
  int64_t used_ = 0;
};

// Memory of one tensor, a weight gradient. Blocks are reused only for tensors of exactly their size; idle and live ones
// together never exceed the most that was live at once.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  char* data_;
  int64_t size_;
};

int64_t kept_bytes();            // of idle buffers
int64_t idle_workspace_bytes();  // of idle workspaces, for tests
void release_workspaces();

}  // namespace switchgear::cpu
