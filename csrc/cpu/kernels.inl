// SPDX-License-Identifier: BSD-3-Clause
// The functions of the Kernels table, once for all ISAs. Included by kernels_<isa>.cpp after its simd_<isa>.h. Everything is
// in an anonymous namespace and calls no library, so no symbol compiled for one ISA can be merged into another.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int kPanel = kLanes * kPanelVectors;

// ---- vectors -------------------------------------------------------------------------------------------------------------

template <typename T>
inline Floats load(const T* p, int64_t n) {  // n < kLanes; the other lanes are 0
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

inline Ints bits_of(Floats v) { return reinterpret_cast<Ints>(v); }
inline Floats from_bits(Ints v) { return reinterpret_cast<Floats>(v); }
inline Floats select(Ints mask, Floats a, Floats b) { return from_bits((bits_of(a) & mask) | (bits_of(b) & ~mask)); }
inline Floats min(Floats a, Floats b) { return select(a < b, a, b); }  // b if either is NaN
inline Floats max(Floats a, Floats b) { return select(a > b, a, b); }

inline void store(BFloat16* p, Floats v) {  // round to nearest even; NaN stays NaN
#ifdef __AVX512BF16__
  if (!has_subnormals(v)) return store_normals(p, v);
#endif
  const Ints bits = bits_of(v);
  const Ints rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  const Ints quiet_nan = ((bits >> 16) & 0xffff) | 0x40;
  const Ints is_nan = v != v;
  store_bits16(p, (quiet_nan & is_nan) | (rounded & ~is_nan));
}

template <typename T>
inline void store(T* p, Floats v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

inline float sum(Floats v) {  // pairwise: lane i with lane i + half
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Calls body(offset, count) over [0, n): full vectors, then the rest.
template <typename Body>
inline void for_vectors(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

template <typename T>
inline Floats load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <typename T>
inline void store_some(T* p, Floats v, int64_t n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    store(p, v, n);
  }
}

// Calls function(typed pointer tag) for the float dtypes.
template <typename Function>
inline auto with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16: return function(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16: return function(static_cast<const Float16*>(nullptr));
    default: return function(static_cast<const float*>(nullptr));
  }
}

// Calls function with `number`, 1 <= number <= kMost, as a constant.
template <int kMost, typename Function>
inline void with_constant(int64_t number, Function&& function) {
  if (number == kMost) return function.template operator()<kMost>();
  if constexpr (kMost > 1) with_constant<kMost - 1>(number, function);
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

void load_row(float* out, const void* row, DType dtype, int64_t n) {
  with_type(dtype, [&]<typename T>(const T*) {
    const T* p = static_cast<const T*>(row);
    for_vectors(n, [&](int64_t i, int64_t count) { store_some(out + i, load_some(p + i, count), count); });
  });
}

void store_row(void* out, DType dtype, const float* row, int64_t n) {
  with_type(dtype, [&]<typename T>(const T*) {
    T* p = static_cast<T*>(out);
    for_vectors(n, [&](int64_t i, int64_t count) { store_some(p + i, load_some(row + i, count), count); });
  });
}

void add_scaled_row(float* accumulator, const void* row, DType dtype, float scale, int64_t n) {
  const Floats factor = broadcast(scale);
  with_type(dtype, [&]<typename T>(const T*) {
    const T* p = static_cast<const T*>(row);
    for_vectors(n, [&](int64_t i, int64_t count) {
      const Floats acc = load_some(accumulator + i, count);
      store_some(accumulator + i, multiply_add(factor, load_some(p + i, count), acc), count);
    });
  });
}

float dot_rows(const void* a, const void* b, DType dtype, int64_t n) {
  return with_type(dtype, [&]<typename T>(const T*) {
    const T* p = static_cast<const T*>(a);
    const T* q = static_cast<const T*>(b);
    Floats total = broadcast(0.0f);
    for_vectors(n, [&](int64_t i, int64_t count) {
      total = multiply_add(load_some(p + i, count), load_some(q + i, count), total);
    });
    return sum(total);
  });
}

}  // namespace
}  // namespace switchgear::cpu

#include "multiply.inl"
#include "weight_gradient.inl"
// dot_products.inl uses transpose_words of weight_gradient.inl
#include "compact_record.h"
#include "dot_products.inl"
// these use all of the above
#include "compact_products.inl"
#include "minifloat_decoders.h"
#include "minifloat_products.inl"
#include "panel_products.inl"

namespace switchgear::cpu {
namespace {

void dot_products(const Product& product) {
  if (product.b.format == Format::kCompact) return compact_products(product);
  if (product.b.format == Format::kPanels) return panel_products(product);
  if (is_minifloat(product.b.format)) return minifloat_products(product);
  with_words(product.b.dtype, [&]<typename Words>() { dot_products_of<Words>(product); });
}

void pack_chunk(const Product& product, int64_t k_begin, int64_t depth) {
  const Matrix& b = product.b;
  if (b.format == Format::kCompact) return unpack_chunk(product, k_begin, depth);
  float* const out = static_cast<float*>(product.scratch);
  with_words(b.dtype, [&]<typename Words>() {
    pack_rows<Words>(out, b, product.num_columns, k_begin, depth);
    const int64_t words = (depth + Words::kDepth - 1) / Words::kDepth, missing = (kLanes - words % kLanes) % kLanes;
    for (int64_t n = 0; n < product.num_columns; ++n) {
      __builtin_memset(out + n * kScratchRow + words, 0, static_cast<size_t>(missing) * 4);
    }
  });
}

// ---- activations ---------------------------------------------------------------------------------------------------------

// 2^f on [-1/2, 1/2] by a Chebyshev fit of degree 6 (relative error 2e-9), scaled through the exponent bits. Arguments are
// clamped to the range of normal results: e^-87.3 = 2^-126. NaN is returned as it is: adding to its bits could overflow.
inline Floats exp(Floats argument) {
  const Ints is_number = argument == argument;
  Floats x = select(is_number, argument, broadcast(0.0f));
  const Floats lowest = broadcast(-87.33654f), highest = broadcast(88.72283f);
  x = select(x < lowest, lowest, x);
  x = select(x > highest, highest, x);
  const Floats log2e = broadcast(0x1.715476p+0f);
  const Floats ln2_high = broadcast(0x1.62ep-1f), ln2_low = broadcast(0x1.0bfbe8p-15f);  // n·ln2_high is exact
  const Floats shift = broadcast(0x1.8p23f);
  const Floats shifted = x * log2e + shift;  // rounds to an integer in the low bits
  const Floats n = shifted - shift;
  const Floats f = ((x - n * ln2_high) - n * ln2_low) * log2e;
  Floats r = broadcast(0x1.41a6fdp-13f);
  for (const float c : {0x1.5f44f1p-10f, 0x1.3b2dfdp-7f, 0x1.c6aed6p-5f, 0x1.ebfbdap-3f, 0x1.62e430p-1f, 1.0f}) {
    r = multiply_add(r, f, broadcast(c));
  }
  return select(is_number, from_bits(bits_of(r) + (bits_of(shifted) << 23)), argument);
}

inline Floats sigmoid(Floats x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(-x)); }

// erfc(z)·e^{z²} for z >= 0 as t·P(t), t = 1/(1 + 0.4 z): a Chebyshev fit of degree 9 on z in [0, 10] (relative error 9e-9).
// Φ(x) = 1 - erfc(x/√2)/2 keeps its relative precision for negative x.
inline Floats normal_cdf(Floats x, Floats* density) {
  const Floats one = broadcast(1.0f), zero = broadcast(0.0f);
  const Floats z = min(select(x < zero, -x, x) * broadcast(0.70710678f), broadcast(10.0f));
  const Floats t = one / multiply_add(z, broadcast(0.4f), one);
  Floats p = broadcast(-0.030429895f);
  for (const float c : {0.202371179f, -0.508615623f, 0.559893062f, -0.29419631f, 0.277049659f, 0.128059535f,
                        0.215244239f, 0.224915503f, 0.225708658f})
    p = multiply_add(p, t, broadcast(c));
  const Floats gauss = exp(x * x * broadcast(-0.5f));
  *density = gauss * broadcast(0.39894228f);
  const Floats tail = broadcast(0.5f) * gauss * t * p;
  return select(x < zero, tail, one - tail);
}

struct Value {
  Floats value, slope;
};

inline Value activate(Activation activation, Floats x) {
  const Floats zero = broadcast(0.0f), one = broadcast(1.0f);
  switch (activation) {
    case Activation::kGelu: {
      Floats density;
      const Floats cdf = normal_cdf(x, &density);
      return {x * cdf, cdf + x * density};
    }
    case Activation::kGeluTanh: {  // x·sigmoid(2u), u = √(2/π)·(x + 0.044715 x³): the same as (1 + tanh u)/2
      const Floats square = min(x * x, broadcast(400.0f));  // s is 0 or 1 beyond; the square of a huge x would overflow
      const Floats u2 = broadcast(1.5957691f) * x * (one + broadcast(0.044715f) * square);
      const Floats s = sigmoid(u2);
      const Floats du2 = broadcast(1.5957691f) * (one + broadcast(0.134145f) * square);
      return {x * s, s + x * s * (one - s) * du2};
    }
    case Activation::kRelu: return {max(zero, x), select(x > zero, one, zero)};
    case Activation::kRelu2: {
      const Floats r = max(zero, x);
      return {r * r, r + r};
    }
    default: {
      const Floats s = sigmoid(x);
      return {x * s, s + x * s * (one - s)};
    }
  }
}

struct Gate {
  Floats a;                     // act(gate) ⊙ up
  Floats a_per_gate, a_per_up;  // its partial derivatives
};

inline Gate apply_gate(Floats gate, Floats up, const GluOptions& o) {
  const Floats zero = broadcast(0.0f), one = broadcast(1.0f);
  Floats gate_in_range = one, up_in_range = one;  // slopes of the clamps
  if (o.limit > 0.0f) {
    const Floats limit = broadcast(o.limit);
    gate_in_range = select(gate > limit, zero, one);
    gate = select(gate > limit, limit, gate);
    if (o.gated) {
      up_in_range = select((up > limit) | (up < -limit), zero, one);
      up = select(up > limit, limit, up);
      up = select(up < -limit, -limit, up);
    }
  }
  if (o.activation == Activation::kSwigluOai) {
    const Floats alpha = broadcast(o.alpha);
    const Floats s = sigmoid(alpha * gate);
    const Floats glu = gate * s;
    const Floats slope = s + alpha * glu * (one - s);
    return {(up + one) * glu, (up + one) * slope * gate_in_range, glu * up_in_range};
  }
  const Value v = activate(o.activation, gate);
  if (!o.gated) return {v.value, v.slope * gate_in_range, zero};
  return {v.value * up, v.slope * up * gate_in_range, v.value * up_in_range};
}

void glu_row(float* a, const float* gate, const float* up, const GluOptions& options, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    const Floats u = options.gated ? load_some(up + i, count) : broadcast(0.0f);
    store_some(a + i, apply_gate(load_some(gate + i, count), u, options).a, count);
  });
}

void glu_backward_row(float* a, float* grad_gate, float* grad_up, const float* grad_a, const float* gate,
                      const float* up, const GluOptions& options, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    const Floats u = options.gated ? load_some(up + i, count) : broadcast(0.0f);
    const Floats g = load_some(grad_a + i, count);
    const Gate result = apply_gate(load_some(gate + i, count), u, options);
    store_some(a + i, result.a, count);
    store_some(grad_gate + i, g * result.a_per_gate, count);
    if (options.gated) store_some(grad_up + i, g * result.a_per_up, count);
  });
}

// ---- probes --------------------------------------------------------------------------------------------------------------

template <bool kPairs>
double multiply_registers(int64_t iterations) {
  constexpr int kChains = kTileRows * kPanelVectors;
  volatile float one = 1.0f;
  const Floats a = broadcast(one), b = broadcast(one);
  Floats acc[kChains];
#pragma GCC unroll 32
  for (int j = 0; j < kChains; ++j) acc[j] = broadcast(static_cast<float>(j) * one);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) acc[j] = step<kPairs>(a, b, acc[j]);
  }
  volatile float sink = 0.0f;
#pragma GCC unroll 32
  for (int j = 0; j < kChains; ++j) sink = sink + sum(acc[j]);
  return static_cast<double>(iterations) * kChains * kLanes * (kPairs ? 4 : 2);
}

double multiply_rate(DType dtype, int64_t iterations) {
  return dtype == DType::kBFloat16 ? multiply_registers<kHasPairs>(iterations) : multiply_registers<false>(iterations);
}

uint64_t read_bytes(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  const bool asks = follows_streams();
  Ints total[8] = {};
  constexpr int kPart = sizeof(Ints);
  for (int64_t i = 0; i + 512 <= bytes; i += 512) {
    for (int j = 0; asks && j < 512; j += kAskedBytes) {
      __builtin_prefetch(p + i + j + lead_of(Asks::kSomeLines), 0, 2);
    }
#pragma GCC unroll 32
    for (int k = 0; k < 512 / kPart; ++k) {
      Ints v;
      __builtin_memcpy(&v, p + i + k * kPart, kPart);
      total[k % 8] ^= v;
    }
  }
  uint64_t result = 0;
  for (auto& v : total) {
    for (int i = 0; i < kLanes; ++i) result += static_cast<uint32_t>(v[i]);
  }
  return result;
}

constexpr Kernels make_table(const char* isa) {
  return {
      .isa = isa,
      .panel = kPanel,
      .most_rows = 40 * kTileRows,  // so that C (60 KB) and a chunk of A stay in L2
      .multiply = multiply,
      .dot_products = dot_products,
      .gathered_bytes = [](DType, int64_t) -> int64_t { return 0; },
      .gather_rows = nullptr,
      .pack_chunk = pack_chunk,
      .expand_minifloats = expand_minifloats,
      .panel_vector_bytes = panel_vector_bytes,
      .sorted_row_bytes = sorted_row_bytes,
      .store_sorted = store_sorted,
      .transpose = transpose_rows,
      .gradient_panel = gradient_panel,
      .load_row = load_row,
      .store_row = store_row,
      .add_scaled_row = add_scaled_row,
      .dot_rows = dot_rows,
      .glu_row = glu_row,
      .glu_backward_row = glu_backward_row,
      .multiply_rate = multiply_rate,
      .read = read_bytes,
  };
}

}  // namespace
}  // namespace switchgear::cpu
