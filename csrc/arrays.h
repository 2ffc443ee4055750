// SPDX-License-Identifier: BSD-3-Clause
// Python arrays as TensorViews, through DLPack. A type with the C exchange API (torch.Tensor) lends its tensors in about 25 ns;
// they are ready on its library's current stream. Any other array gives a capsule through __dlpack__, which makes it ready on
// the stream of the call. The capsule is kept as long as the views are used.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <list>
#include <optional>
#include <vector>

#include "names.h"
#include "switchgear/ops.h"

namespace switchgear {

// Raises ValueError or TypeError unless a capsule of __dlpack__ holds an array that can be read safely, as far as its sizes and
// strides tell; BufferError for negative strides, which a copy of the array does not have.
void check_capsule(const char* name, pybind11::handle capsule);

// The arrays of one call. Views are valid during its lifetime; it is destroyed with the GIL held.
class Arrays {
 public:
  Arrays() = default;
  explicit Arrays(uintptr_t stream) : stream_(stream) {}  // a cudaStream_t; 0 is the default stream

  TensorView in(const char* name, pybind11::handle array);
  TensorView in_or_none(const char* name, pybind11::handle array) {
    return array.is_none() ? TensorView{} : in(name, array);
  }
  // An output, which the ops allocate themselves: its storage is not checked. ValueError for a read-only array.
  TensorView out(const char* name, pybind11::handle array);
  TensorView in_out(const char* name, pybind11::handle array);  // the same of the caller's, whose storage is checked
  TensorView out_or_none(const char* name, pybind11::handle array) {
    return array.is_none() ? TensorView{} : out(name, array);
  }

  // A weight from its tensors and its form, a list of integers. Empty form: plain, one array [E,N,C], in a list or not, or E
  // arrays [N_e,C] with the same dtype, C and strides. Else the form is (format, rows, cols, parts, group_size, fields,
  // element_bytes). The bits of `fields` say which tensors follow the data: 1 scales, 2 row_scales, 4 zeros, 8 records, 16 slots.
  Weight weight(const char* name, pybind11::handle tensors, pybind11::handle form);

  // An adapter from a, b, scales and possibly ranks.
  Adapter adapter(const AdapterNames& names, pybind11::handle tensors);
  // Sets the probabilities of dropout of both adapters. The seed, an int64 array [1], is read if one is above 0.
  void dropout(const std::array<Adapter*, 2>& adapters, pybind11::handle seed, pybind11::handle probabilities);

  // The memory of an array of any dtype. ValueError if it has fewer than `bytes` bytes or is not contiguous.
  void* memory(const char* name, pybind11::handle array, int64_t bytes);

 private:
  struct Borrowed;
  Borrowed borrow(const char* name, pybind11::handle array, bool allocated_by_op = false);
  TensorView writable(const char* name, pybind11::handle array, bool allocated_by_op);
  Weight separate(const char* name, pybind11::sequence weights);

  struct Separate {  // matrices stored separately
    std::vector<const void*> base;
    std::vector<int64_t> row_count;
  };

  std::optional<uintptr_t> stream_;
  std::vector<pybind11::object> capsules_;
  std::list<Separate> separate_;
};

}  // namespace switchgear
