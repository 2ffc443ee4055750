// SPDX-License-Identifier: BSD-3-Clause
// EncodeKernels::encode_rows. Lane l of each vector is row l of the matrix: each kLanes x kLanes numbers are transposed once,
// then groups of columns are reduced, and codes become words of the storage, without shuffles. Included after simd_<isa>.h.
//
//   format            operations a weight                                                            bound
//   int4, groups      33 for each tried share of a group's range: 7 shares, 16 pairs of them if      arithmetic
//                     there are zeros
//   int8, minifloats  10 to 40                                                                       memory, with some cores
//
// A sum adds the halves of a group, filled up to a power of two with zeros, until one number is left, so it has the same bits
// in vectors of any length.
#pragma once
#include <bit>

#include "encoders.h"
#include "minifloat_values.h"
#include "switchgear/groups.h"

namespace switchgear::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr const Float16* kHalf = nullptr;

inline Ints bits_of(Floats x) { return reinterpret_cast<Ints>(x); }
inline Floats from_bits(Ints x) { return reinterpret_cast<Floats>(x); }
inline Floats choose(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Ints choose(Ints mask, Ints yes, Ints no) { return mask ? yes : no; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints magnitude_bits(Floats x) { return bits_of(x) & 0x7fffffff; }
inline Floats absolute(Floats x) { return from_bits(magnitude_bits(x)); }
inline Floats inverse(Floats scale) { return choose(scale == broadcast(0), Floats{}, 1 / scale); }
inline Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// Keeps NaN.
inline Floats clamp(Floats x, float low, float high) {
  x = choose(x < broadcast(low), broadcast(low), x);
  return choose(x > broadcast(high), broadcast(high), x);
}

// The nearest integers, ties to even; |x| <= 2^22.
inline Floats round_small(Floats x) { return x + 0x1.8p23f - 0x1.8p23f; }

inline Floats without_nan(Floats x) { return choose(x == x, x, Floats{}); }

// The nearest numbers of a type, ties to even, widened.
inline Floats round_to(const float*, Floats x) { return x; }
inline Floats round_to(const Float16*, Floats x) {
  Float16 halves[kLanes];
  store(halves, x);
  return load(halves);
}
inline Floats round_to(const BFloat16*, Floats x) {  // no NaN
  const Ints bits = bits_of(x);
  return from_bits((bits + 0x7fff + (bits >> 16 & 1)) & static_cast<int32_t>(0xffff0000));
}

// ---- numbers ------------------------------------------------------------------------------------------------------------

// function(pointer of the dtype)
template <typename Function>
auto with_numbers(DType dtype, const void* numbers, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16: return function(static_cast<const BFloat16*>(numbers));
    case DType::kFloat16: return function(static_cast<const Float16*>(numbers));
    default: return function(static_cast<const float*>(numbers));
  }
}

// The next numbers of a row, zeros past the last.
template <typename T>
Floats load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T some[kLanes] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return load(some);
}

// max |x| by the bits of magnitudes, of which NaN has the largest.
inline float largest_lane(Ints magnitudes) {
  int32_t most = 0;
  for (int l = 0; l < kLanes; ++l) most = magnitudes[l] > most ? magnitudes[l] : most;
  return std::bit_cast<float>(most);
}
template <typename T>
float largest_magnitude(const T* numbers, int64_t count) {
  Ints most{};
  for (int64_t c = 0; c < count; c += kLanes) most = larger(magnitude_bits(load_some(numbers + c, count - c)), most);
  return largest_lane(most);
}

// kLanes rows of a matrix, or the first `count` of them and zeros.
template <typename T>
struct Lanes {
  const T* from;
  int64_t stride, count;
  Ints largest{};  // bits of the magnitudes read

  Ints mask() const {
    Ints mask;
    for (int l = 0; l < kLanes; ++l) mask[l] = l < count ? -1 : 0;
    return mask;
  }
  bool are_finite() const { return largest_lane(largest) < kInfinity; }

  // Columns [begin, begin + columns), and zeros up to a multiple of kLanes.
  void read(int64_t begin, int64_t columns, Floats* w) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Floats v[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const T* const p = from + l * stride + begin + c;
        v[l] = l < count ? load_some(p, columns - c) : Floats{};
      }
      transpose(v);
      for (int l = 0; l < kLanes; ++l) {
        w[c + l] = v[l];
        largest = larger(magnitude_bits(v[l]), largest);
      }
    }
  }
};

template <typename Number>
void store_lanes(Ints numbers, Number* out) {
  for (int l = 0; l < kLanes; ++l) out[l] = static_cast<Number>(numbers[l]);
}
inline void store_words(Ints words, uint8_t* out) { __builtin_memcpy(out, &words, sizeof words); }

// ---- fits ---------------------------------------------------------------------------------------------------------------

// The same `count` columns of kLanes rows.
struct Group {
  const Floats* w;
  int64_t count;
  Floats* q;      // levels
  Floats* terms;  // of a sum: half as many as the power of two that holds `count`
  Floats low{}, high{};

  void find_range() {
    low = high = Floats{};
    for (int64_t i = 0; i < count; ++i) low = choose(w[i] < low, w[i], low), high = choose(w[i] > high, w[i], high);
  }

  template <typename Term>
  Floats sum(Term&& term) const {
    if (count == 1) return term(0);
    int64_t half = 1;
    while (2 * half < count) half *= 2;
    const int64_t pairs = count - half;
    for (int64_t i = 0; i < pairs; ++i) terms[i] = term(i) + term(i + half);
    for (int64_t i = pairs; i < half; ++i) terms[i] = term(i);
    for (half /= 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) terms[i] += terms[i + half];
    }
    return terms[0];
  }
  Floats extreme() const { return choose(high > -low, high, low); }
};

struct Fit {
  Floats scale, zero;
};

// The first of `count` fits, try_fit(i), with the smallest sum of (scale · (q - zero) - w)²; `best` if no sum is finite.
template <typename TryFit>
Fit best_of(const Group& group, Fit best, int count, TryFit&& try_fit) {
  Floats least = broadcast(kInfinity);
  for (int i = 0; i < count; ++i) {
    const Fit fit = try_fit(i);
    const Floats error = group.sum([&](int64_t c) {
      const Floats difference = (group.q[c] - fit.zero) * fit.scale - group.w[c];
      return difference * difference;
    });
    const Ints better = error < least;
    best.scale = choose(better, fit.scale, best.scale), best.zero = choose(better, fit.zero, best.zero);
    least = choose(better, error, least);
  }
  return best;
}

void set_levels(const Group& group, Fit fit, float lowest, float top) {
  const Floats inverted = inverse(fit.scale);
  for (int64_t c = 0; c < group.count; ++c) {
    group.q[c] = round_small(clamp(group.w[c] * inverted + fit.zero, lowest, top));
  }
}

// The scale that fits levels best, with a given zero.
Floats fit_scale(const Group& group, Fit fit) {
  const Floats norm = group.sum([&](int64_t c) { return (group.q[c] - fit.zero) * (group.q[c] - fit.zero); });
  const Floats products = group.sum([&](int64_t c) { return (group.q[c] - fit.zero) * group.w[c]; });
  return choose(norm > broadcast(0), products / norm, fit.scale);
}

// ---- int8 and int4 ------------------------------------------------------------------------------------------------------

constexpr float kShares[] = {1.1f, 1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f};
constexpr float kShareOfEnd[] = {1.03f, 0.95f, 0.87f, 0.79f};
constexpr int kSteps = 2;

Floats round_zero(Floats zero, float unit) { return round_small(clamp(zero * unit, 0, 255)) / unit; }

Fit fit_integers(const Group& group, int bits, bool symmetric) {
  const auto top = static_cast<float>((1 << bits) - 1);
  const Floats middle = broadcast(static_cast<float>(1 << (bits - 1)));
  const auto unit = static_cast<float>(1 << (8 - bits));
  const Floats low = group.low, high = group.high;
  if (bits == 8) {
    if (symmetric) return {absolute(group.extreme()) / 127, middle};
    const Floats scale = (high - low) / top;
    return {scale, round_zero(-low * inverse(scale), unit)};
  }
  if (symmetric) {
    const Floats start = -group.extreme() / middle;
    return best_of(group, {start, middle}, sizeof kShares / sizeof *kShares, [&](int i) {
      Fit fit{start * kShares[i], middle};
      for (int step = 0; step < kSteps; ++step) {
        set_levels(group, fit, 0, top);
        fit.scale = fit_scale(group, fit);
      }
      set_levels(group, fit, 0, top);
      return fit;
    });
  }
  const auto count = static_cast<float>(group.count);
  const Floats mean_w = group.sum([&](int64_t c) { return group.w[c]; }) / count;
  constexpr int kEnds = sizeof kShareOfEnd / sizeof *kShareOfEnd;
  return best_of(group, {(high - low) / top, middle}, kEnds * kEnds, [&](int i) {
    const float low_share = kShareOfEnd[i / kEnds], high_share = kShareOfEnd[i % kEnds];
    Fit fit{(high * high_share - low * low_share) / top, {}};
    fit.zero = round_zero(-low * low_share * inverse(fit.scale), unit);
    for (int step = 0; step < kSteps; ++step) {
      set_levels(group, fit, 0, top);
      const Floats mean = group.sum([&](int64_t c) { return group.q[c]; }) / count;
      fit.scale = fit_scale(group, {fit.scale, mean});
      fit.zero = round_zero(mean - mean_w * inverse(fit.scale), unit);
      fit.scale = fit_scale(group, fit);
    }
    set_levels(group, fit, 0, top);
    return fit;
  });
}

// ---- groups -------------------------------------------------------------------------------------------------------------

constexpr double kGroupShares[] = {1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5};
constexpr float kGroupShareOfEnd[] = {1.0f, 0.85f, 0.7f, 0.55f};

void set_group_levels(const Group& group, Fit fit, int bits) {
  if (bits == 1) {
    for (int64_t c = 0; c < group.count; ++c) {
      group.q[c] = choose(group.w[c] * fit.scale >= broadcast(0), broadcast(1), Floats{});
    }
    return;
  }
  set_levels(group, fit, 0, static_cast<float>((1 << bits) - 1));
  for (int64_t c = 0; c < group.count; ++c) group.q[c] = without_nan(group.q[c]);
}

Fit fit_group(const Group& group, int bits, bool symmetric) {
  const auto top = static_cast<float>((1 << bits) - 1), half = static_cast<float>(1 << (bits - 1));
  if (bits == 1) {
    const Floats sum = group.sum([&](int64_t c) { return absolute(group.w[c]); });
    return {round_to(kHalf, sum / static_cast<float>(group.count)), Floats{}};
  }
  const Floats low = group.low, high = group.high;
  constexpr int kEnds = sizeof kGroupShareOfEnd / sizeof *kGroupShareOfEnd;
  const int count = symmetric ? sizeof kGroupShares / sizeof *kGroupShares : kEnds * kEnds;
  return best_of(group, {broadcast(kInfinity), broadcast(half)}, count, [&](int i) {
    Fit fit{{}, broadcast(half)};
    if (symmetric) {
      fit.scale = group.extreme() * static_cast<float>(-kGroupShares[i] / double{half});
    } else {
      const float low_share = kGroupShareOfEnd[i / kEnds], high_share = kGroupShareOfEnd[i % kEnds];
      fit.scale = (high * high_share - low * low_share) / top;
      fit.zero = without_nan(round_small(clamp(-low * low_share * inverse(fit.scale), 0, top)));
    }
    set_group_levels(group, fit, bits);
    fit.scale = round_to(kHalf, fit_scale(group, fit));
    set_group_levels(group, fit, bits);
    return fit;
  });
}

// ---- integers and groups ------------------------------------------------------------------------------------------------

template <typename T>
struct Levels {
  const RowsToEncode& rows;
  int64_t first;  // lane of the block
  Lanes<T>& lanes;
  Ints mask = lanes.mask();
  int64_t size = rows.group_size < rows.columns ? rows.group_size : rows.columns;
  int64_t num_groups = (rows.columns + size - 1) / size;
  Floats* w = reinterpret_cast<Floats*>(rows.scratch);
  Floats* q = w + (size + 15) / 16 * 16;
  Fit* fits = reinterpret_cast<Fit*>(q + (size + 15) / 16 * 16);
  Floats* terms = reinterpret_cast<Floats*>(fits + num_groups);

  Group read(int64_t g) {
    const int64_t begin = g * size, count = size < rows.columns - begin ? size : rows.columns - begin;
    lanes.read(begin, count, w);
    Group group{w, count, q, terms};
    group.find_range();
    return group;
  }
  // The levels of a column, 0 past the last one.
  Ints level(const Group& group, int64_t c) const {
    return c < group.count ? to_ints(without_nan(group.q[c])) & mask : Ints{};
  }
  template <typename Number>
  Number* at(void* tensor, int64_t g) const {
    return static_cast<Number*>(tensor) + g * kEncodedRows + first;
  }
  void store_zeros(int64_t g, Floats zero) const {
    if (rows.zeros != nullptr) store_lanes(to_ints(without_nan(zero)) & mask, at<uint8_t>(rows.zeros, g));
  }

  void encode_integers() {
    const int bits = static_cast<int>(bits_of(rows.format));
    const bool symmetric = rows.zeros == nullptr;
    Floats largest{};
    for (int64_t g = 0; g < num_groups; ++g) {
      fits[g] = fit_integers(read(g), bits, symmetric);
      largest = choose(absolute(fits[g].scale) > largest, absolute(fits[g].scale), largest);
    }
    const Floats unit = num_groups == 1 ? largest : largest / 127;
    store(at<float>(rows.row_scales, 0), from_bits(bits_of(unit) & mask));
    const float top = static_cast<float>((1 << bits) - 1), lowest = bits == 8 && symmetric ? 1 : 0;
    for (int64_t g = 0; g < num_groups; ++g) {
      const Group group = read(g);
      const Floats code = round_small(fits[g].scale * inverse(unit));
      set_levels(group, {code * unit, fits[g].zero}, lowest, top);
      store_lanes(to_ints(without_nan(code)) & mask, at<int8_t>(rows.scales, g));
      store_zeros(g, fits[g].zero * static_cast<float>(1 << (8 - bits)));
      uint8_t* out = rows.data + g * size * bits * 2 + 4 * first;  // 64 bytes for 4 or 8 columns
      for (int64_t c = 0; c < group.count; c += 8) {
        Ints words[2] = {};
        for (int j = 0; j < 4; ++j) {
          words[0] |= level(group, c + j) << 8 * j;
          words[1] |= level(group, c + 4 + j) << 8 * j;
        }
        if (bits == 4) {
          store_words(words[0] | words[1] << 4, out);
        } else {
          store_words(words[0], out), store_words(words[1], out + 64);
        }
        out += 16 * bits;
      }
    }
  }

  template <int kBits>
  void encode_groups() {
    constexpr int kCodes = 16 / kBits;  // of a half of a word
    for (int64_t g = 0; g < num_groups; ++g) {
      const Group group = read(g);
      const Fit fit = fit_group(group, kBits, rows.zeros == nullptr);
      set_group_levels(group, fit, kBits);
      store(at<Float16>(rows.scales, g), from_bits(bits_of(fit.scale) & mask));
      store_zeros(g, fit.zero);
      for (int64_t c = 0; c < group.count; c += kMinifloatColumns) {
        const auto code = [&](int i) {  // 0 past the last column and row
          const Ints flipped = level(group, c + i) ^ (1 << (kBits - 1));
          return c + i < group.count ? flipped & mask : Ints{};
        };
        uint8_t* out = rows.data + (g * size + c) / kMinifloatColumns * kBits * kPlaneBytes + 4 * first;
        for (int v = 0; v < kBits; ++v, out += kPlaneBytes) {
          Ints words{};
          for (int i = 0; i < kCodes; ++i) {
            for (int half = 0; half < 2; ++half) words |= code(2 * (v * kCodes + i) + half) << (kBits * i + 16 * half);
          }
          if (kBits == 3) words |= (code(30) >> v & 1) << 15 | (code(31) >> v & 1) << 31;
          store_words(words, out);
        }
      }
    }
  }
};

// ---- minifloats ---------------------------------------------------------------------------------------------------------

// The nearest e2m1 of finite numbers, ties to even, at most ±6. The spacing of values is 0.5 up to 2, 1 up to 4, then 2: the
// code is the minimum of x, x + 2 and x + 4 in these units, each rounded.
inline Ints e2m1_codes(Floats x) {
  const Floats size = absolute(x);
  const Floats one = round_small(clamp(size, 0, 8) * 2), two = round_small(clamp(size, 0, 8)) + 2,
               four = round_small(clamp(size, 0, 8) * 0.5f) + 4;
  Floats code = choose(two < one, two, one);
  code = clamp(choose(four < code, four, code), 0, 7);
  return to_ints(code) | (bits_of(x) >> 28 & 8);
}

// The nearest e4m3 of |x| <= 448, ties to even.
inline Ints e4m3_codes(Floats x) {
  const Ints bits = magnitude_bits(x);
  const Ints small = bits_of(absolute(x) + 0x1p14f) - (141 << 23);  // multiples of 2^-9
  const Ints normal = (bits + 0x7ffff + (bits >> 20 & 1) - (120 << 23)) >> 20;
  return choose(bits < (121 << 23), small, normal) | (bits_of(x) >> 24 & 0x80);
}

inline Floats largest_of(const Floats* w, int count) {
  Ints most{};
  for (int i = 0; i < count; ++i) most = larger(magnitude_bits(w[i]), most);
  return from_bits(most);
}

// kGroup columns of kLanes rows: writes their codes and scales, and returns what a value of a code is multiplied by.
template <Format kFormat>
struct Rule;

template <>
struct Rule<Format::kFp8> {
  static constexpr int kGroup = 32;  // or a multiple, or all columns

  static Floats encode(const RowsToEncode& rows, const Floats* w, Ints* q, int64_t column, int64_t first) {
    const Floats scale = load(static_cast<const float*>(rows.scales) + column / rows.group_size * kEncodedRows + first);
    const Floats divisor = choose(scale == broadcast(0), broadcast(1), scale);  // of rows of padding
    for (int i = 0; i < kGroup; ++i) q[i] = e4m3_codes(clamp(w[i] / divisor, -448, 448));
    return scale;
  }
};

template <>
struct Rule<Format::kMxfp4> {
  static constexpr int kGroup = 32;

  static Floats encode(const RowsToEncode& rows, const Floats* w, Ints* q, int64_t column, int64_t first) {
    Ints scale = (bits_of(largest_of(w, kGroup)) >> 23) - 2;
    scale = choose(scale < 0, Ints{}, scale);
    const Floats factor = from_bits((254 - scale) << 23);
    Ints six{}, odd{};  // whether there is a 6; a 0.5 or a 1.5
    for (int i = 0; i < kGroup; ++i) {
      q[i] = e2m1_codes(w[i] * factor);
      six |= (q[i] & 7) == 7, odd |= (q[i] & 5) == 1;
    }
    const Ints halve = six & ~odd;
    for (int i = 0; i < kGroup; ++i) {
      const Ints halved = choose((q[i] & 7) >= 4, q[i] - 2, (q[i] & 8) | (q[i] & 7) >> 1);
      q[i] = choose(halve, halved, q[i]);
    }
    scale -= halve;
    store_lanes(scale, static_cast<uint8_t*>(rows.scales) + column / kGroup * kEncodedRows + first);
    return from_bits(choose(scale == 0, Ints{} + 0x00400000, scale << 23));
  }
};

template <>
struct Rule<Format::kNf4> {
  static constexpr int kGroup = 64;

  // The largest float32 up to the middle of two neighbours: what is above one is above the other.
  struct Thresholds {
    float values[15];

    consteval Thresholds() : values{} {
      for (int i = 0; i < 15; ++i) {
        const double middle = (double{kNf4Values[i]} + kNf4Values[i + 1]) / 2;
        const auto nearest = static_cast<float>(middle);
        const int32_t bits = std::bit_cast<int32_t>(nearest);
        values[i] = nearest > middle ? std::bit_cast<float>(bits + (bits < 0 ? 1 : -1)) : nearest;
      }
    }
  };

  static Floats encode(const RowsToEncode& rows, const Floats* w, Ints* q, int64_t column, int64_t first) {
    static constexpr Thresholds kThresholds;
    const Floats scale = largest_of(w, kGroup), divisor = choose(scale == broadcast(0), broadcast(1), scale);
    for (int i = 0; i < kGroup; ++i) {
      const Floats x = w[i] / divisor;
      Ints code{};
      for (const float threshold : kThresholds.values) code -= x > broadcast(threshold);
      q[i] = code ^ kNf4Zero;
    }
    store(static_cast<float*>(rows.scales) + column / kGroup * kEncodedRows + first, scale);
    return scale;
  }
};

template <>
struct Rule<Format::kNvfp4> {
  static constexpr int kGroup = 16;

  static Floats encode(const RowsToEncode& rows, const Floats* w, Ints* q, int64_t column, int64_t first) {
    const Floats whole = broadcast(*rows.row_scales);
    const Ints scale = e4m3_codes(clamp(largest_of(w, kGroup) / 6 / whole, 0, 448));
    const Floats subnormal = to_floats(scale) * 0x1p-9f, normal = from_bits((scale << 20) + (120 << 23));
    const Floats factor = choose(scale < 8, subnormal, normal) * whole;
    const Floats divisor = choose(factor == broadcast(0), broadcast(kInfinity), factor);
    for (int i = 0; i < kGroup; ++i) q[i] = e2m1_codes(w[i] / divisor);
    store_lanes(scale, static_cast<uint8_t*>(rows.scales) + column / kGroup * kEncodedRows + first);
    return factor;
  }
};

// The codes of a step of 32 columns, as minifloat.h has them.
template <Format kFormat>
void store_step(const Ints* q, uint8_t* out, int64_t first) {
  if constexpr (kFormat == Format::kFp8) {
    for (int v = 0; v < 8; ++v) {
      uint64_t words[kLanes / 2],
          pairs[kLanes / 2];  // of two rows each; of four rows, the first pairs, then the second ones
      const Ints word = q[4 * v] | q[4 * v + 1] << 8 | q[4 * v + 2] << 16 | q[4 * v + 3] << 24;
      __builtin_memcpy(words, &word, sizeof words);
      for (int i = 0; i < kLanes / 2; i += 2) {
        for (int pair = 0; pair < 2; ++pair) {
          const uint64_t one = words[i] >> 16 * pair & 0x0000ffff0000ffff,
                         two = words[i + 1] >> 16 * pair & 0x0000ffff0000ffff;
          pairs[i + pair] = ((one | one >> 16) & 0xffffffff) | (two | two >> 16) << 32;
        }
      }
      __builtin_memcpy(out + 64 * v + 4 * first, pairs, sizeof pairs);
    }
  } else {
    for (int v = 0; v < 4; ++v) {
      Ints words{};
      for (int b = 0; b < 4; ++b) {
        const Ints* const pair = q + 8 * v + 4 * (b % 2) + b / 2;
        words |= (pair[0] | pair[2] << 4) << 8 * b;
      }
      store_words(words, out + 64 * v + 4 * first);
    }
  }
}

// Whether codes stand for the numbers, bit for bit.
template <Format kFormat, typename T>
bool are_equal(const Lanes<T>& lanes, const Floats* w, const Ints* q, Floats factor, int64_t count) {
  constexpr int kCodes = kFormat == Format::kFp8 ? 256 : 16;
  struct Values {
    float values[kCodes];
    consteval Values() : values{} {
      for (int code = 0; code < kCodes; ++code) {
        values[code] = kFormat == Format::kFp8 ? fp8_value(code) : nibble_value<kFormat>(code);
      }
    }
  };
  static constexpr Values kValues;
  Ints different{};
  for (int64_t c = 0; c < count; ++c) {
    float values[kLanes];
    for (int l = 0; l < kLanes; ++l) values[l] = kValues.values[q[c][l] & (kCodes - 1)];
    different |= bits_of(round_to(lanes.from, load(values) * factor)) != bits_of(w[c]);
  }
  different &= lanes.mask();
  bool are = true;
  for (int l = 0; l < kLanes; ++l) are = are && different[l] == 0;
  return are;
}

template <Format kFormat, typename T>
bool encode_minifloats(const RowsToEncode& rows, int64_t first, Lanes<T>& lanes) {
  using Its = Rule<kFormat>;
  constexpr int64_t kChunk = Its::kGroup > kMinifloatColumns ? Its::kGroup : kMinifloatColumns;
  bool is_exact = rows.compares;
  for (int64_t column = 0; column < rows.columns; column += kChunk) {
    const int64_t count = rows.columns - column < kChunk ? rows.columns - column : kChunk;
    Floats w[kChunk] = {};
    Ints q[kChunk] = {};
    lanes.read(column, count, w);
    for (Floats& x : w) x = choose(magnitude_bits(x) < 0x7f800000, x, Floats{});  // else refused, and integers overflow
    for (int64_t i = 0; i < count; i += Its::kGroup) {
      const Floats factor = Its::encode(rows, w + i, q + i, column + i, first);
      const int64_t some = count - i < Its::kGroup ? count - i : Its::kGroup;
      is_exact = is_exact && are_equal<kFormat>(lanes, w + i, q + i, factor, some);
    }
    for (int64_t i = 0; i < count; i += kMinifloatColumns) {
      store_step<kFormat>(q + i, rows.data + (column + i) / kMinifloatColumns * minifloat_step_bytes(kFormat), first);
    }
  }
  return is_exact;
}

constexpr bool takes_minifloats(Format format) { return is_minifloat(format); }
constexpr bool takes_bits(Format format) { return has_bits(format); }

template <typename T>
Encoded encode_typed_rows(const RowsToEncode& rows, const T* numbers) {
  Encoded all{.is_finite = true, .is_exact = rows.compares};
  for (int64_t first = 0; first < kEncodedRows; first += kLanes) {
    const int64_t left = rows.rows - first, count = left < 0 ? 0 : left < kLanes ? left : kLanes;
    Lanes<T> lanes{numbers + (count > 0 ? first * rows.stride : 0), rows.stride, count};
    if (is_minifloat(rows.format)) {
      with_format<takes_minifloats>(rows.format, [&]<Format kFormat>() {
        all.is_exact = encode_minifloats<kFormat>(rows, first, lanes) && all.is_exact;
      });
    } else {
      Levels<T> levels{rows, first, lanes};
      if (is_integer(rows.format)) {
        levels.encode_integers();
      } else {
        with_format<takes_bits>(rows.format,
                                [&]<Format kFormat>() { levels.template encode_groups<bits_of(kFormat)>(); });
      }
    }
    all.is_finite = lanes.are_finite() && all.is_finite;
  }
  return all;
}

Encoded encode_rows(const RowsToEncode& rows) {
  return with_numbers(rows.dtype, rows.numbers,
                      [&]<typename T>(const T* numbers) { return encode_typed_rows(rows, numbers); });
}

}  // namespace
}  // namespace switchgear::cpu
