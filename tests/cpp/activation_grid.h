// SPDX-License-Identifier: BSD-3-Clause
// glu over the whole range of a dtype: all gates of 16 bits, or of float32 every exponent and sign; infinities and NaN; each
// with ordinary, tiny and the largest ups.
#pragma once
#include "activation.h"

namespace switchgear::test {

inline double largest_of(DType dtype) {
  return dtype == DType::kFloat16 ? 65504.0 : dtype == DType::kBFloat16 ? 0x1.fep127 : 0x1.fffffep127;
}

// `got` is within the bound after it is rounded to the dtype, infinite where that overflows, and NaN where the formula is.
inline bool is_right(float got, Bounded want, DType dtype) {
  if (std::isnan(want.value) || std::isnan(got)) return std::isnan(want.value) && std::isnan(got);
  if (std::isinf(want.value)) return static_cast<double>(got) == want.value;
  want = rounded(want, dtype);
  if (std::isinf(got)) return (got > 0) == (want.value > 0) && std::abs(want.value) + want.error >= largest_of(dtype);
  return close(got, want);
}

// h [ups, gates and ups], and the gate of each element. `step`: takes every step-th gate.
struct GateGrid {
  GateGrid(DType dtype, const GluOptions& o, int64_t step) : dtype(dtype), options(o) {
    const float tiny = dtype == DType::kFloat16 ? 0x1p-24f : 0x1p-120f,
                large = dtype == DType::kFloat16 ? 300.0f : 0x1.8p63f;
    ups = {-1.5f, tiny, large, static_cast<float>(largest_of(dtype))};
    if (!o.gated) ups = {1.0f};
    constexpr int64_t kCodes = 65536;
    // float32: sign, exponent and 7 bits of the mantissa, with other bits set, but for infinities
    const auto code = [&](int64_t i) { return static_cast<uint32_t>(i * step % kCodes); };
    I = kCodes / step;
    h = Array(dtype, {std::ssize(ups), o.gated ? 2 * I : I});
    for (int64_t s = 0; s < std::ssize(ups); ++s) {
      for (int64_t i = 0; i < I; ++i) {
        char* const p = h.view().as<char>() + (s * h.size(1) + gate_column(o, i)) * size_of(dtype);
        const uint32_t bits = dtype != DType::kFloat32 ? code(i) : code(i) << 16 | (code(i) % 128 != 0 ? 0x5a5a : 0);
        std::memcpy(p, &bits, static_cast<size_t>(size_of(dtype)));  // little-endian
        if (o.gated) h.set(ups[static_cast<size_t>(s)], s, up_column(o, I, i));
      }
    }
    for (int64_t s = 0; s < std::ssize(ups); ++s) {
      for (int64_t i = 0; i < I; ++i)
        want.push_back(apply_gate({h(s, gate_column(o, i))}, {ups[static_cast<size_t>(s)]}, o));
    }
  }

  void check_forward(const Array& a) const {
    each([&](int64_t s, int64_t i, const Gate& gate) { check(a(s, i), gate.a, "a", s, i); });
  }
  // grad_a is 1 everywhere.
  void check_backward(const Array& grad_h) const {
    each([&](int64_t s, int64_t i, const Gate& gate) {
      check(grad_h(s, gate_column(options, i)), gate.per_gate, "gradient of gate", s, i);
      if (options.gated) check(grad_h(s, up_column(options, I, i)), gate.per_up, "gradient of up", s, i);
    });
  }

  DType dtype;
  GluOptions options;
  std::vector<float> ups;
  int64_t I;
  Array h;
  std::vector<Gate> want;

 private:
  template <typename Body>
  void each(Body&& body) const {
    for (int64_t s = 0; s < std::ssize(ups); ++s) {
      for (int64_t i = 0; i < I; ++i) body(s, i, want[static_cast<size_t>(s * I + i)]);
    }
  }
  void check(float got, Bounded bound, const char* what, int64_t s, int64_t i) const {
    CHECK(is_right(got, bound, dtype), what, ": got ", got, ", expected ", bound.value, " ± ", bound.error,
          " for gate ", h(s, gate_column(options, i)), ", up ", ups[static_cast<size_t>(s)]);
  }
};

template <typename Body>
void for_each_gate_grid(int64_t step, Body&& body) {
  for (const DType dtype : kFloatTypes) {
    for (GluOptions o : all_glu_options()) {
      if (o.interleaved || o.limit > 0) continue;
      note = std::string(name_of(dtype)) + describe(o);
      body(GateGrid(dtype, o, step));
    }
  }
  note.clear();
}

}  // namespace switchgear::test
