// SPDX-License-Identifier: BSD-3-Clause
// The accesses to every byte that later accesses can still conflict with.
#pragma once
#include <cstddef>
#include <cstdint>

#include "race.h"

namespace simt::race::shadow {

void clear();
void forget(uintptr_t start, size_t size);
Findings findings();

}  // namespace simt::race::shadow
