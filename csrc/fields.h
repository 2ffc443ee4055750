// SPDX-License-Identifier: BSD-3-Clause
// The arguments of an op are four: tuples of inputs, options and outputs, and the execution. Fields reads the items of one tuple
// in their order. Each has a name for errors. In a braced list of initializers, C++ reads from left to right.
#pragma once
#include <pybind11/pybind11.h>

#include <string_view>
#include <type_traits>

#include "arrays.h"
#include "switchgear/check.h"

namespace switchgear {

class Fields {
 public:
  Fields(Arrays& arrays, const char* name, pybind11::handle tuple, Py_ssize_t count) : arrays_(arrays), tuple_(tuple) {
    const bool is_tuple = PyTuple_Check(tuple.ptr()) != 0;
    SWITCHGEAR_CHECK(TypeError, is_tuple, name, ": expected a tuple, got ", Py_TYPE(tuple.ptr())->tp_name);
    SWITCHGEAR_CHECK(ValueError, PyTuple_GET_SIZE(tuple.ptr()) == count, name, ": expected ", count, " items, got ",
                     PyTuple_GET_SIZE(tuple.ptr()));
  }

  pybind11::handle next() { return PyTuple_GET_ITEM(tuple_.ptr(), index_++); }

  TensorView in(const char* name) { return arrays_.in(name, next()); }
  TensorView in_or_none(const char* name) { return arrays_.in_or_none(name, next()); }
  TensorView out(const char* name) { return arrays_.out(name, next()); }
  TensorView out_or_none(const char* name) { return arrays_.out_or_none(name, next()); }
  TensorView in_out(const char* name) { return arrays_.in_out(name, next()); }
  TensorView in_out_or_none(const char* name) {
    const pybind11::handle array = next();
    return array.is_none() ? TensorView{} : arrays_.in_out(name, array);
  }

  // Two items: the tensors and the form.
  Weight weight(const char* name) {
    const pybind11::handle tensors = next(), form = next();
    return arrays_.weight(name, tensors, form);
  }

  // A number, a bool, a name or a list of numbers; converted as pybind11 converts arguments.
  template <typename T>
  T value(const char* name) {
    pybind11::detail::make_caster<T> caster;
    const pybind11::handle item = next();
    SWITCHGEAR_CHECK(TypeError, caster.load(item, true), name, ": expected ", kind_of<T>(), ", got ",
                     Py_TYPE(item.ptr())->tp_name);
    return pybind11::detail::cast_op<T>(caster);
  }

 private:
  template <typename T>
  static constexpr const char* kind_of() {
    if constexpr (std::is_same_v<T, bool>) return "bool";
    if constexpr (std::is_integral_v<T>) return "int";
    if constexpr (std::is_floating_point_v<T>) return "float";
    return std::is_convertible_v<T, std::string_view> ? "str" : "a list of int";
  }

  Arrays& arrays_;
  pybind11::handle tuple_;
  Py_ssize_t index_ = 0;
};

}  // namespace switchgear
