// SPDX-License-Identifier: BSD-3-Clause
#pragma once
#include <pybind11/pybind11.h>

namespace switchgear {

// The tiles that the CUDA kernels pick, for predictions; needs neither their module nor a device.
void define_tiles(pybind11::module_& m);

}  // namespace switchgear
