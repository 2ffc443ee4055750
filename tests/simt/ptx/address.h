// SPDX-License-Identifier: BSD-3-Clause
// Checks of addresses, before an access. Shared addresses are the 32-bit ones of tests/simt; all others are the host's, and
// AddressSanitizer, if linked, knows their bounds.
#pragma once
#include <cstdint>

#include "race.h"
#include "thread.h"

namespace simt::ptx {

enum class StateSpace : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParameter };

// Where AddressSanitizer keeps a byte for every eight; 0 without it.
extern const uintptr_t asan_shadow;

[[noreturn]] void fail_misaligned(const Instruction& instruction, uint64_t address, size_t size);
// Fails if AddressSanitizer, asked again, has reasons to.
void check_poisoned(const Instruction& instruction, const char* pointer, size_t size);
char* find_shared(Thread& thread, const Instruction& instruction, uint32_t address, size_t size);
char* check_local(const Thread& thread, const Instruction& instruction, uint64_t address, size_t size);
void record_access(const Instruction& instruction, const char* pointer, size_t size, bool write, StateSpace space);

inline bool looks_poisoned(const char* pointer, size_t size) {
  if (asan_shadow == 0) return false;
  const char* const shadow = reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(pointer) >> 3) + asan_shadow);
  return size <= 8 ? shadow[0] != 0 : (shadow[0] | shadow[1]) != 0;
}

// The bytes in shared memory, which all must be in one array.
inline char* shared_bytes(Thread& thread, const Instruction& instruction, uint32_t address, size_t size) {
  const Window& window = thread.window;
  const uint32_t offset = address - window.address;
  if (offset < window.size && size <= window.size - offset) [[likely]]
    return window.memory + offset;
  return find_shared(thread, instruction, address, size);
}

// The address of an access by the thread itself, of 1 to 16 bytes.
template <StateSpace kSpace>
char* accessed(Thread& thread, const Instruction& instruction, uint64_t base, size_t size, bool write) {
  const uint64_t address = base + static_cast<uint64_t>(static_cast<int64_t>(instruction.offset));
  char* pointer;
  if constexpr (kSpace == StateSpace::kParameter) return reinterpret_cast<char*>(address);
  if constexpr (kSpace == StateSpace::kShared) {
    if ((address & (size - 1)) != 0) [[unlikely]]
      fail_misaligned(instruction, address, size);
    pointer = shared_bytes(thread, instruction, static_cast<uint32_t>(address), size);
  } else {
    if ((address & (size - 1)) != 0) [[unlikely]]
      fail_misaligned(instruction, address, size);
    if constexpr (kSpace == StateSpace::kLocal) return check_local(thread, instruction, address, size);
    pointer = reinterpret_cast<char*>(address);
    if (looks_poisoned(pointer, size)) [[unlikely]]
      check_poisoned(instruction, pointer, size);
  }
  if (race::enabled) [[unlikely]]
    record_access(instruction, pointer, size, write, kSpace);
  return pointer;
}

}  // namespace simt::ptx
