// SPDX-License-Identifier: BSD-3-Clause
#include "address.h"

#include "scheduler.h"
#include "shared_memory.h"

extern "C" __attribute__((weak)) void __asan_get_shadow_mapping(size_t* scale, size_t* offset);

namespace simt::ptx {
namespace {

uintptr_t find_shadow() {
  if (!__asan_get_shadow_mapping) return 0;
  size_t scale = 0, offset = 0;
  __asan_get_shadow_mapping(&scale, &offset);
  if (scale != 3) throw Error("AddressSanitizer with a shadow that is not an eighth of memory");
  return offset;
}

}  // namespace

const uintptr_t asan_shadow = find_shadow();

void fail_misaligned(const Instruction& instruction, uint64_t address, size_t size) {
  char text[100];
  std::snprintf(text, sizeof text, "misaligned address 0x%llx, of %zu bytes", static_cast<unsigned long long>(address),
                size);
  fail(text, instruction.detail->at);
}

void check_poisoned(const Instruction& instruction, const char* pointer, size_t size) {
  check_accessible(pointer, size, "access", instruction.detail->at);
}

char* find_shared(Thread& thread, const Instruction& instruction, uint32_t address, size_t size) {
  char* const pointer = shared_pointer(running_block(), address, size, instruction.detail->at);
  for (const SharedArray& array : running_block().shared) {
    if (pointer < array.memory || pointer >= array.memory + array.size) continue;
    thread.window = {array.address, static_cast<uint32_t>(array.size), array.memory};
  }
  return pointer;
}

char* check_local(const Thread& thread, const Instruction& instruction, uint64_t address, size_t size) {
  char* const pointer = reinterpret_cast<char*>(address);
  const uint64_t offset = address - reinterpret_cast<uint64_t>(thread.local);
  if (offset + size > thread.local_size) fail("outside of local memory", instruction.detail->at);
  return pointer;
}

void record_access(const Instruction& instruction, const char* pointer, size_t size, bool write, StateSpace space) {
  Detail& detail = *instruction.detail;
  if (detail.site == 0) detail.site = race::site_of(detail.at);
  const race::Actor& actor = running_fiber().actor;
  race::Access access;
  access.write = write;
  access.space = space == StateSpace::kShared ? race::Space::kShared : race::Space::kGlobal;
  race::access(actor, actor.now, pointer, size, access, detail.site);
}

}  // namespace simt::ptx
