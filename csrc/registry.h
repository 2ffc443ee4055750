// SPDX-License-Identifier: BSD-3-Clause
// Finds the backend for a device type: the last one registered, or else the one linked into the library.
#pragma once
#include "switchgear/backend.h"

namespace switchgear {

// Null if there is none.
const Backend* find_backend(DeviceType device);

// Each library with ops.cpp defines it once, as its own backend: switchgear_core in csrc/cpu/backend.cpp. A static initialiser
// would not work, since the linker drops files of static libraries that nothing refers to.
const Backend& default_backend();

}  // namespace switchgear
