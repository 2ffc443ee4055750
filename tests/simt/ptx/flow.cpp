// SPDX-License-Identifier: BSD-3-Clause
#include "flow.h"

#include <algorithm>
#include <map>

#include "registers.h"

namespace simt::ptx {
namespace {

bool ends_block(const Statement& statement) {
  return statement.target >= 0 || statement.opcode == "ret" || statement.opcode == "exit" || statement.opcode == "trap";
}

ValueSet before(const Kernel& kernel, const BasicBlock& block, ValueSet live) {
  for (size_t i = block.end; i-- > block.begin;) {
    const Statement& statement = kernel.statements[i];
    // A guarded result keeps its old value if the guard is false.
    if (statement.guard < 0) {
      for_each_value(statement, [](Value) {}, [&](Value value) { live.remove(value); });
      for_each_value(statement, [&](Value value) { live.add(value); }, [](Value) {});
    } else {
      for_each_value(statement, [&](Value value) { live.add(value); }, [&](Value value) { live.add(value); });
    }
  }
  return live;
}

}  // namespace

std::vector<BasicBlock> basic_blocks(const Kernel& kernel) {
  const size_t count = kernel.statements.size();
  std::vector<bool> starts(count + 1);
  starts[0] = true;
  for (size_t i = 0; i < count; ++i) {
    const Statement& statement = kernel.statements[i];
    if (statement.target >= 0) starts[static_cast<size_t>(statement.target)] = true;
    if (ends_block(statement)) starts[i + 1] = true;
  }
  std::vector<BasicBlock> blocks;
  std::map<size_t, size_t> at;  // by first statement
  for (size_t i = 0; i < count; ++i) {
    if (starts[i]) {
      at[i] = blocks.size();
      blocks.push_back({i, i, {}});
    }
    blocks.back().end = i + 1;
  }
  for (BasicBlock& block : blocks) {
    const Statement& last = kernel.statements[block.end - 1];
    if (last.target >= 0) block.next.push_back(at.at(static_cast<size_t>(last.target)));
    if ((!ends_block(last) || last.guard >= 0) && block.end < count) block.next.push_back(at.at(block.end));
  }
  return blocks;
}

std::vector<ValueSet> live_at_end(const Kernel& kernel, const std::vector<BasicBlock>& blocks) {
  const size_t num_values = kernel.value_names.size();
  std::vector<ValueSet> live(blocks.size(), ValueSet(num_values));
  std::vector<std::vector<size_t>> previous(blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    for (const size_t next : blocks[b].next) previous[next].push_back(b);
  }
  std::vector<bool> dirty(blocks.size(), true);
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks.size(); b-- > 0;) {
      if (!dirty[b]) continue;
      dirty[b] = false;
      const ValueSet at_start = before(kernel, blocks[b], live[b]);
      for (const size_t p : previous[b]) {
        if (live[p].join(at_start)) dirty[p] = changed = true;
      }
    }
  }
  return live;
}

void step_undefined(const Statement& statement, ValueSet& undefined) {
  bool source_undefined = false;
  if (passes_undefined(statement)) {
    for_each_value(statement, [&](Value value) { source_undefined |= undefined.has(value); }, [](Value) {});
  }
  for_each_value(
      statement, [](Value) {},
      [&](Value value) {
        if (source_undefined) {
          undefined.add(value);
        } else if (statement.guard < 0) {
          undefined.remove(value);
        }
      });
}

std::vector<ValueSet> maybe_undefined(const Kernel& kernel, const std::vector<BasicBlock>& blocks) {
  const size_t num_values = kernel.value_names.size();
  std::vector<ValueSet> at_start(blocks.size(), ValueSet(num_values));
  ValueSet& entry = at_start[0];
  for (Value value = 1; value < num_values; ++value) entry.add(value);
  for (const Fixed& fixed : kernel.fixed) entry.remove(fixed.value);
  std::vector<bool> dirty(blocks.size()), reached(blocks.size());
  dirty[0] = reached[0] = true;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = 0; b < blocks.size(); ++b) {
      if (!dirty[b]) continue;
      dirty[b] = false;
      ValueSet undefined = at_start[b];
      for (size_t i = blocks[b].begin; i < blocks[b].end; ++i) step_undefined(kernel.statements[i], undefined);
      for (const size_t next : blocks[b].next) {
        if (at_start[next].join(undefined) || !reached[next]) dirty[next] = reached[next] = changed = true;
      }
    }
  }
  return at_start;
}

}  // namespace simt::ptx
