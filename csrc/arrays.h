// SPDX-License-Identifier: BSD-3-Clause
// Python arrays as TensorViews, through DLPack. A type with the C exchange API (torch.Tensor) lends its tensors in some
// 25 ns; any other array is asked for a capsule by __dlpack__, which is kept for as long as the views are used.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "switchgear/ops.h"

namespace switchgear {

// The arrays of one call. Views are valid while it lives; it is destroyed under the GIL.
class Arrays {
 public:
  TensorView in(const char* name, pybind11::handle array) { return load(name, array).view; }
  TensorView in_or_none(const char* name, pybind11::handle array) {
    return array.is_none() ? TensorView{} : in(name, array);
  }
  TensorView out(const char* name, pybind11::handle array);  // ValueError for a read-only one
  TensorView out_or_none(const char* name, pybind11::handle array) {
    return array.is_none() ? TensorView{} : out(name, array);
  }

  // One array [E,N,C], or a list of E arrays [N_e,C] that agree in dtype, C and strides.
  ExpertMatrices matrices(const char* name, pybind11::handle weight);

 private:
  struct Loaded {
    TensorView view;
    bool read_only = false;
  };
  Loaded load(const char* name, pybind11::handle array);
  ExpertMatrices separate(const char* name, pybind11::sequence weights);

  std::vector<pybind11::object> capsules_;
  std::vector<const void*> base_;
  std::vector<int64_t> row_count_;
};

}  // namespace switchgear
