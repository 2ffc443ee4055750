// SPDX-License-Identifier: BSD-3-Clause
// The functions of the Kernels table, once for all ISAs. Included by kernels_<isa>.cpp after its simd_<isa>.h; everything
// lives in an anonymous namespace and calls no library, so that no symbol compiled for one ISA can be merged into another.
//
// multiply: C[m,n] = Σ_k A[m,k]·B[n,k]
//   work 2·M·N·K flop; B is packed once per 240 rows, A is read in place (rows are pointers: gathering is free).
//   A step of the inner loop loads kPanelVectors vectors of B and broadcasts one word of each of 6 rows of A:
//   24 multiply-adds for 4 vector loads and 6 broadcasts with AVX-512, so the multiply-add pipes bind, not the loads.
//   A word is one float32, or with AVX-512-BF16 a pair of bfloat16 neighbours in k (vdpbf16ps). Other dtypes are widened to
//   float32 as they are packed. Each element of C has one accumulator and k ascends: results do not depend on M, N or tiles.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int kPanel = kLanes * kPanelVectors;
constexpr int kAheadWords = 2048;  // 8 KB: how far ahead weights in panels are prefetched
constexpr int kRowTile = 6;
static_assert(kPanel <= kMaxPanel && kMaxRows % kRowTile == 0);

// ---- vectors -------------------------------------------------------------------------------------------------------------

template <typename T>
inline Floats load(const T* p, int64_t n) {  // n < kLanes; zeros behind
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

inline Ints bits_of(Floats v) { return reinterpret_cast<Ints>(v); }
inline Floats from_bits(Ints v) { return reinterpret_cast<Floats>(v); }
inline Floats select(Ints mask, Floats a, Floats b) { return from_bits((bits_of(a) & mask) | (bits_of(b) & ~mask)); }
inline Floats min(Floats a, Floats b) { return select(a < b, a, b); }  // b where either is NaN
inline Floats max(Floats a, Floats b) { return select(a > b, a, b); }

inline void store(BFloat16* p, Floats v) {  // round to nearest even; NaN stays NaN
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

// body(offset, count) over [0, n): full vectors, then what is left.
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

// function(typed pointer tag) for the float dtypes
template <typename Function>
inline auto with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16: return function(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16: return function(static_cast<const Float16*>(nullptr));
    default: return function(static_cast<const float*>(nullptr));
  }
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

// ---- packing -------------------------------------------------------------------------------------------------------------

// What a panel is packed from, in words: word p of column n. One float32 of any source dtype, or a pair of bfloat16.
template <typename T>
struct FloatWords {
  static Floats load_whole(const T* p) { return load(p); }
  static Floats load_along_k(const T* p, int64_t count) { return load_some(p, count); }
  static Floats load_along_n(const T* p, const T*, int64_t count) { return load_some(p, count); }
  static constexpr int kDepth = 1;  // k per word
};

#ifdef __AVX512BF16__
struct PairWords {
  static constexpr int kDepth = 2;
  static Floats load_whole(const BFloat16* p) { return _mm512_loadu_ps(p); }
  static Floats load_along_k(const BFloat16* p, int64_t count) {  // `count` elements of k, two a lane
    if (count == 2 * kLanes) return load_whole(p);
    BFloat16 lanes[2 * kLanes] = {};
    __builtin_memcpy(lanes, p, static_cast<size_t>(count) * 2);
    return _mm512_loadu_ps(lanes);
  }
  static Floats load_along_n(const BFloat16* low, const BFloat16* high,
                             int64_t count) {  // null: zeros (an odd end of k)
    BFloat16 l[kLanes] = {}, h[kLanes] = {};
    if (count == kLanes && high != nullptr) return load_pairs(low, high);
    __builtin_memcpy(l, low, static_cast<size_t>(count) * 2);
    if (high != nullptr) __builtin_memcpy(h, high, static_cast<size_t>(count) * 2);
    return load_pairs(l, h);
  }
};
#endif

bool runs_along_k(const Matrix& b) { return !b.in_panels && b.k_rows == nullptr && b.k_stride == 1 && b.n_stride != 1; }

// Reading kLanes columns at once is kLanes short streams, which the hardware prefetches badly: 15 GB/s a core where plain
// reading gets 25. So each block also asks for the same number of lines of the columns that come next, in the order of
// memory; they wait in L2 (kLanes columns are 64 KB at a depth of 2048 bfloat16).
template <typename T>
class Ahead {
 public:
  Ahead(const T* column, int64_t stride, int64_t depth) : column_(column), stride_(stride), depth_(depth) {}
  template <int64_t kBlock>
  void prefetch(int line) const {
    __builtin_prefetch(column_ + k_ + line * kBlock, 0, 2);
  }
  template <int64_t kBlock>
  void advance() {
    k_ += kLanes * kBlock;
    if (k_ < depth_) return;
    k_ = 0;
    column_ += stride_;
  }

 private:
  const T* column_;
  int64_t stride_, depth_, k_ = 0;
};

// panel[p][n] for k in [k_begin, k_begin + depth), words past num_columns zero.
template <typename Words, typename T>
void pack(float* panel, const Product& product, int64_t k_begin, int64_t depth) {
  const Matrix& b = product.b;
  const int64_t num_columns = product.num_columns;
  const T* data = static_cast<const T*>(b.data);
  const int64_t words = (depth + Words::kDepth - 1) / Words::kDepth;
  const auto k_row = [&](int64_t k) {
    return b.k_rows != nullptr ? static_cast<const T*>(b.k_rows[k]) + b.n_begin : data + k * b.k_stride;
  };

  if (runs_along_k(b)) {  // transpose blocks of words
    constexpr int64_t kBlock = kLanes * Words::kDepth;
    for (int64_t n0 = 0; n0 < kPanel; n0 += kLanes) {
      const int64_t valid = num_columns - n0 < kLanes ? num_columns - n0 : kLanes;
      const T* const column = data + n0 * b.n_stride + k_begin;
      const T* next = column;  // after the last columns: the next chunk, or the next product, or what is cached already
      if (n0 + kLanes < num_columns) {
        next += kLanes * b.n_stride;
      } else if (k_begin + depth < product.depth) {
        next = data + k_begin + depth;
      } else if (product.next != nullptr) {
        next = static_cast<const T*>(product.next);
      }
      Ahead<T> ahead(next, b.n_stride, depth);
      for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
        const int64_t count = depth - k0 < kBlock ? depth - k0 : kBlock;
        const int64_t first = k0 / Words::kDepth;
        Floats block[kLanes];
        if (valid == kLanes && count == kBlock) {
#pragma GCC unroll 16
          for (int n = 0; n < kLanes; ++n) {
            block[n] = Words::load_whole(column + n * b.n_stride + k0);
            ahead.template prefetch<kBlock>(n);
          }
          ahead.template advance<kBlock>();
          transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store(panel + (first + i) * kPanel + n0, block[i]);
          continue;
        }
        for (int n = 0; n < kLanes; ++n) {
          block[n] = n < valid ? Words::load_along_k(column + n * b.n_stride + k0, count) : broadcast(0.0f);
        }
        transpose(block);
        const int64_t rows = words - first < kLanes ? words - first : kLanes;
        for (int i = 0; i < rows; ++i) store(panel + (first + i) * kPanel + n0, block[i]);
      }
    }
    return;
  }
  if (b.k_rows != nullptr || b.n_stride == 1) {  // n runs along memory: words are already side by side
    for (int64_t p = 0; p < words; ++p) {
      const int64_t k = k_begin + p * Words::kDepth;
      const bool whole = Words::kDepth == 1 || k + 1 < k_begin + depth;
      const T* low = k_row(k);
      const T* high = whole ? k_row(k + Words::kDepth - 1) : nullptr;
      for (int64_t n0 = 0; n0 < kPanel; n0 += kLanes) {
        const int64_t valid = num_columns - n0 < kLanes ? num_columns - n0 : kLanes;
        const Floats v =
            valid > 0 ? Words::load_along_n(low + n0, high != nullptr ? high + n0 : nullptr, valid) : broadcast(0.0f);
        store(panel + p * kPanel + n0, v);
      }
    }
    return;
  }
  for (int64_t p = 0; p < words; ++p) {  // any other strides, element by element
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

// ---- multiply ------------------------------------------------------------------------------------------------------------

template <bool kPairs>
inline Floats step(Floats a, Floats b, Floats c) {
#ifdef __AVX512BF16__
  if constexpr (kPairs) return multiply_add_pairs(a, b, c);
#endif
  return multiply_add(a, b, c);
}

// kRows rows of C from `words` words at byte `offset` of each row of A; `half_word` adds one trailing bfloat16. kAhead: the
// panel comes from memory.
template <int kRows, bool kPairs, bool kAhead>
void multiply_tile(const void* const* rows, int64_t offset, const float* panel, int64_t words, bool half_word, float* c,
                   bool accumulate) {
  const char* a[kRows];
  Floats acc[kRows][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    a[i] = static_cast<const char*>(rows[i]) + offset;
#pragma GCC unroll 8
    for (int j = 0; j < kPanelVectors; ++j) {
      acc[i][j] = accumulate ? load(c + i * kPanel + j * kLanes) : broadcast(0.0f);
    }
  }
  for (int64_t p = 0; p < words; ++p, panel += kPanel) {
    Floats b[kPanelVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kPanelVectors; ++j) {
      b[j] = load(panel + j * kLanes);
      if (kAhead) __builtin_prefetch(panel + j * kLanes + kAheadWords, 0, 3);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Floats word = broadcast_word(a[i] + 4 * p);
#pragma GCC unroll 8
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j] = step<kPairs>(word, b[j], acc[i][j]);
    }
  }
  if (kPairs && half_word) {
    for (int i = 0; i < kRows; ++i) {
      BFloat16 pair[2] = {};
      __builtin_memcpy(pair, a[i] + 4 * words, 2);
      const Floats word = broadcast_word(pair);
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j] = step<kPairs>(word, load(panel + j * kLanes), acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kPanelVectors; ++j) store(c + i * kPanel + j * kLanes, acc[i][j]);
  }
}

template <bool kPairs, bool kAhead>
void multiply_rows(const void* const* rows, int64_t num_rows, int64_t offset, const float* panel, int64_t words,
                   bool half_word, float* c, bool accumulate) {
  int64_t m = 0;
  for (; m + kRowTile <= num_rows; m += kRowTile) {
    multiply_tile<kRowTile, kPairs, kAhead>(rows + m, offset, panel, words, half_word, c + m * kPanel, accumulate);
  }
  const auto rest = [&]<int kRows>() {
    multiply_tile<kRows, kPairs, kAhead>(rows + m, offset, panel, words, half_word, c + m * kPanel, accumulate);
  };
  switch (num_rows - m) {
    case 1: return rest.template operator()<1>();
    case 2: return rest.template operator()<2>();
    case 3: return rest.template operator()<3>();
    case 4: return rest.template operator()<4>();
    case 5: return rest.template operator()<5>();
    default: return;
  }
}

// The same sums in the same order for up to kFewRows rows, where writing a panel and reading it again would cost more than
// the multiplications: blocks of B are transposed in registers and used at once. B must run along k.
constexpr int kFewRows = kLanes >= 16 ? 8 : 4;  // with the kLanes vectors of a block they must fit into the registers

// c[m] += Σ over `num_blocks` blocks: kLanes columns of B, `stride` elements apart, times kLanes words of each row of A.
template <int kRows, bool kPairs, typename Words, typename T>
void add_blocks(float* c, const T* b, const T* next, int64_t stride, const char* const* rows, int64_t num_blocks) {
  constexpr int64_t kBlock = kLanes * Words::kDepth;
  Floats acc[kRows];
  const char* a[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    acc[m] = load(c + m * kPanel);
    a[m] = rows[m];
  }
  Ahead<T> ahead(next, stride, num_blocks * kBlock);
  for (int64_t i = 0; i < num_blocks; ++i, b += kBlock) {
    Floats block[kLanes];
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      block[n] = Words::load_whole(b + n * stride);
      ahead.template prefetch<kBlock>(n);
    }
    ahead.template advance<kBlock>();
    transpose(block);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) acc[m] = step<kPairs>(broadcast_word(a[m] + 4 * j), block[j], acc[m]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) a[m] += 4 * kLanes;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) store(c + m * kPanel, acc[m]);
}

// The same for what is left: `columns` columns and `depth` elements, copied with zeros behind, so that nothing past the end
// is read.
template <int kRows, bool kPairs, typename Words, typename T>
void add_partial_block(float* c, const T* b, int64_t stride, const char* const* rows, int64_t columns, int64_t depth) {
  Floats block[kLanes];
  for (int n = 0; n < kLanes; ++n) {
    block[n] = n < columns ? Words::load_along_k(b + n * stride, depth) : broadcast(0.0f);
  }
  transpose(block);
  float lanes[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(lanes[i], block[i]);
  for (int m = 0; m < kRows; ++m) {
    float words[kLanes] = {};
    __builtin_memcpy(words, rows[m], static_cast<size_t>(depth) * 4 / Words::kDepth);
    Floats acc = load(c + m * kPanel);
    for (int i = 0; i * Words::kDepth < depth; ++i) acc = step<kPairs>(broadcast_word(words + i), load(lanes[i]), acc);
    store(c + m * kPanel, acc);
  }
}

template <int kRows, bool kPairs, typename Words, typename T>
void multiply_few_rows(const Product& product, const void* const* rows, int64_t row_offset, int64_t k_begin,
                       int64_t depth) {
  constexpr int64_t kBlock = kLanes * Words::kDepth;
  const Matrix& b = product.b;
  const int64_t num_columns = product.num_columns;
  float* const c = product.c;
  if (k_begin == 0) __builtin_memset(c, 0, sizeof(float) * kPanel * kRows);
  for (int64_t n = 0; n < num_columns; n += kLanes) {
    const T* const block = static_cast<const T*>(b.data) + k_begin + n * b.n_stride;
    const int64_t columns = num_columns - n < kLanes ? num_columns - n : kLanes;
    const int64_t whole = columns == kLanes ? depth / kBlock : 0;
    const char* a[kRows];
    for (int m = 0; m < kRows; ++m) a[m] = static_cast<const char*>(rows[m]) + row_offset;
    const T* const next = n + kLanes < num_columns ? block + kLanes * b.n_stride : static_cast<const T*>(product.next);
    add_blocks<kRows, kPairs, Words>(c + n, block, next != nullptr ? next : block, b.n_stride, a, whole);
    for (int64_t k = whole * kBlock; k < depth; k += kBlock) {
      const char* rest[kRows];
      for (int m = 0; m < kRows; ++m) rest[m] = a[m] + k * 4 / Words::kDepth;
      const int64_t count = depth - k < kBlock ? depth - k : kBlock;
      add_partial_block<kRows, kPairs, Words>(c + n, block + k, b.n_stride, rest, columns, count);
    }
  }
}

bool is_few(const Product& product) { return product.num_rows <= kFewRows && runs_along_k(product.b); }

template <int kRows, bool kPairs, typename Words, typename T>
void multiply_few(const Product& product, const void* const* rows, int64_t row_offset, int64_t k, int64_t depth) {
  if (product.num_rows == kRows) {
    multiply_few_rows<kRows, kPairs, Words, T>(product, rows, row_offset, k, depth);
  } else if constexpr (kRows > 1) {
    multiply_few<kRows - 1, kPairs, Words, T>(product, rows, row_offset, k, depth);
  }
}

template <bool kPairs, typename Words, typename T>
void multiply_chunk(const Product& product, const void* const* rows, int64_t row_offset, int64_t k, int64_t depth) {
  if (is_few(product)) return multiply_few<kFewRows, kPairs, Words, T>(product, rows, row_offset, k, depth);
  if (product.b.in_panels) {
    const float* const words = static_cast<const float*>(product.b.data) + k / Words::kDepth * kPanel;
    multiply_rows<kPairs, true>(rows, product.num_rows, row_offset, words, depth / Words::kDepth, false, product.c,
                                k > 0);
    return;
  }
  float* const panel = static_cast<float*>(product.scratch);
  pack<Words, T>(panel, product, k, depth);
  multiply_rows<kPairs, false>(rows, product.num_rows, row_offset, panel, depth / Words::kDepth, depth % Words::kDepth != 0,
                        product.c, k > 0);
}

void multiply(const Product& product) {
  const bool pairs = kHasPairs && product.row_dtype == DType::kBFloat16 && product.b.dtype == DType::kBFloat16;
  // Without a panel there is no reason to interrupt the streams of B, but for the memory of widened rows.
  const int64_t words = is_few(product) ? kChunkWords * kMaxRows / kFewRows : kChunkWords;
  const int64_t chunk = words * (pairs ? 2 : 1);

  for (int64_t k = 0; k < product.depth || k == 0; k += chunk) {
    const int64_t depth = product.depth - k < chunk ? product.depth - k : chunk;
#ifdef __AVX512BF16__
    if (pairs) {
      multiply_chunk<true, PairWords, BFloat16>(product, product.rows, k * 2, k, depth);
      continue;
    }
#endif
    const void* const* rows = product.rows;
    int64_t row_offset = k * 4;
    const void* widened_rows[kMaxRows];
    if (product.row_dtype != DType::kFloat32) {
      float* const widened = static_cast<float*>(product.scratch) + kChunkWords * kMaxPanel;
      for (int64_t m = 0; m < product.num_rows; ++m) {
        load_row(widened + m * words, static_cast<const char*>(product.rows[m]) + k * 2, product.row_dtype, depth);
        widened_rows[m] = widened + m * words;
      }
      rows = widened_rows;
      row_offset = 0;
    }
    with_type(product.b.dtype, [&]<typename T>(const T*) {
      multiply_chunk<false, FloatWords<T>, T>(product, rows, row_offset, k, depth);
    });
  }
}

// ---- transpose -----------------------------------------------------------------------------------------------------------

template <typename Words, typename T>
void transpose_blocks(char* out, int64_t out_stride_bytes, const void* const* rows, int64_t num_rows,
                      int64_t first_column, int64_t columns) {
  constexpr int64_t kBlock = kLanes * Words::kDepth;
  for (int64_t s0 = 0; s0 < num_rows; s0 += kBlock) {
    const int64_t count = num_rows - s0 < kBlock ? num_rows - s0 : kBlock;
    const int64_t bytes = count * (4 / Words::kDepth);
    for (int64_t c0 = 0; c0 < columns; c0 += kLanes) {
      const int64_t valid = columns - c0 < kLanes ? columns - c0 : kLanes;
      Floats block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t s = s0 + i * Words::kDepth;
        if (s >= num_rows) {
          block[i] = broadcast(0.0f);
          continue;
        }
        const T* low = static_cast<const T*>(rows[s]) + first_column + c0;
        const int64_t last = s + Words::kDepth - 1;
        const T* high = last < num_rows ? static_cast<const T*>(rows[last]) + first_column + c0 : nullptr;
        block[i] = Words::load_along_n(low, high, valid);
      }
      transpose(block);
      char* target = out + c0 * out_stride_bytes + s0 * (4 / Words::kDepth);
      for (int64_t c = 0; c < valid; ++c, target += out_stride_bytes) {
        if (count == kBlock) {
          store(reinterpret_cast<float*>(target), block[c]);
        } else {
          float lanes[kLanes];
          store(lanes, block[c]);
          __builtin_memcpy(target, lanes, static_cast<size_t>(bytes));
        }
      }
    }
  }
}

DType transpose_rows(void* out, int64_t out_stride, const void* const* rows, int64_t num_rows, int64_t first_column,
                     int64_t columns, DType dtype) {
#ifdef __AVX512BF16__
  if (dtype == DType::kBFloat16) {
    transpose_blocks<PairWords, BFloat16>(static_cast<char*>(out), out_stride * 2, rows, num_rows, first_column,
                                          columns);
    return DType::kBFloat16;
  }
#endif
  with_type(dtype, [&]<typename T>(const T*) {
    transpose_blocks<FloatWords<T>, T>(static_cast<char*>(out), out_stride * 4, rows, num_rows, first_column, columns);
  });
  return DType::kFloat32;
}

// ---- activations ---------------------------------------------------------------------------------------------------------

// 2^f on [-1/2, 1/2] by a Chebyshev fit of degree 6 (relative error 2e-9), scaled by the exponent bits. Arguments are clamped
// to where the result is normal: e^-87.3 = 2^-126. NaN stays NaN.
inline Floats exp(Floats x) {
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
  return from_bits(bits_of(r) + (bits_of(shifted) << 23));
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
  constexpr int kChains = kRowTile * kPanelVectors;
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
  Ints total[8] = {};
  constexpr int kPart = sizeof(Ints);
  for (int64_t i = 0; i + 512 <= bytes; i += 512) {
    for (int j = 0; j < 512; j += 64) __builtin_prefetch(p + i + j + 4096, 0, 0);
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
      .has_pairs = kHasPairs,
      .multiply = multiply,
      .transpose = transpose_rows,
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
