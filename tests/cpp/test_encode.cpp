// SPDX-License-Identifier: BSD-3-Clause
// encode_weight on every ISA: weights decode to what the definitions below make of each row, any number of threads writes the
// same bits, and so does every ISA. tests/weights/test_encode.py compares the bits with the definitions in torch.
#include "switchgear/encode.h"

#include "checked_ops.h"
#include "switchgear/gguf.h"
#include "switchgear/groups.h"

namespace switchgear::test {
namespace {

using Row = std::vector<float>;  // a row, or a group of its columns

// ---- numbers -----------------------------------------------------------------------------------------------------------

float inverse(float x) { return x == 0 ? 0 : 1 / x; }
float round_within(float x, float low, float high) { return std::clamp(std::nearbyint(x), low, high); }
float to_half(float x) { return round_to(std::clamp(x, -65504.0f, 65504.0f), DType::kFloat16); }

// The nearest number with some bits of fraction, ties to even.
float round_to_bits(float x, float most, int min_exponent, int fraction) {
  x = std::clamp(x, -most, most);
  const int exponent = x == 0 ? min_exponent : std::max(std::ilogb(x), min_exponent);
  const float spacing = std::ldexp(1.0f, exponent - fraction);
  return std::nearbyint(x / spacing) * spacing;
}
float to_e4m3(float x) { return round_to_bits(x, 448, -6, 3); }
float to_e2m1(float x) { return round_to_bits(x, 6, 0, 1); }

// The nearest number of an ascending table, of two the lower one.
template <typename Table>
float nearest(const Table& table, float x) {
  size_t i = 0;
  while (i + 1 < std::size(table) && x > (double{table[i]} + table[i + 1]) / 2) ++i;
  return table[i];
}
constexpr float kIq4Values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float kMxfp4Values[] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};

// Adds term(number) of all numbers, halves to halves.
template <typename Term>
float sum(const Row& w, Term&& term) {
  Row terms(std::bit_ceil(w.size()));
  std::transform(w.begin(), w.end(), terms.begin(), term);
  for (size_t half = terms.size() / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) terms[i] += terms[i + half];
  }
  return terms[0];
}
float square(float x) { return x * x; }
float itself(float x) { return x; }
float lowest(const Row& w) { return std::min(0.0f, *std::min_element(w.begin(), w.end())); }
float highest(const Row& w) { return std::max(0.0f, *std::max_element(w.begin(), w.end())); }
float largest(const Row& w) {  // the first of several
  return *std::max_element(w.begin(), w.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
}

Row map_row(const Row& w, const auto& function) {
  Row out(w.size());
  std::transform(w.begin(), w.end(), out.begin(), function);
  return out;
}

// function(columns from g · size on, g) of each group of columns.
void for_groups(const Row& w, size_t size, const auto& function) {
  for (size_t begin = 0; begin < w.size(); begin += size) {
    function(Row(w.begin() + begin, w.begin() + std::min(begin + size, w.size())), begin / size);
  }
}
Row join_groups(const Row& w, size_t size, const auto& function) {
  Row out;
  for_groups(w, size, [&](const Row& group, size_t g) {
    const Row some = function(group, g);
    out.insert(out.end(), some.begin(), some.end());
  });
  return out;
}

// ---- integers and groups -----------------------------------------------------------------------------------------------

struct Fit {
  float scale, zero;
};

auto levels_of(Fit fit, float top, float bottom = 0) {
  return [=](float x) { return round_within(x * inverse(fit.scale) + fit.zero, bottom, top); };
}

// The scale with the smallest squared error of scale · (q(x) - zero).
float fit_scale(const Row& w, const auto& q, Fit fit) {
  const float norm = sum(w, [&](float x) { return square(q(x) - fit.zero); });
  return norm > 0 ? sum(w, [&](float x) { return (q(x) - fit.zero) * x; }) / norm : fit.scale;
}

float squared_error(const Row& w, const auto& q, Fit fit) {
  return sum(w, [&](float x) { return square((q(x) - fit.zero) * fit.scale - x); });
}

Fit fit_integers(const Row& w, int64_t bits, bool symmetric) {
  const float top = static_cast<float>((1 << bits) - 1), unit = static_cast<float>(1 << (8 - bits)),
              middle = static_cast<float>(1 << (bits - 1)), count = static_cast<float>(w.size());
  const float low = lowest(w), high = highest(w), extreme = high > -low ? high : low, range = (high - low) / top;
  const auto round_zero = [&](float zero) { return round_within(zero * unit, 0, 255) / unit; };
  if (bits == 8 && symmetric) return {std::abs(extreme) / 127, middle};
  if (bits == 8) return {range, round_zero(-low * inverse(range))};
  constexpr float kShares[] = {1.1f, 1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f}, kEnds[] = {1.03f, 0.95f, 0.87f, 0.79f};
  Fit best{symmetric ? -extreme / middle : range, middle};
  float least = INFINITY;
  for (int i = 0; i < (symmetric ? 7 : 16); ++i) {
    Fit fit{-extreme / middle * kShares[i % 7], middle};
    if (!symmetric) {
      fit.scale = (high * kEnds[i % 4] - low * kEnds[i / 4]) / top;
      fit.zero = round_zero(-low * kEnds[i / 4] * inverse(fit.scale));
    }
    for (int step = 0; step < 2; ++step) {
      const auto levels = levels_of(fit, top);
      if (!symmetric) {
        const float mean = sum(w, levels) / count;
        fit.scale = fit_scale(w, levels, {fit.scale, mean});
        fit.zero = round_zero(mean - sum(w, itself) / count * inverse(fit.scale));
      }
      fit.scale = fit_scale(w, levels, fit);
    }
    const float error = squared_error(w, levels_of(fit, top), fit);
    if (error < least) best = fit, least = error;
  }
  return best;
}

Row as_integers(const Row& w, int64_t bits, size_t size, bool symmetric) {
  std::vector<Fit> fits;
  for_groups(w, size, [&](const Row& group, size_t) { fits.push_back(fit_integers(group, bits, symmetric)); });
  float unit = 0;
  for (const Fit& fit : fits) unit = std::max(unit, std::abs(fit.scale));
  if (fits.size() > 1) unit /= 127;
  return join_groups(w, size, [&](const Row& group, size_t g) {
    const float scale = std::nearbyint(fits[g].scale * inverse(unit)) * unit, zero = fits[g].zero;
    const auto q = levels_of({scale, zero}, static_cast<float>((1 << bits) - 1), bits == 8 && symmetric ? 1 : 0);
    return map_row(group, [&](float x) { return (q(x) - zero) * scale; });
  });
}

Row as_group(const Row& w, int64_t bits, bool symmetric) {
  if (bits == 1) {
    const float scale = to_half(sum(w, [](float x) { return std::abs(x); }) / static_cast<float>(w.size()));
    return map_row(w, [&](float x) { return x * scale >= 0 ? scale : -scale; });
  }
  const float top = static_cast<float>((1 << bits) - 1), middle = static_cast<float>(1 << (bits - 1));
  const float low = lowest(w), high = highest(w);
  constexpr double kShares[] = {1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5};
  constexpr float kEnds[] = {1.0f, 0.85f, 0.7f, 0.55f};
  Fit best{INFINITY, middle};
  float least = INFINITY;
  for (int i = 0; i < (symmetric ? 7 : 16); ++i) {
    Fit fit{(high > -low ? high : low) * static_cast<float>(-kShares[i % 7] / double{middle}), middle};
    if (!symmetric) {
      fit.scale = (high * kEnds[i % 4] - low * kEnds[i / 4]) / top;
      fit.zero = round_within(-low * kEnds[i / 4] * inverse(fit.scale), 0, top);
    }
    fit.scale = to_half(fit_scale(w, levels_of(fit, top), fit));
    const float error = squared_error(w, levels_of(fit, top), fit);
    if (error < least) best = fit, least = error;
  }
  return map_row(w, [&](float x) { return (levels_of(best, top)(x) - best.zero) * best.scale; });
}

// ---- minifloats --------------------------------------------------------------------------------------------------------

// most: the largest magnitude of the numbers that share a scale of fp8, and of nvfp4's part.
Row as_minifloats(Format format, const Row& w, float most) {
  const float amax = std::abs(largest(w)), smallest = 0x1p-126f;
  float scale = 0;
  switch (format) {
    case Format::kFp8: scale = most == 0 ? 1 : std::max(most / 448, smallest); break;
    case Format::kMxfp4: scale = std::ldexp(1.0f, amax == 0 ? -127 : std::max(std::ilogb(amax) - 2, -127)); break;
    case Format::kNf4: scale = amax; break;
    default: {
      const float whole = most == 0 ? 1 : std::max(most / (6 * 448), smallest);
      scale = to_e4m3(amax / 6 / whole) * whole;
    }
  }
  return map_row(w, [&](float x) {
    x = scale == 0 ? 0 : x / scale;
    return (format == Format::kFp8 ? to_e4m3(x) : format == Format::kNf4 ? nearest(kNf4Values, x) : to_e2m1(x)) * scale;
  });
}

// ---- GGUF --------------------------------------------------------------------------------------------------------------

// The scale that removes most of the squares: that of the least-squares fit to round(x / tried), of all tried scales.
float search(const Row& w, const Row& tried, const auto& round) {
  float best = 0, gain = 0;
  for (const float scale : tried) {
    const auto q = [&](float x) { return round(x * inverse(scale)); };
    const float products = sum(w, [&](float x) { return q(x) * x; }),
                squares = std::max(sum(w, [&](float x) { return square(q(x)); }), 1.0f),
                removed = products * products / squares;
    if (removed > gain) best = products / squares, gain = removed;
  }
  return best;
}
float search_scale(const Row& w, float low, float high) {
  Row tried;
  for (int step = -4; step < 5; ++step) tried.push_back(largest(w) / static_cast<float>(double{low} - 0.2 * step));
  return search(w, tried, [&](float x) { return round_within(x, low, high); });
}
float search_table(const Row& w) {
  Row tried;
  for (int end = -139; end < -112; end += 3) tried.push_back(largest(w) / static_cast<float>(end));
  for (int end = 101; end < 128; end += 3) tried.push_back(largest(w) / static_cast<float>(end));
  return search(w, tried, [](float x) { return nearest(kIq4Values, round_within(x, -128, 127)); });
}

// The scale and the min, at least 0, of w = scale · q - min, 0 <= q <= most.
Fit search_range(const Row& w, float most) {
  const float low = lowest(w), high = *std::max_element(w.begin(), w.end()), count = static_cast<float>(w.size());
  Fit best{(high - low) / most, -low};
  float least = INFINITY;
  for (int step = -4; step < 9; step += 2) {
    const float inverted = inverse(high - low) * static_cast<float>(double{most} + 0.1 * step);
    const auto q = [&](float x) { return round_within((x - low) * inverted, 0, most); };
    const float sums = sum(w, q), squares = sum(w, [&](float x) { return square(q(x)); }), of_x = sum(w, itself),
                products = sum(w, [&](float x) { return q(x) * x; }), determinant = count * squares - sums * sums;
    if (!(determinant > 0)) continue;
    float scale = (count * products - sums * of_x) / determinant,
          offset = (squares * of_x - sums * products) / determinant;
    if (offset > 0) scale = products / std::max(squares, 1.0f), offset = 0;
    const float error = sum(w, [&](float x) { return square(scale * q(x) + offset - x); });
    if (error < least && scale > 0) best = {scale, -offset}, least = error;
  }
  return best;
}

// Factors of groups as a float16 times integers.
Row round_factors(const Row& factors, float low, float high) {
  const float d = to_half(largest(factors) / (low != 0 ? low : high));
  return map_row(factors, [&](float factor) { return d * round_within(factor * inverse(d), low, high); });
}

Row as_scaled(const Row& w, size_t size, const auto& find, float low, float high, const auto& round) {
  Row found;
  for_groups(w, size, [&](const Row& group, size_t) { found.push_back(find(group)); });
  const Row scales = round_factors(found, low, high);
  return join_groups(w, size, [&](const Row& group, size_t g) {
    return map_row(group, [&](float x) { return scales[g] * round(x * inverse(scales[g])); });
  });
}
Row as_scaled_integers(const Row& w, float low, float high, float least, float most) {
  const auto find = [&](const Row& group) { return search_scale(group, low, high); };
  return as_scaled(w, 16, find, least, most, [&](float x) { return round_within(x, low, high); });
}

Row as_lowered(const Row& w, size_t size, float most, float factor) {
  Row found, lowered;
  for_groups(w, size, [&](const Row& group, size_t) {
    const Fit fit = search_range(group, most);
    found.push_back(fit.scale), lowered.push_back(fit.zero);
  });
  const Row scales = round_factors(found, 0, factor), mins = round_factors(lowered, 0, factor);
  return join_groups(w, size, [&](const Row& group, size_t g) {
    return map_row(group, [&](float x) {
      return scales[g] * round_within((x + mins[g]) * inverse(scales[g]), 0, most) - mins[g];
    });
  });
}

Row as_symmetric(const Row& w, float middle) {
  const float d = largest(w) / -middle;
  return map_row(w, [&](float x) {
    const float code = std::clamp(std::trunc(x * inverse(d) + (middle + 0.5f)), 0.0f, 2 * middle - 1);
    return to_half(d) * (code - middle);
  });
}
Row as_between(const Row& w, float most) {
  const auto [low, high] = std::minmax_element(w.begin(), w.end());
  const float d = (*high - *low) / most, m = *low;
  return map_row(w, [&](float x) {
    const float code = std::clamp(std::trunc((x - m) * inverse(d) + 0.5f), 0.0f, most);
    return to_half(d) * code + to_half(m);
  });
}

Row as_block(Format format, const Row& w) {
  const auto nearest_iq4 = [](float x) { return nearest(kIq4Values, x); };
  const float most = std::abs(largest(w));
  switch (format) {
    case Format::kQ80:
      return map_row(w, [&](float x) {
        return to_half(most / 127) * round_within(std::round(x * inverse(most / 127)), -127, 127);
      });
    case Format::kQ40: return as_symmetric(w, 8);
    case Format::kQ41: return as_between(w, 15);
    case Format::kQ50: return as_symmetric(w, 16);
    case Format::kQ51: return as_between(w, 31);
    case Format::kIq4Nl: {
      const float d = to_half(search_table(w));
      return map_row(w, [&](float x) { return d * nearest_iq4(x * inverse(d)); });
    }
    case Format::kMxfp4Gguf: {
      const float unit = std::ldexp(1.0f, most == 0 ? -128 : std::max(std::ilogb(most) - 3, -128));
      return map_row(w, [&](float x) { return std::copysign(nearest(kMxfp4Values, std::abs(x) / unit), x) * unit; });
    }
    case Format::kQ2K: return as_lowered(w, 16, 3, 15);
    case Format::kQ3K: return as_scaled_integers(w, -4, 3, -32, 31);
    case Format::kQ4K: return as_lowered(w, 32, 15, 63);
    case Format::kQ5K: return as_lowered(w, 32, 31, 63);
    case Format::kQ6K: return as_scaled_integers(w, -32, 31, -128, 127);
    default: return as_scaled(w, 32, search_table, -32, 31, nearest_iq4);
  }
}

// ---- weights -----------------------------------------------------------------------------------------------------------

struct Kind {
  Format format;
  int64_t bits, group_size = 0;
  bool symmetric = true;
  int64_t scale_rows = 1;
};
constexpr Kind kKinds[] = {
    {Format::kInt8, 8},       {Format::kInt8, 8, 32, false},   {Format::kInt4, 4, 32},   {Format::kInt4, 4, 0, false},
    {Format::kGroups, 1, 32}, {Format::kGroups, 2, 64, false}, {Format::kGroups, 3, 32}, {Format::kGroups, 3, 0, false},
    {Format::kGroups, 4, 32}, {Format::kFp8, 8, 32, true, 16}, {Format::kFp8, 8},        {Format::kMxfp4, 4, 32},
    {Format::kNf4, 4, 64},    {Format::kNvfp4, 4, 16},
};

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kParts = 2, kPartRows = 19, kRows = kParts * kPartRows;

// Memory for a weight.
struct Stored {
  Stored(const Kind& kind, int64_t cols) : kind(kind), cols(cols), size(kind.group_size == 0 ? cols : kind.group_size) {
    const auto row = format_row(kind.format);
    const int64_t blocks = kParts * ceil_of(kPartRows, 16), steps = ceil_of(cols, 32);
    const std::vector<int64_t> by_group{1, blocks, ceil_of(cols, size), 16};
    if (is_gguf(kind.format)) {
      const auto [columns, bytes] = gguf_type(kind.format);
      data = Array(DType::kUInt8, {1, kParts, kPartRows, cols / columns * bytes}, 0, 0);
      return;
    }
    scales = Array(row.scales, by_group, 0, 0);
    if (!kind.symmetric) zeros = Array(DType::kUInt8, by_group, 0, 0);
    if (row.row_scales) row_scales = Array(DType::kFloat32, {1, blocks, 16}, 0, 0);
    if (is_integer(kind.format)) {
      data = Array(DType::kUInt8, {1, blocks, ceil_of(cols, 8) * kind.bits / 4, 64}, 0, 0);
    } else if (is_minifloat(kind.format)) {
      data = Array(DType::kUInt8, {1, blocks, steps, 64 * kind.bits}, 0, 0);
    } else {
      data = Array(DType::kUInt8, {kind.bits, blocks, steps, 64}, 0, 0);
      records = Array(DType::kInt32, {1, 2}, 0, 0);
      records.set_id(0, 0, 0), records.set_id(static_cast<int32_t>(kind.bits), 0, 1);
    }
  }
  Weight weight() const {
    return {.format = kind.format,
            .data = data,
            .scales = scales,
            .row_scales = row_scales,
            .zeros = zeros,
            .records = records,
            .rows = kRows,
            .cols = cols,
            .parts = kParts,
            .group_size = kind.group_size};
  }
  Encoded encode(const Array& numbers, Execution exec) const {
    return encode_weight(numbers, weight(), kind.scale_rows, exec);
  }

  // Decodes to float32 by the product of the unit matrix, whose sums have one number.
  Array decode() const {
    Array unit(DType::kFloat32, {kRows, kRows}), out(DType::kFloat32, {kRows, cols}), offsets(DType::kInt32, {2});
    unit.fill([](int64_t i) { return i / kRows == i % kRows; });
    offsets.fill([](int64_t i) { return i * kRows; });
    grouped_gemm({.x = unit, .weight = weight(), .expert_offsets = offsets, .out = out, .transposed = true}, {1});
    return out;
  }

  Kind kind;
  int64_t cols, size;
  Array data, scales, row_scales, zeros, records;
};

// The rows that a weight decodes to, by definition.
std::vector<Row> define(const Kind& kind, const std::vector<Row>& rows) {
  const size_t size = kind.group_size == 0 ? rows[0].size() : static_cast<size_t>(kind.group_size);
  std::vector<Row> out;
  for (int64_t n = 0; n < kRows; ++n) {
    const Row& row = rows[static_cast<size_t>(n)];
    // The rows that share a scale.
    const int64_t part = n / kPartRows * kPartRows, end = part + kPartRows,
                  first = kind.format == Format::kNvfp4 ? part : part + (n - part) / kind.scale_rows * kind.scale_rows,
                  last = kind.format == Format::kNvfp4 ? end : std::min(first + kind.scale_rows, end);
    out.push_back(join_groups(row, size, [&](const Row& group, size_t g) {
      if (is_gguf(kind.format)) return as_block(kind.format, group);
      if (kind.format == Format::kGroups) return as_group(group, kind.bits, kind.symmetric);
      float most = 0;
      for (int64_t r = first; r < last; ++r) {
        for_groups(rows[static_cast<size_t>(r)], size, [&](const Row& other, size_t at) {
          if (at == g || kind.format == Format::kNvfp4) most = std::max(most, std::abs(largest(other)));
        });
      }
      return as_minifloats(kind.format, group, most);
    }));
    if (is_integer(kind.format)) out.back() = as_integers(row, kind.bits, size, kind.symmetric);
  }
  return out;
}

std::vector<Kind> all_kinds() {
  std::vector<Kind> kinds(std::begin(kKinds), std::end(kKinds));
  for (int number = static_cast<int>(Format::kQ80); number <= static_cast<int>(kLastFormat); ++number) {
    const auto format = static_cast<Format>(number);
    kinds.push_back({format, bits_of(format), gguf_type(format).columns});
  }
  return kinds;
}

// Rows of various numbers, or of numbers as large as `smallest`, and of some whose squares float32 does not hold.
Array numbers_of(DType dtype, int64_t cols, float smallest = 0) {
  Random random(5);
  Array numbers(dtype, {kRows, cols}, 3);
  numbers.fill([&](int64_t i) -> float {
    const float x = random.normal();
    const int64_t row = i / cols;
    if (smallest > 0) return x * (row % 3 == 0 ? smallest : row % 3 == 1 ? 1e-7f : 1e37f);
    switch (row % 8) {
      case 0: return i % cols == 3 ? 30 * x : x;
      case 1: return 0.37f;
      case 2: return x < 0 ? -0.0f : 0.0f;
      case 3: return std::abs(x) + 1;
      case 4: return -std::abs(x) - 1;
      case 5: return std::nearbyint(4 * x) / 2;
      case 6: return x * x * x / 100;
      default: return x;
    }
  });
  return numbers;
}

void check_rows(const Array& got, const std::vector<Row>& want) {
  for (int64_t n = 0; n < got.size(0); ++n) {
    for (int64_t c = 0; c < got.size(1); ++c) {
      const float value = want[static_cast<size_t>(n)][static_cast<size_t>(c)];
      CHECK(got(n, c) == value, "[", n, ", ", c, "] is ", got(n, c), ", not ", value);
    }
  }
}

TEST(weights_decode_to_what_their_definitions_say) {
  for (const Kind& kind : all_kinds()) {
    const bool has_blocks = is_gguf(kind.format);
    const int64_t wide = has_blocks ? 256 + kind.group_size : 70, narrow = has_blocks ? kind.group_size : 5;
    const auto check = [&](const Array& numbers) {
      const int64_t cols = numbers.size(1);
      note = join(name_of(kind.format), " ", kind.bits, " bits, group ", kind.group_size, ", ", cols, " columns ",
                  name_of(numbers.view().dtype));
      Stored stored(kind, cols);
      std::vector<Row> rows(static_cast<size_t>(kRows));
      for (int64_t n = 0; n < kRows; ++n) {
        for (int64_t c = 0; c < cols; ++c) rows[static_cast<size_t>(n)].push_back(numbers(n, c));
      }
      std::vector<Array> first;
      for_each_isa(
          {&stored.data, &stored.scales, &stored.row_scales, &stored.zeros},
          [&](Execution exec) { CHECK(stored.encode(numbers, exec).is_finite); },
          [&] {
            const std::vector<Array> all{stored.data, stored.scales, stored.row_scales, stored.zeros};
            if (first.empty()) first = all, check_rows(stored.decode(), define(kind, rows));
            for (size_t i = 0; i < all.size(); ++i) CHECK(same_bits(first[i], all[i]), "tensor ", i, " of this ISA");
          },
          Isas::kAll);
    };
    check(numbers_of(DType::kFloat32, wide));
    check(numbers_of(DType::kBFloat16, narrow));
    check(numbers_of(DType::kFloat16, narrow));
    if (kind.format == Format::kGroups) continue;  // float16 does not hold scales of the others
    const bool has_subnormals = is_minifloat(kind.format) || kind.format == Format::kMxfp4Gguf;
    check(numbers_of(DType::kFloat32, narrow, has_subnormals ? 1e-43f : 1e-36f));
  }
}

TEST(decoded_minifloats_are_encoded_exactly) {
  for (const Kind& kind : all_kinds()) {
    if (!is_minifloat(kind.format)) continue;
    note = name_of(kind.format);
    Stored stored(kind, 70);
    for_each_isa(
        {}, [&](Execution exec) { CHECK(!stored.encode(numbers_of(DType::kFloat32, 70), exec).is_exact); },
        [&] {
          Array decoded = stored.decode();
          const bool is_exact = stored.encode(decoded, {2}).is_exact;
          CHECK(is_exact || kind.format != Format::kMxfp4);
          CHECK(is_exact == same_bits(decoded, stored.decode()));
          decoded.set(decoded(kRows - 1, 69) * 1.02f, kRows - 1, 69);
          CHECK(!stored.encode(decoded, {2}).is_exact, "the last number");
        });
  }
}

TEST(arguments_are_checked) {
  const Array numbers = numbers_of(DType::kFloat32, 32);
  const Stored stored({Format::kMxfp4, 4, 32}, 32);
  const auto refuses = [&](std::string_view start, const auto& change, int64_t scale_rows = 1) {
    Weight weight = stored.weight();
    change(weight);
    const std::string complaint = complaint_of([&] { encode_weight(numbers, weight, scale_rows); });
    CHECK(complaint.starts_with(start), complaint);
  };
  const auto keep = [](Weight&) {};
  const Array slots(DType::kInt32, {1});
  refuses("weight: expected a format that rounds", [](Weight& w) { w.format = Format::kPlain; });
  refuses("weight_slots: expected none", [&](Weight& w) { w.slots = slots; });
  refuses("weight: expected matrices", [](Weight& w) { w.cols = 31; });
  refuses("weight: expected memory of its own", [&](Weight& w) { w.scales.data = numbers.view().data; });
  for (const int64_t scale_rows : {-16, 0, 8, 24}) refuses("scale_rows: expected 1 or a multiple", keep, scale_rows);
}

TEST(numbers_that_are_not_finite_are_found) {
  struct Bad {
    DType dtype;
    float value;
    int64_t row, from_last;
  };
  for (const Kind& kind : all_kinds()) {
    const int64_t cols = is_gguf(kind.format) ? kind.group_size : 37;
    for (const auto& [dtype, value, row, from_last] : {Bad{DType::kFloat32, NAN, kPartRows, 2},
                                                       {DType::kBFloat16, -INFINITY, 0, cols},
                                                       {DType::kFloat16, INFINITY, kRows - 1, 1}}) {
      note = join(name_of(kind.format), " ", name_of(dtype));
      Stored stored(kind, cols);
      Array numbers = numbers_of(dtype, cols);
      numbers.set(value, row, cols - from_last);
      for_each_isa({}, [&](Execution exec) { CHECK(!stored.encode(numbers, exec).is_finite); }, [] {}, Isas::kAll);
    }
  }
}

}  // namespace
}  // namespace switchgear::test
