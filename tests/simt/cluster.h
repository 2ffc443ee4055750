// SPDX-License-Identifier: BSD-3-Clause
// Blocks of a cluster and their shared memory, for models of instructions that reach another block. Internal.
#pragma once
#include "block.h"

namespace simt {

// The block of this rank in the running thread's cluster; fails if there is none or it has ended.
Block& block_of_cluster(unsigned rank, Location at);
// Notes that the running thread uses the shared memory of another block, which must not end before.
void note_use(Block& target);
// Fails, under the race detector, unless all these uses come before the end of the block's threads.
void check_uses(const Block& block);
// Where `shared`, an address of the running block, lies in a block of the cluster.
char* shared_in(const Block& target, const void* shared, Location at);
// Ends the phase of barrier.cluster if all threads that have not exited have arrived.
void advance_cluster(Cluster& cluster);

}  // namespace simt
