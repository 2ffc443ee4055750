// SPDX-License-Identifier: BSD-3-Clause
// Temporary memory of one call. Blocks are kept and reused, so that a training step does not fault the same pages in again
// and again; release_workspaces() gives all idle ones back.
#pragma once
#include <cstddef>
#include <cstdint>

namespace switchgear::cpu {

class Workspace {
 public:
  explicit Workspace(int64_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `count` elements, aligned to a cache line. The sizes taken must add up to what was asked for.
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

void release_workspaces();

// Asks for huge pages behind the whole 2 MB pages of a large fresh buffer: one page fault instead of 512. A hint: harmless
// where memory is mapped already or the system has none.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace switchgear::cpu
