// SPDX-License-Identifier: BSD-3-Clause
// Which slot of a thread holds which value. nvcc numbers up to 19,000 registers in a kernel; those that are never live at the
// same time share a slot.
#pragma once
#include <cstddef>
#include <vector>

#include "program.h"

namespace simt::ptx {

constexpr int kUntracked = -1;

struct Registers {
  std::vector<uint16_t> slots;  // by Value; fixed values come first
  size_t num_fixed = 0, num_slots = 0;
  // By Value: the tag that says at run time whether the value is defined. Only values that some path reads before it writes
  // them have one.
  std::vector<int> tags;
  size_t num_tags = 0;
};

Registers assign_registers(const Kernel& kernel);

// mov and selp pass an undefined value on: nvcc moves values that nothing uses.
bool passes_undefined(const Statement& statement);

// Calls read(value) and write(value). The accumulators of wgmma are both.
template <typename Read, typename Write>
void for_each_value(const Statement& statement, Read read, Write write);

}  // namespace simt::ptx

#include "roles.h"
