// SPDX-License-Identifier: BSD-3-Clause
// A thread while it runs, and an instruction ready to execute: a function, and the slots of its operands.
#pragma once
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "program.h"

namespace simt::ptx {

struct Thread;
struct Instruction;
// Executes an instruction and returns the next one, or null at the end of the thread.
using Step = const Instruction* (*)(Thread&, const Instruction&);

struct Checked {
  uint16_t slot;
  int tag;
};

// What is needed only off the fast path.
struct Detail {
  const Statement* statement = nullptr;
  Location at;
  uint64_t site = 0;  // the race detector's, once known
  const std::vector<std::string>* value_names = nullptr;
  std::vector<uint16_t> slots;         // of all operands, in the order of the text
  std::vector<size_t> operand_sizes;   // how many of them belong to each operand
  std::vector<int64_t> offsets;        // of each operand
  std::vector<Checked> reads, writes;  // tags
  int guard_tag = -1;
  bool passes_undefined = false;
  Step after_first = nullptr, after_guard = nullptr, after_check = nullptr;
  int element = 0, shape[3] = {};  // of matrix instructions
};

struct Instruction {
  Step step = nullptr;
  const Instruction* target = nullptr;  // of a branch
  Detail* detail = nullptr;
  uint16_t slot[8] = {};  // the first operands; [7] is the guard
  int32_t offset = 0;     // of the address
  uint32_t mode = 0;      // a meaning per function
};
constexpr size_t kGuardSlot = 7;

// An array in shared memory: its 32-bit address, and where it is.
struct Window {
  uint32_t address = 0, size = 0;
  char* memory = nullptr;
};

struct Thread {
  uint64_t* slots;
  uint8_t* tags;  // 1: defined
  Window window;  // the last one used
  char* local = nullptr;
  size_t local_size = 0;
};

// A slot holds a value's bits; those above its type are undefined, except that integers are extended by their sign.
template <typename T>
T get(const Thread& thread, uint16_t slot) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(static_cast<uint32_t>(thread.slots[slot]));
  } else if constexpr (std::is_same_v<T, double>) {
    return std::bit_cast<double>(thread.slots[slot]);
  } else if constexpr (std::is_same_v<T, bool>) {
    return thread.slots[slot] & 1;
  } else {
    return static_cast<T>(thread.slots[slot]);
  }
}
template <typename T>
void set(Thread& thread, uint16_t slot, T value) {
  if constexpr (std::is_same_v<T, float>) {
    thread.slots[slot] = std::bit_cast<uint32_t>(value);
  } else if constexpr (std::is_same_v<T, double>) {
    thread.slots[slot] = std::bit_cast<uint64_t>(value);
  } else if constexpr (std::is_signed_v<T>) {
    thread.slots[slot] = static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    thread.slots[slot] = value;
  }
}

inline const Instruction* next(const Instruction& instruction) { return &instruction + 1; }

}  // namespace simt::ptx
