// SPDX-License-Identifier: BSD-3-Clause
#include "registers.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>

#include "flow.h"

namespace simt::ptx {
namespace {

constexpr size_t kNever = std::numeric_limits<size_t>::max();

// The statements between which a value keeps its slot.
struct Interval {
  Value value = 0;
  size_t first = kNever, last = 0;
  void cover(size_t statement) {
    first = std::min(first, statement);
    last = std::max(last, statement);
  }
};

std::vector<Interval> live_intervals(const Kernel& kernel, const std::vector<BasicBlock>& blocks) {
  std::vector<Interval> intervals(kernel.value_names.size());
  for (size_t value = 0; value < intervals.size(); ++value) intervals[value].value = static_cast<Value>(value);
  const std::vector<ValueSet> live = live_at_end(kernel, blocks);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const auto [begin, end, next] = blocks[b];
    live[b].for_each([&, end = end](Value value) { intervals[value].cover(end - 1); });
    for (const size_t n : next) {
      // What is live at the end of this block and used in the next is live at the start of that.
      const size_t start = blocks[n].begin;
      live[b].for_each([&](Value value) { intervals[value].cover(start); });
    }
    for (size_t i = begin; i < end; ++i) {
      const auto cover = [&](Value value) { intervals[value].cover(i); };
      for_each_value(kernel.statements[i], cover, cover);
    }
  }
  return intervals;
}

// Values with a slot of their own: the hardware writes wgmma's registers long after the instruction.
void keep_wgmma_apart(const Kernel& kernel, std::vector<bool>& alone) {
  for (const Statement& statement : kernel.statements) {
    if (!accumulates(statement.opcode)) continue;
    for_each_value(statement, [&](Value value) { alone[value] = true; }, [&](Value value) { alone[value] = true; });
  }
}

void find_tracked(const Kernel& kernel, const std::vector<BasicBlock>& blocks, Registers& registers) {
  const std::vector<ValueSet> undefined = maybe_undefined(kernel, blocks);
  const auto track = [&](Value value) {
    if (registers.tags[value] == kUntracked) registers.tags[value] = static_cast<int>(registers.num_tags++);
  };
  for (size_t b = 0; b < blocks.size(); ++b) {
    ValueSet now = undefined[b];
    for (size_t i = blocks[b].begin; i < blocks[b].end; ++i) {
      const Statement& statement = kernel.statements[i];
      bool passed_on = false;
      for_each_value(
          statement,
          [&](Value value) {
            if (!now.has(value)) return;
            track(value);
            passed_on |= passes_undefined(statement);
          },
          [&](Value value) {
            if (passed_on) track(value);
          });
      step_undefined(statement, now);
    }
  }
}

// Hands out slots in the order of intervals, those that became free first.
void assign_slots(std::vector<Interval> intervals, const std::vector<bool>& alone, Registers& registers) {
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.first < b.first; });
  using Busy = std::pair<size_t, uint16_t>;  // the last statement, the slot
  std::priority_queue<Busy, std::vector<Busy>, std::greater<>> busy;
  std::vector<uint16_t> free;
  const auto new_slot = [&] {
    if (registers.num_slots > 0xffff) throw std::runtime_error("PTX: a kernel with too many registers");
    return static_cast<uint16_t>(registers.num_slots++);
  };
  for (const Interval& interval : intervals) {
    if (interval.first == kNever) continue;
    uint16_t& slot = registers.slots[interval.value];
    if (alone[interval.value] || registers.tags[interval.value] != kUntracked) {
      slot = new_slot();
      continue;
    }
    while (!busy.empty() && busy.top().first < interval.first) {
      free.push_back(busy.top().second);
      busy.pop();
    }
    if (free.empty()) {
      slot = new_slot();
    } else {
      slot = free.back();
      free.pop_back();
    }
    busy.push({interval.last, slot});
  }
}

}  // namespace

bool passes_undefined(const Statement& statement) {
  return starts_with(statement.opcode, "mov.") || starts_with(statement.opcode, "selp.");
}

Registers assign_registers(const Kernel& kernel) {
  Registers registers;
  const size_t num_values = kernel.value_names.size();
  registers.slots.assign(num_values, 0);
  registers.tags.assign(num_values, kUntracked);
  registers.num_slots = 1;  // slot 0: kSink
  for (const Fixed& fixed : kernel.fixed) registers.slots[fixed.value] = static_cast<uint16_t>(registers.num_slots++);
  registers.num_fixed = registers.num_slots;

  const std::vector<BasicBlock> blocks = basic_blocks(kernel);
  find_tracked(kernel, blocks, registers);
  std::vector<bool> alone(num_values);
  keep_wgmma_apart(kernel, alone);
  std::vector<Interval> intervals = live_intervals(kernel, blocks);
  intervals.erase(intervals.begin());  // kSink
  std::erase_if(intervals, [&](const Interval& i) { return registers.slots[i.value] != 0; });
  assign_slots(std::move(intervals), alone, registers);
  return registers;
}

}  // namespace simt::ptx
