// SPDX-License-Identifier: BSD-3-Clause
// Bulk copies: boxes of tensors (TMA) and plain ranges, in the asynchronous proxy.
#include "tma.h"

#include <cstring>

#include "api.h"
#include "cluster.h"
#include "mbarrier.h"
#include "models.h"
#include "shared_memory.h"
#include "touch.h"

namespace simt {
namespace {

constexpr race::Access kAsyncRead{.write = false, .async = true, .space = Space::kShared};
constexpr race::Access kAsyncWrite{.write = true, .async = true, .space = Space::kShared};

race::Access in_global(race::Access access) {
  access.space = Space::kGlobal;
  return access;
}

TensorMap read_map(const void* tensor_map, int rank, Location at) {
  TensorMap map;
  if (reinterpret_cast<uintptr_t>(tensor_map) % 64 != 0) fail("TMA: tensor map not aligned to 64 bytes", at);
  std::memcpy(&map, tensor_map, sizeof map);
  if (map.mark != kTensorMapMark) fail("TMA: not an encoded tensor map", at);
  check_acquired(tensor_map, at);
  if (map.rank != rank) {
    fail("TMA: instruction of rank " + std::to_string(rank) + ", tensor map of rank " + std::to_string(map.rank), at);
  }
  return map;
}

// One row of a box: its bytes in shared memory, and the part of them inside the tensor.
struct BoxRow {
  uint32_t shared;   // before swizzling
  char* global;      // first element inside
  unsigned skipped;  // bytes before it
  unsigned valid;    // bytes inside
};

unsigned row_bytes(const TensorMap& map) { return unsigned{map.box[0]} * map.element_size; }

std::vector<BoxRow> rows_of_box(const TensorMap& map, const int* coordinates, uint32_t shared) {
  unsigned num_rows = 1;
  for (int i = 1; i < map.rank; ++i) num_rows *= map.box[i];
  const int64_t first = std::max<int64_t>(coordinates[0], 0);
  const int64_t last = std::min<int64_t>(int64_t{coordinates[0]} + map.box[0], static_cast<int64_t>(map.size[0]));
  std::vector<BoxRow> rows;
  for (unsigned row = 0; row < num_rows; ++row) {
    int64_t offset = first * map.element_size;
    bool inside = first < last;
    for (unsigned i = 1, rest = row; i < map.rank; ++i) {
      const int64_t index = coordinates[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside &= index >= 0 && index < static_cast<int64_t>(map.size[i]);
      offset += index * static_cast<int64_t>(map.stride[i - 1]);
    }
    BoxRow& result = rows.emplace_back(BoxRow{shared + row * row_bytes(map), nullptr, 0, 0});
    if (!inside) continue;
    result.global = map.start + offset;
    result.skipped = static_cast<unsigned>(first - coordinates[0]) * map.element_size;
    result.valid = static_cast<unsigned>(last - first) * map.element_size;
  }
  return rows;
}

uint32_t check_shared_box(const TensorMap& map, const void* shared, Location at) {
  const Block& block = running_block();
  const uint32_t address = shared_address(block, shared, at);
  if (address % 128 != 0) fail("TMA: shared address not aligned to 128 bytes", at);
  // A tile that starts inside the swizzle pattern cannot be described to wgmma, nor read by a simple formula.
  const uint32_t pattern = map.swizzle_bits == 0 ? 128u : 128u << map.swizzle_bits;
  if (address % pattern != 0) {
    fail("TMA: swizzled tile at a shared address that is not a multiple of " + std::to_string(pattern), at);
  }
  unsigned bytes = row_bytes(map);
  for (int i = 1; i < map.rank; ++i) bytes *= map.box[i];
  shared_pointer(block, address, bytes, at);
  check_accessible(shared, bytes, "TMA, shared memory", at);
  return address;
}

unsigned box_bytes(const TensorMap& map) {
  unsigned bytes = row_bytes(map);
  for (int i = 1; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Calls f(shared pointer, row, offset in the row, bytes) for pieces that stay contiguous under the swizzle.
template <typename F>
void for_each_piece(const Block& block, const TensorMap& map, const std::vector<BoxRow>& rows, Location at, F f) {
  for (const BoxRow& row : rows) {
    for (unsigned offset = 0; offset < row_bytes(map); offset += 16) {
      f(shared_pointer(block, swizzled(row.shared + offset, map.swizzle_bits), 16, at), row, offset, 16u);
    }
  }
}

void load_box(const Block& block, const TensorMap& map, const std::vector<BoxRow>& rows, Location at) {
  for_each_piece(block, map, rows, at, [](char* shared, const BoxRow& row, unsigned offset, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) {
      const unsigned place = offset + i - row.skipped;  // wraps before the first valid byte
      shared[i] = offset + i >= row.skipped && place < row.valid ? row.global[place] : 0;
    }
  });
}

void store_box(const Block& block, const TensorMap& map, const std::vector<BoxRow>& rows, Location at) {
  for_each_piece(block, map, rows, at, [](const char* shared, const BoxRow& row, unsigned offset, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) {
      const unsigned place = offset + i - row.skipped;
      if (offset + i >= row.skipped && place < row.valid) row.global[place] = shared[i];
    }
  });
}

void check_device(Location at) {
  if (device().major < 9) fail("this instruction needs sm_90", at);
}

}  // namespace

uint64_t& tma_bytes() {
  static uint64_t bytes = 0;
  return bytes;
}

namespace {

// Carries the copy to `block` out now or later, and completes it on the block's mbarrier.
void track(Block& block, uint32_t mbarrier, uint32_t time, int64_t bytes, std::function<void()> land, Location at) {
  auto operation = [&block, mbarrier, time, bytes, land = std::move(land), at] {
    land();
    complete_tracked_copy(block, mbarrier, time, bytes, at);
  };
  if (carry_out_early()) {
    operation();
  } else {
    carry_out_later(running_block(), std::move(operation));
  }
}

}  // namespace

void tma_load_multicast(void* shared, const void* tensor_map, uint64_t* mbarrier, const int* coordinates, int rank,
                        unsigned blocks, Location at) {
  const RuntimeScope scope;
  check_device(at);
  const TensorMap map = read_map(tensor_map, rank, at);
  const uint32_t address = check_shared_box(map, shared, at);
  const std::vector<BoxRow> rows = rows_of_box(map, coordinates, address);
  for (const BoxRow& row : rows) {
    tma_bytes() += row.valid;
    check_accessible(row.global, row.valid, "TMA, global memory", at);
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(blocks >> i & 1)) continue;
    Block& block = block_of_cluster(i, at);
    const bool own = &block == &running_block();
    note_use(block);
    char* const to = own ? static_cast<char*>(shared) : shared_in(block, shared, at);
    const uint32_t barrier =
        checked_mbarrier(block, own ? mbarrier : reinterpret_cast<uint64_t*>(shared_in(block, mbarrier, at)), at);
    const race::Agent agent = start_tracked_copy(block, barrier, at);
    touch_as(block, agent, to, box_bytes(map), kAsyncWrite, at);
    for (const BoxRow& row : rows) touch_as(block, agent, row.global, row.valid, in_global(kAsyncRead), at);
    std::memset(to, 0xff, box_bytes(map));
    track(block, barrier, agent.time, box_bytes(map), [&block, map, rows, at] { load_box(block, map, rows, at); }, at);
  }
}

void tma_load(void* shared, const void* tensor_map, uint64_t* mbarrier, const int* coordinates, int rank, Location at) {
  tma_load_multicast(shared, tensor_map, mbarrier, coordinates, rank, 1u << cluster_rank(), at);
}

void bulk_load(void* shared, const void* global, unsigned size, uint64_t* mbarrier, Location at) {
  const RuntimeScope scope;
  check_device(at);
  if (size % 16 != 0) fail("bulk copy: size not a multiple of 16", at);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("bulk copy: global address not a multiple of 16", at);
  const Block& block = running_block();
  const uint32_t address = shared_address(block, shared, at);
  if (address % 16 != 0) fail("bulk copy: shared address not a multiple of 16", at);
  shared_pointer(block, address, size, at);
  check_accessible(shared, size, "bulk copy, shared memory", at);
  check_accessible(global, size, "bulk copy, global memory", at);
  const uint32_t barrier = checked_mbarrier(mbarrier, at);
  const race::Agent agent = start_tracked_copy(running_block(), barrier, at);
  touch_as(agent, shared, size, kAsyncWrite, at);
  touch_as(agent, global, size, in_global(kAsyncRead), at);
  std::memset(shared, 0xff, size);
  track(running_block(), barrier, agent.time, size, [=] { std::memcpy(shared, global, size); }, at);
}

// ---- stores, in groups as with cp.async ---------------------------------------------------------------------------------

void tma_store(const void* tensor_map, const void* shared, const int* coordinates, int rank, Location at) {
  const RuntimeScope scope;
  check_device(at);
  Fiber& fiber = running_fiber();
  Block& block = *fiber.block;
  const TensorMap map = read_map(tensor_map, rank, at);
  const uint32_t address = check_shared_box(map, shared, at);
  auto rows = rows_of_box(map, coordinates, address);
  ensure_slot(fiber.store_reader, "bulk store of thread " + std::to_string(fiber.linear) + " (reading)");
  ensure_slot(fiber.store_writer, "bulk store of thread " + std::to_string(fiber.linear) + " (writing)");
  touch_as({fiber.store_reader.slot, fiber.store_reader.time + 1}, shared, box_bytes(map), kAsyncRead, at);
  for (const BoxRow& row : rows) {
    check_accessible(row.global, row.valid, "TMA, global memory", at);
    touch_as({fiber.store_writer.slot, fiber.store_writer.time + 1}, row.global, row.valid, in_global(kAsyncWrite), at);
  }
  fiber.open_stores.push_back([&block, map, rows = std::move(rows), at] { store_box(block, map, rows, at); });
  if (carry_out_early()) {
    fiber.open_stores.back()();
    fiber.open_stores.back() = [] {};
  }
}

void bulk_commit(Location) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  fiber.store_groups.push_back({std::move(fiber.open_stores), ++fiber.store_reader.time});
  ++fiber.store_writer.time;
  fiber.open_stores.clear();
}

void bulk_wait(unsigned groups_left, bool reads_only, Location) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  for (size_t i = 0; i + groups_left < fiber.store_groups.size(); ++i) {
    StoreGroup& group = fiber.store_groups[i];
    for (const auto& store : group.stores) store();
    group.stores.clear();
    learn(fiber.store_reader, group.time);
    if (!reads_only) learn(fiber.store_writer, group.time);
  }
  while (!reads_only && fiber.store_groups.size() > groups_left) fiber.store_groups.pop_front();
}

}  // namespace simt
