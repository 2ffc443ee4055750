// SPDX-License-Identifier: BSD-3-Clause
// Shared memory of a block: one dynamic array, and the static ones. Each is a separate heap allocation with poisoned
// surroundings. 32-bit addresses for instructions are assigned as on the device. Internal.
#pragma once
#include "block.h"

namespace simt {

void create_dynamic_shared(Block& block);
void free_shared(Block& block);

uint32_t shared_address(const Block& block, const void* pointer, Location at);
// The bytes [address, address + size); fails if they are not all in one array.
char* shared_pointer(const Block& block, uint32_t address, size_t size, Location at);
// Fails if AddressSanitizer reports the bytes as inaccessible; does nothing in other builds.
void check_accessible(const void* start, size_t size, const char* what, Location at);
// Whether an address is in the shared memory of the running thread's cluster.
bool is_shared(const void* address);
// "shared memory + 0x40" or an address in global memory.
std::string describe_address(uintptr_t address);

}  // namespace simt
