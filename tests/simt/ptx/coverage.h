// SPDX-License-Identifier: BSD-3-Clause
// Which opcodes the PTX contains, and which of them a thread has executed.
#pragma once
#include <string_view>

namespace simt::ptx {

class Module;

void mark_executed(std::string_view opcode);
// At the end of the program, adds a line for each opcode to the file that SWITCHGEAR_PTX_TABLE names: "executed OPCODE" or
// "seen OPCODE" for those of such modules, "tested OPCODE" for others that were executed.
void watch_coverage(Module& module);

}  // namespace simt::ptx
