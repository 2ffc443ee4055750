// SPDX-License-Identifier: BSD-3-Clause
// What the source says of a kernel besides its body.
#pragma once

namespace simt {

// The first number in the kernel's __launch_bounds__, else 1024.
unsigned launch_bound(const void* kernel);
// The registers of a thread at the start, if the compiler gives a block of so many threads all that a multiprocessor has.
unsigned registers_per_thread(unsigned threads);

}  // namespace simt
