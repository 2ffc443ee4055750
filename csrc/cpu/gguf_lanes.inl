// SPDX-License-Identifier: BSD-3-Clause
// Products of int8 activations and GGUF's blocks on ISAs without dots: included by gguf_kernels.inl.
//
//   multiply: C[m,n] = Σ_b dx[m,b] · (d[n,b] · Σ_g s[n,g] · Σ_{k in g} x[m,k]·q[n,k] - m[n,b] · Σ_g t[n,g] · Σ_{k in g} x[m,k])
//   work 2·M·N·K operations, and taking weights apart once per product; traffic: weights once per 240 rows
//   Some rows of weights are taken apart in the scratch: codes as bytes, their factors as vectors need them. The lanes of a vector
//   are neighbours in k, so rows of weights stay in memory order. On x86 a vector takes two multiplications: bytes by bytes, whose
//   sums of two fit in 16 bits, and these by the integers s, or by ones.
// Sums within a block are exact integers. Sums over blocks are float32, in the lanes of one vector, ascending; then lanes are
// added. So a row's result depends on this row and on the weights alone.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int kColumns = 4 * kLanes;  // of a vector of bytes
constexpr int64_t kMostGroups = 256;  // whose integers are made wider at once

// ---- vectors -------------------------------------------------------------------------------------------------------------

typedef int8_t Bytes __attribute__((vector_size(sizeof(Ints))));

inline Ints broadcast_ints(int32_t value) { return Ints{} + value; }
inline Bytes load_codes(const void* p) {
  Bytes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Lane l is p[l / kEach].
template <int kEach>
inline Ints spread(const int32_t* p) {
  if constexpr (kEach >= kLanes) return broadcast_ints(p[0]);
  int32_t lanes[kLanes];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) lanes[l] = p[l / kEach];
  Ints v;
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}
template <int kEach>
inline Floats spread(const float* p) {
  if constexpr (kEach >= kLanes) return broadcast(p[0]);
  float lanes[kLanes];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) lanes[l] = p[l / kEach];
  return load(lanes);
}

#if defined(__AVX2__)
// What `factor` makes of an integer: each half of a lane is multiplied by it.
constexpr int32_t kOne = 0x00010001;
inline int32_t factor(int32_t s) { return (s & 0xffff) | s << 16; }
#else
constexpr int32_t kOne = 1;
inline int32_t factor(int32_t s) { return s; }
#endif

#if defined(__AVX512BW__)
template <>
inline Floats spread<8>(const float* p) {
  const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi32(index, _mm512_castsi128_si512(pair)));
}
template <>
inline Ints spread<8>(const int32_t* p) {
  const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Ints>(_mm512_permutexvar_epi32(index, _mm512_castsi128_si512(pair)));
}
template <>
inline Ints spread<4>(const int32_t* p) {
  const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Ints>(_mm512_permutexvar_epi32(index, _mm512_castsi128_si512(four)));
}
#elif defined(__AVX2__)
template <>
inline Ints spread<4>(const int32_t* p) {
  return reinterpret_cast<Ints>(_mm256_set_m128i(_mm_set1_epi32(p[1]), _mm_set1_epi32(p[0])));
}
#endif

// sum + s · (the sums of the products of four bytes); s is made by `factor`. Codes are at most 63 if they have no signs.
template <bool kHasSigns>
inline Ints add_products(Ints sum, Bytes codes, Bytes x, Ints s) {
#if defined(__AVX512BW__)
  __m512i w = reinterpret_cast<__m512i>(codes), a = reinterpret_cast<__m512i>(x);
  if constexpr (kHasSigns) {
    a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
    w = _mm512_abs_epi8(w);
  }
  return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(_mm512_maddubs_epi16(w, a), reinterpret_cast<__m512i>(s)));
#elif defined(__AVX2__)
  __m256i w = reinterpret_cast<__m256i>(codes), a = reinterpret_cast<__m256i>(x);
  if constexpr (kHasSigns) {
    a = _mm256_sign_epi8(a, w);
    w = _mm256_abs_epi8(w);
  }
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(_mm256_maddubs_epi16(w, a), reinterpret_cast<__m256i>(s)));
#elif defined(SWITCHGEAR_NEON)
  const auto w = reinterpret_cast<int8x16_t>(codes), a = reinterpret_cast<int8x16_t>(x);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a))), high = vpaddlq_s16(vmull_high_s8(w, a));
  return sum + reinterpret_cast<Ints>(vpaddq_s32(low, high)) * s;
#else
  Ints products{};
  for (int l = 0; l < kLanes; ++l) {
    int32_t product = 0;
    for (int i = 4 * l; i < 4 * l + 4; ++i) product += codes[i] * x[i];
    products[l] = product;
  }
  return sum + products * s;
#endif
}

// Lanes whose sum is that of the products of 16 numbers of 16 bits.
inline Ints multiply_sums(const int16_t* a, const int16_t* b) {
#if defined(__AVX2__)
  const auto load_sums = [](const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const __m256i products = _mm256_madd_epi16(load_sums(a), load_sums(b));
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_zextsi256_si512(products));
#else
  return reinterpret_cast<Ints>(products);
#endif
#else
  Ints products = {};
  for (int i = 0; i < 16; ++i) products[i % kLanes] += a[i] * b[i];
  return products;
#endif
}

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

inline float add_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// ---- weights taken apart -------------------------------------------------------------------------------------------------

// What products need to know of a format.
template <int kGroupColumns, bool kSigned, bool kWithMins, int kAdded>
struct Kind {
  static constexpr int kGroup = kGroupColumns, kOffset = kAdded;
  static constexpr bool kHasSigns = kSigned, kHasMins = kWithMins;
};

// The offsets of codes of 32 columns are taken away, those of 256 columns are terms of sums.
template <Format kFormat>
using KindOf = Kind<Block<kFormat>::kGroup,
                    Block<kFormat>::kHasSigns || (!kHasIntegerFactors<kFormat> && Block<kFormat>::kOffset != 0),
                    Block<kFormat>::kHasMins, kHasIntegerFactors<kFormat> ? Block<kFormat>::kOffset : 0>;

// A row of weights: codes; factors int32 of each group; terms int16 of each 16 columns, t or offset · s; scales d; offsets m, or
// -m where they are of 32 columns.
struct Parts {
  uint8_t* codes;
  int32_t* factors;
  int16_t* terms;
  float *scales, *offsets;

  Parts(void* memory, const GgufRow& row, int64_t columns)
      : codes(static_cast<uint8_t*>(memory)),
        factors(reinterpret_cast<int32_t*>(codes + row.sums)),
        terms(reinterpret_cast<int16_t*>(codes + row.sums + columns / 16 * 4)),
        scales(reinterpret_cast<float*>(codes + row.scales)),
        offsets(reinterpret_cast<float*>(codes + row.offsets)) {}
};

// The integers of all groups are read first, and made wider after: a processor waits for bytes that it has just written one by
// one, if it reads several at once.
template <Format kFormat>
void take_apart(void* memory, const GgufRow& row, const uint8_t* block, int64_t columns) {
  using B = Block<kFormat>;
  constexpr int64_t kBlock = gguf_type(kFormat).columns, kBytes = gguf_type(kFormat).bytes;
  constexpr bool kIsWide = kHasIntegerFactors<kFormat>, kHasTerms = kIsWide && (B::kHasMins || B::kOffset != 0);
  constexpr int kGroups = static_cast<int>(kBlock / B::kGroup), kRepeats = B::kGroup / 16;
  const Parts parts(memory, row, columns);
  const int64_t blocks = columns / kBlock;
  int8_t s[kMostGroups];
  uint8_t t[kMostGroups];
  for (int64_t b = 0, first = 0; b < blocks; ++b, block += kBytes) {
    prefetch_lines(block, kBytes);
    for (int unit = 0; unit < kBlock / B::kUnit; ++unit) {
      uint8_t* const codes = parts.codes + b * kBlock + unit * B::kUnit;
      B::unpack(codes, block, unit);
      if constexpr (!kIsWide && B::kOffset != 0) {
        for (int i = 0; i < kBlock; i += 16) {
          store_vector(codes + i, Run<16>(codes + i).v - static_cast<uint8_t>(B::kOffset));
        }
      }
    }
    const Factors f = B::factors(block);
    parts.scales[b] = f.d;
    if constexpr (B::kHasMins) parts.offsets[b] = kIsWide ? f.m : -f.m;
    if constexpr (kIsWide) {
      const int64_t count = (b - first + 1) * kGroups;
      __builtin_memcpy(s + count - kGroups, f.s, kGroups);
      if constexpr (B::kHasMins) __builtin_memcpy(t + count - kGroups, f.t, kGroups);
      if (count + kGroups <= kMostGroups && b + 1 < blocks) continue;
      int32_t* const factors = parts.factors + first * kGroups;
      int16_t* const terms = parts.terms + first * 16;
      for (int64_t g = 0; g < count; ++g) factors[g] = factor(s[g]);
      for (int64_t g = 0; kHasTerms && g < count; ++g) {
        const auto term = static_cast<int16_t>(B::kHasMins ? t[g] : B::kOffset * s[g]);
        for (int i = 0; i < kRepeats; ++i) terms[g * kRepeats + i] = term;
      }
      first = b + 1;
    }
  }
  if constexpr (kBlock == kNarrow) {  // up to whole vectors
    for (int64_t k = columns; k < (columns + 63) / 64 * 64; ++k) parts.codes[k] = 0;
    for (int64_t b = blocks; b < (blocks + 15) / 16 * 16; ++b) parts.scales[b] = parts.offsets[b] = 0.0f;
  }
}

// ---- products ------------------------------------------------------------------------------------------------------------

struct Operands {
  const void* const* rows;  // of activations
  const uint8_t* weights;   // taken apart
  GgufRow row;
  int64_t columns;

  template <typename T>
  const T* of_row(int64_t m, int64_t at) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(rows[m]) + at);
  }
};

// c[m, n] for kRows rows from m on and kCount rows of weights from n on, of blocks of 256 columns.
template <typename Kind, int kRows, int kCount>
void multiply_wide(float* c, const Operands& o, int64_t m, int64_t n) {
  constexpr int kGroupLanes = Kind::kGroup / 4;
  Floats total[kRows][kCount] = {};
  for (int64_t b = 0; b < o.columns / kWide; ++b) {
    Ints sum[kRows][kCount] = {};
#pragma GCC unroll 2
    for (int v = 0; v < kWide / kColumns; ++v) {
      const int64_t k = b * kWide + v * kColumns;
      Bytes codes[kCount];
      Ints s[kCount];
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const uint8_t* const w = o.weights + (n + j) * o.row.bytes;
        codes[j] = load_codes(w + k);
        s[j] = spread<kGroupLanes>(reinterpret_cast<const int32_t*>(w + o.row.sums) + k / Kind::kGroup);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Bytes x = load_codes(o.of_row<int8_t>(m + i, k));
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) sum[i][j] = add_products<Kind::kHasSigns>(sum[i][j], codes[j], x, s[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      uint8_t* const w = const_cast<uint8_t*>(o.weights) + (n + j) * o.row.bytes;
      const Parts parts(w, o.row, o.columns);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const float scale = o.of_row<float>(m + i, o.row.scales)[b];
        const int16_t* const sums = o.of_row<int16_t>(m + i, o.row.sums) + b * 16;
        if constexpr (Kind::kOffset != 0) sum[i][j] -= multiply_sums(parts.terms + b * 16, sums);
        total[i][j] = multiply_add(to_floats(sum[i][j]), broadcast(parts.scales[b] * scale), total[i][j]);
        if constexpr (Kind::kHasMins) {
          const Floats terms = to_floats(multiply_sums(parts.terms + b * 16, sums));
          total[i][j] = multiply_add(terms, broadcast(-(parts.offsets[b] * scale)), total[i][j]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) c[(m + i) * kPanel + n + j] = add_lanes(total[i][j]);
  }
}

// The same of blocks of 32 columns, several in a vector where it is longer.
template <typename Kind, int kRows, int kCount>
void multiply_narrow(float* c, const Operands& o, int64_t m, int64_t n) {
  constexpr int kVectors = kColumns < kNarrow ? kNarrow / kColumns : 1;  // of a block
  constexpr int64_t kStep = kColumns * kVectors;
  const Ints ones = broadcast_ints(kOne);
  Floats total[kRows][kCount] = {};
  const uint8_t* w[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) w[j] = o.weights + (n + j) * o.row.bytes;
  for (int64_t k = 0; k < o.columns; k += kStep) {
    Bytes codes[kCount][kVectors];
    Floats scales[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) codes[j][v] = load_codes(w[j] + k + v * kColumns);
      scales[j] = spread<kNarrow / 4>(reinterpret_cast<const float*>(w[j] + o.row.scales) + k / kNarrow);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Floats scale = spread<kNarrow / 4>(o.of_row<float>(m + i, o.row.scales) + k / kNarrow);
      Ints sum[kCount] = {};
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Bytes x = load_codes(o.of_row<int8_t>(m + i, k + v * kColumns));
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) sum[j] = add_products<Kind::kHasSigns>(sum[j], codes[j][v], x, ones);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        total[i][j] = multiply_add(to_floats(sum[j]), scales[j] * scale, total[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCount; ++j) {
      if constexpr (Kind::kHasMins) {
        const auto* const offsets = reinterpret_cast<const float*>(w[j] + o.row.offsets);
        const auto* const sums = o.of_row<float>(m + i, o.row.offsets);
        for (int64_t b = 0; b < o.columns / kNarrow; b += kLanes) {
          total[i][j] = multiply_add(load(offsets + b), load(sums + b), total[i][j]);
        }
      }
      c[(m + i) * kPanel + n + j] = add_lanes(total[i][j]);
    }
  }
}

template <typename Kind, bool kIsWide, int kRows>
void multiply_rows(float* c, const Operands& o, int64_t m, int64_t count) {
  int64_t n = 0;
  for (; n + 2 <= count; n += 2) {
    if constexpr (kIsWide) {
      multiply_wide<Kind, kRows, 2>(c, o, m, n);
    } else {
      multiply_narrow<Kind, kRows, 2>(c, o, m, n);
    }
  }
  if (n == count) return;
  if constexpr (kIsWide) {
    multiply_wide<Kind, kRows, 1>(c, o, m, n);
  } else {
    multiply_narrow<Kind, kRows, 1>(c, o, m, n);
  }
}

template <typename Kind, bool kIsWide>
void multiply_parts(float* c, const Operands& o, int64_t num_rows, int64_t count) {
  constexpr int kTile = kIsWide ? 4 : 2;  // rows, as registers allow
  const int64_t tiles = (num_rows + kTile - 1) / kTile;
  for (int64_t t = 0, m = 0, rows; t < tiles; ++t, m += rows) {
    rows = (num_rows - m) / (tiles - t);
    with_count<kTile>(rows, [&]<int kRows>() { multiply_rows<Kind, kIsWide, kRows>(c, o, m, count); });
  }
}

// ---- one row -------------------------------------------------------------------------------------------------------------

// With one row of activations, codes go from registers to their product, with the sums of multiply_wide and multiply_narrow. That
// is for vectors of a block of 32 columns; longer ones would read what two stores have written.
constexpr bool kHasOneRow = kColumns == kNarrow;

// c[n] for kCount rows of weights from n on. Their offsets are kept in the scratch.
template <Format kFormat, int kCount>
void multiply_one(const Product& p, int64_t n) {
  using B = Block<kFormat>;
  using Kind = KindOf<kFormat>;
  constexpr int64_t kBlock = gguf_type(kFormat).columns, kBytes = gguf_type(kFormat).bytes;
  constexpr int kGroups = static_cast<int>(kBlock / B::kGroup), kRepeats = B::kGroup / 16;
  constexpr bool kIsWide = kHasIntegerFactors<kFormat>;
  const GgufRow row(p.depth);
  const Operands o{p.rows, nullptr, row, p.depth};
  const auto* const x = o.of_row<uint8_t>(0, 0);
  const auto* const scales = o.of_row<float>(0, row.scales);
  const int64_t blocks = p.depth / kBlock, padded = (blocks + 15) / 16 * 16;
  auto* const offsets = static_cast<float*>(p.scratch);  // [kCount, padded]
  Floats total[kCount] = {};
  const uint8_t* w[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) w[j] = static_cast<const uint8_t*>(p.b.data) + (n + j) * p.b.n_stride;
  for (int64_t b = 0; b < blocks; ++b) {
    const float scale = scales[b];
    [[maybe_unused]] const int16_t* const sums = o.of_row<int16_t>(0, row.sums) + b * 16;
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      prefetch_lines(w[j], kBytes);
      alignas(64) uint8_t codes[kBlock];
#pragma GCC unroll 2
      for (int unit = 0; unit < kBlock / B::kUnit; ++unit) B::unpack(codes + unit * B::kUnit, w[j], unit);
      const Factors f = B::factors(w[j]);
      w[j] += kBytes;
      Ints sum = {};
      if constexpr (kIsWide) {
        int32_t factors[kGroups];
        int16_t terms[16];
        for (int g = 0; g < kGroups; ++g) factors[g] = factor(f.s[g]);
        for (int g = 0; g < kGroups; ++g) {
          const auto term = static_cast<int16_t>(B::kHasMins ? f.t[g] : B::kOffset * f.s[g]);
          for (int i = 0; i < kRepeats; ++i) terms[g * kRepeats + i] = term;
        }
#pragma GCC unroll 8
        for (int v = 0; v < kBlock / kColumns; ++v) {
          const Ints s = spread<Kind::kGroup / 4>(factors + v * kColumns / Kind::kGroup);
          sum = add_products<Kind::kHasSigns>(sum, load_codes(codes + v * kColumns),
                                              load_codes(x + b * kBlock + v * kColumns), s);
        }
        if constexpr (Kind::kOffset != 0) sum -= multiply_sums(terms, sums);
        total[j] = multiply_add(to_floats(sum), broadcast(f.d * scale), total[j]);
        if constexpr (Kind::kHasMins) {
          total[j] = multiply_add(to_floats(multiply_sums(terms, sums)), broadcast(-(f.m * scale)), total[j]);
        }
      } else {
        Bytes signed_codes = load_codes(codes);
        if constexpr (B::kOffset != 0) signed_codes -= static_cast<int8_t>(B::kOffset);
        sum = add_products<Kind::kHasSigns>(sum, signed_codes, load_codes(x + b * kBlock), broadcast_ints(kOne));
        total[j] = multiply_add(to_floats(sum), broadcast(f.d) * broadcast(scale), total[j]);
        if constexpr (Kind::kHasMins) offsets[j * padded + b] = -f.m;
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    if constexpr (Kind::kHasMins && !kIsWide) {
      for (int64_t b = blocks; b < padded; ++b) offsets[j * padded + b] = 0.0f;
      const auto* const sums = o.of_row<float>(0, row.offsets);
      for (int64_t b = 0; b < blocks; b += kLanes) {
        total[j] = multiply_add(load(offsets + j * padded + b), load(sums + b), total[j]);
      }
    }
    p.c[n + j] = add_lanes(total[j]);
  }
}

template <Format kFormat>
void multiply_of(const Product& p) {
  if constexpr (kHasOneRow) {
    constexpr int kMost = kHasIntegerFactors<kFormat> ? 2 : 4;
    if (p.num_rows == 1 && kMost * GgufRow(p.depth).bytes <= kProductScratch) {
      for (int64_t n = 0; n < p.num_columns; n += kMost) {
        with_count<kMost>(p.num_columns - n < kMost ? p.num_columns - n : kMost,
                          [&]<int kCount>() { multiply_one<kFormat, kCount>(p, n); });
      }
      return;
    }
  }
  constexpr int64_t kFewColumns = 2;  // at once for few rows, so that weights taken apart stay in L1
  const GgufRow row(p.depth);
  const int64_t room = kProductScratch / row.bytes, most = p.num_rows <= 4 ? kFewColumns : p.num_columns;
  const int64_t at_once = most < room ? most : room;
  auto* const memory = static_cast<uint8_t*>(p.scratch);
  for (int64_t n = 0; n < p.num_columns; n += at_once) {
    const int64_t count = p.num_columns - n < at_once ? p.num_columns - n : at_once;
    for (int64_t j = 0; j < count; ++j) {
      take_apart<kFormat>(memory + j * row.bytes, row, static_cast<const uint8_t*>(p.b.data) + (n + j) * p.b.n_stride,
                          p.depth);
    }
    multiply_parts<KindOf<kFormat>, kHasIntegerFactors<kFormat>>(p.c + n, {p.rows, memory, row, p.depth}, p.num_rows,
                                                                 count);
  }
}

}  // namespace
}  // namespace switchgear::cpu
