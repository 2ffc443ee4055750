// SPDX-License-Identifier: BSD-3-Clause
// multiply with columns of a weight in integers or minifloats: C[m,n] = Σ_k A[m,k]·W[k, first_column + n], W rounded to the
// dtype of A. Included by kernels.inl after minifloat_products.inl and before multiply is defined.
//
//   work 2·M·N·K flop; traffic: stored weights once per product, 1 or 1/2 byte each and their scales
//   Weights are decoded into the packed panel, kStoredWords words of depth at a time, 16 KB with AVX-512: it stays in L1. So
//   they pass memory and L2 in their stored form only. The lanes of a decoded vector are rows of a block, i.e. neighbours in
//   k. Pairs of bfloat16 are neighbours in k too, so rounding two columns makes 16 whole words, and transposing 16 vectors
//   makes 8 rows of the panel for 32 columns: 4 shuffles per 32 weights. Words of float32 are transposed and then rounded.
//   With AVX-512-BF16, weights of 4 bits are looked up instead, 16 rounded values of a row: 128 weights take 3 shuffles to
//   transpose, 1 to align, 7 shifts and masks, 4 lookups, and 5 to 7 operations for the table.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int64_t kStoredWords = 64;  // depth of a decoded panel

// The group of each 8 columns of a panel, counted from that of the first one.
using Groups = int64_t[kMaxPanel / 8];
inline void find_groups(Groups& groups, const Product& product) {
  const Matrix& b = product.b;
  for (int64_t n = 0; n < kPanel; n += 8) {
    const int64_t last = n < product.num_columns ? n : 0;
    groups[n / 8] = (b.first_column + last) / b.group_size - b.first_column / b.group_size;
  }
}

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
  const float* row_scales;
  const uint8_t* zeros;         // of integers
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
      using Of = Minifloats<kFormat, false>;
      constexpr int64_t kBytes = kScaleBytes<kFormat>;
      return {Of::scale(scales + row * kBytes, g, Of::kHasRowScales ? row_scales + row : nullptr), broadcast(0.0f)};
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

  // Of the group of column n; prefetches those of the next slice.
  RowScales scales_at(const Groups& groups, int64_t n, int row) const {
    const int64_t g = groups[n / 8];
    constexpr int64_t kBytes = kScaleBytes<kFormat>;
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
inline bool is_one_group(const Groups& groups) { return groups[kPanel / 8 - 1] == 0; }
inline bool is_two_groups(const Groups& groups) {  // one in each half of a panel
  return groups[kPanel / 16 - 1] == 0 && groups[kPanel / 16] == groups[kPanel / 8 - 1];
}

// The bfloat16 of `low`, then those of `high`. Subnormal numbers become zero, as they do in the product itself.
inline Floats round_columns(Floats low, Floats high) {
  return reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(high, low));
}

// 32 columns from n on of all rows: 8 words of depth.
template <Format kFormat, bool kWhole>
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
    for (int i = 0; i < kColumns; ++i) words[k + i] = round_columns(low[i], high[i]);
  }
  transpose(words);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    store(panel + i * kPanel + n, words[i]);
    store(panel + i * kPanel + n + kLanes, words[kLanes / 2 + i]);
  }
}

// ---- lookup of codes of 4 bits -------------------------------------------------------------------------------------------

// Where a looked-up panel has column n. Vector t has nibble t of each 16 bits; its lane 2·w + h is of half h of word w.
template <Format kFormat>
constexpr int place_of(int n) {
  const int word = n / 8, k = n % 8;
  if (kFormat == Format::kInt4) return (k / 4 + k % 2 * 2) * kLanes + 2 * word + k % 4 / 2;
  return k / 2 * kLanes + 2 * word + k % 2;
}

// row[i] = row[from[i]] for a panel.
void permute_panel(float* row, const int32_t* from) {
  Floats v[kPanelVectors], out[kPanelVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kPanelVectors; ++j) v[j] = load(row + j * kLanes);
#pragma GCC unroll 4
  for (int j = 0; j < kPanelVectors; ++j) {
    const __m512i index = _mm512_load_si512(from + j * kLanes);
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(2 * kLanes));
    out[j] = _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(v[0], index, v[1]),
                                  _mm512_permutex2var_ps(v[2], index, v[3]));
  }
#pragma GCC unroll 4
  for (int j = 0; j < kPanelVectors; ++j) store(row + j * kLanes, out[j]);
}

// Rows of c into the order of a looked-up panel, or back.
template <Format kFormat>
void reorder(const Product& product, bool back) {
  static constexpr auto kPlaces = make_table_of<int32_t, kPanel>(place_of<kFormat>);
  static constexpr auto kColumns = [] {
    Table<int32_t, kPanel> columns{};
    for (int n = 0; n < kPanel; ++n) columns.values[place_of<kFormat>(n)] = n;
    return columns;
  }();
  const int32_t* const from = back ? kPlaces.values : kColumns.values;
  for (int64_t m = 0; m < product.num_rows; ++m) permute_panel(product.c + m * kPanel, from);
}

inline void transpose_quads(__m512i (&v)[8]) {
  __m512i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi64(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // columns i, i + 2, i + 4 and i + 6
    const __m512i low_even = _mm512_shuffle_i64x2(t[i], t[i + 2], 0x88);
    const __m512i low_odd = _mm512_shuffle_i64x2(t[i], t[i + 2], 0xdd);
    const __m512i high_even = _mm512_shuffle_i64x2(t[i + 4], t[i + 6], 0x88);
    const __m512i high_odd = _mm512_shuffle_i64x2(t[i + 4], t[i + 6], 0xdd);
    v[i] = _mm512_shuffle_i64x2(low_even, high_even, 0x88);
    v[i + 4] = _mm512_shuffle_i64x2(low_even, high_even, 0xdd);
    v[i + 2] = _mm512_shuffle_i64x2(low_odd, high_odd, 0x88);
    v[i + 6] = _mm512_shuffle_i64x2(low_odd, high_odd, 0xdd);
  }
}

// The 16 values of a row, then those of the next one.
template <Format kFormat>
inline __m512i pair_table(const float* scales, const float* zeros) {
  static constexpr auto kCodes = make_table_of<float, 16>([](int i) {
    if constexpr (kFormat == Format::kInt4) return static_cast<float>(i);
    return nibble_value<kFormat>(i);
  });
  const Floats codes = load(kCodes.values);
  if constexpr (kFormat == Format::kInt4) {
    return reinterpret_cast<__m512i>(round_columns((codes - broadcast(zeros[0])) * broadcast(scales[0]),
                                                   (codes - broadcast(zeros[1])) * broadcast(scales[1])));
  }
  return reinterpret_cast<__m512i>(round_columns(codes * broadcast(scales[0]), codes * broadcast(scales[1])));
}

// A whole panel of 4-bit weights whose two halves each share a group, or both the same one: 8 words of depth. A vector of
// the table holds the 16 values of two rows, and an index of 5 bits finds the word of a pair.
template <Format kFormat, int kGroups>
void look_up_block(float* panel, const StoredBlock<kFormat>& block, const RowScales (&rows)[kGroups]) {
  float scales[kGroups][kLanes], zeros[kGroups][kLanes];
  for (int g = 0; g < kGroups; ++g) {
    store(scales[g], rows[g].scale);
    store(zeros[g], rows[g].zero);
  }
  __m512i pairs[8];  // of rows; first of words
#pragma GCC unroll 8
  for (int w = 0; w < 8; ++w) {
    __builtin_prefetch(block.data + w * kLine + block.ahead, 0, 2);
    pairs[w] = _mm512_loadu_si512(block.data + w * kLine);
  }
  transpose_quads(pairs);
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const __m512i mask = _mm512_set1_epi16(15), second = _mm512_set1_epi32(16 << 16);
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    const __m512i codes = _mm512_shuffle_epi8(pairs[p], halves);
    const __m512i table = pair_table<kFormat>(scales[0] + 2 * p, zeros[0] + 2 * p);
    __m512i upper = table;
    if constexpr (kGroups > 1) upper = pair_table<kFormat>(scales[1] + 2 * p, zeros[1] + 2 * p);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m512i code = t == 0 ? codes : _mm512_srli_epi16(codes, static_cast<unsigned>(4 * t));
      const __m512i index = _mm512_ternarylogic_epi32(code, mask, second, 0xea);  // code & mask | second
      __m512i words = _mm512_permutexvar_epi16(index, table);
      if constexpr (kGroups > 1) words = _mm512_mask_permutexvar_epi16(words, 0xffff0000, index, upper);
      store(panel + p * kPanel + t * kLanes, _mm512_castsi512_ps(words));
    }
  }
}

template <Format kFormat, int kGroups>
void look_up(float* panel, const StoredBlock<kFormat>& block, const Groups& groups) {
  RowScales rows[kGroups];
  for (int g = 0; g < kGroups; ++g) rows[g] = block.scales_at(groups, g * kPanel / kGroups, 0);
  look_up_block(panel, block, rows);
}

template <Format kFormat, bool kWhole>
void pack_block(PairWords, float* panel, const StoredBlock<kFormat>& block, const Groups& groups) {
  static_assert(kLanes == kMinifloatRows);
  if constexpr (kWhole && bits_of(kFormat) == 4) {
    if (is_one_group(groups)) return look_up<kFormat, 1>(panel, block, groups);
    if (is_two_groups(groups)) return look_up<kFormat, 2>(panel, block, groups);
  }
  for (int64_t n = 0; n < kPanel; n += 2 * kLanes) {
    const RowScales first = block.scales_at(groups, n, 0), second = block.scales_at(groups, n + kLanes, 0);
    pack_pairs<kFormat, kWhole>(panel, block, n, first, second);
  }
}
#endif

template <Format kFormat, bool kWhole, typename T>
void pack_block(FloatWords<T>, float* panel, const StoredBlock<kFormat>& block, const Groups& groups) {
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
  Groups groups;
  find_groups(groups, product);
  const auto bytes_to = [](const void* next, const void* own) {
    return next == nullptr ? 0 : static_cast<const char*>(next) - static_cast<const char*>(own);
  };
  for (int64_t k = k_begin; k < k_begin + depth; k += kMinifloatRows) {
    const int64_t block = k / kMinifloatRows;
    const auto* const zeros = static_cast<const uint8_t*>(b.zeros);
    const StoredBlock<kFormat> stored{
        .data = static_cast<const uint8_t*>(b.data) + block * b.n_stride,
        .scales = static_cast<const uint8_t*>(b.scales) + block * b.scale_stride,
        .row_scales = b.row_scales == nullptr ? nullptr : b.row_scales + k,
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

constexpr bool is_multiplied_in_place(Format format) { return is_integer(format) || is_minifloat(format); }

template <typename Words>
void pack_stored(float* panel, const Product& product, int64_t k, int64_t depth) {
  with_format<is_multiplied_in_place>(
      product.b.format, [&]<Format kFormat>() { pack_stored_of<Words, kFormat>(panel, product, k, depth); });
  if (Words::kDepth == 2 && depth % 2 != 0) {  // what follows the last row is padding, and may be NaN
    float* const last = panel + depth / 2 * kPanel;
    for (int n = 0; n < kPanel; ++n) {
      last[n] = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, last[n]) & 0xffff);
    }
  }
}

// The columns of c in the order of the packed panel, or back.
template <typename Words>
void reorder_columns(const Product&, bool) {}

#ifdef __AVX512BF16__
template <>
void reorder_columns<PairWords>(const Product& product, bool back) {
  if (bits_of(product.b.format) != 4 || product.num_columns != kPanel) return;
  Groups groups;
  find_groups(groups, product);
  if (!is_one_group(groups) && !is_two_groups(groups)) return;
  if (product.b.format == Format::kInt4) return reorder<Format::kInt4>(product, back);
  reorder<Format::kMxfp4>(product, back);  // all minifloats have the same order
}
#endif

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
  if (product.accumulate) reorder_columns<Words>(product, false);
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
  reorder_columns<Words>(product, true);
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
