// SPDX-License-Identifier: BSD-3-Clause
#include "shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

#include "models.h"
#include "scheduler.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* start, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* start, size_t size);
__attribute__((weak)) void* __asan_region_is_poisoned(void* start, size_t size);
}

namespace simt {
namespace {

constexpr size_t kAlignment = 1024;
constexpr uint32_t kDynamicStart = 1024;     // as on the device, where the system reserves the first bytes
constexpr uint32_t kStaticStart = 0x100000;  // clear of the dynamic array, whatever its size
constexpr size_t kMaxStatic = 48 << 10;
// Only multiples of 16 bytes are documented. With options().any_shared_base launches in turn have bases at these distances past a
// multiple of 1024: the same for all blocks, since those of a cluster find each other's arrays by their own addresses.
constexpr uint32_t kBaseOffsets[] = {16, 1008, 128, 0};

size_t rounded_up(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

size_t allocated_size(size_t size) { return (size + kAlignment) / kAlignment * kAlignment + kAlignment; }

// Fills the array with NaN, and poisons the memory before it (at least one alignment unit) and after it. It starts `offset`
// bytes past a multiple of the alignment.
char* create_array(size_t size, size_t offset) {
  const size_t allocated = allocated_size(size + offset) + kAlignment;
  char* memory = static_cast<char*>(std::aligned_alloc(kAlignment, allocated));
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0xff, allocated);
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(memory, allocated);
    __asan_unpoison_memory_region(memory + kAlignment + offset, size);
  }
  return memory + kAlignment + offset;
}

void free_array(char* array, size_t size) {
  if (race::enabled) race::forget(array, size);
  const size_t offset = reinterpret_cast<uintptr_t>(array) % kAlignment;
  char* const memory = array - offset - kAlignment;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, allocated_size(size + offset) + kAlignment);
  std::free(memory);
}

}  // namespace

void create_dynamic_shared(Block& block) {
  const size_t size = block.grid->dynamic_shared;
  const uint32_t offset = options().any_shared_base ? kBaseOffsets[statistics().launches % std::size(kBaseOffsets)] : 0;
  block.shared.push_back({nullptr, create_array(size, offset), size, kDynamicStart + offset});
}

void free_shared(Block& block) {
  for (const SharedArray& array : block.shared) free_array(array.memory, array.size);
  block.shared.clear();
}

uint32_t shared_address(const Block& block, const void* pointer, Location at) {
  const char* byte = static_cast<const char*>(pointer);
  for (const SharedArray& array : block.shared) {
    if (byte >= array.memory && byte <= array.memory + array.size) {
      return array.address + static_cast<uint32_t>(byte - array.memory);
    }
  }
  fail("this address is not in the block's shared memory", at);
}

char* shared_pointer(const Block& block, uint32_t address, size_t size, Location at) {
  for (const SharedArray& array : block.shared) {
    if (address >= array.address && uint64_t{address} + size <= array.address + array.size) {
      return array.memory + (address - array.address);
    }
  }
  char text[160];
  std::snprintf(text, sizeof text,
                "shared address 0x%x, %zu bytes: not inside one array of the block (dynamic: %zu bytes)", address, size,
                block.shared[0].size);
  fail(text, at);
}

void check_accessible(const void* start, size_t size, const char* what, Location at) {
  if (!__asan_region_is_poisoned || size == 0) return;
  if (__asan_region_is_poisoned(const_cast<void*>(start), size) != nullptr) {
    fail(std::string(what) + ": out of bounds (AddressSanitizer)", at);
  }
}

bool is_shared(const void* address) {
  for (const Block* block : running_block().cluster->blocks) {
    if (block == nullptr) continue;
    for (const SharedArray& array : block->shared) {
      if (address >= array.memory && address < array.memory + array.size) return true;
    }
  }
  return false;
}

std::string describe_address(uintptr_t address) {
  char text[64];
  if (running_fiber_or_null() != nullptr) {
    for (const SharedArray& array : running_block().shared) {
      const uintptr_t start = reinterpret_cast<uintptr_t>(array.memory);
      if (address < start || address >= start + array.size) continue;
      std::snprintf(text, sizeof text, "%s shared memory + 0x%zx", array.key == nullptr ? "dynamic" : "static",
                    static_cast<size_t>(address - start));
      return text;
    }
  }
  std::snprintf(text, sizeof text, "global memory 0x%zx", static_cast<size_t>(address));
  return text;
}

// ---- what kernels call --------------------------------------------------------------------------------------------------

void* dynamic_shared() { return running_block().shared[0].memory; }

void* static_shared(const void* key, size_t size, size_t alignment, Location at) {
  const RuntimeScope scope;
  Block& block = running_block();
  uint32_t next = kStaticStart;
  size_t total = size;
  for (const SharedArray& array : block.shared) {
    if (array.key == key) return array.memory;
    if (array.key == nullptr) continue;
    next = array.address + static_cast<uint32_t>(array.size);
    total += array.size;
  }
  if (total > kMaxStatic) fail("static shared memory: more than 48 KiB", at);
  const Grid& grid = *block.grid;
  // SHARED_DYN's alignment pads what comes before it.
  const size_t before_dynamic = grid.dynamic_shared > 0 ? rounded_up(total) : total;
  if (before_dynamic + grid.dynamic_shared > grid.shared_limit) {
    fail("shared memory: " + std::to_string(before_dynamic) + " bytes of static and " +
             std::to_string(grid.dynamic_shared) + " of dynamic, expected at most " + std::to_string(grid.shared_limit),
         at);
  }
  const uint32_t step = static_cast<uint32_t>(alignment < 16 ? 16 : alignment);
  block.shared.push_back({key, create_array(size, 0), size, (next + step) / step * step});
  return block.shared.back().memory;
}

uint32_t shared_address(const void* pointer, Location at) { return shared_address(running_block(), pointer, at); }

}  // namespace simt
