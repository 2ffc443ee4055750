// SPDX-License-Identifier: BSD-3-Clause
#include "registry.h"

#include <array>
#include <atomic>

namespace switchgear {
namespace {

constexpr size_t kDeviceTypes = 2;
std::array<std::atomic<const Backend*>, kDeviceTypes> registered{};

}  // namespace

void register_backend(const Backend& backend) {
  registered[static_cast<size_t>(backend.device)].store(&backend, std::memory_order_release);
}

const Backend* find_backend(DeviceType device) {
  const Backend* backend = registered[static_cast<size_t>(device)].load(std::memory_order_acquire);
  if (backend != nullptr) return backend;
  const Backend& ours = default_backend();
  return ours.device == device ? &ours : nullptr;
}

}  // namespace switchgear
