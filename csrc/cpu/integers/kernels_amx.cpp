// SPDX-License-Identifier: BSD-3-Clause
// multiply of kernels.inl with AMX, for more than kFewRows rows and groups that are long enough. With fewer rows memory
// binds; those products and everything else are those of avx512vnni.
//
//   work 2·M·N·K operations; TDPBSUD adds products of 16 rows and 16 columns over 64 k in 16 cycles. A step adds to
//   2 x 2 tiles of sums (amx_block.h).
//   At 8 bits 16 words of a block are a tile in place. 4-bit values are unpacked into tiles once for all rows. A group ends
//   with conversions and multiply-adds of its sums, through memory: longer than the 32 cycles that a tile takes over 128 k.
//   reached on 2 cores of a Xeon (family 6, model 207): OLMoE with 512 tokens at 8 bits, one scale per row: 36 to 48 ms,
//   with vectors 56 to 71
//
// Rows of activations that are not consecutive are copied, 32 at a time. The missing part of a group's last tile is zero
// weights. Integers are exact and float32 sums have the order of kernels.inl, so results have the same bits.
#include "cpu/integers/kernels.h"

#include "cpu/amx_block.h"
#include "cpu/simd_avx512.h"

#include "cpu/integers/dot.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kWordBytes = 4 * kBlockRows;  // of a word of a block
constexpr int64_t kGroupWords = 64;  // of the shortest groups: up to 128 columns vectors are as fast or faster
constexpr int64_t kChunkWords = 256, kChunkSteps = kChunkWords / kTile;  // multiplied by all rows in turn
constexpr int64_t kCopiedRow = 4 * kChunkWords + kLine;  // bytes of a row of activations: not a page apart
constexpr int kPanelBlocks = kIntegerPanel / kBlockRows;
static_assert(kBlockRows == kTile && kLanes == kTile);

// Weights as tiles: step s of a block at tiles[block] + s · kTileBytes.
struct WeightTiles {
  const char* tiles[kPanelBlocks];
};

struct Sums {
  alignas(64) int32_t of[kIntegerRows][kIntegerPanel];
};
struct Totals {
  alignas(64) float of[kIntegerRows][kIntegerPanel];
};

class TileProduct {
 public:
  explicit TileProduct(const IntegerProduct& product)
      : p_(product),
        blocks_(tiles_of(product.num_columns, kBlockRows)),
        groups_of_rows_(tiles_of(product.num_rows, kTile)),
        block_bytes_(product.b.words * kWordBytes * product.b.bits / 8) {
    if (product.next != nullptr) {
      ahead_ = {reinterpret_cast<const char*>(product.next), 1, 0, blocks_ * block_bytes_};
    }
    ahead_.spread_over(kPointsPerStep * tiles_of(product.b.words, kTile) * tiles_of(groups_of_rows_, 2) *
                       tiles_of(blocks_, 2));
  }

  void run() {
    const IntegerPanel& b = p_.b;
    tile_configure(shapes(kTile));
    for (int64_t block = 0, last = 0; last < b.groups; ++block) {
      last = at_most((block + 1) * b.block_groups, b.groups);
      for (int64_t g = block * b.block_groups; g < last; ++g) {
        const int64_t begin = g * b.group_words, end = at_most(begin + b.group_words, b.words);
        for (int64_t word = begin; word < end; word += kChunkWords) {
          const int64_t words = at_most(end - word, kChunkWords);
          const WeightTiles weights = weights_of(word, words);
          for (int64_t m = 0; m < groups_of_rows_ * kTile; m += 2 * kTile) {
            int32_t* const sums = sums_.of[end - begin > kChunkWords ? m : 0];  // of a single chunk: they stay in L1
            add_rows(m, weights, word, words, sums, word > begin);
            if (word + words == end) end_group(g, m, sums, g == block * b.block_groups);
          }
        }
      }
      end_block(block, last == b.groups);
    }
    tile_release();
  }

 private:
  int64_t row(int64_t m) const { return p_.indices != nullptr ? p_.indices[m] : m; }

  // Sums of 32 rows from m on (+)= products over `words` words from `word` on.
  void add_rows(int64_t m, const WeightTiles& weights, int64_t word, int64_t words, int32_t* sums, bool adds) {
    const int64_t steps = tiles_of(words, kTile);
    const bool is_in_place =
        p_.indices == nullptr && m + 2 * kTile <= p_.num_rows && 4 * word + steps * kStepBytes <= p_.rows.stride;
    if (!is_in_place) copy_rows(m, word, steps * kStepBytes);
    const int64_t stride = is_in_place ? p_.rows.stride : kCopiedRow;
    const auto* const first =
        reinterpret_cast<const char*>(is_in_place ? p_.rows.values + m * p_.rows.stride + 4 * word : copies_[0]);
    int32_t* const below = sums + kTile * kIntegerPanel;
    for (int64_t j = 0; j < blocks_; j += 2) {
      const int64_t j1 = at_most(j + 1, blocks_ - 1);
      const Block<int32_t> block{
          .first = {first, first + kTile * stride},
          .first_stride = stride,
          .second = {weights.tiles[j], weights.tiles[j1]},
          .steps = steps,
          .sums = {{sums + j * kTile, below + j * kTile}, {sums + j1 * kTile, below + j1 * kTile}},
          .sum_stride = kIntegerPanel * 4,
          .adds = adds};
      add_block(groups_of_rows_ - m / kTile, blocks_ - j, block, ahead_);
    }
  }

  // Copies 32 rows from m on; zeros after the last.
  void copy_rows(int64_t m, int64_t word, int64_t bytes) {
    for (int64_t i = 0; i < 2 * kTile; ++i) {
      const int64_t count = m + i < p_.num_rows ? at_most(bytes, p_.rows.stride - 4 * word) : 0;
      if (count > 0) {
        const int8_t* const values = p_.rows.values + row(m + i) * p_.rows.stride + 4 * word;
        __builtin_memcpy(copies_[i], values, static_cast<size_t>(count));
      }
      __builtin_memset(copies_[i] + count, 0, static_cast<size_t>(bytes - count));
    }
  }

  // Whole tiles of 8-bit values are read in place; other tiles and 4-bit values are copied.
  WeightTiles weights_of(int64_t word, int64_t words) {
    WeightTiles weights;
    const int64_t filled = words * kWordBytes, whole = tiles_of(words, kTile) * kTileBytes;
    for (int64_t j = 0; j < blocks_; ++j) {
      const uint8_t* const values = p_.b.values + j * block_bytes_ + word * kWordBytes * p_.b.bits / 8;
      weights.tiles[j] = reinterpret_cast<const char*>(values);
      if (p_.b.bits == 8 && filled == whole) continue;
      uint8_t* const tiles = tiles_[j];
      weights.tiles[j] = reinterpret_cast<const char*>(tiles);
      if (p_.b.bits == 8) {
        __builtin_memcpy(tiles, values, static_cast<size_t>(filled));
      } else {
        unpack(tiles, values, words);
      }
      __builtin_memset(tiles + filled, 0, static_cast<size_t>(whole - filled));
    }
    return weights;
  }

  static void unpack(uint8_t* tiles, const uint8_t* values, int64_t words) {  // an even number
    const __m512i halves = _mm512_set1_epi8(0x0f);
    for (int64_t w = 0; w < words; w += 2, tiles += 2 * kWordBytes, values += kWordBytes) {
      const __m512i v = _mm512_loadu_si512(values);
      _mm512_store_si512(tiles, _mm512_and_si512(v, halves));
      _mm512_store_si512(tiles + kWordBytes, _mm512_and_si512(_mm512_srli_epi16(v, 4), halves));
    }
  }

  // totals (+)= sums · scale, as end_group of kernels.inl does.
  void end_group(int64_t g, int64_t first_row, const int32_t* sums, bool is_first) {
    const int64_t end_row = at_most(first_row + 2 * kTile, p_.num_rows);
    const IntegerPanel& b = p_.b;
    const bool has_zeros = b.zeros != nullptr;
    const float unit = b.bits == 8 ? -1.0f : -1.0f / 16;
    for (int64_t j = 0; j < blocks_; ++j) {
      const int64_t at = (j * b.groups + g) * kBlockRows;
      const Floats scale = widen(b.scales + at);
      const Floats offset = has_zeros ? scale * widen(b.zeros + at) * broadcast(unit) : Floats{};
      for (int64_t m = first_row; m < end_row; ++m) {
        const int32_t correction = p_.rows.corrections[row(m) * b.groups + g];
        const Ints sum =
            load_ints(sums + (m - first_row) * kIntegerPanel + j * kTile) + broadcast_ints(has_zeros ? 0 : correction);
        float* const total = &totals_.of[m][j * kTile];
        Floats v = multiply_add(__builtin_convertvector(sum, Floats), scale, is_first ? Floats{} : load(total));
        if (has_zeros) v = multiply_add(broadcast(static_cast<float>(correction)), offset, v);
        store(total, v);
      }
    }
  }

  // c (+)= totals · scale of the activations; after the last block c *= scales of the rows of weights.
  void end_block(int64_t block, bool is_last) {
    for (int64_t m = 0; m < p_.num_rows; ++m) {
      const Floats scale = broadcast(p_.rows.scales[row(m) * p_.rows.blocks + block]);
      for (int64_t j = 0; j < blocks_; ++j) {
        float* const c = p_.c + m * p_.c_stride + j * kTile;
        const Floats total = load(&totals_.of[m][j * kTile]);
        Floats sum = block == 0 ? total * scale : multiply_add(total, scale, load(c));
        if (is_last) sum = sum * load(p_.b.row_scales + j * kTile);
        store(c, sum);
      }
    }
  }

  const IntegerProduct& p_;
  const int64_t blocks_, groups_of_rows_, block_bytes_;
  Ahead ahead_;
  Sums sums_;
  Totals totals_;
  alignas(64) int8_t copies_[2 * kTile][kCopiedRow];
  alignas(64) uint8_t tiles_[kPanelBlocks][kChunkSteps * kTileBytes];
};

void multiply(const IntegerProduct& product) {
  if (product.num_rows <= kFewRows || product.b.group_words < kGroupWords) {
    return integers_avx512vnni().multiply(product);
  }
  TileProduct(product).run();
}

double multiply_rate(int, int64_t iterations) {
  tile_configure(shapes(kTile));  // tiles of zeros
  for (int64_t i = 0; i < iterations; ++i) {
    for_sums<2, 2>([]<int kF, int kS>() { multiply_tiles<int32_t, kSums<kF, kS>, kFirst, kSecond>(); });
  }
  tile_release();
  return static_cast<double>(iterations) * 4 * kTile * kTile * kStepBytes * 2;
}

}  // namespace

const IntegerKernels& integers_amx() {
  static const IntegerKernels table = [] {
    IntegerKernels own = integers_avx512vnni();
    own.multiply = multiply;
    own.multiply_rate = multiply_rate;
    return own;
  }();
  return table;
}

}  // namespace switchgear::cpu
