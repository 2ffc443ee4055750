// SPDX-License-Identifier: BSD-3-Clause
// setmaxnreg. A block starts with the same number of registers for every thread, as many as a multiprocessor has for it. A
// warp that needs fewer returns the others to the block; a warp that needs more waits until the block has them.
#include "models.h"
#include "scheduler.h"

namespace simt {
namespace {

void wake_all(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) wake(*fiber);
  waiting.clear();
}

// The last lane to arrive checks that all ask for the same.
void compare(void* const* operands, uint32_t) {
  for (int lane = 1; lane < 32; ++lane) {
    if (*static_cast<unsigned*>(operands[lane]) != *static_cast<unsigned*>(operands[0])) {
      throw Error("setmaxnreg: the lanes of a warp ask for different numbers of registers");
    }
  }
}

}  // namespace

void set_max_registers(unsigned count, Location at) {
  if (count < 24 || count > 256 || count % 8 != 0) fail("setmaxnreg: expected a multiple of 8 from 24 to 256", at);
  collective("setmaxnreg", 0xffffffffu, &count, compare, at);
  const RuntimeScope scope;
  Block& block = running_block();
  if (block.grid->registers == 0 || running_fiber().lane != 0) return;
  Warp& warp = running_warp();
  if (warp.registers == 0) warp.registers = block.grid->registers;
  const int more = static_cast<int>(count) - static_cast<int>(warp.registers);
  while (more > block.free_registers) {
    block.waiting_for_registers.push_back(&running_fiber());
    wait("setmaxnreg, which needs registers that no warp has returned,", at);
  }
  block.free_registers -= more;
  warp.registers = count;
  if (more < 0) wake_all(block.waiting_for_registers);
}

}  // namespace simt
