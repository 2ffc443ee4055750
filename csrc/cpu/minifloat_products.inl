// SPDX-License-Identifier: BSD-3-Clause
// dot_products whose B is in minifloats (minifloat.h): fp8 and mxfp4 weights with rows of bfloat16, float16 or float32. Included by
// kernels.inl after dot_products.inl.
//
//   work 2·M·N·K flop; traffic: weights once, 1 or 1/2 byte each and their scales; rows of A from L1 or L2
//   The lanes of a vector are neighbours in n, as in panels: one broadcast word of A meets 16 rows of the weight.
//   Few rows: a step is decoded in registers, between memory and multiplication.
//   More rows: a chunk of the panel is decoded into the scratch once, as [word of depth][column], and multiplied in tiles of 6 rows
//   and the panel, as in multiply.inl.
//
// Order of each sum: steps of 32 columns, ascending. A step is summed from zero, k ascending, in float32: pairs of bfloat16 by vdpbf16ps
// where rows are bfloat16 and the ISA has that, otherwise by multiply-adds on float32. One multiply-add adds it, times its scale, to
// the total. That depends on the depth alone, so a row's result does not depend on its neighbours. What the last step lacks in A is
// zeros, whose weights are zeros, too.
#pragma once

namespace switchgear::cpu {
namespace {

template <Format kFormat, bool kPairs>
struct Minifloats {
  using Values = Decoder<kFormat, kPairs>;
  static constexpr int64_t kStepBytes = minifloat_step_bytes(kFormat), kStepVectors = kStepBytes / kLine;
  static constexpr int64_t kStepWords = kMinifloatColumns / (kPairs ? 2 : 1);
  static constexpr int64_t kChunkSteps = kChunkWords / 2 / kStepWords;  // of a decoded chunk, 128 KB beside its scales

  // Steps from one scale to the next.
  static int64_t group_steps(const Matrix& b) {
    return kFormat == Format::kMxfp4 ? 1 : b.group_size / kMinifloatColumns;
  }
  // Where the lanes of vector j of the columns are in a block's first step, and their scales in its first group.
  static const uint8_t* data(const Matrix& b, int64_t j) {
    const int64_t row = b.first_row + j * kLanes;
    return static_cast<const uint8_t*>(b.data) + row / kMinifloatRows * b.n_stride + row % kMinifloatRows * 4;
  }
  static const uint8_t* scales(const Matrix& b, int64_t j) {
    const int64_t row = b.first_row + j * kLanes;
    return static_cast<const uint8_t*>(b.scales) + row / kMinifloatRows * b.scale_stride +
           row % kMinifloatRows * kScaleBytes<kFormat>;
  }
  static Floats scale(const uint8_t* scales, int64_t group) {
    return load_scales<kFormat>(scales + group * kMinifloatRows * kScaleBytes<kFormat>);
  }
};

// Rows of A for `depth` k from k on: themselves, or widened to float32, or padded with zeros to a whole step.
Rows step_rows(const Product& product, bool pairs, int64_t k, int64_t depth, const void* (&made)[kMaxRows]) {
  const DType dtype = product.b.dtype;
  const int64_t element = size_of(dtype), missing = (kMinifloatColumns - depth % kMinifloatColumns) % kMinifloatColumns;
  const bool widens = !pairs && dtype != DType::kFloat32;
  if (!widens && missing == 0) return {product.rows, k * element};
  const int64_t out_element = pairs ? 2 : 4;
  char* out = static_cast<char*>(product.scratch) + kScratchRow * kMaxPanel * 4;
  for (int64_t m = 0; m < product.num_rows; ++m) {
    const char* const row = static_cast<const char*>(product.rows[m]) + k * element;
    if (widens) {
      load_row(reinterpret_cast<float*>(out), row, dtype, depth);
    } else {
      __builtin_memcpy(out, row, static_cast<size_t>(depth * element));
    }
    __builtin_memset(out + depth * out_element, 0, static_cast<size_t>(missing * out_element));
    made[m] = out;
    out += (depth + missing) * out_element + kLine;
  }
  return {made, 0};
}

// ---- few rows ------------------------------------------------------------------------------------------------------------

// kVectors vectors of columns from their first step on, and what to prefetch in step 0: of each block as many bytes.
template <int kVectors>
struct StepColumns {
  const uint8_t* data[kVectors];
  const uint8_t* scales[kVectors];
  const char* ahead[kVectors];
};

template <int kVectors>
constexpr int kBlockVectors = kVectors * kLanes < kMinifloatRows ? kVectors : kMinifloatRows / kLanes;  // of one block

// kRows rows and kVectors vectors of C += the products of steps [first, last). Prefetches a line in kAskedBytes.
template <Format kFormat, bool kPairs, int kRows, int kVectors, int64_t kAsked>
void add_step_tile(float* c, const Rows& a, const StepColumns<kVectors>& b, int64_t group_steps, int64_t first,
                   int64_t last) {
  using Of = Minifloats<kFormat, kPairs>;
  constexpr int kWords = Of::Values::kWords;
  const char* rows[kRows];
  Floats total[kRows][kVectors], scale[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    rows[i] = static_cast<const char*>(a.rows[i]) + a.offset;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[i][v] = load(c + i * kPanel + v * kLanes);
  }
  for (int64_t s = first; s < last;) {
    const int64_t group = s / group_steps, end = (group + 1) * group_steps < last ? (group + 1) * group_steps : last;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) scale[v] = Of::scale(b.scales[v], group);
    for (; s < end; ++s) {
      Floats sum[kRows][kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] = broadcast(0.0f);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v += kBlockVectors<kVectors>) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < Of::kStepBytes; i += kAsked) {
          __builtin_prefetch(b.ahead[v] + s * Of::kStepBytes + i, 0, 2);
        }
      }
#pragma GCC unroll 2
      for (int64_t q = 0; q < Of::kStepVectors; ++q) {
        Floats words[kVectors][kWords];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          Of::Values::decode(words[v], b.data[v] + s * Of::kStepBytes + q * kLine);
        }
        const int64_t word = s * Of::kStepWords + q * kWords;
#pragma GCC unroll 8
        for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const auto broadcasted = broadcast_word(rows[i] + 4 * (word + w));
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[i][v] = step<kPairs>(broadcasted, words[v][w], sum[i][v]);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[i][v] = multiply_add(sum[i][v], scale[v], total[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + i * kPanel + v * kLanes, total[i][v]);
  }
}

constexpr int64_t kDirectRows =
    2 * kTileRows;  // up to so many, decoding for each tile is quicker than by way of the scratch
constexpr int kFewVectors = kLanes < kMinifloatRows ? kPanelVectors : 2;  // at once

// Steps [first, last) of a block, whose rows of A begin with the first; `ahead`: what to prefetch beside them.
template <Format kFormat, bool kPairs, int kVectors>
void add_few_vectors(const Product& product, const Rows& a, int64_t j, int64_t first, int64_t last) {
  using Of = Minifloats<kFormat, kPairs>;
  const Matrix& b = product.b;
  const int64_t steps = (product.depth + kMinifloatColumns - 1) / kMinifloatColumns;
  const int64_t lead_bytes = lead_of(product.num_rows <= 2 ? Asks::kSomeLines : Asks::kEveryLine) / kVectors;
  const int64_t lead = lead_bytes / Of::kStepBytes < steps ? lead_bytes / Of::kStepBytes : steps;
  const int64_t vectors = (product.num_columns + kLanes - 1) / kLanes;
  StepColumns<kVectors> columns;
  for (int v = 0; v < kVectors; ++v) {
    columns.data[v] = Of::data(b, j + v);
    columns.scales[v] = Of::scales(b, j + v);
  }
  const auto add = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    for (int64_t m = 0, tiles = num_row_tiles(product.num_rows), t = 0, count; t < tiles; ++t, m += count) {
      count = (product.num_rows - m) / (tiles - t);
      with_constant<kTileRows>(count, [&]<int kRows>() {
        const Rows rows{a.rows + m, a.offset - first * Of::kStepWords * 4};
        float* const c = product.c + m * kPanel + j * kLanes;
        const int64_t group_steps = Of::group_steps(b);
        if (kRows <= 2 && follows_streams()) {
          add_step_tile<kFormat, kPairs, kRows, kVectors, kAskedBytes>(c, rows, columns, group_steps, begin, end);
        } else {
          add_step_tile<kFormat, kPairs, kRows, kVectors, kLine>(c, rows, columns, group_steps, begin, end);
        }
      });
    }
  };
  const int64_t middle = steps - lead < first ? first : steps - lead > last ? last : steps - lead;
  for (int v = 0; v < kVectors; ++v) {
    columns.ahead[v] = reinterpret_cast<const char*>(columns.data[v]) + lead * Of::kStepBytes;
  }
  add(first, middle);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t then = j + kVectors + v;  // comes next
    const auto* const data = then < vectors            ? reinterpret_cast<const char*>(Of::data(b, then))
                             : product.next != nullptr ? static_cast<const char*>(product.next) +
                                                             (then - vectors) * kLanes / kMinifloatRows * b.n_stride
                                                       : reinterpret_cast<const char*>(columns.data[v]);
    columns.ahead[v] = data - (steps - lead) * Of::kStepBytes;
  }
  add(middle, last);
}

template <Format kFormat, bool kPairs>
void add_few_steps(const Product& product, const Rows& a, int64_t first, int64_t last) {
  const int64_t vectors = (product.num_columns + kLanes - 1) / kLanes;
  int64_t j = 0;
  for (; j + kFewVectors <= vectors; j += kFewVectors) {
    add_few_vectors<kFormat, kPairs, kFewVectors>(product, a, j, first, last);
  }
  for (; j < vectors; ++j) add_few_vectors<kFormat, kPairs, 1>(product, a, j, first, last);
}

// ---- more rows -----------------------------------------------------------------------------------------------------------

// A decoded chunk: words [step][word][column] and scales [step][column].
struct DecodedChunk {
  const float* words;
  const float* scales;
  int64_t steps;
};

template <Format kFormat, bool kPairs>
void decode_chunk(float* words, float* scales, const Product& product, int64_t first, int64_t steps) {
  using Of = Minifloats<kFormat, kPairs>;
  constexpr int kWords = Of::Values::kWords;
  const int64_t vectors = (product.num_columns + kLanes - 1) / kLanes, group_steps = Of::group_steps(product.b);
  for (int64_t j = 0; j < vectors; ++j) {
    const uint8_t* p = Of::data(product.b, j) + first * Of::kStepBytes;
    const uint8_t* const own_scales = Of::scales(product.b, j);
    float* out = words + j * kLanes;
    for (int64_t s = 0; s < steps; ++s) {
      store(scales + s * kPanel + j * kLanes, Of::scale(own_scales, (first + s) / group_steps));
#pragma GCC unroll 2
      for (int64_t q = 0; q < Of::kStepVectors; ++q, p += kLine, out += kWords * kPanel) {
        Floats decoded[kWords];
        Of::Values::decode(decoded, p);
#pragma GCC unroll 8
        for (int w = 0; w < kWords; ++w) store(out + w * kPanel, decoded[w]);
      }
    }
  }
}

// kRows rows of C += the products of a chunk. Prefetches `lines` lines a step.
template <int kRows, bool kPairs>
void add_decoded_tile(float* c, const Rows& a, const DecodedChunk& chunk, int64_t lines, Ahead& ahead) {
  constexpr int64_t kStepWords = kMinifloatColumns / (kPairs ? 2 : 1);
  const char* rows[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) rows[i] = static_cast<const char*>(a.rows[i]) + a.offset;
  const float* words = chunk.words;
  for (int64_t s = 0; s < chunk.steps; ++s) {
    Floats sum[kRows][kPanelVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) sum[i][v] = broadcast(0.0f);
    }
    for (int64_t i = 0; i < lines; ++i) ahead.prefetch_line();
    for (int64_t w = s * kStepWords; w < (s + 1) * kStepWords; ++w, words += kPanel) {
      Floats b[kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) b[v] = load(words + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto word = broadcast_word(rows[i] + 4 * w);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) sum[i][v] = step<kPairs>(word, b[v], sum[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      const Floats scale = load(chunk.scales + s * kPanel + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        float* const total = c + i * kPanel + v * kLanes;
        store(total, multiply_add(sum[i][v], scale, load(total)));
      }
    }
  }
}

template <Format kFormat, bool kPairs>
void add_decoded_steps(const Product& product, const Rows& a, int64_t first, int64_t steps) {
  using Of = Minifloats<kFormat, kPairs>;
  const Matrix& b = product.b;
  float* const words = static_cast<float*>(product.scratch);
  float* const scales = words + Of::kChunkSteps * Of::kStepWords * kPanel;
  static_assert(Of::kChunkSteps * (Of::kStepWords + 1) <= kScratchRow);
  decode_chunk<kFormat, kPairs>(words, scales, product, first, steps);

  // The next chunk, or the first one of the next product.
  const int64_t all = (product.depth + kMinifloatColumns - 1) / kMinifloatColumns, last = first + steps;
  const int64_t blocks = (product.num_columns + kMinifloatRows - 1) / kMinifloatRows;
  const auto* const data = static_cast<const char*>(last < all ? b.data : product.next);
  const int64_t begin = last < all ? last : 0, rest = all - begin < Of::kChunkSteps ? all - begin : Of::kChunkSteps;
  const int64_t tiles = num_row_tiles(product.num_rows), width = rest * Of::kStepBytes;
  Ahead ahead;
  int64_t lines = 0;
  if (data != nullptr) {
    ahead = Ahead(data + begin * Of::kStepBytes, b.n_stride, width);
    lines = (blocks * width / kLine + tiles * steps - 1) / (tiles * steps);
  }
  const DecodedChunk chunk{words, scales, steps};
  for (int64_t t = 0, m = 0, count; t < tiles; ++t, m += count) {
    count = (product.num_rows - m) / (tiles - t);
    with_constant<kTileRows>(count, [&]<int kRows>() {
      add_decoded_tile<kRows, kPairs>(product.c + m * kPanel, {a.rows + m, a.offset}, chunk, lines, ahead);
    });
  }
}

// ---- the whole -----------------------------------------------------------------------------------------------------------

template <Format kFormat, bool kPairs>
void minifloat_products_of(const Product& product) {
  using Of = Minifloats<kFormat, kPairs>;
  const int64_t depth = product.depth, num_rows = product.num_rows;
  const void* made[kMaxRows];
  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(num_rows));
  if (num_rows == 0) return;

  const bool is_direct = num_rows <= kDirectRows, widens = !kPairs && product.b.dtype != DType::kFloat32;
  int64_t most = Of::kChunkSteps * kMinifloatColumns;  // k at a time
  if (is_direct) {
    const int64_t room = kScratchRow * kMaxRows / kDirectRows - kLine / 4;
    most = widens ? room / kMinifloatColumns * kMinifloatColumns : depth;
  } else {  // vectors without columns stay zero
    const int64_t vectors = (product.num_columns + kLanes - 1) / kLanes;
    if (vectors < kPanelVectors) {
      __builtin_memset(product.scratch, 0, static_cast<size_t>(Of::kChunkSteps * (Of::kStepWords + 1) * kPanel * 4));
    }
  }
  const int64_t whole = depth / kMinifloatColumns * kMinifloatColumns;  // the last, shorter step has rows of its own
  for (int64_t k = 0, count; k < depth; k += count) {
    count = k == whole ? depth - whole : whole - k < most ? whole - k : most;
    const Rows a = step_rows(product, kPairs, k, count, made);
    const int64_t first = k / kMinifloatColumns, steps = (count + kMinifloatColumns - 1) / kMinifloatColumns;
    if (is_direct) {
      add_few_steps<kFormat, kPairs>(product, a, first, first + steps);
    } else {
      add_decoded_steps<kFormat, kPairs>(product, a, first, steps);
    }
  }
  // Rows of weights that pad a block, or are none of this product, leave no trace.
  for (int64_t m = 0; m < num_rows && product.num_columns < kPanel; ++m) {
    __builtin_memset(product.c + m * kPanel + product.num_columns, 0,
                     static_cast<size_t>(kPanel - product.num_columns) * 4);
  }
}

template <Format kFormat>
void minifloat_products_in(const Product& product) {
  if constexpr (kHasPairs) {
    if (product.b.dtype == DType::kBFloat16) return minifloat_products_of<kFormat, true>(product);
  }
  minifloat_products_of<kFormat, false>(product);
}

void minifloat_products(const Product& product) {
  if (product.b.format == Format::kFp8) return minifloat_products_in<Format::kFp8>(product);
  minifloat_products_in<Format::kMxfp4>(product);
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

// A step of kLanes rows as plain rows: out[r][c] = value · scale.
template <Format kFormat>
void expand_step(float (&out)[kLanes][kMinifloatColumns], const Matrix& b, int64_t j, int64_t step) {
  using Of = Minifloats<kFormat, false>;
  constexpr int kWords = Of::Values::kWords;
  const uint8_t* p = Of::data(b, j) + step * Of::kStepBytes;
  const Floats scale = Of::scale(Of::scales(b, j), step / Of::group_steps(b));
  Floats words[kMinifloatColumns / kWords][kWords];
  for (int q = 0; q < kMinifloatColumns / kWords; ++q) Of::Values::decode(words[q], p + q * kLine);
#pragma GCC unroll 8
  for (int k = 0; k < kMinifloatColumns; k += kLanes) {
    Floats block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = words[(k + i) / kWords][(k + i) % kWords] * scale;
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out[i] + k, block[i]);
  }
}

void expand_minifloats(void* out, int64_t stride, DType dtype, const Matrix& b, int64_t num_rows, int64_t first,
                       int64_t count) {
  const int64_t element = size_of(dtype);
  for (int64_t n = 0; n < num_rows; n += kLanes) {
    for (int64_t k = 0; k < count; k += kMinifloatColumns) {
      float rows[kLanes][kMinifloatColumns];
      const int64_t j = n / kLanes, step = (first + k) / kMinifloatColumns;
      if (b.format == Format::kFp8) {
        expand_step<Format::kFp8>(rows, b, j, step);
      } else {
        expand_step<Format::kMxfp4>(rows, b, j, step);
      }
      char* target = static_cast<char*>(out) + (n * stride + k) * element;
      const int64_t columns = count - k < kMinifloatColumns ? count - k : kMinifloatColumns;
      for (int64_t r = 0; r < kLanes && n + r < num_rows; ++r, target += stride * element) {
        store_row(target, dtype, rows[r], columns);
      }
    }
  }
}

}  // namespace
}  // namespace switchgear::cpu
