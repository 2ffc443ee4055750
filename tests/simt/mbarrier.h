// SPDX-License-Identifier: BSD-3-Clause
// mbarriers, as the parts of the runtime that complete them see them. Internal.
#pragma once
#include "block.h"

namespace simt {

// The shared address of an initialised mbarrier, or an error.
uint32_t checked_mbarrier(uint64_t* mbarrier, Location at);
// One arrival that expects `bytes` more, by whoever has joined its past into `arriving`.
void arrive_at(Block& block, uint32_t address, int64_t bytes, Location at);

// A copy that the mbarrier tracks: started, with the moment of its accesses, and landed.
race::Agent start_tracked_copy(uint32_t address, Location at);
void complete_tracked_copy(Block& block, uint32_t address, uint32_t time, int64_t bytes, Location at);

}  // namespace simt
