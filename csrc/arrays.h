// SPDX-License-Identifier: BSD-3-Clause
// Python arrays as TensorViews, through DLPack. A type with the C exchange API (torch.Tensor) lends its tensors in some
// 25 ns, which are ready on the stream that its library calls current; any other array is asked for a capsule by
// __dlpack__, which is kept for as long as the views are used, and which makes it ready on the stream of the call.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <list>
#include <optional>
#include <vector>

#include "switchgear/ops.h"

namespace switchgear {

// The arrays of one call. Views are valid while it lives; it is destroyed under the GIL.
class Arrays {
 public:
  Arrays() = default;
  explicit Arrays(uintptr_t stream) : stream_(stream) {}  // a cudaStream_t; 0 is the default stream

  TensorView in(const char* name, pybind11::handle array) { return load(name, array).view; }
  TensorView in_or_none(const char* name, pybind11::handle array) {
    return array.is_none() ? TensorView{} : in(name, array);
  }
  TensorView out(const char* name, pybind11::handle array);  // ValueError for a read-only one
  TensorView out_or_none(const char* name, pybind11::handle array) {
    return array.is_none() ? TensorView{} : out(name, array);
  }

  // A weight from its tensors and its form, integers. No form: plain, one array [E,N,C], in a list or not, or E arrays [N_e,C] that
  // agree in dtype, C and strides. Else (format, rows, cols, parts, group_size, fields); the bits of `fields` say which tensors
  // follow the data: 1 scales, 2 row_scales, 4 zeros, 8 slots.
  Weight weight(const char* name, pybind11::handle tensors, pybind11::handle form);

  // The memory of an array of any dtype; ValueError where it has less than `bytes`, or isn't compact.
  void* memory(const char* name, pybind11::handle array, int64_t bytes);

 private:
  struct Borrowed;
  struct Loaded {
    TensorView view;
    bool read_only = false;
  };
  Borrowed borrow(const char* name, pybind11::handle array);
  Loaded load(const char* name, pybind11::handle array);
  Weight separate(const char* name, pybind11::sequence weights);

  struct Separate {  // matrices with memory of their own
    std::vector<const void*> base;
    std::vector<int64_t> row_count;
  };

  std::optional<uintptr_t> stream_;
  std::vector<pybind11::object> capsules_;
  std::list<Separate> separate_;
};

}  // namespace switchgear
