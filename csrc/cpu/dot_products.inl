// SPDX-License-Identifier: BSD-3-Clause
// dot_products: C[m,n] = Σ_k A[m,k]·B[n,k]; rows of A and B both run along k; up to kMaxRows rows and one panel of columns.
// Included by kernels.inl after multiply.inl.
//
//   work 2·M·N·K flop; neither operand is packed; rows of A are pointers, so gathering is free
//   The lanes of a vector are neighbours in k. A step loads kDotColumns vectors of B and 6 of A and multiplies every pair: 24
//   multiply-adds for 10 loads with AVX-512, so the multiply-add pipes bind. A word is one float32, or with AVX-512-BF16 a
//   pair of bfloat16 (vdpbf16ps). Other dtypes are widened to float32, in registers if A is a single tile.
//   Up to 6 rows are a single tile: memory binds, and B is read column by column, or in several streams. Many rows reach
//   88-91 % of the peak multiply-adds, 77-84 % if B comes from memory.
//
// Order of each sum: chunks of kChunkWords words ascend; within a chunk lane l adds words l, l + kLanes, …; then lanes are
// added pairwise. It depends only on the depth, not on M, N, tiles or the layout of B, so a row's result does not depend on
// its neighbours. B that runs along n is transposed into the scratch, chunk by chunk.
//
// Prefetches go to L2. A single tile prefetches further along the stream of B; several tiles share the prefetches of the next
// chunk or of the caller's next panel.
#pragma once

namespace switchgear::cpu {
namespace {

// C[i,j] += the sum of the lanes of acc[i][j], always in the order of add_sums.
template <int kRows, int kColumns>
inline void add_lanes(float* c, const Floats (&acc)[kRows][kColumns]) {
  if constexpr (kColumns == kDotColumns) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) add_sums(c + i * kPanel, acc[i]);
  } else {
    constexpr int kCount = kRows * kColumns;
#pragma GCC unroll 8
    for (int first = 0; first < kCount; first += kDotColumns) {  // kDotColumns sums at once
      float sums[kDotColumns] = {};
      Floats some[kDotColumns];
#pragma GCC unroll 8
      for (int n = 0; n < kDotColumns; ++n) {
        const int at = first + n < kCount ? first + n : first;
        some[n] = acc[at / kColumns][at % kColumns];
      }
      add_sums(sums, some);
#pragma GCC unroll 8
      for (int n = 0; n < kDotColumns; ++n) {
        const int at = first + n;
        if (at < kCount) c[at / kColumns * kPanel + at % kColumns] += sums[n];
      }
    }
  }
}

// What a tile prefetches: one or two rows anywhere, or kColumns consecutive rows, every line of them or one in
// kSparseBytes.
enum class Prefetch { kNothing, kOneRow, kTwoRows, kEveryLine, kSomeLines };
constexpr int64_t kSparseBytes = 256;

// A depth below one step: a single step under a mask. Not in add_dot_tile, whose loops then compile to slower code.
template <int kRows, int kColumns, typename Words>
[[gnu::noinline]] void add_short_dot_tile(float* c, const Rows& a, const Element<Words>* b, int64_t stride,
                                          int64_t depth) {
  using Packed = typename Words::Packed;
  Floats column[kColumns], acc[kRows][kColumns];
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) column[j] = Words::load_along_k(b + j * stride, depth);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const char* const words = static_cast<const char*>(a.rows[i]) + a.offset;
    const Floats row = Packed::load_along_k(reinterpret_cast<const Element<Packed>*>(words), depth);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) acc[i][j] = step<Words::kDepth == 2>(row, column[j], broadcast(0.0f));
  }
  add_lanes(c, acc);
}

// Rows [0, kRows) and columns [0, kColumns) of C += the products over `depth`, chunk by chunk. Prefetches `ahead`.
template <int kRows, int kColumns, Prefetch kPrefetch, typename Words>
void add_dot_tile(float* c, const Rows& a, const Element<Words>* b, int64_t stride, int64_t depth,
                  const char* const (&ahead)[2]) {
  constexpr int64_t kStep = kLanes * Words::kDepth, kBytes = kStep * sizeof(Element<Words>);
  constexpr int64_t kChunk = kChunkWords * Words::kDepth;
  if (depth > 0 && depth < kStep) return add_short_dot_tile<kRows, kColumns, Words>(c, a, b, stride, depth);
  const char *first = ahead[0], *second = ahead[1];
  const char* rows[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) rows[i] = static_cast<const char*>(a.rows[i]) + a.offset;
  for (int64_t k = 0; k < depth;) {
    Floats acc[kRows][kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) acc[i][j] = broadcast(0.0f);
    }
    const int64_t end = depth - k < kChunk ? depth : k + kChunk;
    const auto advance = [&] {
      Floats column[kColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) column[j] = Words::load_whole(b + j * stride);
      if constexpr (kPrefetch == Prefetch::kEveryLine) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kColumns * kBytes; i += kLine) __builtin_prefetch(first + i, 0, 2);
        first += kColumns * kBytes;
      }
      if constexpr (kPrefetch == Prefetch::kOneRow || kPrefetch == Prefetch::kTwoRows) {
        __builtin_prefetch(first, 0, 2);
        first += kBytes;
      }
      if constexpr (kPrefetch == Prefetch::kTwoRows) {
        __builtin_prefetch(second, 0, 2);
        second += kBytes;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Floats row = load(reinterpret_cast<const float*>(rows[i] + k * (4 / Words::kDepth)));
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) acc[i][j] = step<Words::kDepth == 2>(row, column[j], acc[i][j]);
      }
      k += kStep;
      b += kStep;
    };
    if constexpr (kPrefetch == Prefetch::kSomeLines) {
      constexpr int64_t kSteps = kSparseBytes / kBytes;
      while (k + kSteps * kStep <= end) {
        __builtin_prefetch(first, 0, 2);
        first += kSparseBytes;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSteps; ++i) advance();
      }
    }
#pragma GCC unroll 2
    while (k + kStep <= end) advance();
    if (k < end) {
      Floats column[kColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) column[j] = Words::load_along_k(b + j * stride, end - k);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        float words[kLanes] = {};
        __builtin_memcpy(words, rows[i] + k * (4 / Words::kDepth), static_cast<size_t>(end - k) * 4 / Words::kDepth);
        const Floats row = load(words);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) acc[i][j] = step<Words::kDepth == 2>(row, column[j], acc[i][j]);
      }
      k = end;
    }
    add_lanes(c, acc);
  }
}

// Rows of memory, `stride` bytes apart, whose prefetches `tiles` tiles of C share evenly.
struct RowPrefetches {
  const char* row = nullptr;
  int64_t stride = 0, rows = 0, tiles = 1;
  int64_t due = 0;

  const char* take() {
    due -= tiles;
    const char* const taken = row;
    row += stride;
    return taken;
  }
};

// A chunk of B that is multiplied by all row tiles.
template <typename T>
struct DotChunk {
  const T* b;
  int64_t stride, num_columns, depth;
};

// kRows rows of C += those of A times a chunk. `next_rows` are the next kRows rows of A, to prefetch.
template <int kRows, typename Words>
void add_dot_rows(float* c, const Rows& a, const void* const* next_rows, const DotChunk<Element<Words>>& chunk,
                  RowPrefetches& next_b) {
  const auto [b, stride, num_columns, depth] = chunk;
  const int64_t tiles = num_columns / kDotColumns;
  int64_t row = 0, due = 0;  // of next_rows
  int64_t n = 0;
  for (; n + kDotColumns <= num_columns; n += kDotColumns) {
    const char* ahead[2] = {};
    int num_ahead = 0;
    if (next_rows != nullptr && (due += kRows) >= tiles) {
      due -= tiles;
      ahead[num_ahead++] = static_cast<const char*>(next_rows[row++]) + a.offset;
    }
    next_b.due += next_b.rows;
    while (num_ahead < 2 && next_b.due >= next_b.tiles) ahead[num_ahead++] = next_b.take();
    const auto* const column = b + n * stride;
    switch (num_ahead) {
      case 0:
        add_dot_tile<kRows, kDotColumns, Prefetch::kNothing, Words>(c + n, a, column, stride, depth, ahead);
        break;
      case 1: add_dot_tile<kRows, kDotColumns, Prefetch::kOneRow, Words>(c + n, a, column, stride, depth, ahead); break;
      default: add_dot_tile<kRows, kDotColumns, Prefetch::kTwoRows, Words>(c + n, a, column, stride, depth, ahead);
    }
  }
  for (; n < num_columns; ++n) {
    add_dot_tile<kRows, 1, Prefetch::kNothing, Words>(c + n, a, b + n * stride, stride, depth, {});
  }
}

// Rows of B, or a part of each, that a single tile of A reads in order. Prefetches run `lead` rows ahead; past the last row
// they continue at `next`, with the same stride.
struct RowsOfB {
  const char* data;
  int64_t stride, count, lead;  // equal rows may have a stride of 0
  const char* next;

  RowsOfB(const void* b, int64_t row_stride, int64_t num_rows, int64_t part_bytes, int64_t lead_bytes,
          const void* next_b)
      : data(static_cast<const char*>(b)),
        stride(row_stride),
        count(num_rows),
        lead((lead_bytes + part_bytes - 1) / part_bytes),
        next(next_b != nullptr ? static_cast<const char*>(next_b) : data) {}

  const char* row(int64_t n) const { return data + n * stride; }
  const char* ahead_of(int64_t n) const {
    return n + lead < count ? row(n + lead) : next + (n + lead - count) * stride;
  }
};

// How a single tile reads B as one stream, which has the highest bandwidth on most processors: one column at a time if rows
// are long. Short rows wait at their starts and ends, and narrow vectors for the chain of one column's sums: both take
// kDotColumns. Up to two rows of A stay in L1; on some processors one prefetched line here and there is enough then. More
// rows partly come from L2 and must not wait in L1's miss buffers behind lines from memory, so all of B is prefetched well
// ahead. If rows of A exceed L1, kDotColumns columns share each read of them. From kChunkedRows on they are multiplied chunk
// by chunk instead, as measured on processors that follow streams; but with 8 lanes, which need more chains than the sums of
// so many rows, always kDotColumns at a time.
constexpr int64_t kShortRow = 1024, kFitting = 24576;  // bytes: of a row of B, of all rows of A
constexpr int64_t kChunkedRows = 4;
constexpr bool kHasFewLanes = kLanes <= 8;
static_assert(kTileRows * kChunkWords * 4 <= kFitting);
template <typename Words>
constexpr bool kIsNarrow = kLanes * Words::kDepth * sizeof(Element<Words>) < 32;
constexpr int64_t lead_of(Prefetch prefetch) { return prefetch == Prefetch::kEveryLine ? 32768 : 8192; }  // bytes

// Calls walk.operator()<columns at a time, Prefetch>() for num_rows rows of `a_bytes` each; rows of B have `b_bytes`.
template <typename Words, typename Walk>
void choose_walk(int64_t num_rows, int64_t a_bytes, int64_t b_bytes, int64_t fitting, Walk&& walk) {
  if (kIsNarrow<Words> || b_bytes <= kShortRow || num_rows * a_bytes > fitting) {
    return walk.template operator()<kDotColumns, Prefetch::kEveryLine>();
  }
  if (num_rows <= 2 && fastest_reads() == Reads::kSomeLines) return walk.template operator()<1, Prefetch::kSomeLines>();
  walk.template operator()<1, Prefetch::kEveryLine>();
}

// Calls tile.operator()<kColumns>(n) for all columns of `rows`.
template <int kColumns, typename Tile>
void for_columns(const RowsOfB& rows, Tile&& tile) {
  int64_t n = 0;
  for (; n + kColumns <= rows.count; n += kColumns) tile.template operator()<kColumns>(n);
  for (; n < rows.count; ++n) tile.template operator()<1>(n);
}

// A single tile where several streams are fastest: a column of each of kColumns parts of B at a time. These are as many chains of
// sums, without which narrow vectors would wait for one.
template <int kRows, int kColumns, typename Words>
void add_streams(const Product& product, const Rows& a, const Element<Words>* b, int64_t depth) {
  const int64_t stride = product.b.n_stride, part = product.num_columns / kColumns;
  const int64_t apart = stride * (product.stream_columns > 0 ? product.stream_columns : part);
  for (int64_t n = 0; n < part; ++n) {
    float sums[kRows * kPanel];
    const auto for_sums = [&](auto&& function) {
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) function(sums[i * kPanel + j], product.c[i * kPanel + n + j * part]);
      }
    };
    for_sums([](float& sum, float& c) { sum = c; });
    add_dot_tile<kRows, kColumns, Prefetch::kNothing, Words>(sums, a, b + n * stride, apart, depth, {});
    for_sums([](float& sum, float& c) { c = sum; });
  }
  for (int64_t n = part * kColumns; n < product.num_columns; ++n) {
    add_dot_tile<kRows, 1, Prefetch::kNothing, Words>(product.c + n, a, b + n * stride, stride, depth, {});
  }
}

// Streams of a tile of kRows rows, as many as registers allow; 0: one stream is faster.
template <int kRows, typename Words>
constexpr int num_streams() {
  constexpr bool kAreWidened = sizeof(Element<Words>) * Words::kDepth < 4;
  if (kLanes > 8) return 0;  // processors with longer vectors prefer one stream
  if (kRows <= (kAreWidened ? 2 : 3)) return kMostStreams;
  return kAreWidened ? kMostStreams / 2 : 0;
}

int num_streams_of(DType dtype, int64_t num_rows) {
  int streams = 0;
  if (fastest_reads() != Reads::kStreams || num_rows > kTileRows) return 0;
  with_words(dtype, [&]<typename Words>() {
    with_constant<kTileRows>(num_rows, [&]<int kRows>() { streams = num_streams<kRows, Words>(); });
  });
  return streams;
}

// All of a single tile, which reads B once, or a part of its depth; `next` is read afterwards.
template <int kRows, typename Words>
void add_few_dot_rows(const Product& product, const Rows& a, const Element<Words>* b, int64_t depth, const void* next) {
  constexpr int64_t kElement = sizeof(*b);
  const int64_t stride = product.b.n_stride;
  if constexpr (constexpr int kColumns = num_streams<kRows, Words>(); kColumns > 0) {
    if (fastest_reads() == Reads::kStreams) return add_streams<kRows, kColumns, Words>(product, a, b, depth);
  }
  const int64_t a_bytes = depth * 4 / Words::kDepth, b_bytes = depth * kElement;
  constexpr int64_t kFits = kHasFewLanes && kRows >= kChunkedRows ? 0 : kFitting;
  choose_walk<Words>(kRows, a_bytes, b_bytes, kFits, [&]<int kColumns, Prefetch kPrefetch>() {
    const RowsOfB rows(b, stride * kElement, product.num_columns, b_bytes, lead_of(kPrefetch), next);
    for_columns<kColumns>(rows, [&]<int kCount>(int64_t n) {
      add_dot_tile<kRows, kCount, kPrefetch, Words>(product.c + n, a, b + n * stride, stride, depth,
                                                    {rows.ahead_of(n), nullptr});
    });
  });
}

// ---- B as rows -----------------------------------------------------------------------------------------------------------

// out[n] = the words of B's row n for k in [k_begin, k_begin + depth), kScratchRow words apart.
template <typename Words>
void pack_rows(float* out, const Matrix& b, int64_t num_columns, int64_t k_begin, int64_t depth) {
  using T = Element<Words>;
  const T* const data = static_cast<const T*>(b.data) + k_begin * b.k_stride;
  if (b.n_stride == 1 && b.k_stride != 1) {
    const void* k_rows[kChunkWords * Words::kDepth];
    for (int64_t k = 0; k < depth; ++k) k_rows[k] = data + k * b.k_stride;
    transpose_words<Words>(out, kScratchRow, k_rows, depth, 0, num_columns);
    return;
  }
  constexpr int64_t kStep = kLanes * Words::kDepth;
  for (int64_t n = 0; n < num_columns; ++n, out += kScratchRow) {
    const T* const row = data + n * b.n_stride;
    for (int64_t k = 0; k < depth; k += kStep) {
      const int64_t count = depth - k < kStep ? depth - k : kStep;
      if (b.k_stride == 1) {
        store(out + k / Words::kDepth, Words::load_along_k(row + k, count));
        continue;
      }
      T lanes[kStep] = {};
      for (int64_t i = 0; i < count; ++i) lanes[i] = row[(k + i) * b.k_stride];
      store(out + k / Words::kDepth, Words::load_along_k(lanes, count));
    }
  }
}

// ---- all rows ------------------------------------------------------------------------------------------------------------

// All rows, in tiles of nearly equal height, times a chunk of B. `next`: as many rows of B, `next_stride` bytes apart, that
// are read next.
template <typename Words>
void add_dot_chunk(const Product& product, const Rows& a, const DotChunk<Element<Words>>& chunk, const void* next,
                   int64_t next_stride) {
  const int64_t tiles = num_row_tiles(product.num_rows);
  RowPrefetches next_b;
  if (next != nullptr) {
    next_b = {.row = static_cast<const char*>(next),
              .stride = next_stride,
              .rows = chunk.num_columns,
              .tiles = tiles * (chunk.num_columns / kDotColumns)};
  }
  for (int64_t t = 0, m = 0, count; t < tiles; ++t, m += count) {
    count = (product.num_rows - m) / (tiles - t);
    with_constant<kTileRows>(count, [&]<int kRows>() {  // tiles never shrink, so kRows more rows follow
      const void* const* const next_rows = t + 1 < tiles ? a.rows + m + kRows : nullptr;
      add_dot_rows<kRows, Words>(product.c + m * kPanel, {a.rows + m, a.offset}, next_rows, chunk, next_b);
    });
  }
}

template <typename Words>
void dot_products_of(const Product& product) {
  using T = Element<Words>;
  using Packed = typename Words::Packed;
  constexpr bool kPairs = Words::kDepth == 2;
  constexpr int64_t kChunk = kChunkWords * Words::kDepth, kBytes = sizeof(T);
  const Matrix& b = product.b;
  const T* const data = static_cast<const T*>(b.data);
  const int64_t depth = product.depth, num_columns = product.num_columns;
  const auto length = [&](int64_t k, int64_t most) { return depth - k < most ? depth - k : most; };
  const void* widened_rows[kMaxRows];

  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(product.num_rows));
  if (b.k_stride == 1 && product.num_rows <= kTileRows) {
    const bool widens = !kPairs && b.dtype != DType::kFloat32;
    const bool exceeds = product.num_rows * depth * 4 / Words::kDepth > kFitting;
    const bool in_chunks = exceeds && product.num_rows >= kChunkedRows && !kHasFewLanes && follows_streams();
    const int64_t most = widens ? kMaxRows / kTileRows * kChunk : in_chunks ? kChunk : depth;
    for (int64_t k = 0; k < depth; k += most) {
      const Rows rows = rows_from(product, b.dtype, kPairs, k, length(k, most), widened_rows);
      const void* const next = k + most < depth ? data + k + most : product.next.data;
      with_constant<kTileRows>(product.num_rows, [&]<int kRows>() {
        add_few_dot_rows<kRows, Words>(product, rows, data + k, length(k, most), next);
      });
    }
    return;
  }
  constexpr bool kIsWord = __is_same(Words, Packed);
  float* const packed = static_cast<float*>(product.scratch);
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t count = length(k, kChunk);
    const Rows rows = rows_from(product, b.dtype, kPairs, k, count, widened_rows);
    if constexpr (kIsWord) {
      if (b.k_stride == 1) {
        const void* const next = k + kChunk < depth ? data + k + kChunk : product.next.data;
        add_dot_chunk<Words>(product, rows, {data + k, b.n_stride, num_columns, count}, next, b.n_stride * kBytes);
        continue;
      }
    }
    pack_rows<Words>(packed, b, num_columns, k, count);
    add_dot_chunk<Packed>(
        product, rows,
        {reinterpret_cast<const Element<Packed>*>(packed), kScratchRow * Words::kDepth, num_columns, count}, nullptr,
        0);
  }
}

}  // namespace
}  // namespace switchgear::cpu
