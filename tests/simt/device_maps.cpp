// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps that kernels write: copies of encoded maps whose fields tensormap.replace changes. TMA reads maps through a proxy
// of its own, so a thread must release what it wrote to them, and the thread that uses a map must acquire it first, in each
// kernel again. (The manual lets other threads of the block follow by a barrier; no kernel needs that.)
//
// A map is known here from its first replacement until its bytes differ from those the device left: then the host wrote there.
#include <array>
#include <cstring>
#include <map>

#include "api.h"
#include "models.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "tma.h"
#include "touch.h"

namespace simt {
namespace {

constexpr size_t kMapBytes = 128;

struct DeviceMap {
  std::array<unsigned char, kMapBytes> bytes;
  const Fiber* writer = nullptr;  // null: released
  uint64_t version = 0;
};
std::map<uintptr_t, DeviceMap>& device_maps() {
  static std::map<uintptr_t, DeviceMap> maps;
  return maps;
}

uintptr_t address_of(const void* map) { return reinterpret_cast<uintptr_t>(map); }

DeviceMap* find(const void* map) {
  const auto found = device_maps().find(address_of(map));
  if (found == device_maps().end()) return nullptr;
  if (std::memcmp(found->second.bytes.data(), map, kMapBytes) == 0) return &found->second;
  device_maps().erase(found);
  return nullptr;
}

void check_map(const void* map, Location at) {
  if (device().major < 9) fail("this instruction needs sm_90", at);
  if (address_of(map) % 128 != 0) fail("tensor map not aligned to 128 bytes", at);
  check_accessible(map, kMapBytes, "tensor map", at);
}

// Changes a map with `change`, on behalf of the running thread.
template <typename Change>
void replace(void* map, Change&& change, Location at) {
  const RuntimeScope scope;
  check_map(map, at);
  touch(map, kMapBytes, {.write = true, .async = false, .space = Space::kGlobal}, at);
  TensorMap fields;
  std::memcpy(&fields, map, sizeof fields);
  if (fields.mark != kTensorMapMark) fail("tensormap.replace: not an encoded tensor map", at);
  change(fields);
  std::memcpy(map, &fields, sizeof fields);
  static uint64_t versions = 0;
  DeviceMap& known = device_maps()[address_of(map)];
  known.writer = &running_fiber();
  known.version = ++versions;
  std::memcpy(known.bytes.data(), map, kMapBytes);
}

}  // namespace

void replace_map_address(void* map, const void* address, Location at) {
  if (address_of(address) % 16 != 0) fail("tensormap.replace: address not aligned to 16 bytes", at);
  replace(map, [&](TensorMap& fields) { fields.start = static_cast<char*>(const_cast<void*>(address)); }, at);
}

void replace_map_size(void* map, int dimension, uint32_t size, Location at) {
  const auto change = [&](TensorMap& fields) {
    if (dimension < 0 || dimension >= fields.rank) fail("tensormap.replace: no such dimension", at);
    if (size == 0) fail("tensormap.replace: a size of zero", at);
    fields.size[dimension] = size;
  };
  replace(map, change, at);
}

void release_maps(Location at) {
  const RuntimeScope scope;
  if (device().major < 9) fail("this instruction needs sm_90", at);
  for (auto& [address, map] : device_maps()) {
    if (map.writer == &running_fiber()) map.writer = nullptr;
  }
}

void acquire_map(const void* map, Location at) {
  const RuntimeScope scope;
  check_map(map, at);
  touch(map, kMapBytes, {.write = false, .async = false, .space = Space::kGlobal}, at);
  const DeviceMap* const known = find(map);
  if (known == nullptr) return;
  if (known->writer != nullptr) fail("fence.proxy.tensormap: nobody released this tensor map", at);
  running_fiber().acquired_maps[address_of(map)] = known->version;
}

void check_acquired(const void* map, Location at) {
  const DeviceMap* const known = find(map);
  if (known == nullptr) return;
  const auto& acquired = running_fiber().acquired_maps;
  const auto found = acquired.find(address_of(map));
  if (found == acquired.end()) fail("TMA: a tensor map that the device wrote, without a fence.proxy.tensormap", at);
  if (found->second != known->version) fail("TMA: a tensor map that changed after its fence.proxy.tensormap", at);
}

}  // namespace simt
