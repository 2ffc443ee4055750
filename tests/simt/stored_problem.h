// SPDX-License-Identifier: BSD-3-Clause
// Random weights in every stored format, written bit by bit as the headers of include/switchgear say, with their values
// in float64.
#pragma once
#include <limits>

#include "bounded.h"
#include "run_op.h"
#include "switchgear/groups.h"
#include "switchgear/integers.h"
#include "switchgear/minifloat.h"

namespace switchgear::test {

constexpr int64_t blocks_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float nearest(float v, DType dtype) {
  Array one(dtype, {1});
  one.set(v, 0);
  return one(0);
}

// Bytes at a multiple of 16, which end where their memory ends.
class Bytes {
 public:
  Bytes() = default;
  Bytes(DType dtype, std::vector<int64_t> shape) : array_(dtype, shape, 0, 16 / size_of(dtype)) {}
  const TensorView& view() const { return array_.view(); }
  uint8_t* data() const { return array_.view().as<uint8_t>(); }
  int64_t size() const { return array_.numel() * size_of(array_.view().dtype); }
  void fill(Random& random) const {
    for (int64_t i = 0; i < size(); ++i) data()[i] = static_cast<uint8_t>(random.bits());
  }

 private:
  Array array_;
};

// [N,C] of E experts. group: columns that share a scale, 0 for all. `permuted`: experts are stored in another order,
// with one more.
struct StoredShape {
  Format format;
  int64_t E, N, C, parts = 1, group = 0;
  bool zeros = false, permuted = false;
};

inline std::string describe(const StoredShape& s) {
  return join(name_of(s.format), " E", s.E, " [", s.N, ", ", s.C, "] parts ", s.parts, " group ", s.group,
              s.zeros ? " zeros" : "", s.permuted ? " permuted" : "");
}

class StoredWeights {
 public:
  StoredWeights(Random& random, const StoredShape& s) : s_(s), stored_(s.E + (s.permuted ? 1 : 0)) {
    size_ = s.group > 0 ? s.group : s.C;
    groups_ = blocks_of(s.C, size_);
    part_rows_ = s.N / s.parts;
    blocks_ = s.parts * blocks_of(part_rows_, 16);
    allocate(random);
    codes_.resize(static_cast<size_t>(stored_ * s.N * s.C));
    for (int64_t i = 0; i < stored_; ++i) {
      for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t g = 0; g < groups_; ++g) set_scale(random, i, n, g);
        for (int64_t c = 0; c < s.C; ++c) {
          int code = static_cast<int>(random.below(int64_t{1} << code_bits(i)));
          if (s.format == Format::kFp8 && (code & 127) == 127) code ^= 1;  // NaN
          codes_[static_cast<size_t>((i * s.N + n) * s.C + c)] = code;
          set_code(i, n, c, code);
        }
      }
    }
    describe_weight();
  }

  const Weight& weight() const { return weight_; }
  int64_t group_size() const { return size_; }
  int64_t groups() const { return groups_; }
  int64_t slot(int64_t e) const { return s_.permuted ? (e + 1) % stored_ : e; }

  // w[n,c] is value · scale (integers: · row_scale). value is exact in float.
  float value(int64_t e, int64_t n, int64_t c) const {
    const int64_t i = slot(e);
    const int code = codes_[static_cast<size_t>((i * s_.N + n) * s_.C + c)];
    const double zero = s_.zeros ? static_cast<double>(zeros_.data()[scale_index(i, n, c / size_)]) : 0.0;
    switch (s_.format) {
      case Format::kInt8: return static_cast<float>(code - (s_.zeros ? zero : 128.0));
      case Format::kInt4: return static_cast<float>(code - (s_.zeros ? zero / 16 : 8.0));
      case Format::kNf4: return kNf4Values[code];
      case Format::kMxfp4:
      case Format::kNvfp4: {
        constexpr float kValues[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        return code & 8 ? -kValues[code & 7] : kValues[code & 7];
      }
      case Format::kFp8: {
        const int exponent = code >> 3 & 15, fraction = code & 7;
        const float magnitude =
            std::ldexp(static_cast<float>(exponent > 0 ? 8 + fraction : fraction), std::max(exponent, 1) - 10);
        return code & 0x80 ? -magnitude : magnitude;
      }
      default: break;
    }
    if (bits_[static_cast<size_t>(i)] == 1) return code == 0 ? -1.0f : 1.0f;
    return static_cast<float>(code - (s_.zeros ? zero : std::ldexp(1.0, code_bits(i) - 1)));
  }
  float scale(int64_t e, int64_t n, int64_t g) const {
    return scale_[static_cast<size_t>((slot(e) * s_.N + n) * groups_ + g)];
  }
  float row_scale(int64_t e, int64_t n) const {
    return format_row(s_.format).row_scales ? row_scales_.view().as<const float>()[slot(e) * blocks_ * 16 + place(n)]
                                            : 1.0f;
  }
  // The weight as the specification decodes it.
  float decoded(int64_t e, int64_t n, int64_t c) const {
    return value(e, n, c) * (row_scale(e, n) * scale(e, n, c / size_));
  }

 private:
  int code_bits(int64_t i) const {
    return s_.format == Format::kGroups ? bits_[static_cast<size_t>(i)] : static_cast<int>(bits_of(s_.format));
  }
  int64_t place(int64_t n) const {
    return n / part_rows_ * (blocks_ / s_.parts) * 16 + n % part_rows_;
  }  // row among those of blocks
  int64_t scale_index(int64_t i, int64_t n, int64_t g) const {
    return ((i * blocks_ + place(n) / 16) * groups_ + g) * 16 + place(n) % 16;
  }

  void allocate(Random& random) {
    const bool integers = is_integer(s_.format);
    const int64_t step = integers ? 0 : 64 * code_bits_or(0), steps = blocks_of(s_.C, 32);
    if (s_.format == Format::kGroups) {
      int64_t planes = 0;
      for (int64_t i = 0; i < stored_; ++i) {
        const int bits = static_cast<int>((i + 2) % 4 + 1);
        bits_.push_back(bits);
        firsts_.push_back(planes);
        planes += bits;
      }
      data_ = Bytes(DType::kUInt8, {planes, blocks_, steps, kPlaneBytes});
      records_ = Bytes(DType::kInt32, {stored_, 2});
      for (int64_t i = 0; i < stored_; ++i) {
        const int32_t record[] = {static_cast<int32_t>(firsts_[static_cast<size_t>(i)]), bits_[static_cast<size_t>(i)]};
        std::memcpy(records_.data() + 8 * i, record, 8);
      }
      std::memset(data_.data(), 0, static_cast<size_t>(data_.size()));
    } else if (integers) {
      data_ = Bytes(DType::kUInt8, {stored_, blocks_, blocks_of(s_.C, 8) * (s_.format == Format::kInt8 ? 2 : 1), 64});
      data_.fill(random);  // padding may be anything
    } else {
      data_ = Bytes(DType::kUInt8, {stored_, blocks_, steps, step});
      std::memset(data_.data(), 0, static_cast<size_t>(data_.size()));
    }
    if (format_row(s_.format).row_scales) {
      row_scales_ = Bytes(DType::kFloat32, {stored_, blocks_, 16});
      for (int64_t i = 0; i < stored_ * blocks_ * 16; ++i) {
        row_scales_.view().as<float>()[i] = std::numeric_limits<float>::quiet_NaN();
      }
    }
    const DType dtype = format_row(s_.format).scales;
    scales_ = Bytes(dtype, {stored_, blocks_, groups_, 16});
    scales_.fill(random);  // of rows of padding: anything
    if (dtype == DType::kFloat32) std::memset(scales_.data(), 0xff, static_cast<size_t>(scales_.size()));
    scale_.resize(static_cast<size_t>(stored_ * s_.N * groups_));
    if (s_.zeros) {
      zeros_ = Bytes(DType::kUInt8, {stored_, blocks_, groups_, 16});
      zeros_.fill(random);
    }
  }
  int64_t code_bits_or(int64_t otherwise) const {
    return s_.format == Format::kGroups ? otherwise : bits_of(s_.format);
  }

  void set_scale(Random& random, int64_t i, int64_t n, int64_t g) {
    const int64_t at = scale_index(i, n, g);
    float scale = static_cast<float>(0.05 + random.unit()) * (random.below(2) == 0 ? 1.0f : -1.0f);
    if (g == 0 && format_row(s_.format).row_scales)
      row_scales_.view().as<float>()[i * blocks_ * 16 + place(n)] = static_cast<float>(0.001 * (1 + random.unit()));
    if (is_integer(s_.format)) {
      auto& stored = scales_.view().as<int8_t>()[at];
      stored = static_cast<int8_t>(random.below(255) - 127);
      scale = stored;
    } else if (s_.format == Format::kNvfp4) {  // e4m3 without a sign
      const int code = static_cast<int>(random.below(0x7f)), exponent = code >> 3, fraction = code & 7;
      scales_.data()[at] = static_cast<uint8_t>(code);
      scale = std::ldexp(static_cast<float>(exponent > 0 ? 8 + fraction : fraction), std::max(exponent, 1) - 10);
    } else if (s_.format == Format::kMxfp4) {
      scales_.data()[at] = static_cast<uint8_t>(120 + random.below(9));
      scale = std::ldexp(1.0f, scales_.data()[at] - 127);
    } else if (s_.format == Format::kGroups) {
      scale = nearest(scale, DType::kFloat16);
      Array one(DType::kFloat16, {1}, 0, 0);
      one.set(scale, 0);
      std::memcpy(scales_.data() + 2 * at, one.view().data, 2);
    } else {
      std::memcpy(scales_.data() + 4 * at, &scale, 4);
    }
    scale_[static_cast<size_t>((i * s_.N + n) * groups_ + g)] = scale;
  }

  void set_code(int64_t i, int64_t n, int64_t c, int code) {
    const int64_t block = place(n) / 16, r = place(n) % 16;
    if (is_integer(s_.format)) {
      const int64_t words = data_.view().shape[2];
      uint8_t* const all = data_.data() + (i * blocks_ + block) * words * 64;
      if (s_.format == Format::kInt8) {
        all[c / 4 * 64 + 4 * r + c % 4] = static_cast<uint8_t>(code);
      } else {
        uint8_t& byte = all[c / 8 * 64 + 4 * r + c % 4];
        byte = static_cast<uint8_t>(c % 8 < 4 ? (byte & 0xf0) | code : (byte & 0x0f) | code << 4);
      }
      return;
    }
    const int64_t k = c % 32, steps = blocks_of(s_.C, 32);
    if (s_.format == Format::kGroups) {
      const int bits = code_bits(i);
      uint8_t* const step =
          data_.data() + (firsts_[static_cast<size_t>(i)] * blocks_ * steps + (block * steps + c / 32) * bits) * 64;
      const int stored = code ^ 1 << (bits - 1);
      const int64_t column = k / 2, half = k % 2;
      const auto put = [&](int64_t vector, int64_t bit, int value, int count) {
        uint16_t word;
        uint8_t* const p = step + 64 * vector + 4 * r + 2 * half;
        std::memcpy(&word, p, 2);
        const int mask = ((1 << count) - 1) << bit;
        word = static_cast<uint16_t>((word & ~mask) | value << bit);
        std::memcpy(p, &word, 2);
      };
      if (bits != 3) {
        put(column / (16 / bits), bits * (column % (16 / bits)), stored, bits);
      } else if (column < 15) {
        put(column / 5, 3 * (column % 5), stored, 3);
      } else {
        for (int q = 0; q < 3; ++q) put(q, 15, stored >> q & 1, 1);
      }
      return;
    }
    uint8_t* const step = data_.data() + ((i * blocks_ + block) * steps + c / 32) * minifloat_step_bytes(s_.format);
    if (s_.format == Format::kFp8) {
      const int64_t j = k % 4;
      step[k / 4 * 64 + 16 * (r / 4) + 8 * (j / 2) + 2 * (r % 4) + j % 2] = static_cast<uint8_t>(code);
      return;
    }
    if (s_.format == Format::kNf4) code ^= kNf4Zero;
    for (int64_t b = 0; b < 4; ++b) {
      const int64_t first = 4 * (b % 2) + b / 2;
      uint8_t& byte = step[k / 8 * 64 + 4 * r + b];
      if (k % 8 == first) byte = static_cast<uint8_t>((byte & 0xf0) | code);
      if (k % 8 == first + 2) byte = static_cast<uint8_t>((byte & 0x0f) | code << 4);
    }
  }

  void describe_weight() {
    weight_ = {.format = s_.format,
               .data = data_.view(),
               .scales = scales_.view(),
               .row_scales = row_scales_.view(),
               .zeros = zeros_.view(),
               .records = records_.view(),
               .rows = s_.N,
               .cols = s_.C,
               .parts = s_.parts,
               .group_size = s_.group};
    if (!s_.permuted) return;
    slots_ = Bytes(DType::kInt32, {s_.E});
    for (int64_t e = 0; e < s_.E; ++e) slots_.view().as<int32_t>()[e] = static_cast<int32_t>(slot(e));
    weight_.slots = slots_.view();
  }

  StoredShape s_;
  int64_t stored_, size_, groups_, part_rows_, blocks_;
  std::vector<int> codes_, bits_;
  std::vector<int64_t> firsts_;
  std::vector<float> scale_;
  Bytes data_, scales_, row_scales_, zeros_, records_, slots_;
  Weight weight_;
};

// ---- rows as the products of integers take them ---------------------------------------------------------------------------------

struct IntegerRow {
  std::vector<int> values;
  std::vector<float> scales;
  int64_t block;
};

template <typename At>
IntegerRow integers_of(const At& x, int64_t columns, int64_t group) {
  IntegerRow row;
  row.block = group > 0 ? std::max(group, kActivationBlock) : columns;
  for (int64_t first = 0; first < columns; first += row.block) {
    float largest = 0.0f;
    for (int64_t c = first; c < std::min(first + row.block, columns); ++c) largest = std::max(largest, std::abs(x(c)));
    const bool is_zero = largest < 0x1p-100f;
    row.scales.push_back(is_zero ? 0.0f : largest / 127.0f);
    const float inverse = is_zero ? 0.0f : 127.0f / largest;
    for (int64_t c = first; c < std::min(first + row.block, columns); ++c) {
      row.values.push_back(static_cast<int>(std::nearbyint(x(c) * inverse)));
    }
  }
  return row;
}

}  // namespace switchgear::test
