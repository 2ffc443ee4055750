// SPDX-License-Identifier: BSD-3-Clause
// dot_products with B in panels and rows of A in the same word order. Included by kernels.inl after dot_products.inl.
//
//   work 2·M·N·K flop; traffic: B once, as one stream; A once per panel, from L2
//   The lanes of a vector are neighbours in n, and one word of A multiplies all of them. A step of AVX-512 loads 2 vectors of
//   B for each of 2 lanes of dot_products and broadcasts 2 words of each of 6 rows: 24 multiply-adds for 16 loads. A block of
//   B (16 KB) stays in L1 for all rows, so memory has L2 to itself. With few rows memory binds: a word of A per 64 bytes of B.
//
// Sums have the bits of dot_products. There, lane l of an accumulator adds words l, l + kLanes, … of a chunk, and add_sums
// adds lanes in pairs. Here one accumulator holds lane l of kLanes columns. kSumOrder lists lanes such that neighbours are
// the pairs of add_sums, and neighbouring pairs its next pairs.
//
// A chunk of up to kChunkWords words has the same number of words in each lane, its steps. Position p is lane kSumOrder[p];
// kClasses positions make a set. The order of words:
//   row of A     [chunk][set][step][class]
//   panel of B   [chunk][set][group][step][class][column of the group]
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int kWide = 2;                         // vectors of B that share the broadcast words: a group
constexpr int kGroups = kPanelVectors / kWide;   // in a panel
constexpr int kClasses = kPanelVectors / kWide;  // lanes at a time, for as many accumulators as elsewhere
constexpr int kSets = kLanes / kClasses;
constexpr int kSumLevels = __builtin_ctz(kSets);  // levels of sums of sets that wait for their neighbours
static_assert(kWide * kGroups == kPanelVectors && (kSets & (kSets - 1)) == 0);
static_assert(kSumLevels * kMaxRows * kPanel * 4 <= kProductScratch);

// ---- rows of A -----------------------------------------------------------------------------------------------------------

int64_t panel_vector_bytes(DType dtype) {
  int64_t bytes = 0;
  with_words(dtype, [&]<typename Words>() { bytes = kLanes * Words::kDepth * sizeof(Element<Words>); });
  return bytes;
}

int64_t word_bytes(DType dtype, int64_t depth) {
  return 4 * (dtype == DType::kBFloat16 && kHasPairs ? depth / 2 : depth);
}

void store_sorted(void* out, DType dtype, int64_t depth, int64_t first, const float* values, int64_t n) {
  const bool pairs = dtype == DType::kBFloat16 && kHasPairs;
  const int64_t per_word = pairs ? 2 : 1, total = depth / per_word;
  float rounded[kMaxPanel], widened[kMaxPanel];  // n is a multiple of the words of a vector, as depth is
  store_row(rounded, dtype, values, n);
  if (!pairs) load_row(widened, rounded, dtype, n);
  const float* const words = pairs ? rounded : widened;
  const int64_t begin = first / per_word, chunk = begin / kChunkWords * kChunkWords;
  const int64_t steps = (total - chunk < kChunkWords ? total - chunk : kChunkWords) / kLanes;
  for (int64_t i = 0; i * per_word < n; i += kLanes) {
    float* const row = static_cast<float*>(out) + chunk + (begin - chunk + i) / kLanes * kClasses;
    for (int p = 0; p < kLanes; ++p) row[p / kClasses * steps * kClasses + p % kClasses] = words[i + kSumOrder[p]];
  }
}

// ---- multiplying ---------------------------------------------------------------------------------------------------------

// Consecutive parts of a chunk of a panel; a part has the columns of a group and kClasses lanes.
template <typename T>
struct PartsOfB {
  const T* data;
  int64_t steps;  // of a part
  int first, end;
  int64_t gap = 0;  // elements between parts
};
constexpr int kParts = kSets * kGroups;

// kRows rows of C += the products of rows of A, whose chunk is at word `offset`, and parts of B. A part's sums are added to
// waiting sums of other sets; then they wait too, or after the last set are added to C. The levels of waiting sums are
// kMaxRows rows apart. Prefetches kLines lines per step, `stride` bytes after those of the step before.
template <int kRows, typename Words, int kLines>
void add_parts(float* c, float* waiting, const void* const* a_rows, int64_t offset,
               const PartsOfB<Element<Words>>& parts, const char* ahead, int64_t stride) {
  constexpr int64_t kVector = kLanes * Words::kDepth;
  const float* rows[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) rows[i] = static_cast<const float*>(a_rows[i]) + offset;
  const auto* block = parts.data;
  for (int part = parts.first; part < parts.end; ++part) {
    const int set = part / kGroups;
    const int64_t column = part % kGroups * kWide * kLanes, set_words = parts.steps * kClasses;
    Floats acc[kRows][kClasses][kWide];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j / kWide][j % kWide] = broadcast(0.0f);
    }
    for (int64_t word = set * set_words; word < (set + 1) * set_words; word += kClasses) {
      Floats b[kClasses][kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) b[j / kWide][j % kWide] = Words::load_whole(block + j * kVector);
      block += kPanelVectors * kVector;
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) __builtin_prefetch(ahead + j * kLine, 0, 2);
      ahead += stride;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kClasses; ++j) {
          const auto a = broadcast_word(rows[i] + word + j);
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) acc[i][j][v] = step<Words::kDepth == 2>(a, b[j][v], acc[i][j][v]);
        }
      }
    }
    block += parts.gap;
    if constexpr (kClasses == 2) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[i][0][v] = acc[i][0][v] + acc[i][1][v];
      }
    }
    float* sums = waiting + column;
    int level = 0;
    for (; set >> level & 1; ++level, sums += kMaxRows * kPanel) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[i][0][v] = acc[i][0][v] + load(sums + i * kPanel + v * kLanes);
      }
    }
    const bool is_last = level == kSumLevels;
    if (is_last) sums = c + column;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        float* const target = sums + i * kPanel + v * kLanes;
        store(target, is_last ? load(target) + acc[i][0][v] : acc[i][0][v]);
      }
    }
  }
}

// Prefetches `bytes` of each of `count` rows from byte `offset` on: pieces too short for the processor to detect a stream.
// Narrow vectors take so long for a piece that loads alone keep up; the prefetches would cost them 4 to 7 %.
constexpr bool kPrefetchesRows = kLanes >= 16;
inline void prefetch_rows(const void* const* rows, int64_t count, int64_t offset, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    const char* const row = static_cast<const char*>(rows[i]) + offset;
    for (int64_t byte = 0; byte < bytes; byte += kLine) __builtin_prefetch(row + byte, 0, 2);
  }
}

// How B is prefetched: each step of the first `tiles` tiles of rows prefetches `lines` lines, `stride` bytes after those of
// the step before.
struct Guide {
  int lines;
  int64_t stride, tiles;
};
constexpr int kGuidedRows = 2;
template <typename Words>
constexpr int64_t step_bytes() {
  return kLanes * Words::kDepth * kPanelVectors * sizeof(Element<Words>);
}
template <typename Words>
constexpr int lines_per_step() {
  return step_bytes<Words>() < kLine ? 1 : step_bytes<Words>() / kLine;
}

// Several tiles share the prefetches of a step, one or two lines each. A single tile prefetches every line. If the processor
// follows streams, it feeds the tile itself; one or two rows only show it where the stream continues.
inline Guide guide_of(int64_t num_rows, int64_t tiles, int step_lines, int64_t step_bytes) {
  if (tiles > 1) {
    const int lines = tiles < step_lines ? 2 : 1;
    return {lines, lines * kLine, step_lines / lines};
  }
  if (!follows_streams()) return {step_lines, step_bytes, 1};
  const bool is_guided = num_rows <= kGuidedRows && fastest_reads() != Reads::kStreams;
  return {is_guided ? 1 : 0, step_bytes, 1};
}

// What a tile prefetches: `lines` lines per step, `stride` bytes after those of the step before.
struct LinesAhead {
  int lines;
  const char* data;
  int64_t stride;
};

// All rows of C += the products of their words from `offset` on and parts of B, in tiles of nearly equal height. ahead_of(tile)
// is what a tile prefetches; one or two rows prefetch a line per step in any case.
template <typename Words, typename AheadOf>
void add_parts_of_rows(const Product& product, int64_t offset, const PartsOfB<Element<Words>>& parts,
                       AheadOf&& ahead_of) {
  constexpr int kLines = lines_per_step<Words>();
  const int64_t tiles = num_row_tiles(product.num_rows), set_bytes = 4 * parts.steps * kClasses;
  const int64_t sets = (parts.end - parts.first + kGroups - 1) / kGroups;
  float* const waiting = static_cast<float*>(product.scratch);
  for (int64_t t = 0, m = 0, count; t < tiles; ++t, m += count) {
    count = (product.num_rows - m) / (tiles - t);
    if (kPrefetchesRows && parts.first % kGroups == 0 && t + 1 < tiles) {  // rows are read here for the first time
      prefetch_rows(product.rows + m + count, count, 4 * offset + parts.first / kGroups * set_bytes, sets * set_bytes);
    }
    const LinesAhead ahead = ahead_of(t);
    with_constant<kTileRows>(count, [&]<int kRows>() {
      const auto add = [&]<int kLinesAhead>() {
        add_parts<kRows, Words, kLinesAhead>(product.c + m * kPanel, waiting + m * kPanel, product.rows + m, offset,
                                             parts, ahead.data, ahead.stride);
      };
      if (ahead.lines == kLines) {
        add.template operator()<kLines>();
      } else if constexpr (kRows <= kGuidedRows) {
        add.template operator()<1>();
      } else {
        with_constant<3>(ahead.lines + 1, [&]<int kCount>() { add.template operator()<kCount - 1>(); });
      }
    });
  }
}

// Calls add(first, end) for the parts of a chunk, as many at a time as stay in L1 for all rows.
template <typename Words, typename Add>
void for_near_parts(int64_t steps, Add&& add) {
  constexpr int64_t kNear = 16384;  // bytes
  const int64_t near = kNear / (steps * step_bytes<Words>());
  const int together = near > kParts ? kParts : near < 1 ? 1 : static_cast<int>(near);
  for (int part = 0; part < kParts; part += together) add(part, part + together < kParts ? part + together : kParts);
}

template <typename Words>
void panel_products_of(const Product& product) {
  using T = Element<Words>;
  constexpr int64_t kStep = kLanes * Words::kDepth, kChunk = kChunkWords * Words::kDepth;
  constexpr int64_t kLead = 32768;  // bytes, of prefetches
  const int64_t tiles = num_row_tiles(product.num_rows);
  const Guide guide = guide_of(product.num_rows, tiles, lines_per_step<Words>(), step_bytes<Words>());
  const T* data = static_cast<const T*>(product.b.data);
  const char* const end = reinterpret_cast<const char*>(data + product.depth * kPanel);

  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(product.num_rows));
  for (int64_t k = 0; k < product.depth; k += kChunk) {
    const int64_t steps = (product.depth - k < kChunk ? product.depth - k : kChunk) / kStep;
    for_near_parts<Words>(steps, [&](int first, int last) {
      const PartsOfB<T> parts{.data = data, .steps = steps, .first = first, .end = last};
      const char* ahead = reinterpret_cast<const char*>(data) + kLead;
      if (ahead >= end && product.next.data != nullptr)
        ahead = static_cast<const char*>(product.next.data) + (ahead - end);
      add_parts_of_rows<Words>(product, k / Words::kDepth, parts, [&](int64_t t) {
        const int64_t tile = t < guide.tiles ? t : guide.tiles;
        return LinesAhead{t < guide.tiles ? guide.lines : 0, ahead + tile * (last - first) * steps * guide.stride,
                          guide.stride};
      });
      data += (last - first) * steps * kStep * kPanelVectors;
    });
  }
}

void panel_products(const Product& product) {
  with_words(product.b.dtype, [&]<typename Words>() { panel_products_of<Words>(product); });
}

// ---- expanding -----------------------------------------------------------------------------------------------------------

// out[n·stride + c] = b(n, first + c) in the dtype of b, for n < num_rows and c < count; all but stride are even.
void expand_panels(void* out, int64_t stride, const Matrix& b, int64_t depth, int64_t num_rows, int64_t first,
                   int64_t count) {
  int place_of[kLanes];
  for (int p = 0; p < kLanes; ++p) place_of[kSumOrder[p]] = p;
  with_words(b.dtype, [&]<typename Words>() {
    using T = Element<Words>;
    constexpr int64_t kBytes = sizeof(T) * Words::kDepth, kColumns = kWide * kLanes;  // of a word, of a group
    const int64_t words = depth / Words::kDepth, begin = first / Words::kDepth, end = (first + count) / Words::kDepth;
    for (int64_t n = 0; n < num_rows; n += kPanel) {
      const char* const panel = static_cast<const char*>(b.data) + n * b.n_stride;
      for (int64_t w = begin; w < end; ++w) {
        const int64_t chunk = w / kChunkWords * kChunkWords, rest = words - chunk;
        const int64_t steps = (rest < kChunkWords ? rest : kChunkWords) / kLanes, step = (w - chunk) / kLanes;
        const int place = place_of[(w - chunk) % kLanes];
        for (int64_t g = 0; g < kGroups; ++g) {
          const int64_t at = ((place / kClasses * kGroups + g) * steps + step) * kClasses + place % kClasses;
          const char* const source = panel + (chunk * kPanel + at * kColumns) * kBytes;
          T* const target = static_cast<T*>(out) + (n + g * kColumns) * stride + (w - begin) * Words::kDepth;
          for (int64_t i = 0; i < kColumns; ++i) __builtin_memcpy(target + i * stride, source + i * kBytes, kBytes);
        }
      }
    }
  });
}

}  // namespace
}  // namespace switchgear::cpu
