// SPDX-License-Identifier: BSD-3-Clause
// The launcher of exchange.cuh for Python: of the module _cuda, and of _simt in tests.
#pragma once
#include <pybind11/pybind11.h>

namespace switchgear {

void define_exchange(pybind11::module_& m);

}  // namespace switchgear
