// SPDX-License-Identifier: BSD-3-Clause
// dot_products with B in minifloats (minifloat.h: fp8, mxfp4, nf4) or integers of 1 to 4 bits (groups.h); rows of bfloat16,
// float16 or float32. Included by kernels.inl after dot_products.inl.
//
//   work 2·M·N·K flop; traffic: weights once, 1/8 byte for each bit, and their scales; rows of A from L1 or L2
//   The lanes of a vector are neighbours in n: one broadcast word of A multiplies 16 rows of the weight.
//   Few rows: a step of 32 columns is decoded into registers. With AVX-512 a tile of 1 to 6 rows multiplies 1, 2 or 4
//   blocks of 16 weights at a time; each is a stream of data and one of scales, prefetched 8 KB ahead into L1:
//   where two cores of Zen 5 read 70 GB/s, one row of 3 bits reaches 91 to 93 % of it, but 61 % if prefetched into L2.
//   Many rows: a chunk of the panel is decoded into the scratch as [word of depth][column], 32 KB so that it stays in L1,
//   and multiplied in tiles of 6 rows and the panel, as in multiply.inl.
//   reached on one core of Zen 5, of a plain read or of the multiply-adds: bfloat16, 1 or 2 rows 91 to 93 % of the read;
//   6 rows 77 % of the multiply-adds in mxfp4, 80 % of the read in fp8; 64 rows 80 to 83 % of the multiply-adds, 240 rows
//   86 to 88 %, 1.05 to 1.15 times plain bfloat16. Float32, 1 row: 77 % (mxfp4) and 89 % (fp8) of the read, bound by
//   instructions. AVX2, 1 row: 64 bytes take 24 (mxfp4) and 17 (fp8) cycles, 27 and 38 % of the read.
//
// Order of each sum: steps of 32 columns ascend, or of 16 where a scale is for 16. A step is summed in float32 from zero, k ascending: pairs of bfloat16 by
// vdpbf16ps if rows are bfloat16 and the ISA has it, otherwise float32 multiply-adds. One multiply-add adds the sum, times
// its scale, to the total. The order depends on the depth alone, so a row's result does not depend on its neighbours. If
// the last step is shorter, A is padded with zeros, as the weights are. Zeros of groups: values are those of symmetric weights,
// and one more multiply-add adds (2^(bits-1) - zero) · (the sum of A in the step) to the sum of a step.
#pragma once

namespace switchgear::cpu {
namespace {

template <Format kFormat, bool kPairs>
struct Minifloats {
  using Values = Decoder<kFormat, kPairs>;
  // Half a step of the storage if each half has a scale of its own.
  static constexpr int64_t kStepColumns = minifloat_group(kFormat) == 16 ? 16 : kMinifloatColumns;
  static constexpr int64_t kStepBytes = minifloat_step_bytes(kFormat) * kStepColumns / kMinifloatColumns;
  static constexpr int64_t kStepPieces = kStepBytes / Values::kBytes;
  static constexpr int64_t kStepWords = kStepColumns / (kPairs ? 2 : 1);
  static constexpr int64_t kChunkSteps = 32768 / (4 * kPanel * kStepWords);  // of a decoded chunk

  // Steps that share a scale.
  static int64_t group_steps(const Matrix& b) {
    constexpr int64_t kGroup = minifloat_group(kFormat);
    return (kGroup > 0 ? kGroup : b.group_size) / kStepColumns;
  }
  static int64_t num_steps(const Product& product) { return (product.depth + kStepColumns - 1) / kStepColumns; }
  // Vector j of the columns: its lanes in the first step of their block, and their scales of the first group.
  static const uint8_t* data(const Matrix& b, int64_t j) {
    const int64_t row = b.first_row + j * kLanes;
    return static_cast<const uint8_t*>(b.data) + row / kMinifloatRows * b.n_stride + row % kMinifloatRows * 4;
  }
  static const uint8_t* scales(const Matrix& b, int64_t j) {
    const int64_t row = b.first_row + j * kLanes;
    return static_cast<const uint8_t*>(b.scales) + row / kMinifloatRows * b.scale_stride +
           row % kMinifloatRows * kScaleBytes<kFormat>;
  }
  static constexpr int64_t kGroupBytes = kMinifloatRows * kScaleBytes<kFormat>;
  // `rows` are the scales of rows: null if the format has none.
  static Floats scale(const uint8_t* scales, int64_t group, const float* rows) {
    const Floats own = load_scales<kFormat>(scales + group * kGroupBytes);
    if constexpr (kHasRowScales) return own * load(rows);
    return own;
  }
  static constexpr bool kHasRowScales = format_row(kFormat).row_scales;
  static const float* row_scales(const Matrix& b, int64_t j) {
    return kHasRowScales ? b.row_scales + b.first_row + j * kLanes : nullptr;
  }

  // The same for zeros, if there are any; 2^(bits-1) - zero is what is missing in the values.
  static constexpr bool kHasZeros = has_bits(kFormat) && kFormat != Format::kBits1;
  static const uint8_t* zeros(const Matrix& b, int64_t j) {
    if (!kHasZeros || b.zeros == nullptr) return nullptr;
    const int64_t row = b.first_row + j * kLanes;
    return static_cast<const uint8_t*>(b.zeros) + row / kMinifloatRows * b.scale_stride / 2 + row % kMinifloatRows;
  }
  static Floats missing(const uint8_t* zeros, int64_t group) {
    constexpr int kMiddle = 1 << (bits_of(kFormat) - 1);
    return __builtin_convertvector(kMiddle - load_bytes(zeros + group * kMinifloatRows), Floats);
  }
};

int64_t num_vectors(const Product& product) { return (product.num_columns + kLanes - 1) / kLanes; }

// Rows of A from the first k of a step on, and with zeros the sum of each row in each step.
struct StepRows {
  const void* const* rows;
  int64_t offset;
  const float* sums = nullptr;  // [rows, stride], of steps from `first` on
  int64_t stride = 0, first = 0;

  StepRows from(int64_t m) const { return {rows + m, offset, sums + m * stride, stride, first}; }
  float sum(int64_t m, int64_t step) const { return sums[m * stride + step - first]; }
};

// In the scratch, behind a decoded chunk. A pass over the depth has as many steps as fit.
constexpr int64_t kSumsBegin = 10240, kMostSums = kScratchRow * kMaxPanel - kSumsBegin;  // floats

// The sums of A in each of `steps` steps.
void sum_steps(float* sums, const Rows& a, int64_t num_rows, bool pairs, int64_t steps) {
  const int64_t step_bytes = kMinifloatColumns * (pairs ? 2 : 4);
  for (int64_t m = 0; m < num_rows; ++m) {
    const char* const row = static_cast<const char*>(a.rows[m]) + a.offset;
    for (int64_t s = 0; s < steps; s += kLanes) {
      Floats v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const char* const p = row + (s + i) * step_bytes;
        v[i] = broadcast(0.0f);
        if (s + i >= steps) continue;
        if (pairs) {
          for (int k = 0; k < kMinifloatColumns; k += kLanes) {
            v[i] = v[i] + load(reinterpret_cast<const BFloat16*>(p) + k);
          }
        } else {
          for (int k = 0; k < kMinifloatColumns; k += kLanes) v[i] = v[i] + load(reinterpret_cast<const float*>(p) + k);
        }
      }
      transpose(v);
      for (int64_t i = 1; i < kLanes; ++i) v[0] = v[0] + v[i];
      store_some(sums + s, v[0], steps - s < kLanes ? steps - s : kLanes);
    }
    sums += steps;
  }
}

// Rows of A for `depth` k from k on: in place, widened to float32, or padded with zeros to a whole step.
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

// kVectors vectors of columns: where their first step and scale are, and what to prefetch in step 0 and group 0.
template <int kVectors>
struct StepColumns {
  const uint8_t* data[kVectors];
  const uint8_t* scales[kVectors];
  const uint8_t* data_ahead[kVectors];
  const uint8_t* scales_ahead[kVectors];
  const uint8_t* zeros[kVectors];     // null if there are none
  const float* row_scales[kVectors];  // the same
};

// Vectors of columns that share a block, so that one of them prefetches for all.
template <int kVectors>
constexpr int kBlockVectors = kVectors * kLanes < kMinifloatRows ? kVectors : kMinifloatRows / kLanes;

// Vectors of columns that a tile of so many rows multiplies at once. Memory delivers one stream fastest, but more chains of
// multiply-adds overlap, and a word of A serves more of them. Where a block is several vectors, it is one stream.
// One row of 1 to 3 bits decodes more per byte, so it takes two blocks: 3 bits from memory 26 cycles a step instead of 28.
constexpr bool kIsBlock = kLanes == kMinifloatRows;
template <Format kFormat, bool kPairs>
constexpr int vectors_at_once(int rows) {
  if (!kIsBlock) return kPanelVectors;
  if (!kPairs) return 2;
  if (kFormat == Format::kFp8) return rows <= 2 ? 1 : 2;
  if (rows == 1) return has_bits(kFormat) && kFormat != Format::kBits4 ? 2 : 1;
  return rows == 3 || rows == 4 ? 4 : 2;
}

// Steps that are summed side by side, where one has few chains: those of float32 are twice as long as those of pairs. Groups
// of few bits come from memory faster than a chain of 16 multiply-adds ends. Pairs of fp8 and mxfp4 in turns are up to 1.36x
// faster from L2, but slower from memory, also where their loads keep its order.
template <Format kFormat, bool kPairs>
constexpr int steps_at_once(int chains) {
  if (has_bits(kFormat)) return chains > 4 ? 1 : kPairs && chains == 1 ? 4 : 2;
  return kPairs || chains > 4 ? 1 : chains > 2 ? 2 : 4;
}

// kRows rows and kVectors vectors of C += the products of kSteps steps from step s on, with scales scale(step, vector).
// With zeros, missing[v] times the sum of A in the step is part of them.
template <Format kFormat, bool kPairs, int kSteps, int kRows, int kVectors, typename Scale>
inline void add_steps(Floats (&total)[kRows][kVectors], const char* const (&rows)[kRows],
                      const StepColumns<kVectors>& b, int64_t s, Scale&& scale, const StepRows& a,
                      const Floats* missing) {
  using Of = Minifloats<kFormat, kPairs>;
  constexpr int kWords = Of::Values::kWords;
  Floats sum[kSteps][kRows][kVectors];
#pragma GCC unroll 4
  for (int u = 0; u < kSteps; ++u) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[u][i][v] = broadcast(0.0f);
    }
  }
  const auto load_pieces = [&](typename Of::Values::Piece(&pieces)[kVectors], int64_t byte) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (v % kBlockVectors<kVectors> == 0) {
#pragma GCC unroll 3
        for (int line = 0; line < Of::Values::kBytes; line += kLine) {
          __builtin_prefetch(b.data_ahead[v] + byte + line, 0, 3);
        }
      }
      pieces[v] = Of::Values::piece_at(b.data[v] + byte);
    }
  };
  const auto multiply_word = [&](Floats(&sums)[kRows][kVectors], const typename Of::Values::Piece(&pieces)[kVectors],
                                 int w, int64_t k) {
    Floats words[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) words[v] = Of::Values::word(pieces[v], w);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto word = broadcast_word(rows[i] + 4 * k);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] = step<kPairs>(word, words[v], sums[i][v]);
    }
  };
#pragma GCC unroll 2
  for (int64_t q = 0; q < Of::kStepPieces; ++q) {
    typename Of::Values::Piece pieces[kSteps][kVectors];
    const auto byte = [&](int u) { return (s + u) * Of::kStepBytes + q * Of::Values::kBytes; };
    const auto word = [&](int u) { return (s + u) * Of::kStepWords + q * kWords; };
    if constexpr (has_bits(kFormat)) {  // words are decoded where they are multiplied: steps in turns
#pragma GCC unroll 4
      for (int u = 0; u < kSteps; ++u) load_pieces(pieces[u], byte(u));
#pragma GCC unroll 32
      for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 4
        for (int u = 0; u < kSteps; ++u) multiply_word(sum[u], pieces[u], w, word(u) + w);
      }
    } else {
#pragma GCC unroll 4
      for (int u = 0; u < kSteps; ++u) {
        load_pieces(pieces[u], byte(u));
#pragma GCC unroll 8
        for (int w = 0; w < kWords; ++w) multiply_word(sum[u], pieces[u], w, word(u) + w);
      }
    }
  }
  if constexpr (Of::kHasZeros) {
    if (missing != nullptr) {
#pragma GCC unroll 4
      for (int u = 0; u < kSteps; ++u) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Floats sums = broadcast(a.sum(i, s + u));
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[u][i][v] = multiply_add(sums, missing[v], sum[u][i][v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kSteps; ++u) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Floats factor = scale(u, v);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) total[i][v] = multiply_add(sum[u][i][v], factor, total[i][v]);
    }
  }
}

// kRows rows and kVectors vectors of C += the products of steps [first, last).
template <Format kFormat, bool kPairs, int kSteps, int kRows, int kVectors>
void add_step_tile(float* c, const StepRows& a, const StepColumns<kVectors>& b, int64_t group_steps, int64_t first,
                   int64_t last) {
  using Of = Minifloats<kFormat, kPairs>;
  const char* rows[kRows];
  Floats total[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    rows[i] = static_cast<const char*>(a.rows[i]) + a.offset;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[i][v] = load(c + i * kPanel + v * kLanes);
  }
  const auto scale_of = [&](int v, int64_t group) {
    if (v % kBlockVectors<kVectors> == 0) __builtin_prefetch(b.scales_ahead[v] + group * Of::kGroupBytes, 0, 3);
    return Of::scale(b.scales[v], group, b.row_scales[v]);
  };
  int64_t s = first;
  if constexpr (minifloat_group(kFormat) > 0) {  // of 1 or 2 steps: each step loads its scales
    constexpr int64_t kGroupSteps = minifloat_group(kFormat) / Of::kStepColumns;
    const auto scale = [&](int u, int v) { return scale_of(v, (s + u) / kGroupSteps); };
    constexpr const Floats* missing = nullptr;
    for (; s + kSteps <= last; s += kSteps) add_steps<kFormat, kPairs, kSteps>(total, rows, b, s, scale, a, missing);
    for (; kSteps > 1 && s < last; ++s) add_steps<kFormat, kPairs, 1>(total, rows, b, s, scale, a, missing);
  } else {
    for (int64_t group = s / group_steps; s < last; ++group) {
      const int64_t next = (group + 1) * group_steps, end = next < last ? next : last;
      Floats scales[kVectors], offsets[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) scales[v] = scale_of(v, group);
      const Floats* missing = nullptr;
      if constexpr (Of::kHasZeros) {
        if (b.zeros[0] != nullptr) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) offsets[v] = Of::missing(b.zeros[v], group);
          missing = offsets;
        }
      }
      const auto scale = [&](int, int v) { return scales[v]; };
      for (; s + kSteps <= end; s += kSteps) add_steps<kFormat, kPairs, kSteps>(total, rows, b, s, scale, a, missing);
      if constexpr (kSteps > 2) {
        for (; s + 2 <= end; s += 2) add_steps<kFormat, kPairs, 2>(total, rows, b, s, scale, a, missing);
      }
      for (; kSteps > 1 && s < end; ++s) add_steps<kFormat, kPairs, 1>(total, rows, b, s, scale, a, missing);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + i * kPanel + v * kLanes, total[i][v]);
  }
}

// Steps [first, last) of kVectors vectors of columns from vector j on; rows of A start with the first of these steps.
template <Format kFormat, bool kPairs, int kVectors>
void add_few_vectors(const Product& product, const StepRows& a, int64_t j, int64_t first, int64_t last) {
  using Of = Minifloats<kFormat, kPairs>;
  constexpr int64_t kLead = 8192;  // bytes of a block
  constexpr int kMostRows = kIsBlock && kVectors > 2 ? 4 : kTileRows;
  const Matrix& b = product.b;
  const int64_t steps = Of::num_steps(product), group_steps = Of::group_steps(b);
  const int64_t lead = kLead / Of::kStepBytes < steps ? kLead / Of::kStepBytes : steps, turn = steps - lead;
  StepColumns<kVectors> columns;
  const auto add = [&](int64_t begin, int64_t end) {
    const int64_t tiles = num_row_tiles(product.num_rows);
    for (int64_t t = 0, m = 0, count; t < tiles && begin < end; ++t, m += count) {
      count = (product.num_rows - m) / (tiles - t);
      with_constant<kMostRows>(count, [&]<int kRows>() {
        StepRows rows = a.from(m);  // of step 0
        rows.offset -= first * Of::kStepWords * 4;
        rows.first = first;
        add_step_tile<kFormat, kPairs, steps_at_once<kFormat, kPairs>(kRows * kVectors), kRows>(
            product.c + m * kPanel + j * kLanes, rows, columns, group_steps, begin, end);
      });
    }
  };
  for (int v = 0; v < kVectors; ++v) {
    columns.data[v] = Of::data(b, j + v);
    columns.scales[v] = Of::scales(b, j + v);
    columns.zeros[v] = Of::zeros(b, j + v);
    columns.row_scales[v] = Of::row_scales(b, j + v);
    columns.data_ahead[v] = columns.data[v] + lead * Of::kStepBytes;
    columns.scales_ahead[v] = columns.scales[v] + (lead + group_steps - 1) / group_steps * Of::kGroupBytes;
  }
  add(first, turn < last ? turn : last);
  // From here on the lead reaches the vectors that come next, and behind the last one the caller's next product.
  for (int v = 0; v < kVectors; ++v) {
    const int64_t next = j + kVectors + v, behind = next - num_vectors(product);
    const uint8_t *data = Of::data(b, next), *scales = Of::scales(b, next);
    if (behind >= 0 && product.next.data != nullptr) {
      const int64_t block = behind * kLanes / kMinifloatRows;
      data = static_cast<const uint8_t*>(product.next.data) + block * b.n_stride;
      scales = static_cast<const uint8_t*>(product.next.scales) + block * b.scale_stride;
    }
    columns.data_ahead[v] = data - turn * Of::kStepBytes;
    columns.scales_ahead[v] = scales - turn / group_steps * Of::kGroupBytes;
  }
  add(turn > first ? turn : first, last);
}

template <Format kFormat, bool kPairs>
void add_few_steps(const Product& product, const StepRows& a, int64_t first, int64_t last) {
  const int64_t vectors = num_vectors(product), tiles = num_row_tiles(product.num_rows);
  int64_t j = 0;
  with_constant<kTileRows>((product.num_rows + tiles - 1) / tiles, [&]<int kRows>() {  // of the highest tile
    constexpr int kVectors = vectors_at_once<kFormat, kPairs>(kRows);
    for (; j + kVectors <= vectors; j += kVectors) {
      add_few_vectors<kFormat, kPairs, kVectors>(product, a, j, first, last);
    }
  });
  for (; j < vectors; ++j) add_few_vectors<kFormat, kPairs, 1>(product, a, j, first, last);
}

// ---- many rows -----------------------------------------------------------------------------------------------------------

// A decoded chunk: words [step][word][column], scales [step][column] and, with zeros, what is missing in its values.
struct DecodedChunk {
  const float* words;
  const float* scales;
  const float* missing;
  int64_t steps;
};

template <Format kFormat, bool kPairs>
void decode_chunk(float* words, float* scales, float* missing, const Product& product, int64_t first, int64_t steps) {
  using Of = Minifloats<kFormat, kPairs>;
  constexpr int kWords = Of::Values::kWords;
  const int64_t vectors = num_vectors(product), group_steps = Of::group_steps(product.b);
  for (int64_t j = 0; j < vectors; ++j) {
    const uint8_t* p = Of::data(product.b, j) + first * Of::kStepBytes;
    const uint8_t* const own_scales = Of::scales(product.b, j);
    const uint8_t* const own_zeros = Of::zeros(product.b, j);
    const float* const rows = Of::row_scales(product.b, j);
    float* out = words + j * kLanes;
    for (int64_t s = 0; s < steps; ++s) {
      store(scales + s * kPanel + j * kLanes, Of::scale(own_scales, (first + s) / group_steps, rows));
      if constexpr (Of::kHasZeros) {
        if (missing != nullptr) {
          store(missing + s * kPanel + j * kLanes, Of::missing(own_zeros, (first + s) / group_steps));
        }
      }
#pragma GCC unroll 2
      for (int64_t q = 0; q < Of::kStepPieces; ++q, p += Of::Values::kBytes, out += kWords * kPanel) {
        const auto piece = Of::Values::piece_at(p);
#pragma GCC unroll 32
        for (int w = 0; w < kWords; ++w) store(out + w * kPanel, Of::Values::word(piece, w));
      }
    }
  }
}

// kRows rows of C += the products of a chunk. Prefetches `lines` lines a step.
template <int kRows, bool kPairs, int64_t kStepWords>
void add_decoded_tile(float* c, const StepRows& a, const DecodedChunk& chunk, int64_t lines, Ahead& ahead) {
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
    if (chunk.missing != nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Floats sums = broadcast(a.sum(i, s));
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) {
          sum[i][v] = multiply_add(sums, load(chunk.missing + s * kPanel + v * kLanes), sum[i][v]);
        }
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

// Steps [first, first + steps), at most a chunk; rows of A start with the first of them.
template <Format kFormat, bool kPairs>
void add_decoded_steps(const Product& product, const StepRows& a, int64_t first, int64_t steps) {
  using Of = Minifloats<kFormat, kPairs>;
  const Matrix& b = product.b;
  float* const words = static_cast<float*>(product.scratch);
  float* const scales = words + Of::kChunkSteps * Of::kStepWords * kPanel;
  static_assert(Of::kChunkSteps >= 1 && Of::kChunkSteps * (Of::kStepWords + 2) * kPanel <= kSumsBegin);
  float* const missing = a.sums != nullptr ? scales + Of::kChunkSteps * kPanel : nullptr;
  decode_chunk<kFormat, kPairs>(words, scales, missing, product, first, steps);

  // While it is multiplied, the next chunk is prefetched, or the first one of the next product.
  const int64_t all = Of::num_steps(product), last = first + steps, tiles = num_row_tiles(product.num_rows);
  const int64_t blocks = (product.num_columns + kMinifloatRows - 1) / kMinifloatRows;
  const Start next = last < all ? b.start() : product.next;
  const int64_t begin = last < all ? last : 0, count = all - begin < Of::kChunkSteps ? all - begin : Of::kChunkSteps;
  const int64_t width = count * Of::kStepBytes, group_steps = Of::group_steps(b);
  Ahead ahead;
  int64_t lines = 0;
  if (next.data != nullptr) {
    ahead = Ahead(static_cast<const char*>(next.data) + begin * Of::kStepBytes, b.n_stride, width);
    lines = (blocks * width / kLine + tiles * steps - 1) / (tiles * steps);
  }
  for (int64_t block = 0; block < blocks && next.data != nullptr; ++block) {
    const char* const line = static_cast<const char*>(next.scales) + block * b.scale_stride;
    for (int64_t g = begin / group_steps; g * group_steps < begin + count; g += kLine / Of::kGroupBytes) {
      __builtin_prefetch(line + g * Of::kGroupBytes, 0, 2);
    }
  }
  const DecodedChunk chunk{words, scales, missing, steps};
  for (int64_t t = 0, m = 0, rows; t < tiles; ++t, m += rows) {
    rows = (product.num_rows - m) / (tiles - t);
    with_constant<kTileRows>(rows, [&]<int kRows>() {
      add_decoded_tile<kRows, kPairs, Of::kStepWords>(product.c + m * kPanel, a.from(m), chunk, lines, ahead);
    });
  }
}

// ---- the whole -----------------------------------------------------------------------------------------------------------

// Up to so many rows, decoding again for each tile of rows is faster than through the scratch, if decoding is cheap.
template <Format kFormat>
constexpr int64_t kDirectRows = kIsBlock && (kHasPairs || bits_of(kFormat) <= 4) ? 36 : kTileRows;

template <Format kFormat, bool kPairs>
void minifloat_products_of(const Product& product) {
  using Of = Minifloats<kFormat, kPairs>;
  const int64_t depth = product.depth, num_rows = product.num_rows;
  const void* made[kMaxRows];
  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(num_rows));
  if (num_rows == 0) return;

  const bool is_direct = num_rows <= kDirectRows<kFormat>, widens = !kPairs && product.b.dtype != DType::kFloat32;
  int64_t most = depth;  // k of A at a time: in place all, widened ones as many as the scratch holds
  if (widens) {
    const int64_t room = kScratchRow * kMaxRows / (is_direct ? kDirectRows<kFormat> : kMaxRows) - kLine / 4;
    most = room / kMinifloatColumns * kMinifloatColumns;
  }
  if (!is_direct && num_vectors(product) < kPanelVectors) {  // the other vectors of a chunk stay zero
    __builtin_memset(product.scratch, 0, static_cast<size_t>(Of::kChunkSteps * (Of::kStepWords + 2) * kPanel * 4));
  }
  const bool has_zeros = Of::kHasZeros && product.b.zeros != nullptr;
  if (has_zeros) {
    const int64_t room = kMostSums / num_rows * kMinifloatColumns;
    most = most < room ? most : room;
  }
  float* const sums = static_cast<float*>(product.scratch) + kSumsBegin;
  const int64_t whole = depth / kMinifloatColumns * kMinifloatColumns;  // a shorter last step has rows of its own
  for (int64_t k = 0, count; k < depth; k += count) {
    count = k == whole ? depth - whole : whole - k < most ? whole - k : most;
    const auto [rows, offset] = step_rows(product, kPairs, k, count, made);
    const int64_t first = k / Of::kStepColumns, last = first + (count + Of::kStepColumns - 1) / Of::kStepColumns;
    StepRows a{rows, offset};
    if (has_zeros) {
      sum_steps(sums, {rows, offset}, num_rows, kPairs, last - first);
      a.sums = sums;
      a.stride = last - first;
    }
    if (is_direct) {
      add_few_steps<kFormat, kPairs>(product, a, first, last);
      continue;
    }
    for (int64_t s = first; s < last; s += Of::kChunkSteps) {
      const int64_t steps = last - s < Of::kChunkSteps ? last - s : Of::kChunkSteps;
      add_decoded_steps<kFormat, kPairs>(product, a, s, steps);
      a.offset += steps * Of::kStepWords * 4;
      a.first -= steps;
    }
  }
  // Columns past the last one are padding, or belong to another product.
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

constexpr bool has_decoder(Format format) { return is_minifloat(format) || has_bits(format); }

void minifloat_products(const Product& product) {
  with_format<has_decoder>(product.b.format, [&]<Format kFormat>() { minifloat_products_in<kFormat>(product); });
}

// ---- plain rows ----------------------------------------------------------------------------------------------------------

// 32 columns of the rows of vector j, of which `columns` exist: out[r][c] = value · scale.
template <Format kFormat>
void expand_step(float (&out)[kLanes][kMinifloatColumns], const Matrix& b, int64_t j, int64_t step, int64_t columns) {
  using Of = Minifloats<kFormat, false>;
  constexpr int kWords = Of::Values::kWords;
  const uint8_t* p = Of::data(b, j) + step * minifloat_step_bytes(kFormat);
  const auto group_at = [&](int64_t column) { return (step * kMinifloatColumns + column) / b.group_size; };
  Floats words[kMinifloatColumns];
#pragma GCC unroll 4
  for (int q = 0; q < kMinifloatColumns / kWords; ++q) {
    const auto piece = Of::Values::piece_at(p + q * Of::Values::kBytes);
#pragma GCC unroll 32
    for (int w = 0; w < kWords; ++w) words[q * kWords + w] = Of::Values::word(piece, w);
  }
  if constexpr (Of::kHasZeros) {
    if (b.zeros != nullptr) {
      const Floats missing = Of::missing(Of::zeros(b, j), group_at(0));
      for (Floats& word : words) word = word + missing;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kMinifloatColumns; k += kLanes) {
    const Floats scale = Of::scale(Of::scales(b, j), group_at(k < columns ? k : 0), Of::row_scales(b, j));
    Floats block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = words[k + i] * scale;
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out[i] + k, block[i]);
  }
}

template <Format kFormat>
void expand_minifloats_in(void* out, int64_t stride, DType dtype, const Matrix& b, int64_t num_rows, int64_t first,
                          int64_t count) {
  const int64_t element = size_of(dtype);
  for (int64_t n = 0; n < num_rows; n += kLanes) {
    for (int64_t k = 0; k < count; k += kMinifloatColumns) {
      float rows[kLanes][kMinifloatColumns];
      const int64_t columns = count - k < kMinifloatColumns ? count - k : kMinifloatColumns;
      expand_step<kFormat>(rows, b, n / kLanes, (first + k) / kMinifloatColumns, columns);
      char* target = static_cast<char*>(out) + (n * stride + k) * element;
      for (int64_t r = 0; r < kLanes && n + r < num_rows; ++r, target += stride * element) {
        store_row(target, dtype, rows[r], columns);
      }
    }
  }
}

void expand_minifloats(void* out, int64_t stride, DType dtype, const Matrix& b, int64_t num_rows, int64_t first,
                       int64_t count) {
  with_format<has_decoder>(b.format, [&]<Format kFormat>() {
    expand_minifloats_in<kFormat>(out, stride, dtype, b, num_rows, first, count);
  });
}

}  // namespace
}  // namespace switchgear::cpu
