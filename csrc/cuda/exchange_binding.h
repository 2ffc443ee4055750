// SPDX-License-Identifier: BSD-3-Clause
// Binds the launcher of exchange.cuh to Python: in the module _cuda, and in _simt for tests.
#pragma once
#include <pybind11/pybind11.h>

namespace switchgear {

void define_exchange(pybind11::module_& m);

}  // namespace switchgear
