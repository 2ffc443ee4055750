// SPDX-License-Identifier: BSD-3-Clause
// Binds the reader of records (reader.h) to Python.
#pragma once
#include <pybind11/pybind11.h>

namespace switchgear {

void define_reader(pybind11::module_& m);

}  // namespace switchgear
