// SPDX-License-Identifier: BSD-3-Clause
// What the source says of a kernel besides its body. simt.h makes __launch_bounds__ padding before the kernel's code.
#include "attributes.h"

#include <cstdint>

#include "runtime.h"

namespace simt {

unsigned launch_bound(const void* kernel) {
  if (other_kernels.launch_bound != nullptr) {
    if (const unsigned bound = other_kernels.launch_bound(kernel); bound != 0) return bound;
  }
  constexpr uint8_t kPadding = 0x90;  // nop
  constexpr unsigned kMaxThreads = 1024;
  const volatile uint8_t* const code = static_cast<const volatile uint8_t*>(kernel);
  unsigned count = 0;
  while (count < kMaxThreads && code[-1 - static_cast<int>(count)] == kPadding) ++count;
  // Padding that aligns the function may end in the same byte, and bounds are multiples of a warp.
  const unsigned bound = count / 32 * 32;
  return bound == 0 ? kMaxThreads : bound;
}

unsigned registers_per_thread(unsigned threads) {
  constexpr unsigned kRegisters = 65536, kMost = 248;  // of a multiprocessor; of a thread, 255 rounded down to eights
  const unsigned share = kRegisters / threads / 8 * 8;
  return share < kMost ? share : kMost;
}

}  // namespace simt
