// SPDX-License-Identifier: BSD-3-Clause
// Registers that are read before they are written.
#pragma once
#include "thread.h"

namespace simt::ptx {

// A step for instructions with tracked operands: checks what they read, then executes them.
const Instruction* check_defined(Thread& thread, const Instruction& instruction);

// The same for selp, whose result is undefined only if the operand that it selects is.
const Instruction* check_selected(Thread& thread, const Instruction& instruction);

// The same for wgmma, which does not read its sums if it does not add to them.
const Instruction* check_sums(Thread& thread, const Instruction& instruction);

}  // namespace simt::ptx
