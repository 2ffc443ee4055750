// SPDX-License-Identifier: BSD-3-Clause
#include "undefined.h"

#include <algorithm>

#include "runtime.h"

namespace simt::ptx {
namespace {

std::string name_of_slot(const Detail& detail, uint16_t slot) {
  size_t at = 0;
  for (const Operand& operand : detail.statement->operands) {
    for (const Value value : operand.values) {
      if (detail.slots[at++] == slot) return (*detail.value_names)[value];
    }
  }
  return detail.statement->guard >= 0 ? (*detail.value_names)[static_cast<size_t>(detail.statement->guard)] : "?";
}

[[noreturn]] void fail_undefined(const Detail& detail, uint16_t slot) {
  fail("register " + name_of_slot(detail, slot) + " is read before it is written", detail.at);
}

}  // namespace

const Instruction* check_defined(Thread& thread, const Instruction& i) {
  const Detail& detail = *i.detail;
  bool defined = true;
  for (const Checked& read : detail.reads) {
    if (thread.tags[read.tag] != 0) continue;
    if (!detail.passes_undefined) fail_undefined(detail, read.slot);
    defined = false;
  }
  const Instruction* const after = detail.after_check(thread, i);
  for (const Checked& written : detail.writes) thread.tags[written.tag] = defined;
  return after;
}

const Instruction* check_selected(Thread& thread, const Instruction& i) {
  const Detail& detail = *i.detail;
  const uint16_t predicate = i.slot[3];
  const auto is_undefined = [&](uint16_t slot) {
    for (const Checked& read : detail.reads) {
      if (read.slot == slot && thread.tags[read.tag] == 0) return true;
    }
    return false;
  };
  if (is_undefined(predicate)) fail_undefined(detail, predicate);
  const bool defined = !is_undefined(get<bool>(thread, predicate) ? i.slot[1] : i.slot[2]);
  const Instruction* const after = detail.after_check(thread, i);
  for (const Checked& written : detail.writes) thread.tags[written.tag] = defined;
  return after;
}

const Instruction* check_sums(Thread& thread, const Instruction& i) {
  const Detail& detail = *i.detail;
  const auto sums_end = detail.slots.begin() + static_cast<std::ptrdiff_t>(detail.operand_sizes[0]);
  const uint16_t adds = sums_end[static_cast<std::ptrdiff_t>(detail.operand_sizes[1]) + 1];  // after a and b
  const auto is_sum = [&](uint16_t slot) { return std::find(detail.slots.begin(), sums_end, slot) != sums_end; };
  const auto check = [&](bool sums) {
    for (const Checked& read : detail.reads) {
      if (is_sum(read.slot) == sums && thread.tags[read.tag] == 0) fail_undefined(detail, read.slot);
    }
  };
  check(false);
  if (get<bool>(thread, adds)) check(true);
  const Instruction* const after = detail.after_check(thread, i);
  for (const Checked& written : detail.writes) thread.tags[written.tag] = 1;
  return after;
}

}  // namespace simt::ptx
