// SPDX-License-Identifier: BSD-3-Clause
// Which backend runs the ops of a device type: the one registered last, or else the one the library was linked with.
#pragma once
#include "switchgear/backend.h"

namespace switchgear {

// Null where there is none.
const Backend* find_backend(DeviceType device);

// Each library that holds ops.cpp defines it once, as its own backend: switchgear_core in csrc/cpu/backend.cpp. A static
// initialiser would not do, since the linker drops files of static libraries that nothing refers to.
const Backend& default_backend();

}  // namespace switchgear
