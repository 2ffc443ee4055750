// SPDX-License-Identifier: BSD-3-Clause
// The functions of the Kernels table, once for all ISAs. Included after a simd_<isa>.h (isas.cmake). Everything is
// in an anonymous namespace and calls no library, so no symbol compiled for one ISA can be merged into another.
#pragma once
#include "cpu/widen.h"

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
inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }  // b if either is NaN
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

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

// An address sanitizer does not see loads under a mask: it is shown both ends.
template <typename T>
inline const T* seen(const T* p, [[maybe_unused]] int64_t n) {
#ifdef __SANITIZE_ADDRESS__
  const auto* bytes = reinterpret_cast<const volatile char*>(p);
  if (n > 0) (void)(bytes[0] + bytes[n * int64_t{sizeof(T)} - 1]);
#endif
  return p;
}

template <typename T>
inline Floats load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load(seen(p, n), n);
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
#include "gguf_rows.inl"
#include "minifloat_decoders.h"
// group_decoders.h uses minifloat_decoders.h
#include "group_decoders.h"
#include "minifloat_products.inl"
#include "panel_products.inl"
// packed_products.inl uses panel_products.inl
#include "packed_products.inl"
#include "stored_columns.inl"

namespace switchgear::cpu {
namespace {

void dot_products(const Product& product) {
  if (product.b.format == Format::kCompact) return compact_products(product);
  if (product.b.format == Format::kPanels) return panel_products(product);
  if (is_decoded(product.b.format)) return minifloat_products(product);
  with_words(product.b.dtype, [&]<typename Words>() {
    if constexpr (kPackingRows > 0 && Words::kDepth == 1) {
      if (product.sorted_rows) return packed_products_of<Words>(product);
    }
    dot_products_of<Words>(product);
  });
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

// e^x as value · scale: a tiny e^x times a huge up may be an ordinary number. scale is a power of two, 1 for x > -86. Below
// e^-174 = 2^-251 the value is 0: times any up and |x|, that is less than 2^-115. Above e^88.72 it stays there. 2^f on
// [-1/2, 1/2] by a Chebyshev fit of degree 6 (relative error 2e-9), scaled through the exponent bits. For NaN, some number.
struct Power {
  Floats value, scale;
};

inline Power exp(Floats argument) {
  const Floats lowest = broadcast(-174.0f);
  const Floats x = min(max(argument, lowest), broadcast(88.72283f));
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
  const Floats high = max(shifted, broadcast(0x1.8p23f - 125.0f));  // an r below 1 has the exponent -1
  const Ints power = bits_of(r) + (bits_of(high) << 23);
  const Ints scale = ((bits_of(shifted) - bits_of(high)) << 23) + 0x3f800000;
  return {select(argument < lowest, broadcast(0.0f), from_bits(power)), from_bits(scale)};
}

// An activation of x. Each result is the product of two factors, which the caller multiplies last: value · value_scale and
// slope · slope_scale.
struct Curve {
  Floats value, value_scale;
  Floats slope, slope_scale;
};

// x·sigmoid(t) for t whose derivative is `rate`. sigmoid(t) = e^t / (1 + e^t) needs no other exponential for t < 0.
inline Curve sigmoid_curve(Floats x, Floats t, Floats rate) {
  const Floats one = broadcast(1.0f);
  const Power e = exp(t);  // 1 + e.value is 1 where e.scale is not; a NaN is still in x
  const Floats s = e.value / (one + e.value), value = x * s;
  return {value, e.scale, s + value * (one - s) * rate, e.scale};
}

// x·Φ(x). erfc(z)·e^{z²} for z >= 0 is t·P(t), t = 1/(1 + 0.4 z), P a minimax fit of degree 9 on z in [0, 13.25] (relative
// error 2e-8, 4e-8 with these coefficients), past which e^{-z²} is 0. Φ(x) = 1 - erfc(x/√2)/2 keeps its relative precision
// for negative x.
inline Curve gelu_curve(Floats x) {
  const Floats one = broadcast(1.0f), zero = broadcast(0.0f);
  const Ints is_negative = x < zero;
  const Floats z = min(select(is_negative, -x, x) * broadcast(0.70710678f), broadcast(13.25f));
  const Floats t = one / multiply_add(z, broadcast(0.4f), one);
  Floats p = broadcast(-0.024129979f);
  for (const float c : {0.16879836f, -0.43132731f, 0.45925173f, -0.21270886f, 0.23461176f, 0.14224035f, 0.2123189f,
                        0.22525296f, 0.22569209f})
    p = multiply_add(p, t, broadcast(c));
  const Power gauss = exp(x * x * broadcast(-0.5f));
  const Floats tail = broadcast(0.5f) * gauss.value * t * p;
  const Floats cdf = select(is_negative, tail, one - tail);
  const Floats scale = select(is_negative, gauss.scale, one);  // the tail of a positive x counts only where it is 1
  return {x * cdf, scale, cdf + x * (gauss.value * broadcast(0.39894228f)), scale};
}

inline Curve activate(Activation activation, Floats x, float alpha) {
  const Floats zero = broadcast(0.0f), one = broadcast(1.0f);
  switch (activation) {
    case Activation::kGelu: return gelu_curve(x);
    case Activation::kGeluTanh: {  // x·sigmoid(2u), u = √(2/π)·(x + 0.044715 x³): the same as (1 + tanh u)/2
      const Floats square = min(x * x, broadcast(400.0f));  // s is 0 or 1 beyond; the square of a huge x would overflow
      const Floats u2 = broadcast(1.5957691f) * x * (one + broadcast(0.044715f) * square);
      return sigmoid_curve(x, u2, broadcast(1.5957691f) * (one + broadcast(0.134145f) * square));
    }
    case Activation::kRelu: return {max(zero, x), one, select(x > zero, one, zero), one};
    case Activation::kRelu2: {
      const Floats r = max(zero, x);
      return {r, r, r, broadcast(2.0f)};
    }
    case Activation::kSwigluOai: return sigmoid_curve(x, broadcast(alpha) * x, broadcast(alpha));
    case Activation::kSilu: break;
  }
  return sigmoid_curve(x, x, one);
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
  const Curve c = activate(o.activation, gate, o.alpha);
  if (!o.gated) return {c.value * c.value_scale, c.slope * c.slope_scale * gate_in_range, zero};
  const Floats factor = o.activation == Activation::kSwigluOai ? up + one : up;
  return {c.value * factor * c.value_scale, c.slope * factor * c.slope_scale * gate_in_range,
          c.value * c.value_scale * up_in_range};
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

}  // namespace
}  // namespace switchgear::cpu

// attention.inl uses exp
#include "attention.inl"

namespace switchgear::cpu {
namespace {

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

// `bytes` from each of kCount places, `gap` bytes apart, in turns; a line in kSparseBytes is prefetched `lead` bytes ahead.
template <int kCount>
void read_streams(Ints (&total)[8], const char* p, int64_t bytes, int64_t gap, int64_t lead) {
  constexpr int kPart = sizeof(Ints), kRun = 512 / kCount;
  for (int64_t i = 0; i < bytes; i += kRun) {
#pragma GCC unroll 4
    for (int stream = 0; stream < kCount; ++stream) {
      const char* const run = p + stream * gap + i;
      for (int j = 0; lead > 0 && j < kRun; j += kSparseBytes) __builtin_prefetch(run + j + lead, 0, 2);
#pragma GCC unroll 32
      for (int k = 0; k < kRun / kPart; ++k) {
        Ints v;
        __builtin_memcpy(&v, run + k * kPart, kPart);
        total[(stream * (kRun / kPart) + k) % 8] ^= v;
      }
    }
  }
}

uint64_t read_bytes(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  const Reads reads = fastest_reads();
  Ints total[8] = {};
  if (reads == Reads::kStreams) {
    constexpr int64_t kBlock = 1 << 18;
    for (; bytes >= kBlock; bytes -= kBlock, p += kBlock) {
      read_streams<kMostStreams>(total, p, kBlock / kMostStreams, kBlock / kMostStreams, 0);
    }
  }
  read_streams<1>(total, p, bytes / 512 * 512, 0, reads == Reads::kSomeLines ? lead_of(Prefetch::kSomeLines) : 0);
  uint64_t result = 0;
  for (auto& v : total) {
    for (int i = 0; i < kLanes; ++i) result += static_cast<uint32_t>(v[i]);
  }
  return result;
}

void expand_rows(void* out, int64_t stride, const Matrix& b, int64_t depth, int64_t num_rows, int64_t first,
                 int64_t count) {
  if (b.format == Format::kCompact) return expand_compact_rows(out, stride, b, depth, num_rows, first, count);
  if (is_gguf(b.format)) return expand_gguf_rows(out, stride, b, num_rows, first, count);
  expand_panels(out, stride, b, depth, num_rows, first, count);
}

constexpr Kernels make_table(const char* isa) {
  return {
      .isa = isa,
      .panel = kPanel,
      .most_rows = 40 * kTileRows,  // so that C (60 KB) and a chunk of A stay in L2
      .multiply = multiply,
      .multiplies_stored = [](DType) { return true; },
      .dot_products = dot_products,
      .num_streams = num_streams_of,
      .gathered_bytes = [](DType, int64_t) -> int64_t { return 0; },
      .gather_rows = nullptr,
      .pack_chunk = pack_chunk,
      .expand_minifloats = expand_minifloats,
      .expand_rows = expand_rows,
      .packing_rows = [](DType dtype) { return dtype == DType::kFloat32 ? kPackingRows : kWidenedPackingRows; },
      .panel_vector_bytes = panel_vector_bytes,
      .word_bytes = word_bytes,
      .store_sorted = store_sorted,
      .transpose = transpose_rows,
      .gradient_panel = gradient_panel,
      .load_row = load_row,
      .store_row = store_row,
      .add_scaled_row = add_scaled_row,
      .dot_rows = dot_rows,
      .glu_row = glu_row,
      .glu_backward_row = glu_backward_row,
      .score_rows = score_rows,
      .softmax_weights = softmax_weights,
      .add_weighted_rows = add_weighted_rows,
      .merge_rows = merge_rows,
      .multiply_rate = multiply_rate,
      .read = read_bytes,
  };
}

}  // namespace
}  // namespace switchgear::cpu
