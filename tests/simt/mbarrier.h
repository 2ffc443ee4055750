// SPDX-License-Identifier: BSD-3-Clause
// The mbarrier functions for those parts of the runtime that complete barriers. Internal.
#pragma once
#include "block.h"

namespace simt {

// The shared address of an initialised mbarrier; fails for any other.
uint32_t checked_mbarrier(uint64_t* mbarrier, Location at);
// The same for one in another block of the cluster.
uint32_t checked_mbarrier(const Block& block, uint64_t* mbarrier, Location at);
// One arrival that expects `bytes` more. The caller has joined its view into `arriving`.
void arrive_at(Block& block, uint32_t address, int64_t bytes, Location at);

// A copy tracked by the mbarrier: its start, which returns the moment of its accesses, and its completion.
race::Agent start_tracked_copy(Block& block, uint32_t address, Location at);
void complete_tracked_copy(Block& block, uint32_t address, uint32_t time, int64_t bytes, Location at);

}  // namespace simt
