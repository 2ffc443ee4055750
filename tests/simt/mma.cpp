// SPDX-License-Identifier: BSD-3-Clause
// ldmatrix, stmatrix and mma.sync. With g = lane / 4 and q = lane % 4, a register of 16-bit pairs holds
//   ldmatrix   row g, columns 2q and 2q + 1 of an 8x8 matrix; transposed: rows 2q and 2q + 1 of column g
//   A [16,16]  register i: row g + 8 (i & 1), columns 2q + 8 (i >> 1) and the next
//   B [16,8]   register i: column g, rows 2q + 8 i and the next
//   C [16,8]   value i: row g + 8 (i >> 1), column 2q + (i & 1)
// and for tf32, whose registers hold one value each,
//   A [16,8]   register i: row g + 8 (i & 1), column q + 4 (i >> 1)
//   B [8,8]    register i: column g, row q + 4 i
#include <algorithm>
#include <cmath>
#include <cstring>

#include "elements.h"
#include "models.h"
#include "shared_memory.h"
#include "touch.h"

namespace simt {
namespace {

struct MatrixOperands {
  uint16_t row[8];
  uint32_t* registers;
  const uint32_t* source;
  int matrices;
  bool transposed;
  uint32_t address;
};

const char* check_row(const void* row, int matrices, const char* name, bool write, Location at) {
  if (static_cast<int>(running_fiber().lane) >= 8 * matrices) return nullptr;  // this lane's address is not used
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(std::string(name) + ": row address not a multiple of 16", at);
  const Block& block = running_block();
  shared_pointer(block, shared_address(block, row, at), 16, at);
  check_accessible(row, 16, name, at);
  touch(row, 16, {.write = write, .space = Space::kShared}, at);
  return static_cast<const char*>(row);
}

void count_conflicts(void* const* operands, int matrices) {
  for (int matrix = 0; matrix < matrices; ++matrix) {
    int rows[8] = {};
    int most = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t address = static_cast<const MatrixOperands*>(operands[8 * matrix + i])->address;
      most = std::max(most, ++rows[address / 16 % 8]);
    }
    ++statistics().ldmatrix;
    statistics().bank_conflicts += static_cast<uint64_t>(most - 1);
  }
}

// Row and column, in an 8x8 matrix, of the element in half `half` of a lane's register.
struct Place {
  int row, column;
};
Place place_of(int lane, int half, bool transposed) {
  const Place place{lane / 4, 2 * (lane % 4) + half};
  return transposed ? Place{place.column, place.row} : place;
}

void load_matrices(void* const* operands, uint32_t) {
  const auto of = [&](int lane) { return static_cast<MatrixOperands*>(operands[lane]); };
  count_conflicts(operands, of(0)->matrices);
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < of(lane)->matrices; ++matrix) {
      uint32_t value = 0;
      for (int half = 0; half < 2; ++half) {
        const Place place = place_of(lane, half, of(lane)->transposed);
        value |= uint32_t{of(8 * matrix + place.row)->row[place.column]} << (16 * half);
      }
      of(lane)->registers[matrix] = value;
    }
  }
}

void store_matrices(void* const* operands, uint32_t) {
  const auto of = [&](int lane) { return static_cast<MatrixOperands*>(operands[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < of(lane)->matrices; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        const Place place = place_of(lane, half, of(lane)->transposed);
        of(8 * matrix + place.row)->row[place.column] = static_cast<uint16_t>(of(lane)->source[matrix] >> (16 * half));
      }
    }
  }
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Location at) {
  MatrixOperands operands{{}, registers, nullptr, matrices, transposed, 0};
  {
    const RuntimeScope scope;
    if (const char* bytes = check_row(row, matrices, "ldmatrix", false, at)) {
      std::memcpy(operands.row, bytes, 16);
      operands.address = shared_address(running_block(), row, at);
    }
  }
  collective("ldmatrix", 0xffffffffu, &operands, load_matrices, at);
}

void stmatrix(const uint32_t* registers, int matrices, bool transposed, void* row, Location at) {
  MatrixOperands operands{{}, nullptr, registers, matrices, transposed, 0};
  bool used;
  {
    const RuntimeScope scope;
    used = check_row(row, matrices, "stmatrix", true, at) != nullptr;
  }
  collective("stmatrix", 0xffffffffu, &operands, store_matrices, at);
  if (used) std::memcpy(row, operands.row, 16);
}

// ---- mma ----------------------------------------------------------------------------------------------------------------

namespace {

struct MmaOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  Element element;
};

void multiply(void* const* operands, uint32_t) {
  const auto of = [&](int lane) { return static_cast<MmaOperands*>(operands[lane]); };
  const Element element = of(0)->element;
  const int depth = element == Element::kTf32 ? 8 : 16;
  float a[16][16], b[16][8], sum[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1);
      if (element == Element::kTf32) {
        a[row][q + 4 * (i >> 1)] = tf32_value(of(lane)->a[i]);
      } else {
        for (int half = 0; half < 2; ++half) {
          a[row][2 * q + 8 * (i >> 1) + half] = half_value(of(lane)->a[i] >> (16 * half), element);
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (element == Element::kTf32) {
        b[q + 4 * i][g] = tf32_value(of(lane)->b[i]);
      } else {
        for (int half = 0; half < 2; ++half) {
          b[2 * q + 8 * i + half][g] = half_value(of(lane)->b[i] >> (16 * half), element);
        }
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) of(lane)->d[i] += sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
  }
}

}  // namespace

void mma(float* d, const uint32_t* a, const uint32_t* b, Element element, Location at) {
  MmaOperands operands{d, a, b, element};
  collective(element == Element::kBf16  ? "mma.bf16"
             : element == Element::kF16 ? "mma.f16"
                                        : "mma.tf32",
             0xffffffffu, &operands, multiply, at);
}

namespace {

// The bits of the number of `fraction` bits and exponents from `lowest` on that is nearest to v, ties to even.
uint32_t round_to_half(double v, int fraction, int lowest) {
  const int width = 15 - fraction;
  const uint32_t sign = std::signbit(v) ? 0x8000 : 0, infinity = ((1u << width) - 1) << fraction;
  if (std::isnan(v)) return infinity | 1u << (fraction - 1);
  if (std::isinf(v)) return sign | infinity;
  const int exponent = v == 0 ? lowest : std::max(std::ilogb(v), lowest);
  // In units of the last place. Adding an exponent to the integer carries from one binade to the next, or to infinity.
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::abs(v), fraction - exponent)));
  return sign | std::min(units + (static_cast<uint32_t>(exponent - lowest) << fraction), infinity);
}

}  // namespace

// The product and, of numbers less than 2^30 apart, the sum are exact in double.
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c, Element element) {
  uint32_t result = 0;
  for (const int shift : {0, 16}) {
    const double product = double{half_value(a >> shift, element)} * half_value(b >> shift, element);
    const double v = product + half_value(c >> shift, element);
    result |= (element == Element::kBf16 ? round_to_half(v, 7, -126) : round_to_half(v, 10, -14)) << shift;
  }
  return result;
}

}  // namespace simt
