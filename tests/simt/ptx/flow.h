// SPDX-License-Identifier: BSD-3-Clause
// A kernel's basic blocks, and sets of its values.
#pragma once
#include <cstdint>
#include <vector>

#include "program.h"

namespace simt::ptx {

class ValueSet {
 public:
  explicit ValueSet(size_t size) : words_((size + 63) / 64) {}
  bool has(Value value) const { return words_[value / 64] >> (value % 64) & 1; }
  void add(Value value) { words_[value / 64] |= uint64_t{1} << (value % 64); }
  void remove(Value value) { words_[value / 64] &= ~(uint64_t{1} << (value % 64)); }
  // Whether this set grew.
  bool join(const ValueSet& other) {
    uint64_t grown = 0;
    for (size_t i = 0; i < words_.size(); ++i) {
      grown |= other.words_[i] & ~words_[i];
      words_[i] |= other.words_[i];
    }
    return grown != 0;
  }
  template <typename F>
  void for_each(F f) const {
    for (size_t i = 0; i < words_.size(); ++i) {
      for (uint64_t rest = words_[i]; rest != 0; rest &= rest - 1) {
        f(static_cast<Value>(i * 64 + static_cast<size_t>(__builtin_ctzll(rest))));
      }
    }
  }

 private:
  std::vector<uint64_t> words_;
};

struct BasicBlock {
  size_t begin, end;  // statements
  std::vector<size_t> next;
};

std::vector<BasicBlock> basic_blocks(const Kernel& kernel);

// Values that may be undefined at the start of each block, and values that are live at its end.
std::vector<ValueSet> maybe_undefined(const Kernel& kernel, const std::vector<BasicBlock>& blocks);
void step_undefined(const Statement& statement, ValueSet& undefined);
std::vector<ValueSet> live_at_end(const Kernel& kernel, const std::vector<BasicBlock>& blocks);

}  // namespace simt::ptx
