// SPDX-License-Identifier: BSD-3-Clause
// Which operands an instruction writes.
#pragma once
#include <array>
#include <string_view>

#include "program.h"

namespace simt::ptx {

inline bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

// Most write their first operand.
inline bool writes_nothing(std::string_view opcode) {
  constexpr std::string_view kStems[] = {"st.",
                                         "red.",
                                         "bra",
                                         "bar.sync",
                                         "bar.arrive",
                                         "bar.warp",
                                         "barrier.",
                                         "cp.",
                                         "fence",
                                         "membar",
                                         "prefetch",
                                         "stmatrix",
                                         "ret",
                                         "exit",
                                         "trap",
                                         "setmaxnreg",
                                         "nanosleep",
                                         "griddepcontrol",
                                         "tensormap.",
                                         "mbarrier.init",
                                         "mbarrier.inval",
                                         "mbarrier.expect_tx",
                                         "wgmma.fence",
                                         "wgmma.commit",
                                         "wgmma.wait"};
  for (const std::string_view stem : kStems) {
    if (starts_with(opcode, stem)) return true;
  }
  return false;
}

inline bool accumulates(std::string_view opcode) { return starts_with(opcode, "wgmma.mma_async"); }

template <typename Read, typename Write>
void for_each_value(const Statement& statement, Read read, Write write) {
  if (statement.guard >= 0) read(static_cast<Value>(statement.guard));
  const bool writes = !statement.operands.empty() && !writes_nothing(statement.opcode);
  for (size_t i = 0; i < statement.operands.size(); ++i) {
    const bool is_result = i == 0 && writes && !statement.operands[i].address;
    for (const Value value : statement.operands[i].values) {
      if (value == kSink) continue;
      if (!is_result || accumulates(statement.opcode)) read(value);
    }
  }
  if (!writes || statement.operands[0].address) return;
  for (const Value value : statement.operands[0].values) {
    if (value != kSink) write(value);
  }
}

}  // namespace simt::ptx
