// SPDX-License-Identifier: BSD-3-Clause
// Checks that a thread or block leaves nothing pending at its exit. Internal.
#pragma once
#include "block.h"

namespace simt {

void check_thread_exit(const Fiber& fiber);          // no asynchronous operation without a wait
void check_barriers_after_exit(const Fiber& fiber);  // no thread waits for it in __syncthreads
void check_block_exit(const Block& block);

}  // namespace simt
