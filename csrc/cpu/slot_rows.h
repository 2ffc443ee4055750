// SPDX-License-Identifier: BSD-3-Clause
// A row for each slot of a call, in memory of its own.
#pragma once
#include "experts.h"
#include "workspace.h"

namespace switchgear::cpu {

class SlotRows {
 public:
  SlotRows(int64_t num_slots, int64_t width, DType dtype)
      : stride_(Workspace::padded(width * size_of(dtype))),
        memory_(Workspace::padded(num_slots * stride_) +
                Workspace::padded(num_slots * static_cast<int64_t>(sizeof(void*)))),
        data_(static_cast<char*>(memory_.take_bytes(num_slots * stride_))),
        pointers_(memory_.take<const void*>(num_slots)) {
    fill_row_pointers(pointers_, data_, stride_, num_slots);
  }

  char* row(int64_t slot) const { return data_ + slot * stride_; }
  const void* const* pointers() const { return pointers_; }

 private:
  int64_t stride_;  // bytes
  Workspace memory_;
  char* data_;
  const void** pointers_;
};

}  // namespace switchgear::cpu
