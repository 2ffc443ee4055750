// SPDX-License-Identifier: BSD-3-Clause
// Products of int8 activations and GGUF's blocks where an instruction adds four products of bytes to a lane (AVX-512 VNNI):
// included by gguf_kernels.inl.
//
//   S[m,n,b] = Σ_g s[n,g] · Σ_{k in g} x[m,k]·q[n,k]      of a block of 32 or 256 columns, an exact integer
//   C[m,n] = Σ_l Σ_{b % 16 = l} (d[n,b]·dx[m,b]) · S[m,n,b] - mins      b and l ascend, in float32
//   Codes are unsigned bytes, the value plus an offset whose products are taken away as integers.
//   Up to 4 rows: weights go from memory to registers, lanes along k. The sums of 16 blocks are brought together in one vector, so
//   its lanes are the l of C. One row takes 50 to 70 ns for 2048 weights of a row on a Zen 4, about as long as reading them.
//   More: 32 rows of weights are taken apart with lanes along n, and read again for each six rows: 0.6 of the rate of the
//   instruction with 64 rows.
#pragma once

namespace switchgear::cpu {
namespace {

using Vector = __m512i;
constexpr int64_t kMostDirect = 4;  // rows whose products read weights in place
constexpr int kBlocks = 16;         // sums of a vector
constexpr int kTileVectors = 2;     // of weights taken apart

inline Vector load_vector(const void* p) { return _mm512_loadu_si512(p); }
inline void store_to(void* p, Vector v) { _mm512_storeu_si512(p, v); }
inline Vector bytes_of(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Vector broadcast_int(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline Floats as_floats(Vector sums) { return _mm512_cvtepi32_ps(sums); }

// ---- codes of vectors ----------------------------------------------------------------------------------------------------

// What a code is larger than its value by.
template <Format kFormat>
constexpr int kCodeOffset = Block<kFormat>::kHasSigns ? 128 : Block<kFormat>::kOffset;

// 16 bytes of each fourth of 16 blocks.
template <int kBytes>
inline Vector sixteens(const uint8_t* p) {
  const auto load16 = [&](int b) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * b * kBytes)); };
  Vector v = _mm512_castsi128_si512(load16(0));
  v = _mm512_inserti32x4(v, load16(1), 1);
  v = _mm512_inserti32x4(v, load16(2), 2);
  return _mm512_inserti32x4(v, load16(3), 3);
}

inline Vector table_of(const int8_t* values) {
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(values));
  return _mm512_xor_si512(_mm512_broadcast_i32x4(table), bytes_of(128));
}

// Of each fourth of 16 blocks of 32 columns: the codes of their first 16 columns, and of their last.
template <Format kFormat>
inline void narrow_codes(Vector& first, Vector& last, const uint8_t* block) {
  constexpr int kBytes = gguf_type(kFormat).bytes;
  if constexpr (kFormat == Format::kQ80) {
    first = _mm512_xor_si512(sixteens<kBytes>(block + 2), bytes_of(128));
    last = _mm512_xor_si512(sixteens<kBytes>(block + 18), bytes_of(128));
    return;
  }
  const Vector v = sixteens<kBytes>(block + kBytes - 16), mask = bytes_of(15);
  first = _mm512_and_si512(v, mask);
  last = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  if constexpr (kFormat == Format::kIq4Nl || kFormat == Format::kMxfp4Gguf) {
    const Vector table = table_of(kFormat == Format::kIq4Nl ? kIq4Values : kMxfp4Values);
    first = _mm512_shuffle_epi8(table, first);
    last = _mm512_shuffle_epi8(table, last);
  }
  if constexpr (kFormat == Format::kQ50 || kFormat == Format::kQ51) {
    uint64_t first_bits = 0, last_bits = 0;
    for (int b = 0; b < 4; ++b) {
      uint16_t bits[2];
      __builtin_memcpy(bits, block + 4 * b * kBytes + kBytes - 20, 4);
      first_bits |= static_cast<uint64_t>(bits[0]) << 16 * b;
      last_bits |= static_cast<uint64_t>(bits[1]) << 16 * b;
    }
    first = _mm512_mask_add_epi8(first, first_bits, first, bytes_of(16));
    last = _mm512_mask_add_epi8(last, last_bits, last, bytes_of(16));
  }
}

// float16 numbers of 16 blocks.
template <int kBytes>
inline Floats halves_of(const uint8_t* p) {
  uint64_t fours[4] = {};
#pragma GCC unroll 16
  for (int b = 0; b < kBlocks; ++b) {
    uint16_t half;
    __builtin_memcpy(&half, p + b * kBytes, 2);
    fours[b / 4] |= static_cast<uint64_t>(half) << b % 4 * 16;
  }
  const auto number = [&](int i) { return static_cast<long long>(fours[i]); };
  return _mm512_cvtph_ps(_mm256_setr_epi64x(number(0), number(1), number(2), number(3)));
}

template <Format kFormat>
inline Floats narrow_scales(const uint8_t* block) {
  constexpr int kBytes = gguf_type(kFormat).bytes;
  if constexpr (kFormat == Format::kMxfp4Gguf) {
    float scales[kBlocks];
    for (int b = 0; b < kBlocks; ++b) scales[b] = Block<kFormat>::factors(block + b * kBytes).d;
    return load(scales);
  } else {
    return halves_of<kBytes>(block);
  }
}

// 32 bytes twice, the second shifted by kBits more.
template <int kBits>
inline Vector shifted(const uint8_t* p, int by) {
  const Vector v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const Vector counts = _mm512_inserti64x4(_mm512_set1_epi16(static_cast<short>(by)),
                                           _mm256_set1_epi16(static_cast<short>(by + kBits)), 1);
  return _mm512_srlv_epi16(v, counts);
}
// Bits [by, by + kBits) of each of 32 bytes, then the next kBits, at kTo.
template <int kBits, int kTo>
inline Vector bits_at(const uint8_t* p, int by) {
  const Vector v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const Vector counts =
      _mm512_inserti64x4(_mm512_set1_epi32((kTo - by) & 31), _mm256_set1_epi32((kTo - by - kBits) & 31), 1);
  return _mm512_and_si512(_mm512_rolv_epi32(v, counts), bytes_of(((1 << kBits) - 1) << kTo));
}

// Codes [64 · i, + 64) of a block of 256.
template <Format kFormat>
inline Vector wide_codes(const uint8_t* block, int i) {
  const int half = i / 2, quarter = i % 2;
  if constexpr (kFormat == Format::kQ2K) {
    return _mm512_and_si512(shifted<2>(block + 16 + 32 * half, 4 * quarter), bytes_of(3));
  } else if constexpr (kFormat == Format::kQ3K) {
    const Vector low = _mm512_and_si512(shifted<2>(block + 32 + 32 * half, 4 * quarter), bytes_of(3));
    return _mm512_or_si512(low, bits_at<1, 2>(block, 2 * i));
  } else if constexpr (kFormat == Format::kQ4K) {
    return _mm512_and_si512(shifted<4>(block + 16 + 32 * i, 0), bytes_of(15));
  } else if constexpr (kFormat == Format::kQ5K) {
    const Vector low = _mm512_and_si512(shifted<4>(block + 48 + 32 * i, 0), bytes_of(15));
    return _mm512_or_si512(low, bits_at<1, 4>(block + 16, 2 * i));
  } else if constexpr (kFormat == Format::kQ6K) {
    const Vector low = _mm512_and_si512(_mm512_srli_epi16(load_vector(block + 64 * half), 4 * quarter), bytes_of(15));
    return _mm512_or_si512(low, bits_at<2, 4>(block + 128 + 32 * half, 4 * quarter));
  } else {
    static_assert(kFormat == Format::kIq4Xs);
    constexpr int kOrder = _MM_SHUFFLE(3, 1, 2, 0);  // sixteens of columns from lower and upper halves of bytes
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 8 + 32 * i));
    const __m256i mask = _mm256_set1_epi8(15);
    const Vector both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, mask)),
                                           _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), 1);
    return _mm512_shuffle_epi8(table_of(kIq4Values), _mm512_shuffle_i64x2(both, both, kOrder));
  }
}

// The integers of a block of 256: s of each group; of each 16 columns, -s · offset or t, as 16 bits.
struct WideFactors {
  __m256i s, terms;
  float d, m;
};
template <Format kFormat>
inline WideFactors wide_factors(const uint8_t* block) {
  using B = Block<kFormat>;
  const Factors f = B::factors(block);
  const auto widened = [](const auto& bytes, auto widen) {
    if constexpr (B::kGroup == 16) return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return widen(_mm_unpacklo_epi8(eight, eight));
  };
  const auto as_signed = [](__m128i v) { return _mm256_cvtepi8_epi16(v); };
  WideFactors factors{.s = widened(f.s, as_signed), .terms = {}, .d = f.d, .m = f.m};
  if constexpr (B::kHasMins) factors.terms = widened(f.t, as_signed);
  if constexpr (kCodeOffset<kFormat> != 0) {
    factors.terms = _mm256_mullo_epi16(factors.s, _mm256_set1_epi16(-kCodeOffset<kFormat>));
  }
  return factors;
}
template <Format kFormat>
constexpr bool kHasTerms = Block<kFormat>::kHasMins || kCodeOffset<kFormat> != 0;

// ---- sums of lanes -------------------------------------------------------------------------------------------------------

inline Vector add_pairs(Vector a, Vector b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// Lane 4 · i + j is the sum of lanes [4 · i, + 4) of v[j].
inline Vector sums_of_fours(const Vector* v) {
  const Vector low = add_pairs(v[0], v[1]), high = add_pairs(v[2], v[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// Lane i is the sum of v[i].
inline Vector sums_of_all(const Vector (&v)[16]) {
  const Vector a = sums_of_fours(v), b = sums_of_fours(v + 4), c = sums_of_fours(v + 8), d = sums_of_fours(v + 12);
  const auto add_lanes = [](Vector one, Vector other) {  // 0 and 1, 2 and 3 of both
    return _mm512_add_epi32(_mm512_shuffle_i32x4(one, other, 0x88), _mm512_shuffle_i32x4(one, other, 0xdd));
  };
  return add_lanes(add_lanes(a, b), add_lanes(c, d));
}

// c[n] is the sum of lanes of totals[n], ascending.
inline void store_sums(float* c, Floats (&totals)[16]) {
  transpose(totals);
  Floats sum = {};
#pragma GCC unroll 16
  for (int l = 0; l < 16; ++l) sum += totals[l];
  store(c, sum);
}

// ---- few rows ------------------------------------------------------------------------------------------------------------

// kBlocks blocks from w on, of which those before `end` are in memory: a copy if they are fewer.
template <int kBytes>
inline const uint8_t* whole_blocks(uint8_t (&copy)[kBytes * kBlocks], const uint8_t* w, const uint8_t* end) {
  if (end - w >= kBytes * kBlocks) return w;
  __builtin_memset(copy, 0, sizeof copy);
  __builtin_memcpy(copy, w, static_cast<size_t>(end - w));
  return copy;
}

// totals[i][j] of row m + i and row n + j of weights, j < count.
template <Format kFormat, int kRows>
void narrow_totals(Floats (&totals)[kRows][16], const Product& p, int64_t m, int64_t n, int64_t count) {
  constexpr int kBytes = gguf_type(kFormat).bytes;
  const GgufRow row(p.depth);
  const int64_t blocks = p.depth / kNarrow;
  const char* x[kRows];
  for (int i = 0; i < kRows; ++i) x[i] = static_cast<const char*>(p.rows[m + i]);
  const auto* const weights = static_cast<const uint8_t*>(p.b.data);
  const uint8_t* const end = weights + (p.num_columns - 1) * p.b.n_stride + blocks * kBytes;
  for (int64_t j = 0; j < count; ++j) {
    const uint8_t* w = weights + (n + j) * p.b.n_stride;
    Floats total[kRows] = {};
    for (int64_t b = 0; b < blocks; b += kBlocks, w += kBlocks * kBytes) {
      prefetch_lines(w, kBlocks * kBytes);
      uint8_t copy[kBlocks * kBytes];
      const uint8_t* const block = whole_blocks<kBytes>(copy, w, end);
      const __mmask16 valid =
          first_lanes(std::min<int64_t>(blocks - b, kBlocks));  // those of this row: the next one's follow
      Vector sums[kRows][4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        Vector first, last;
        narrow_codes<kFormat>(first, last, block + v * kBytes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const char* const values = x[i] + b * kNarrow + v * 128;
          sums[i][v] = _mm512_dpbusd_epi32(Vector{}, first, load_vector(values));
          sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], last, load_vector(values + 64));
        }
      }
      const Floats scales = _mm512_maskz_mov_ps(valid, narrow_scales<kFormat>(block));
      Floats mins = {};
      if constexpr (Block<kFormat>::kHasMins) mins = _mm512_maskz_mov_ps(valid, halves_of<kBytes>(block + 2));
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        Vector sum = sums_of_fours(sums[i]);
        const auto at = [&](int64_t part) { return x[i] + part + b * 4; };
        if constexpr (kCodeOffset<kFormat> != 0) {
          constexpr int kShift = kCodeOffset<kFormat> == 128 ? 0 : kCodeOffset<kFormat> == 16 ? 3 : 4;
          sum = _mm512_add_epi32(sum, _mm512_srai_epi32(load_vector(at(row.sums)), kShift));
        }
        const Floats scale = load(reinterpret_cast<const float*>(at(row.scales)));
        total[i] = multiply_add(as_floats(sum), scales * scale, total[i]);
        if constexpr (Block<kFormat>::kHasMins) {
          total[i] = multiply_add(mins, load(reinterpret_cast<const float*>(at(row.offsets))), total[i]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) totals[i][j] = total[i];
  }
}

// Lane l of 32 or 16 is v[4 · quarter + l / 8 or l / 4].
inline Vector spread_halves(__m256i v, int quarter) {
  const Vector eights = _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2,  //
                                         1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const Vector index = _mm512_add_epi16(eights, _mm512_set1_epi16(static_cast<short>(4 * quarter)));
  return _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(v));
}
inline Vector spread_ints(Vector v, int quarter) {
  const Vector fours = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_epi32(_mm512_add_epi32(fours, _mm512_set1_epi32(4 * quarter)), v);
}

// The same of blocks of 256 columns. Their sums are brought together before they are multiplied by floats.
template <Format kFormat, int kRows>
void wide_totals(Floats (&totals)[kRows][16], const Product& p, int64_t m, int64_t n, int64_t count) {
  using B = Block<kFormat>;
  constexpr int kBytes = gguf_type(kFormat).bytes;
  constexpr bool kHasSmallCodes = kCodeOffset<kFormat> < 128;  // sums of two products fit in 16 bits
  const GgufRow row(p.depth);
  const int64_t blocks = p.depth / kWide, length = count * blocks, padded = (length + 15) / 16 * 16;
  const char* x[kRows];
  for (int i = 0; i < kRows; ++i) x[i] = static_cast<const char*>(p.rows[m + i]);
  auto* const scales = static_cast<float*>(p.scratch);  // [count, blocks]
  float* const min_scales = scales + padded;
  auto* const sums = reinterpret_cast<int32_t*>(min_scales + padded);  // [kRows][count, blocks]
  int32_t* const mins = sums + kRows * padded;
  Vector parts[kRows][16], min_parts[kRows][16];
  const auto* w = static_cast<const uint8_t*>(p.b.data) + n * p.b.n_stride;
  for (int64_t at = 0, b = 0; at < length; ++at) {
    prefetch_lines(w, kBytes);
    const WideFactors factors = wide_factors<kFormat>(w);
    scales[at] = factors.d;
    if constexpr (B::kHasMins) min_scales[at] = -factors.m;
    Vector sum[kRows] = {};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vector codes = wide_codes<kFormat>(w, v);
      const Vector s = kHasSmallCodes ? spread_halves(factors.s, v) : spread_ints(_mm512_cvtepi16_epi32(factors.s), v);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vector values = load_vector(x[i] + b * kWide + v * 64);
        if constexpr (kHasSmallCodes) {
          sum[i] = _mm512_dpwssd_epi32(sum[i], _mm512_maddubs_epi16(codes, values), s);
        } else {
          const Vector products = _mm512_dpbusd_epi32(Vector{}, codes, values);
          sum[i] = _mm512_add_epi32(sum[i], _mm512_mullo_epi32(products, s));
        }
      }
    }
    const int slot = static_cast<int>(at % 16);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kHasTerms<kFormat>) {
        const Vector terms = _mm512_zextsi256_si512(factors.terms);
        const Vector of_sixteens =
            _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[i] + row.sums + b * 32)));
        if constexpr (B::kHasMins) {
          min_parts[i][slot] = _mm512_madd_epi16(terms, of_sixteens);
        } else {
          sum[i] = _mm512_dpwssd_epi32(sum[i], terms, of_sixteens);
        }
      }
      parts[i][slot] = sum[i];
    }
    if (at + 1 == length) {
      for (int i = 0; i < kRows; ++i) {
        for (int rest = slot + 1; rest < 16; ++rest) parts[i][rest] = min_parts[i][rest] = Vector{};
      }
    }
    if (slot == 15 || at + 1 == length) {
      for (int i = 0; i < kRows; ++i) {
        store_to(sums + i * padded + at - slot, sums_of_all(parts[i]));
        if constexpr (B::kHasMins) store_to(mins + i * padded + at - slot, sums_of_all(min_parts[i]));
      }
    }
    w += kBytes;
    if (++b == blocks) {
      b = 0;
      w += p.b.n_stride - blocks * kBytes;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const auto* const x_scales = reinterpret_cast<const float*>(x[i] + row.scales);
    for (int64_t j = 0; j < count; ++j) {
      Floats total = {};
      for (int64_t b = 0; b < blocks; b += 16) {
        const auto mask = blocks - b < 16 ? first_lanes(blocks - b) : static_cast<__mmask16>(-1);
        const int64_t at = j * blocks + b;
        const Floats scale = _mm512_maskz_loadu_ps(mask, x_scales + b);
        const auto add = [&](const int32_t* numbers, const float* factors) {
          const Floats factor = _mm512_maskz_loadu_ps(mask, factors + at) * scale;
          total = multiply_add(as_floats(_mm512_maskz_loadu_epi32(mask, numbers + i * padded + at)), factor, total);
        };
        add(sums, scales);
        if constexpr (B::kHasMins) add(mins, min_scales);
      }
      totals[i][j] = total;
    }
  }
}

template <Format kFormat>
void multiply_few(const Product& p) {
  constexpr int kMost = kMostDirect;
  const int64_t tiles = (p.num_rows + kMost - 1) / kMost;
  for (int64_t n = 0; n < p.num_columns; n += 16) {
    const int64_t count = p.num_columns - n < 16 ? p.num_columns - n : 16;
    for (int64_t t = 0, m = 0, rows; t < tiles; ++t, m += rows) {
      rows = (p.num_rows - m) / (tiles - t);
      with_count<kMost>(rows, [&]<int kRows>() {
        Floats totals[kRows][16];
        for (int i = 0; i < kRows; ++i) {
          for (int64_t j = count; j < 16; ++j) totals[i][j] = Floats{};
        }
        if constexpr (kHasIntegerFactors<kFormat>) {
          wide_totals<kFormat, kRows>(totals, p, m, n, count);
        } else {
          narrow_totals<kFormat, kRows>(totals, p, m, n, count);
        }
        for (int i = 0; i < kRows; ++i) store_sums(p.c + (m + i) * kPanel + n, totals[i]);
      });
    }
  }
}

// ---- many rows -----------------------------------------------------------------------------------------------------------

// 16 rows of weights taken apart: [blocks][vectors of a block], lanes along n. Codes, of four columns each; of blocks of 256 s of
// each group and terms of each 32 columns; d; and of formats with mins theirs.
template <Format kFormat>
struct Panel {
  using B = Block<kFormat>;
  static constexpr bool kIsWide = kHasIntegerFactors<kFormat>;
  static constexpr int kColumns = gguf_type(kFormat).columns, kBytes = gguf_type(kFormat).bytes;
  static constexpr int kGroup = B::kGroup, kGroups = kIsWide ? kColumns / kGroup : 0;
  static constexpr int kTerms = kIsWide && kHasTerms<kFormat> ? 8 : 0;
  static constexpr int kFactors = kColumns / 4, kFirstTerm = kFactors + kGroups, kScale = kFirstTerm + kTerms;
  static constexpr int kVectors = kScale + 1 + B::kHasMins;

  static int64_t bytes(int64_t depth) { return (depth / kColumns + 15) / 16 * 16 * kVectors * 64; }
};

inline void transpose_to(char* out, int64_t stride, Vector (&v)[16]) {
  Floats rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(v[i]);
  transpose(rows);
  for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(out + i * stride), rows[i]);
}

// rows[j]: of weights. All codes are larger than their values by 128.
template <Format kFormat>
void take_apart_narrow(char* out, const uint8_t* const (&rows)[16], int64_t depth) {
  using P = Panel<kFormat>;
  constexpr int64_t kBlock = P::kVectors * 64;
  constexpr bool kHasMins = P::B::kHasMins;
  const int64_t blocks = depth / kNarrow;
  for (int64_t b = 0; b < blocks; b += kBlocks, out += kBlocks * kBlock) {
    Vector codes[4][2][16], scales[16], mins[16];
    for (int j = 0; j < 16; ++j) {
      const uint8_t* const w = rows[j] + b * P::kBytes;
      prefetch_lines(w, kBlocks * P::kBytes);
      uint8_t copy[kBlocks * P::kBytes];
      const uint8_t* const block = whole_blocks<P::kBytes>(copy, w, rows[j] + blocks * P::kBytes);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        Vector first, last;
        narrow_codes<kFormat>(first, last, block + v * P::kBytes);
        codes[v][0][j] = _mm512_add_epi8(first, bytes_of(128 - kCodeOffset<kFormat>));
        codes[v][1][j] = _mm512_add_epi8(last, bytes_of(128 - kCodeOffset<kFormat>));
      }
      scales[j] = _mm512_castps_si512(narrow_scales<kFormat>(block));
      if constexpr (kHasMins) mins[j] = _mm512_castps_si512(halves_of<P::kBytes>(block + 2));
    }
    for (int v = 0; v < 4; ++v) {
      for (int half = 0; half < 2; ++half) {  // word 4 · i + t is of block 4 · i + v
        Vector words[16];
        for (int j = 0; j < 16; ++j) words[j] = codes[v][half][j];
        char turned[16 * 64];
        transpose_to(turned, 64, words);
        for (int i = 0; i < 4; ++i) {
          for (int t = 0; t < 4; ++t) {
            store_to(out + (4 * i + v) * kBlock + (4 * half + t) * 64, load_vector(turned + (4 * i + t) * 64));
          }
        }
      }
    }
    transpose_to(out + P::kScale * 64, kBlock, scales);
    if constexpr (kHasMins) transpose_to(out + (P::kScale + 1) * 64, kBlock, mins);
  }
}

template <Format kFormat>
void take_apart_wide(char* out, const uint8_t* const (&rows)[16], int64_t depth) {
  using P = Panel<kFormat>;
  constexpr int64_t kBlock = P::kVectors * 64;
  for (int64_t b = 0; b < depth / kWide; ++b, out += kBlock) {
    Vector words[16], terms[16];
    for (int v = 0; v < 4; ++v) {
      for (int j = 0; j < 16; ++j) words[j] = wide_codes<kFormat>(rows[j] + b * P::kBytes, v);
      transpose_to(out + v * 1024, 64, words);
    }
    alignas(64) float scales[2][16];
    for (int j = 0; j < 16; ++j) {
      const uint8_t* const w = rows[j] + b * P::kBytes;
      prefetch_lines(w, P::kBytes);
      const WideFactors factors = wide_factors<kFormat>(w);
      words[j] = _mm512_cvtepi16_epi32(factors.s);
      terms[j] = _mm512_zextsi256_si512(factors.terms);
      scales[0][j] = factors.d;
      scales[1][j] = -factors.m;
    }
    char turned[16 * 64];
    transpose_to(turned, 64, words);
    for (int g = 0; g < P::kGroups; ++g) {
      store_to(out + (P::kFactors + g) * 64, load_vector(turned + g * (P::kGroup / 16) * 64));
    }
    if constexpr (P::kTerms > 0) {
      transpose_to(turned, 64, terms);
      __builtin_memcpy(out + P::kFirstTerm * 64, turned, P::kTerms * 64);
    }
    __builtin_memcpy(out + P::kScale * 64, scales, (1 + P::B::kHasMins) * 64);
  }
}

// Rows m to m + kRows of c, and kVectors · 16 columns.
template <Format kFormat, int kRows, int kVectors>
void multiply_tile(float* c, const char* panel, int64_t panel_bytes, const void* const* rows, int64_t depth) {
  using P = Panel<kFormat>;
  constexpr bool kHasMins = P::B::kHasMins;
  const GgufRow row(depth);
  const int64_t blocks = depth / P::kColumns;
  const char* x[kRows];
  for (int i = 0; i < kRows; ++i) x[i] = static_cast<const char*>(rows[i]);
  Floats result[kRows][kVectors] = {};
  for (int64_t lane = 0; lane < blocks && lane < 16; ++lane) {
    Floats total[kRows][kVectors] = {};
    for (int64_t b = lane; b < blocks; b += 16) {
      const char* const block = panel + b * P::kVectors * 64;
      const auto vector_at = [&](int j, int v) { return load_vector(block + j * panel_bytes + v * 64); };
      const auto floats_at = [&](int j, int v) {
        return load(reinterpret_cast<const float*>(block + j * panel_bytes + v * 64));
      };
      const auto float_at = [&](int i, int64_t part) {
        return broadcast(reinterpret_cast<const float*>(x[i] + part)[b]);
      };
      Vector sum[kRows][kVectors];
      [[maybe_unused]] Vector mins[kRows][kVectors] = {};
      if constexpr (!P::kIsWide) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < kVectors; ++j) sum[i][j] = broadcast_int(x[i] + row.sums + b * 4);
        }
        const int64_t at = b / 16 * 512 + b % 4 * 128 + b % 16 / 4 * 16;
#pragma GCC unroll 8
        for (int word = 0; word < 8; ++word) {
          Vector codes[kVectors];
          for (int j = 0; j < kVectors; ++j) codes[j] = vector_at(j, word);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const Vector values = broadcast_int(x[i] + at + word / 4 * 64 + word % 4 * 4);
            for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], codes[j], values);
          }
        }
      } else {
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < kVectors; ++j) sum[i][j] = Vector{};
        }
        for (int g = 0; g < P::kGroups; ++g) {
          Vector of_group[kRows][kVectors] = {};
#pragma GCC unroll 8
          for (int word = 0; word < P::kGroup / 4; ++word) {
            const int at = g * P::kGroup / 4 + word;
            Vector codes[kVectors];
            for (int j = 0; j < kVectors; ++j) codes[j] = vector_at(j, at);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
              const Vector values = broadcast_int(x[i] + b * kWide + at * 4);
              for (int j = 0; j < kVectors; ++j) of_group[i][j] = _mm512_dpbusd_epi32(of_group[i][j], codes[j], values);
            }
          }
          for (int j = 0; j < kVectors; ++j) {
            const Vector s = vector_at(j, P::kFactors + g);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
              sum[i][j] = _mm512_add_epi32(sum[i][j], _mm512_mullo_epi32(of_group[i][j], s));
            }
          }
        }
        for (int t = 0; t < P::kTerms; ++t) {
          for (int j = 0; j < kVectors; ++j) {
            const Vector terms = vector_at(j, P::kFirstTerm + t);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
              Vector& to = kHasMins ? mins[i][j] : sum[i][j];
              to = _mm512_dpwssd_epi32(to, terms, broadcast_int(x[i] + row.sums + b * 32 + t * 4));
            }
          }
        }
      }
      for (int j = 0; j < kVectors; ++j) {
        const Floats scales = floats_at(j, P::kScale);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Floats scale = float_at(i, row.scales);
          total[i][j] = multiply_add(as_floats(sum[i][j]), scales * scale, total[i][j]);
          if constexpr (kHasMins) {
            const Floats of_mins = floats_at(j, P::kScale + 1);
            if constexpr (P::kIsWide) {
              total[i][j] = multiply_add(as_floats(mins[i][j]), of_mins * scale, total[i][j]);
            } else {
              total[i][j] = multiply_add(of_mins, float_at(i, row.offsets), total[i][j]);
            }
          }
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) result[i][j] += total[i][j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * kPanel + j * 16, result[i][j]);
  }
}

template <Format kFormat>
void multiply_many(const Product& p) {
  constexpr int kMost = 6;
  const int64_t tiles = (p.num_rows + kMost - 1) / kMost, bytes = Panel<kFormat>::bytes(p.depth);
  auto* const panel = static_cast<char*>(p.scratch);
  for (int64_t n = 0; n < p.num_columns; n += kTileVectors * 16) {
    const int64_t count = p.num_columns - n, vectors = count <= 16 ? 1 : 2;
    for (int64_t v = 0; v < vectors; ++v) {
      const uint8_t* rows[16];  // the last one again where there are no more
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t column = v * 16 + j < count ? n + v * 16 + j : p.num_columns - 1;
        rows[j] = static_cast<const uint8_t*>(p.b.data) + column * p.b.n_stride;
      }
      if constexpr (kHasIntegerFactors<kFormat>) {
        take_apart_wide<kFormat>(panel + v * bytes, rows, p.depth);
      } else {
        take_apart_narrow<kFormat>(panel + v * bytes, rows, p.depth);
      }
    }
    for (int64_t t = 0, m = 0, rows; t < tiles; ++t, m += rows) {
      rows = (p.num_rows - m) / (tiles - t);
      float* const c = p.c + m * kPanel + n;
      with_count<kMost>(rows, [&]<int kRows>() {
        if (vectors == 1) return multiply_tile<kFormat, kRows, 1>(c, panel, bytes, p.rows + m, p.depth);
        multiply_tile<kFormat, kRows, 2>(c, panel, bytes, p.rows + m, p.depth);
      });
    }
  }
}

template <Format kFormat>
void multiply_of(const Product& p) {
  if (p.num_rows <= kMostDirect || kTileVectors * Panel<kFormat>::bytes(p.depth) > kProductScratch) {
    return multiply_few<kFormat>(p);
  }
  multiply_many<kFormat>(p);
}

}  // namespace
}  // namespace switchgear::cpu
