// SPDX-License-Identifier: BSD-3-Clause
// multiply: C[m,n] = Σ_k A[m,k]·B[n,k], up to kMaxRows rows and one panel of columns. Included by kernels.inl.
//
//   work 2·M·N·K flop; B is packed once per product; A is read in place (rows are pointers, so gathering is free)
//   A step of the inner loop loads kPanelVectors vectors of B and broadcasts one word of each of 6 rows of A:
//   24 multiply-adds for 4 vector loads and 6 broadcasts with AVX-512, so the multiply-add pipes bind, not the loads.
//   A word is one float32, or with AVX-512-BF16 a pair of bfloat16 neighbours in k (vdpbf16ps). Other dtypes are widened to
//   float32 when packed. Each element of C has one accumulator and k ascends: results do not depend on M, N or tiles.
//
// The depth is cut into chunks of 4 KB per row. While one is multiplied, the next, of this product or the caller's next, is
// prefetched into L2. Prefetches are spread evenly, so memory and arithmetic never wait for each other.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int kLinesPerWord = kPanel * 4 < kLine ? 1 : kPanel * 4 / kLine;  // lines of B per word of depth
static_assert(kPanel <= kMaxPanel);

// ---- prefetching ---------------------------------------------------------------------------------------------------------

// Walks over rows of memory, line by line.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* data, int64_t stride, int64_t width)
      : line_(static_cast<const char*>(data)), row_end_(line_ + width), skip_(stride - width), stride_(stride) {}

  template <int kLines>
  void prefetch() {
    if (row_end_ - line_ > kLines * kLine) {
#pragma GCC unroll 16
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(line_ + i * kLine, 0, 2);
      line_ += kLines * kLine;
      return;
    }
    for (int i = 0; i < kLines; ++i) prefetch_line();
  }
  void prefetch_line() {
    __builtin_prefetch(line_, 0, 2);
    line_ += kLine;
    const bool at_end = line_ >= row_end_;
    line_ = at_end ? row_end_ + skip_ : line_;
    row_end_ = at_end ? row_end_ + stride_ : row_end_;
  }

 private:
  static constexpr char kNothing[kLine] = {};
  const char* line_ = kNothing;
  const char* row_end_ = kNothing + kLine;
  int64_t skip_ = -kLine, stride_ = 0;
};

// ---- packing -------------------------------------------------------------------------------------------------------------

// The words that a panel is packed from: word p of column n is one float32 of any source dtype, or a pair of bfloat16.
template <typename T>
struct FloatWords {
  using Element = T;
  using Packed = FloatWords<float>;
  static constexpr int kDepth = 1;  // k per word
  static Floats load_whole(const T* p) { return load(p); }
  static Floats load_along_k(const T* p, int64_t count) { return load_some(p, count); }
  static Floats load_along_n(const T* p, const T*, int64_t count) { return load_some(p, count); }
  static void load_two_along_n(Floats (&words)[2], const T* p, const T*) {
    words[0] = load(p);
    words[1] = load(p + kLanes);
  }
};

#ifdef __AVX512BF16__
struct PairWords {
  using Element = BFloat16;
  using Packed = PairWords;
  static constexpr int kDepth = 2;
  static Floats load_whole(const BFloat16* p) { return _mm512_loadu_ps(p); }
  static Floats load_along_k(const BFloat16* p, int64_t count) {  // `count` elements of k, two per lane
    return count == 2 * kLanes ? load_whole(p) : load_neighbours(seen(p, count), count);
  }
  static Floats load_along_n(const BFloat16* low, const BFloat16* high, int64_t count) {  // high null: k ends, zeros
    BFloat16 l[kLanes] = {}, h[kLanes] = {};
    if (count == kLanes && high != nullptr) return load_pairs(low, high);
    __builtin_memcpy(l, low, static_cast<size_t>(count) * 2);
    if (high != nullptr) __builtin_memcpy(h, high, static_cast<size_t>(count) * 2);
    return load_pairs(l, h);
  }
  static void load_two_along_n(Floats (&words)[2], const BFloat16* low, const BFloat16* high) {
    load_two_pairs(words, low, high);
  }
};
#endif

template <typename Words>
using Element = typename Words::Element;

#ifdef __AVX512BF16__
using BFloat16Words = PairWords;
#else
using BFloat16Words = FloatWords<BFloat16>;
#endif

// Calls function.operator()<Words>() with the words in which this ISA multiplies the dtype.
template <typename Function>
inline void with_words(DType dtype, Function&& function) {
#ifdef __AVX512BF16__
  if (dtype == DType::kBFloat16) return function.template operator()<PairWords>();
#endif
  with_type(dtype, [&]<typename T>(const T*) { function.template operator()<FloatWords<T>>(); });
}

bool runs_along_k(const Matrix& b) { return b.k_stride == 1 && b.n_stride != 1; }

// kParts runs of kLanes / kParts words, `stride` bytes apart.
template <int kParts>
inline Floats load_parts(const char* p, int64_t stride) {
  constexpr int kBytes = kLanes / kParts * 4;
#ifdef __AVX512F__
  if constexpr (kParts == 2) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(p))),
                              _mm256_loadu_ps(reinterpret_cast<const float*>(p + stride)), 1);
  } else if constexpr (kParts == 4) {
    const auto part = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * stride)); };
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_insertf128_ps(_mm256_castps128_ps256(part(0)), part(1), 1)),
                              _mm256_insertf128_ps(_mm256_castps128_ps256(part(2)), part(3), 1), 1);
  }
#endif
  float lanes[kLanes];
  for (int i = 0; i < kParts; ++i) {
    __builtin_memcpy(reinterpret_cast<char*>(lanes) + i * kBytes, p + i * stride, static_cast<size_t>(kBytes));
  }
  return load(lanes);
}

// kParts · kLanes columns of kLanes / kParts words each, as those of a low rank: kParts columns share a vector, so one
// transposition serves all.
template <int kParts>
inline void pack_short_columns(float* panel, const char* column, int64_t stride) {
  Floats block[kLanes];
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) block[n] = load_parts<kParts>(column + n * stride, kLanes * stride);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    store(panel + i % (kLanes / kParts) * kPanel + i / (kLanes / kParts) * kLanes, block[i]);
  }
}

// panel[p][n] from columns that run along k: blocks of words are transposed in registers. Prefetches `lines` lines per word.
template <typename Words>
void pack_along_k(float* panel, const Element<Words>* data, int64_t stride, int64_t num_columns, int64_t depth,
                  int64_t lines, Ahead& ahead) {
  constexpr int64_t kBlock = kLanes * Words::kDepth;
  const int64_t words = (depth + Words::kDepth - 1) / Words::kDepth;
  if constexpr (sizeof(*data) * Words::kDepth == 4 && kPanelVectors == 4) {
    if (num_columns == kPanel && (2 * depth == kBlock || 4 * depth == kBlock)) {
      const auto* const columns = reinterpret_cast<const char*>(data);
      const int64_t bytes = stride * static_cast<int64_t>(sizeof(*data));
      for (int64_t i = 0; i < lines * words; ++i) ahead.prefetch_line();
      if (4 * depth == kBlock) return pack_short_columns<4>(panel, columns, bytes);
      pack_short_columns<2>(panel, columns, bytes);
      return pack_short_columns<2>(panel + 2 * kLanes, columns + 2 * kLanes * bytes, bytes);
    }
  }
  for (int64_t n0 = 0; n0 < kPanel; n0 += kLanes) {
    const int64_t valid = num_columns - n0 < kLanes ? num_columns - n0 : kLanes;
    for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
      const int64_t count = depth - k0 < kBlock ? depth - k0 : kBlock;
      const auto* const column = data + n0 * stride + k0;
      float* const target = panel + k0 / Words::kDepth * kPanel + n0;
      for (int64_t i = 0; i < lines; ++i) ahead.prefetch<kLanes / kPanelVectors>();
      Floats block[kLanes];
      if (valid == kLanes && count == kBlock) {
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) block[n] = Words::load_whole(column + n * stride);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(target + i * kPanel, block[i]);
        continue;
      }
      for (int n = 0; n < kLanes; ++n) {
        block[n] = n < valid ? Words::load_along_k(column + n * stride, count) : broadcast(0.0f);
      }
      transpose(block);
      const int64_t rest = words - k0 / Words::kDepth, rows = rest < kLanes ? rest : kLanes;
      for (int i = 0; i < rows; ++i) store(target + i * kPanel, block[i]);
    }
  }
}

// The same if n runs along memory; row(k) is the address of the columns of k.
template <typename Words, typename Row>
void pack_along_n(float* panel, int64_t num_columns, int64_t depth, int64_t lines, Ahead& ahead, Row&& row) {
  for (int64_t k = 0; k < depth; k += Words::kDepth, panel += kPanel) {
    const auto* const low = row(k);
    const auto* high = low;
    if (Words::kDepth > 1) high = k + 1 < depth ? row(k + 1) : nullptr;
    for (int64_t i = 0; i < lines; ++i) ahead.prefetch_line();
    if (num_columns == kPanel && high != nullptr) {
#pragma GCC unroll 8
      for (int n0 = 0; n0 < kPanel; n0 += 2 * kLanes) {
        Floats words[2];
        Words::load_two_along_n(words, low + n0, high + n0);
        store(panel + n0, words[0]);
        store(panel + n0 + kLanes, words[1]);
      }
      continue;
    }
    for (int64_t n0 = 0; n0 < kPanel; n0 += kLanes) {
      const int64_t valid = num_columns - n0 < kLanes ? num_columns - n0 : kLanes;
      store(panel + n0,
            valid > 0 ? Words::load_along_n(low + n0, high != nullptr ? high + n0 : nullptr, valid) : broadcast(0.0f));
    }
  }
}

// Any other strides, element by element.
template <typename Words>
void pack_elements(float* panel, const Matrix& b, int64_t num_columns, int64_t k_begin, int64_t depth) {
  using T = Element<Words>;
  const T* const data = static_cast<const T*>(b.data);
  for (int64_t p = 0; p * Words::kDepth < depth; ++p) {
    for (int64_t n = 0; n < kPanel; ++n) {
      T lanes[kLanes * Words::kDepth] = {};
      for (int64_t i = 0; i < Words::kDepth; ++i) {
        const int64_t k = p * Words::kDepth + i;
        if (n < num_columns && k < depth) lanes[i] = data[n * b.n_stride + (k_begin + k) * b.k_stride];
      }
      float word[kLanes];
      store(word, Words::load_along_k(lanes, kLanes * Words::kDepth));
      panel[p * kPanel + n] = word[0];
    }
  }
}

// panel[p][n] for k in [k_begin, k_begin + depth); words past num_columns are zero.
template <typename Words>
void pack(float* panel, const Product& product, int64_t k_begin, int64_t depth, int64_t lines, Ahead& ahead) {
  const Matrix& b = product.b;
  const auto* const data = static_cast<const Element<Words>*>(b.data);
  if (runs_along_k(b)) {
    pack_along_k<Words>(panel, data + k_begin, b.n_stride, product.num_columns, depth, lines, ahead);
  } else if (b.n_stride == 1) {
    pack_along_n<Words>(panel, product.num_columns, depth, lines, ahead,
                        [&](int64_t k) { return data + (k_begin + k) * b.k_stride; });
  } else {
    pack_elements<Words>(panel, b, product.num_columns, k_begin, depth);
  }
}

// ---- many rows -----------------------------------------------------------------------------------------------------------

template <bool kPairs, typename A>  // a vector, or a word for all lanes
inline Floats step(A a, Floats b, Floats c) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) return multiply_add_pairs(a, b, c);
#endif
  return multiply_add(a, b, c);
}

// A chunk of the depth of a product: `words` words of each row from byte `offset` on; half_word: one more bfloat16.
struct Chunk {
  const void* const* rows;
  int64_t offset;
  const float* panel;
  int64_t words;
  bool half_word;
  bool accumulate;
};

// kRows rows of C from row m on. Prefetches kLines lines per step.
template <int kRows, bool kPairs, int kLines>
void multiply_tile(const Chunk& chunk, int64_t m, float* c, Ahead& ahead_of_all) {
  const char* a[kRows];
  Floats acc[kRows][kPanelVectors];
  c += m * kPanel;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    a[i] = static_cast<const char*>(chunk.rows[m + i]) + chunk.offset;
#pragma GCC unroll 8
    for (int j = 0; j < kPanelVectors; ++j) {
      acc[i][j] = chunk.accumulate ? load(c + i * kPanel + j * kLanes) : broadcast(0.0f);
    }
  }
  const float* panel = chunk.panel;
  Ahead ahead = ahead_of_all;
  for (int64_t p = 0; p < chunk.words; ++p, panel += kPanel) {
    Floats b[kPanelVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kPanelVectors; ++j) b[j] = load(panel + j * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kLines; ++j) ahead.prefetch_line();
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto word = broadcast_word(a[i] + 4 * p);
#pragma GCC unroll 8
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j] = step<kPairs>(word, b[j], acc[i][j]);
    }
  }
  if (kLines > 0) ahead_of_all = ahead;
  if (kPairs && chunk.half_word) {
    for (int i = 0; i < kRows; ++i) {
      BFloat16 pair[2] = {};
      __builtin_memcpy(pair, a[i] + 4 * chunk.words, 2);
      const auto word = broadcast_word(pair);
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j] = step<kPairs>(word, load(panel + j * kLanes), acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kPanelVectors; ++j) store(c + i * kPanel + j * kLanes, acc[i][j]);
  }
}

int64_t num_row_tiles(int64_t num_rows) { return (num_rows + kTileRows - 1) / kTileRows; }

// All rows, in tiles of nearly equal height. The first `prefetching` tiles prefetch one line per step.
template <bool kPairs>
void multiply_rows(const Chunk& chunk, const Product& product, int64_t prefetching, Ahead& ahead) {
  const int64_t num_rows = product.num_rows;
  float* const c = product.c;
  const int64_t tiles = num_row_tiles(num_rows);
  for (int64_t t = 0, m = 0; t < tiles; ++t) {
    const int64_t rows = (num_rows - m) / (tiles - t);
    with_constant<kTileRows>(rows, [&]<int kRows>() {
      if (t < prefetching) {
        multiply_tile<kRows, kPairs, 1>(chunk, m, c, ahead);
      } else {
        multiply_tile<kRows, kPairs, 0>(chunk, m, c, ahead);
      }
    });
    m += rows;
  }
}

// ---- all rows ------------------------------------------------------------------------------------------------------------

// Prefetches the chunk of depth from `begin` on, or the first one of the caller's next product.
Ahead ahead_of(const Product& product, int64_t begin, int64_t chunk) {
  const Matrix& b = product.b;
  if (b.k_stride != 1 && b.n_stride != 1) return {};
  const int64_t element = b.dtype == DType::kFloat32 ? 4 : 2;
  const char* data = static_cast<const char*>(b.data);
  if (begin >= product.depth) {
    if (product.next.data == nullptr) return {};
    data = static_cast<const char*>(product.next.data);
    begin = 0;
  }
  const int64_t depth = product.depth - begin < chunk ? product.depth - begin : chunk;
  if (runs_along_k(b)) {
    const int64_t width = depth * element;
    if (b.n_stride != depth) return {data + begin * element, b.n_stride * element, width};
    return {data, product.num_columns * width, product.num_columns * width};  // short columns share lines
  }
  const bool is_next = data != b.data;
  const int64_t width = is_next && product.next_width > 0 ? product.next_width : product.num_columns * element;
  return {data + begin * b.k_stride * element, b.k_stride * element, width};
}

// Rows of A as the kernels read them: words from byte `offset` on.
struct Rows {
  const void* const* rows;
  int64_t offset;
};

// The rows themselves, or their elements [k, k + depth) widened from `dtype` to float32 in the product's scratch.
Rows rows_from(const Product& product, DType dtype, bool pairs, int64_t k, int64_t depth,
               const void* (&widened_rows)[kMaxRows]) {
  k += product.row_begin;
  if (dtype == DType::kFloat32 || product.rows_are_widened) return {product.rows, k * 4};
  if (pairs) return {product.rows, k * 2};
  float* const widened = static_cast<float*>(product.scratch) + kScratchRow * kMaxPanel;
  for (int64_t m = 0; m < product.num_rows; ++m) {
    float* const row = widened + m * (depth + kScratchRow - kChunkWords);
    if (!product.rows_are_kept) load_row(row, static_cast<const char*>(product.rows[m]) + k * 2, dtype, depth);
    widened_rows[m] = row;
  }
  return {widened_rows, 0};
}

template <typename Words>
void multiply_words(const Product& product) {
  constexpr bool kPairs = Words::kDepth == 2;
  constexpr int64_t kChunk = kChunkWords * Words::kDepth;
  const void* widened_rows[kMaxRows];
  const int64_t depth = product.depth;
  const auto length = [&](int64_t k, int64_t most) { return depth - k < most ? depth - k : most; };

  if (depth == 0) {
    if (!product.accumulate) {
      __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(product.num_rows));
    }
    return;
  }

  float* const panel = static_cast<float*>(product.scratch);
  const int64_t tiles = num_row_tiles(product.num_rows), prefetching = tiles < kLinesPerWord ? tiles : kLinesPerWord;
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t count = length(k, kChunk);
    Ahead ahead = ahead_of(product, k + kChunk, kChunk);
    pack<Words>(panel, product, k, count, kLinesPerWord - prefetching, ahead);
    const auto [rows, offset] = rows_from(product, product.b.dtype, kPairs, k, count, widened_rows);
    const Chunk chunk{.rows = rows,
                      .offset = offset,
                      .panel = panel,
                      .words = count / Words::kDepth,
                      .half_word = count % Words::kDepth != 0,
                      .accumulate = product.accumulate || k > 0};
    multiply_rows<kPairs>(chunk, product, prefetching, ahead);
  }
}

}  // namespace
}  // namespace switchgear::cpu
