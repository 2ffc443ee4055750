// SPDX-License-Identifier: BSD-3-Clause
// quantize_integers and quantize_groups.
//
//   for each of 7 shares of a group's range, 16 pairs of shares if it has a zero:
//     q = clamp(round(w / scale + zero)), then the scale (and zero) that fit w best for these q; of all fits the one with the
//     smallest sum of (scale · (q - zero) - w)²
//
// About 33 float32 operations a weight and share, 230 in all, on 4 bytes read and 1 written: arithmetic binds. Sums are those of
// a tree: halves of a group, filled up to a power of two with zeros, are added until one number is left, so they are the same in
// vectors of any length. Files like this one are compiled with -ffp-contract=off.
#include "switchgear/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "checks.h"
#include "half.h"
#include "threads.h"

namespace switchgear {
namespace {

// One number of each of some rows: a vector register of any processor.
constexpr int64_t kLanes = 4;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Floats same(float x) { return x + Floats{}; }
Floats choose(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
Floats absolute(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Mask>(x) & 0x7fffffff); }
Floats inverse(Floats scale) { return choose(scale == 0, Floats{}, 1 / scale); }

// NaN stays NaN.
Floats clamp(Floats x, float low, float high) {
  x = choose(x < low, same(low), x);
  return choose(x > high, same(high), x);
}

// To nearest, ties to even, of |x| <= 2^22.
Floats round_small(Floats x) { return x + 0x1.8p23f - 0x1.8p23f; }

Floats without_nan(Floats x) { return choose(x == x, x, Floats{}); }

Floats round_to_halves(Floats x) {
  for (int64_t l = 0; l < kLanes; ++l) x[l] = cpu::round_to_half(x[l]);
  return x;
}

// The same `count` columns of kLanes rows.
struct Group {
  const Floats* w;
  int64_t count;
  Floats* q;      // levels
  Floats* terms;  // of a sum: std::bit_ceil(count)
  Floats low{}, high{};

  void find_range() {
    low = high = Floats{};
    for (int64_t i = 0; i < count; ++i) low = choose(w[i] < low, w[i], low), high = choose(w[i] > high, w[i], high);
  }

  template <typename Term>
  Floats sum(Term&& term) const {
    int64_t half = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(count))) / 2;
    if (half == 0) return term(0);
    for (int64_t i = 0; i < half; ++i) terms[i] = i + half < count ? term(i) + term(i + half) : term(i);
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

// Of `count` fits, try_fit(i), the first with the smallest sum of (scale · (q - zero) - w)²; `best` if none has one.
template <typename TryFit>
Fit best_of(const Group& group, Fit best, int count, TryFit&& try_fit) {
  Floats least = same(kInfinity);
  for (int i = 0; i < count; ++i) {
    const Fit fit = try_fit(i);
    const Floats error = group.sum([&](int64_t c) {
      const Floats difference = (group.q[c] - fit.zero) * fit.scale - group.w[c];
      return difference * difference;
    });
    const Mask better = error < least;
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
  return choose(norm > 0, products / norm, fit.scale);
}

// ---- int8 and int4 ------------------------------------------------------------------------------------------------------

constexpr float kShares[] = {1.1f, 1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f};
constexpr float kShareOfEnd[] = {1.03f, 0.95f, 0.87f, 0.79f};
constexpr int kSteps = 2;

Floats round_zero(Floats zero, float unit) { return round_small(clamp(zero * unit, 0, 255)) / unit; }

Fit fit_integers(const Group& group, int bits, bool symmetric) {
  const auto top = static_cast<float>((1 << bits) - 1);
  const Floats middle = same(static_cast<float>(1 << (bits - 1)));
  const auto unit = static_cast<float>(1 << (8 - bits));
  const Floats low = group.low, high = group.high;
  if (bits == 8) {
    if (symmetric) return {absolute(group.extreme()) / 127, middle};
    const Floats scale = (high - low) / top;
    return {scale, round_zero(-low * inverse(scale), unit)};
  }
  if (symmetric) {
    const Floats start = -group.extreme() / middle;
    return best_of(group, {start, middle}, std::size(kShares), [&](int i) {
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
  constexpr int kEnds = std::size(kShareOfEnd);
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

void set_group_levels(const Group& group, Fit fit, float top) {
  set_levels(group, fit, 0, top);
  for (int64_t c = 0; c < group.count; ++c) group.q[c] = without_nan(group.q[c]);
}

Fit fit_group(const Group& group, int bits, bool symmetric) {
  const auto top = static_cast<float>((1 << bits) - 1), half = static_cast<float>(1 << (bits - 1));
  if (bits == 1) {
    const Floats sum = group.sum([&](int64_t c) { return absolute(group.w[c]); });
    return {round_to_halves(sum / static_cast<float>(group.count)), same(half)};
  }
  const Floats low = group.low, high = group.high;
  constexpr int kEnds = std::size(kGroupShareOfEnd);
  const int count = symmetric ? static_cast<int>(std::size(kGroupShares)) : kEnds * kEnds;
  return best_of(group, {same(kInfinity), same(half)}, count, [&](int i) {
    Fit fit{{}, same(half)};
    if (symmetric) {
      fit.scale = group.extreme() * static_cast<float>(-kGroupShares[i] / double{half});
    } else {
      const float low_share = kGroupShareOfEnd[i / kEnds], high_share = kGroupShareOfEnd[i % kEnds];
      fit.scale = (high * high_share - low * low_share) / top;
      fit.zero = without_nan(round_small(clamp(-low * low_share * inverse(fit.scale), 0, top)));
    }
    set_group_levels(group, fit, top);
    fit.scale = round_to_halves(fit_scale(group, fit));
    set_group_levels(group, fit, top);
    return fit;
  });
}

// ---- rows ---------------------------------------------------------------------------------------------------------------

// A number of each row to `out`, `stride` apart, as integers; NaN becomes 0.
template <typename Integer>
void store(Floats numbers, Integer* out, int64_t stride, int64_t num_rows) {
  numbers = without_nan(numbers);
  for (int64_t l = 0; l < num_rows; ++l) out[l * stride] = static_cast<Integer>(static_cast<int32_t>(numbers[l]));
}

// kLanes rows from `first` on, and less at the end, transposed, with room for their levels.
struct Rows {
  int64_t first, count, columns, group_size;
  std::vector<Floats> w, q, terms;

  Rows(int64_t num_columns, int64_t size)
      : first(0),
        count(0),
        columns(num_columns),
        group_size(size),
        w(columns),
        q(columns),
        terms(std::bit_ceil(static_cast<uint64_t>(size))) {}

  void read(const TensorView& rows, int64_t row) {
    first = row, count = std::min(kLanes, rows.shape[0] - row);
    for (int64_t l = 0; l < count; ++l) {
      const float* const from = rows.as<float>() + (row + l) * columns;
      for (int64_t c = 0; c < columns; ++c) w[static_cast<size_t>(c)][l] = from[c];
    }
  }
  Group group(int64_t g) {
    const int64_t begin = g * group_size;
    Group group{w.data() + begin, std::min(group_size, columns - begin), q.data() + begin, terms.data()};
    group.find_range();
    return group;
  }
  void store_levels(uint8_t* levels) const {
    for (int64_t c = 0; c < columns; ++c)
      store(q[static_cast<size_t>(c)], levels + first * columns + c, columns, count);
  }
};

// Calls quantize(rows) for all rows, kLanes at a time.
template <typename Quantize>
void for_each_rows(const TensorView& rows, int64_t group_size, Execution exec, Quantize&& quantize) {
  cpu::parallel_for_ranges(cpu::resolve_threads(exec.num_threads), rows.shape[0], kLanes,
                           [&](int64_t begin, int64_t, int) {
                             Rows some(rows.shape[1], group_size);
                             some.read(rows, begin);
                             quantize(some);
                           });
}

int64_t check_levels(const TensorView& rows, std::span<const TensorView> levels, LevelOptions& options,
                     Execution exec) {
  check_threads(exec);
  for (const TensorView& tensor : levels) {
    SWITCHGEAR_CHECK(ValueError, tensor.data == nullptr || tensor.contiguous(), "levels: expected contiguous arrays");
  }
  SWITCHGEAR_CHECK(ValueError, rows.ndim == 2 && rows.contiguous() && rows.dtype == DType::kFloat32,
                   "rows: expected contiguous [R,C] float32, got ", describe(rows));
  const int64_t columns = rows.shape[1];
  if (options.group_size == 0) options.group_size = std::max<int64_t>(columns, 1);
  return (columns + options.group_size - 1) / options.group_size;
}

}  // namespace

void quantize_integers(const TensorView& rows, const std::array<TensorView, 4>& levels, LevelOptions options,
                       Execution exec) {
  const int64_t num_groups = check_levels(rows, levels, options, exec);
  const auto bits = static_cast<int>(options.bits);
  const bool symmetric = levels[3].data == nullptr;
  const float top = static_cast<float>((1 << bits) - 1), lowest = bits == 8 && symmetric ? 1 : 0;
  for_each_rows(rows, options.group_size, exec, [&](Rows& some) {
    std::vector<Fit> fits(static_cast<size_t>(num_groups));
    Floats largest{};
    for (int64_t g = 0; g < num_groups; ++g) {
      const Fit fit = fits[static_cast<size_t>(g)] = fit_integers(some.group(g), bits, symmetric);
      largest = choose(absolute(fit.scale) > largest, absolute(fit.scale), largest);
    }
    const Floats unit = num_groups == 1 ? largest : largest / 127;
    for (int64_t l = 0; l < some.count; ++l) levels[2].as<float>()[some.first + l] = unit[l];
    for (int64_t g = 0; g < num_groups; ++g) {
      const Fit fit = fits[static_cast<size_t>(g)];
      const Floats code = round_small(fit.scale * inverse(unit));
      set_levels(some.group(g), {code * unit, fit.zero}, lowest, top);
      const int64_t at = some.first * num_groups + g;
      store(code, levels[1].as<int8_t>() + at, num_groups, some.count);
      if (!symmetric) {
        store(fit.zero * static_cast<float>(1 << (8 - bits)), levels[3].as<uint8_t>() + at, num_groups, some.count);
      }
    }
    some.store_levels(levels[0].as<uint8_t>());
  });
}

void quantize_groups(const TensorView& rows, const std::array<TensorView, 3>& levels, LevelOptions options,
                     Execution exec) {
  const int64_t num_groups = check_levels(rows, levels, options, exec);
  const auto bits = static_cast<int>(options.bits);
  const bool symmetric = levels[2].data == nullptr;
  for_each_rows(rows, options.group_size, exec, [&](Rows& some) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const Group group = some.group(g);
      const Fit fit = fit_group(group, bits, symmetric);
      if (bits == 1) {
        for (int64_t c = 0; c < group.count; ++c) group.q[c] = choose(group.w[c] * fit.scale >= 0, same(1), Floats{});
      } else {
        set_group_levels(group, fit, static_cast<float>((1 << bits) - 1));
      }
      const int64_t at = some.first * num_groups + g;
      for (int64_t l = 0; l < some.count; ++l) levels[1].as<float>()[at + l * num_groups] = fit.scale[l];
      if (!symmetric) store(bits == 1 ? Floats{} : fit.zero, levels[2].as<uint8_t>() + at, num_groups, some.count);
    }
    some.store_levels(levels[0].as<uint8_t>());
  });
}

}  // namespace switchgear
