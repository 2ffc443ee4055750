// SPDX-License-Identifier: BSD-3-Clause
// multiply with columns of a weight in integers or minifloats: C[m,n] = Σ_k A[m,k]·W[k, first_column + n], W rounded to the
// dtype of A. Included by kernels.inl after minifloat_products.inl and before multiply is defined.
//
//   work 2·M·N·K flop; traffic: stored weights once per product, 1 or 1/2 byte each and their scales
//   Weights are decoded into the packed panel, kStoredWords words of depth at a time, 16 KB with AVX-512: it stays in L1. So
//   they pass memory and L2 in their stored form only. The lanes of a decoded vector are rows of a block, i.e. neighbours in
//   k. Pairs of bfloat16 are neighbours in k too, so rounding two columns makes 16 whole words, and transposing 16 vectors
//   makes 8 rows of the panel for 32 columns: per 32 weights 2 operations each for scales, 1 rounding and 4 shuffles.
//   Words of float32 are transposed first and rounded then.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int64_t kStoredWords = 64;  // depth of a decoded panel

template <Format kFormat>
constexpr bool kIsInteger = is_integer(kFormat);
template <Format kFormat>
constexpr int kStoredColumns = bits_of(kFormat) == 8 ? 4 : 8;  // of 64 bytes

// kLanes rows of a block, in columns that share a group.
struct RowScales {
  Floats scale, zero;  // w = (value - zero) · scale
};

// Columns of a block of 16 rows.
template <Format kFormat>
struct StoredBlock {
  const uint8_t* data;
  const uint8_t* scales;
  const float* row_scales;  // these two for integers only
  const uint8_t* zeros;
  int64_t ahead, scales_ahead;  // bytes to what is prefetched
  int64_t num_columns;

  // Of rows `row` + lane and group g.
  RowScales scales_of(int64_t g, int row) const {
    if constexpr (kIsInteger<kFormat>) {
      constexpr float kUnit = bits_of(kFormat) == 8 ? 1.0f : 1.0f / 16;
      const int64_t place = g * kMinifloatRows + row;
      const Floats zero = zeros == nullptr ? broadcast(128.0f) : widen(zeros + place);
      return {load(row_scales + row) * widen(reinterpret_cast<const int8_t*>(scales) + place), zero * broadcast(kUnit)};
    } else {
      constexpr int64_t kBytes = kScaleBytes<kFormat>;
      return {load_scales<kFormat>(scales + (g * kMinifloatRows + row) * kBytes), broadcast(0.0f)};
    }
  }

  // Column n and its neighbours in a vector of the storage, for rows `row` + lane. Past the last column they are zero.
  template <bool kWhole>
  void decode(Floats* values, int64_t n, int row, const RowScales& rows) const {
    constexpr int kColumns = kStoredColumns<kFormat>;
    if (!kWhole && n >= num_columns) {
      for (int k = 0; k < kColumns; ++k) values[k] = broadcast(0.0f);
      return;
    }
    const uint8_t* const p = data + n / kColumns * kLine + row * 4;
    if (row == 0) __builtin_prefetch(p + ahead, 0, 2);
    if constexpr (kIsInteger<kFormat>) {
      constexpr int kBits = bits_of(kFormat);
      const Ints codes = load_ints(p);
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) {
        const Ints q = codes >> (8 * (k % 4) + 4 * (k / 4)) & ((1 << kBits) - 1);
        values[k] = (__builtin_convertvector(q, Floats) - rows.zero) * rows.scale;
      }
    } else {
      Floats words[kColumns];
      Decoder<kFormat, false>::decode(words, p);
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) values[k] = words[k] * rows.scale;
    }
  }

  // Group of the first column's group `groups[n / 16]`, after a prefetch.
  RowScales scales_at(const int64_t (&groups)[kMaxPanel / 8], int64_t n, int row) const {
    const int64_t g = groups[n / 8];
    constexpr int64_t kBytes = kIsInteger<kFormat> ? 1 : kScaleBytes<kFormat>;
    if (row == 0) __builtin_prefetch(scales + g * kMinifloatRows * kBytes + scales_ahead, 0, 2);
    return scales_of(g, row);
  }
};

template <typename T>
inline Floats rounded_to(Floats v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    T lanes[kLanes];
    store(lanes, v);
    return load(lanes);
  }
}

#ifdef __AVX512BF16__
// The bfloat16 of `low`, then those of `high`. The processor's own rounding treats subnormal numbers as zero.
template <bool kInBits>
inline Floats round_columns(Floats low, Floats high) {
  if constexpr (!kInBits) return reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(high, low));
  BFloat16 lanes[2 * kLanes];
  store(lanes, low);
  store(lanes + kLanes, high);
  return _mm512_loadu_ps(lanes);
}

// Whether a value that is not zero may become subnormal: the smallest is 2^-9.
inline bool makes_subnormals(Floats scale) {
  const Floats magnitude = _mm512_abs_ps(scale);
  return (_mm512_cmp_ps_mask(magnitude, broadcast(0x1p-116f), _CMP_LT_OQ) &
          _mm512_test_epi32_mask(_mm512_castps_si512(magnitude), _mm512_castps_si512(magnitude))) != 0;
}

// 32 columns from n on of all rows: 8 words of depth.
template <Format kFormat, bool kWhole, bool kInBits>
inline void pack_pairs(float* panel, const StoredBlock<kFormat>& block, int64_t n, const RowScales& first,
                       const RowScales& second) {
  constexpr int kColumns = kStoredColumns<kFormat>;
  Floats words[kLanes];
#pragma GCC unroll 4
  for (int k = 0; k < kLanes; k += kColumns) {
    Floats low[kColumns], high[kColumns];
    block.template decode<kWhole>(low, n + k, 0, first);
    block.template decode<kWhole>(high, n + kLanes + k, 0, second);
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) words[k + i] = round_columns<kInBits>(low[i], high[i]);
  }
  transpose(words);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    store(panel + i * kPanel + n, words[i]);
    store(panel + i * kPanel + n + kLanes, words[kLanes / 2 + i]);
  }
}

template <Format kFormat, bool kWhole>
void pack_block(PairWords, float* panel, const StoredBlock<kFormat>& block, const int64_t (&groups)[kMaxPanel / 8]) {
  static_assert(kLanes == kMinifloatRows);
  for (int64_t n = 0; n < kPanel; n += 2 * kLanes) {
    const RowScales first = block.scales_at(groups, n, 0), second = block.scales_at(groups, n + kLanes, 0);
    if (makes_subnormals(first.scale) || makes_subnormals(second.scale)) {
      pack_pairs<kFormat, kWhole, true>(panel, block, n, first, second);
    } else {
      pack_pairs<kFormat, kWhole, false>(panel, block, n, first, second);
    }
  }
}
#endif

template <Format kFormat, bool kWhole, typename T>
void pack_block(FloatWords<T>, float* panel, const StoredBlock<kFormat>& block,
                const int64_t (&groups)[kMaxPanel / 8]) {
  constexpr int kColumns = kStoredColumns<kFormat>, kStep = kColumns > kLanes ? kColumns : kLanes;
  static_assert(kPanel % kStep == 0);
  for (int row = 0; row < kMinifloatRows; row += kLanes) {
    for (int64_t n = 0; n < kPanel; n += kStep) {
      const RowScales rows = block.scales_at(groups, n, row);
      Floats values[kStep];
#pragma GCC unroll 4
      for (int k = 0; k < kStep; k += kColumns) block.template decode<kWhole>(values + k, n + k, row, rows);
#pragma GCC unroll 2
      for (int half = 0; half < kStep; half += kLanes) {
        Floats part[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) part[i] = values[half + i];
        transpose(part);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (row + i) * kPanel + n + half, rounded_to<T>(part[i]));
      }
    }
  }
}

// panel[p][n] for k in [k_begin, k_begin + depth), where k_begin starts a block.
template <typename Words, Format kFormat>
void pack_stored_of(float* panel, const Product& product, int64_t k_begin, int64_t depth) {
  const Matrix& b = product.b;
  int64_t groups[kMaxPanel / 8] = {};
  for (int64_t n = 0; n < product.num_columns; n += 8) {
    groups[n / 8] = (b.first_column + n) / b.group_size - b.first_column / b.group_size;
  }
  const auto bytes_to = [](const void* next, const void* own) {
    return next == nullptr ? 0 : static_cast<const char*>(next) - static_cast<const char*>(own);
  };
  for (int64_t k = k_begin; k < k_begin + depth; k += kMinifloatRows) {
    const int64_t block = k / kMinifloatRows;
    const auto* const zeros = static_cast<const uint8_t*>(b.zeros);
    const StoredBlock<kFormat> stored{
        .data = static_cast<const uint8_t*>(b.data) + block * b.n_stride,
        .scales = static_cast<const uint8_t*>(b.scales) + block * b.scale_stride,
        .row_scales = b.row_scales + k,
        .zeros = zeros == nullptr ? nullptr : zeros + block * b.scale_stride,
        .ahead = bytes_to(product.next.data, b.data),
        .scales_ahead = bytes_to(product.next.scales, b.scales),
        .num_columns = product.num_columns,
    };
    if (product.num_columns == kPanel) {
      pack_block<kFormat, true>(Words{}, panel, stored, groups);
    } else {
      pack_block<kFormat, false>(Words{}, panel, stored, groups);
    }
    panel += kMinifloatRows / Words::kDepth * kPanel;
  }
}

template <typename Words>
void pack_stored(float* panel, const Product& product, int64_t k, int64_t depth) {
  switch (product.b.format) {
    case Format::kInt8: pack_stored_of<Words, Format::kInt8>(panel, product, k, depth); break;
    case Format::kInt4: pack_stored_of<Words, Format::kInt4>(panel, product, k, depth); break;
    case Format::kFp8: pack_stored_of<Words, Format::kFp8>(panel, product, k, depth); break;
    case Format::kMxfp4: pack_stored_of<Words, Format::kMxfp4>(panel, product, k, depth); break;
    default: pack_stored_of<Words, Format::kNf4>(panel, product, k, depth);
  }
  if (Words::kDepth == 2 && depth % 2 != 0) {  // what follows the last row is padding, and may be NaN
    float* const last = panel + depth / 2 * kPanel;
    for (int n = 0; n < kPanel; ++n) {
      last[n] = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, last[n]) & 0xffff);
    }
  }
}

template <typename Words>
void multiply_stored_words(const Product& product) {
  constexpr bool kPairs = Words::kDepth == 2;
  constexpr int64_t kChunk = kStoredWords * Words::kDepth;
  float* const panel = static_cast<float*>(product.scratch);
  const void* widened[kMaxRows];
  const int64_t depth = product.depth, stride = sizeof(float) * kPanel;
  if (depth == 0 && !product.accumulate) {
    __builtin_memset(product.c, 0, static_cast<size_t>(stride * product.num_rows));
  }
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t count = depth - k < kChunk ? depth - k : kChunk;
    pack_stored<Words>(panel, product, k, count);
    const auto [rows, offset] = rows_from(product, product.b.dtype, kPairs, k, count, widened);
    const Chunk chunk{.rows = rows,
                      .offset = offset,
                      .panel = panel,
                      .words = count / Words::kDepth,
                      .half_word = count % Words::kDepth != 0,
                      .accumulate = product.accumulate || k > 0};
    Ahead none;
    multiply_rows<kPairs>(chunk, product, 0, none);
  }
  // A vector of the storage may hold columns past the last one.
  for (int64_t m = 0; m < product.num_rows && product.num_columns < kPanel; ++m) {
    __builtin_memset(product.c + m * kPanel + product.num_columns, 0,
                     static_cast<size_t>(kPanel - product.num_columns) * 4);
  }
}

void multiply(const Product& product) {
  with_words(product.b.dtype, [&]<typename Words>() {
    if (product.b.format == Format::kPlain) return multiply_words<Words>(product);
    multiply_stored_words<Words>(product);
  });
}

}  // namespace
}  // namespace switchgear::cpu
