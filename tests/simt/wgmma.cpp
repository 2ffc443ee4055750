// SPDX-License-Identifier: BSD-3-Clause
// wgmma.mma_async: a warp computes 16 of the 64 rows, with k = 16. The product is carried out either at issue or only at a
// wait; until then its accumulators hold NaN. Its reads of shared memory belong to the warp's tensor core, an engine in the
// asynchronous proxy.
//
// A descriptor gives the start, two strides and the width of the swizzled rows, w = 16, 32, 64 or 128 bytes (16: no
// swizzle). With 16-bit elements, the byte of element (i, k), i along M or N, before swizzling:
//   K-major    start + (i / 8) SBO + (i % 8) w + 2k                        w > 16
//              start + (i / 8) SBO + (i % 8) 16 + (k / 8) LBO + 2 (k % 8)  w = 16
//   MN-major   start + (k / 8) SBO + (k % 8) w + (i / (w/2)) LBO + 2 (i % (w/2))   w > 16
//              start + (k / 8) LBO + (k % 8) 16 + (i / 8) SBO + 2 (i % 8)          w = 16
#include <bit>
#include <cstring>

#include "elements.h"
#include "models.h"
#include "shared_memory.h"
#include "tma.h"
#include "touch.h"

namespace simt {
namespace {

constexpr int kDepth = 16;
constexpr int kWarpRows = 16;

struct Matrix {
  uint32_t start, leading, stride;  // in bytes
  int swizzle_bits;
  bool transposed;  // MN-major

  uint32_t address(int i, int k) const {
    const uint32_t row = static_cast<uint32_t>(transposed ? k : i), column = static_cast<uint32_t>(transposed ? i : k);
    const uint32_t width = 16u << swizzle_bits, elements = width / 2;
    uint32_t offset = row % 8 * width + 2 * (column % elements);
    if (swizzle_bits == 0 && transposed) {
      offset += row / 8 * leading + column / elements * stride;
    } else {
      offset += row / 8 * stride + column / elements * leading;
    }
    return swizzled(start + offset, swizzle_bits);
  }
};

Matrix decode(uint64_t descriptor, bool transposed, Location at) {
  constexpr int kSwizzleBits[4] = {0, 3, 2, 1};
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  if (descriptor >> 49 & 7) fail("wgmma: base offsets are not modelled; align tiles to the swizzle's pattern", at);
  return {field(0), field(16), field(32), kSwizzleBits[descriptor >> 62], transposed};
}

struct Product {
  Matrix a, b;
  uint32_t a_registers[32][4];
  const uint32_t* a_sources[32];  // null: not read again
  bool a_in_registers, accumulate;
  int first_row;
  WgmmaShape shape;
  Location at;
};

float element_at(const Block& block, const Matrix& matrix, int i, int k, const Product& product) {
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(block, matrix.address(i, k), 2, product.at), 2);
  return half_value(bits, product.shape.element);
}

void load_a(const Block& block, const Product& product, float (&a)[kWarpRows][kDepth]) {
  for (int row = 0; row < kWarpRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      if (product.a_in_registers) {
        const int lane = row % 8 * 4 + k % 8 / 2, index = row / 8 + k / 8 * 2;
        a[row][k] = half_value(product.a_registers[lane][index] >> (16 * (k % 2)), product.shape.element);
      } else {
        a[row][k] = element_at(block, product.a, product.first_row + row, k, product);
      }
    }
  }
}

void multiply(const Block& block, const Product& product, Accumulators& accumulators) {
  const int columns = product.shape.columns;
  float a[kWarpRows][kDepth];
  load_a(block, product, a);
  std::vector<float> b(static_cast<size_t>(kDepth * columns));
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < columns; ++column) {
      b[static_cast<size_t>(k * columns + column)] = element_at(block, product.b, column, k, product);
    }
  }
  std::vector<float> sum(static_cast<size_t>(columns));
  for (int row = 0; row < kWarpRows; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      const float* b_row = &b[static_cast<size_t>(k * columns)];
      for (int column = 0; column < columns; ++column) sum[static_cast<size_t>(column)] += a[row][k] * b_row[column];
    }
    for (int column = 0; column < columns; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      const int index = column / 8 * 4 + row / 8 * 2 + column % 2;
      float& value = accumulators.values[static_cast<size_t>(lane * columns / 2 + index)];
      value = (product.accumulate ? value : 0.0f) + sum[static_cast<size_t>(column)];
    }
  }
}

// The kernel may not have changed factors in registers since the product was issued.
void check_factors(const Product& product) {
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* const now = product.a_sources[lane];
    if (now != nullptr && std::memcmp(now, product.a_registers[lane], sizeof product.a_registers[lane]) != 0) {
      fail("wgmma: factors in registers changed before the product was waited for", product.at);
    }
  }
}

// Reports the tensor core's reads, 16 bytes at a time: eight adjacent elements.
void touch_matrix(const race::Agent& agent, const Matrix& matrix, int first, int count, Location at) {
  const Block& block = running_block();
  const int step_i = matrix.transposed ? 8 : 1, step_k = matrix.transposed ? 1 : 8;
  for (int i = first; i < first + count; i += step_i) {
    for (int k = 0; k < kDepth; k += step_k) {
      const char* bytes = shared_pointer(block, matrix.address(i, k), 16, at);
      check_accessible(bytes, 16, "wgmma", at);
      touch_as(agent, bytes, 16, {.async = true, .space = Space::kShared}, at);
    }
  }
}

// ---- accumulators -------------------------------------------------------------------------------------------------------

size_t num_registers(int columns) { return static_cast<size_t>(columns / 2); }

using LaneRegisters = std::array<AccumulatorRegisters, 32>;

const float* key_of(const LaneRegisters& registers) { return &registers[0][0]; }

bool same_registers(const AccumulatorRegisters& a, const AccumulatorRegisters& b, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (&a[i] != &b[i]) return false;
  }
  return true;
}

std::vector<float> read_registers(const LaneRegisters& registers, int columns) {
  std::vector<float> values;
  values.reserve(32 * num_registers(columns));
  for (const AccumulatorRegisters& lane : registers) {
    for (size_t i = 0; i < num_registers(columns); ++i) values.push_back(lane[i]);
  }
  return values;
}

void write_registers(const Accumulators& accumulators) {
  const size_t count = accumulators.values.size() / 32;
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t i = 0; i < count; ++i) accumulators.registers[lane][i] = accumulators.values[lane * count + i];
  }
}

std::shared_ptr<Accumulators> find_pending(const Warp& warp, const float* lane0) {
  const auto search = [&](const std::vector<WarpProduct>& products) -> std::shared_ptr<Accumulators> {
    for (const WarpProduct& product : products) {
      if (key_of(product.accumulators->registers) == lane0) return product.accumulators;
    }
    return nullptr;
  };
  for (const auto& group : warp.product_groups) {
    if (auto found = search(group)) return found;
  }
  return search(warp.open_products);
}

// Takes over the accumulators from the kernel, unless they are already in flight.
std::shared_ptr<Accumulators> take_accumulators(Warp& warp, const LaneRegisters& registers, int columns, Location at) {
  if (auto pending = find_pending(warp, key_of(registers))) {
    if (pending->values.size() != 32 * num_registers(columns))
      fail("wgmma: accumulators in flight with another shape", at);
    if (!same_registers(pending->registers[0], registers[0], num_registers(columns)))
      fail("wgmma: accumulators in flight in another order", at);
    return pending;
  }
  auto taken = std::make_shared<Accumulators>();
  taken->registers = registers;
  taken->values = read_registers(registers, columns);
  if (!warp.fenced) {
    const auto left = warp.finished_accumulators.find(key_of(registers));
    const bool untouched = left != warp.finished_accumulators.end() && left->second.size() == taken->values.size() &&
                           std::memcmp(left->second.data(), taken->values.data(), taken->values.size() * 4) == 0;
    if (!untouched) fail("wgmma: registers were written since the last wgmma.fence", at);
  }
  const float poison = std::bit_cast<float>(0xffffffffu);
  for (const AccumulatorRegisters& lane : registers) {
    for (size_t i = 0; i < num_registers(columns); ++i) lane[i] = poison;
  }
  return taken;
}

// Carries out all the products in order, since each builds on the one before.
void carry_out(std::vector<WarpProduct>& products) {
  for (WarpProduct& product : products) {
    if (!product.multiply) continue;
    product.multiply();
    product.multiply = nullptr;
  }
}

void carry_out_all(Warp& warp) {
  for (auto& group : warp.product_groups) carry_out(group);
  carry_out(warp.open_products);
}

// ---- the instructions, after the last lane has arrived --------------------------------------------------------------------

struct WgmmaOperands {
  AccumulatorRegisters d;
  const uint32_t* a;
  bool a_stays;
  uint64_t descriptor_a, descriptor_b;
  bool accumulate;
  WgmmaShape shape;
  Location at;
};

void check_same_in_warpgroup(Block& block, Warp& warp, unsigned warp_index, const WgmmaOperands& operands) {
  auto& log = block.warpgroup_products[warp_index / 4];
  const WgmmaShape& shape = operands.shape;
  const std::array<uint64_t, 4> entry{operands.a == nullptr ? operands.descriptor_a : 0, operands.descriptor_b,
                                      static_cast<uint64_t>(shape.columns),
                                      uint64_t{operands.accumulate} | uint64_t{shape.a_transposed} << 1 |
                                          uint64_t{shape.b_transposed} << 2 | uint64_t{operands.a != nullptr} << 3};
  if (warp.num_products < log.size()) {
    if (log[warp.num_products] != entry) fail("wgmma: operands differ between the warps of the warpgroup", operands.at);
  } else {
    log.push_back(entry);
  }
  ++warp.num_products;
}

void issue(void* const* all, uint32_t) {
  ++statistics().wgmma;
  Block& block = running_block();
  Warp& warp = running_warp();
  const auto of = [&](int lane) -> const WgmmaOperands& { return *static_cast<const WgmmaOperands*>(all[lane]); };
  const WgmmaOperands& first = of(0);
  Product product{decode(first.descriptor_a, first.shape.a_transposed, first.at),
                  decode(first.descriptor_b, first.shape.b_transposed, first.at),
                  {},
                  {},
                  first.a != nullptr,
                  first.accumulate,
                  static_cast<int>(running_fiber().warp % 4) * kWarpRows,
                  first.shape,
                  first.at};
  LaneRegisters registers;
  for (int lane = 0; lane < 32; ++lane) {
    const WgmmaOperands& operands = of(lane);
    if ((first.a == nullptr && operands.descriptor_a != first.descriptor_a) ||
        operands.descriptor_b != first.descriptor_b || operands.accumulate != first.accumulate) {
      fail("wgmma: operands differ inside the warp", first.at);
    }
    registers[static_cast<size_t>(lane)] = operands.d;
    if (operands.a == nullptr) continue;
    std::memcpy(product.a_registers[lane], operands.a, sizeof product.a_registers[lane]);
    if (operands.a_stays) product.a_sources[lane] = operands.a;
  }
  check_same_in_warpgroup(block, warp, running_fiber().warp, first);
  if (product.a_in_registers && !warp.fenced_group)
    fail("wgmma: factors in registers, and no wgmma.fence in the group", first.at);

  ensure_slot(warp.tensor_core, "wgmma of warp " + std::to_string(running_fiber().warp));
  const race::Agent agent{warp.tensor_core.slot, warp.tensor_core.time + 1};
  if (!product.a_in_registers) touch_matrix(agent, product.a, product.first_row, kWarpRows, first.at);
  touch_matrix(agent, product.b, 0, product.shape.columns, first.at);

  auto accumulators = take_accumulators(warp, registers, product.shape.columns, first.at);
  ++accumulators->pending;
  Accumulators* const target = accumulators.get();
  warp.open_products.push_back({std::move(accumulators),
                                [&block, product, target] { multiply(block, product, *target); },
                                [product] { check_factors(product); }});
  if (carry_out_early()) carry_out_all(warp);
}

void commit(void* const*, uint32_t) {
  Warp& warp = running_warp();
  warp.product_groups.push_back(std::move(warp.open_products));
  warp.open_products.clear();
  warp.fenced_group = false;
  warp.product_group_times.push_back(++warp.tensor_core.time);
}

void finish_groups(void* const* operands, uint32_t) {
  Warp& warp = running_warp();
  const unsigned groups_left = *static_cast<const unsigned*>(operands[0]);
  warp.fenced = false;
  while (warp.product_groups.size() > groups_left) {
    carry_out(warp.product_groups.front());
    for (const WarpProduct& product : warp.product_groups.front()) {
      product.check();
      Accumulators& accumulators = *product.accumulators;
      if (--accumulators.pending > 0) continue;
      write_registers(accumulators);
      warp.finished_accumulators[key_of(accumulators.registers)] = accumulators.values;
    }
    warp.product_groups.pop_front();
    warp.finished_time = warp.product_group_times.front();
    warp.product_group_times.pop_front();
  }
}

void check_warpgroup(Location at) {
  if (device().major < 9) fail("wgmma needs sm_90", at);
  if (running_fiber().warp / 4 * 4 + 4 > running_block().warps.size()) fail("wgmma: not a whole warpgroup", at);
}

}  // namespace

void wgmma_fence(Location at) {
  collective(
      "wgmma.fence", 0xffffffffu, nullptr,
      [](void* const*, uint32_t) { running_warp().fenced = running_warp().fenced_group = true; }, at);
}

void wgmma(AccumulatorRegisters d, FactorRegisters a, uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate,
           WgmmaShape shape, Location at) {
  check_warpgroup(at);
  WgmmaOperands operands{d, a.values, a.stay, descriptor_a, descriptor_b, accumulate, shape, at};
  collective("wgmma.mma_async", 0xffffffffu, &operands, issue, at);
}

void wgmma_commit(Location at) { collective("wgmma.commit_group", 0xffffffffu, nullptr, commit, at); }

void wgmma_wait(unsigned groups_left, Location at) {
  collective("wgmma.wait_group", 0xffffffffu, &groups_left, finish_groups, at);
  const RuntimeScope scope;
  learn(running_warp().tensor_core, running_warp().finished_time);
}

}  // namespace simt
