// SPDX-License-Identifier: BSD-3-Clause
// What a thread or a block must not leave behind. Internal.
#pragma once
#include "block.h"

namespace simt {

void check_thread_exit(const Fiber& fiber);          // nothing asynchronous that nobody waited for
void check_barriers_after_exit(const Fiber& fiber);  // nobody waits for it in __syncthreads
void check_block_exit(const Block& block);

}  // namespace simt
