// SPDX-License-Identifier: BSD-3-Clause
// A row for each slot of a call.
#pragma once
#include "experts.h"
#include "workspace.h"

namespace switchgear::cpu {

class SlotRows {
 public:
  static int64_t bytes(int64_t num_slots, int64_t width, DType dtype) {
    return Workspace::padded(num_slots * stride(width, dtype)) +
           Workspace::padded(num_slots * static_cast<int64_t>(sizeof(void*)));
  }
  SlotRows(Workspace& memory, int64_t num_slots, int64_t width, DType dtype)
      : stride_(stride(width, dtype)),
        data_(static_cast<char*>(memory.take_bytes(num_slots * stride_))),
        pointers_(memory.take<const void*>(num_slots)) {
    fill_row_pointers(pointers_, data_, stride_, num_slots);
  }

  char* row(int64_t slot) const { return data_ + slot * stride_; }
  const void* const* pointers() const { return pointers_; }

 private:
  static int64_t stride(int64_t width, DType dtype) { return Workspace::padded(width * size_of(dtype)); }

  int64_t stride_;  // bytes
  char* data_;
  const void** pointers_;
};

}  // namespace switchgear::cpu
