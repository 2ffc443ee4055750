// SPDX-License-Identifier: BSD-3-Clause
// The accesses that were made to every byte, as far as later ones can conflict with them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "race.h"

namespace simt::race::shadow {

void clear();
void forget(uintptr_t start, size_t size);
Findings findings();

}  // namespace simt::race::shadow
