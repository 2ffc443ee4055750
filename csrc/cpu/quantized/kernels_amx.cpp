// SPDX-License-Identifier: BSD-3-Clause
// multiply of kernels.inl by AMX, for more rows than kFewRows and groups that are long enough; with fewer, which wait for memory,
// and everything else it is that of avx512vnni.
//
//   work 2·M·N·K operations; TDPBSUD adds products of 16 rows and 16 columns over 64 k in 16 cycles. A step of 2 x 2 tiles of sums
//   takes two tiles of each operand, as in amx_tiles.h.
//   At 8 bits 16 words of a block are a tile as they lie. 4-bit values are unpacked into tiles, once for all rows. Each group ends
//   in conversions and multiply-adds of its sums, by way of memory: longer than the 32 cycles that a tile takes over 128 k.
//   reached on 2 cores of a Xeon (family 6, model 207): OLMoE with 512 tokens at 8 bits, a scale per row, 36 to 48 ms, with
//   vectors 56 to 71
//
// Rows of activations that don't follow each other are copied, 32 at a time. What a group lacks of a tile is zero weights. The
// integers are exact, and the order of what is float32 is that of kernels.inl: results have the same bits.
#include "cpu/quantized/kernels.h"

#include "cpu/amx.h"
#include "cpu/simd_avx512.h"

#include "cpu/quantized/dot.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kTile = 16;                                      // rows, columns, and words of a tile
constexpr int64_t kWordBytes = 4 * kBlockRows, kTileBytes = 1024;  // of a word of a block; of a tile
constexpr int64_t kGroupWords = 64;  // of the shortest groups: up to 128 columns vectors are as fast or faster
constexpr int64_t kChunkWords = 256, kChunkSteps = kChunkWords / 16;  // that are multiplied with all rows in turn
constexpr int64_t kChunkBytes = 4 * kChunkWords;                      // of a row of activations
constexpr int64_t kCopiedRow = kChunkBytes + 64;                      // not a page apart
constexpr int kPanelBlocks = kQuantizedPanel / kBlockRows;
static_assert(kBlockRows == kTile && kLanes == kTile);

int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

TileConfig shapes() {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) config.rows[t] = kTile, config.row_bytes[t] = 64;
  return config;
}

// Weights as tiles: step s of a block at tiles[block] + s · kTileBytes.
struct Weights8 {
  const uint8_t* tiles[kPanelBlocks];
};

struct Sums {
  alignas(64) int32_t of[kQuantizedRows][kQuantizedPanel];
};
struct Totals {
  alignas(64) float of[kQuantizedRows][kQuantizedPanel];
};

class TileProduct {
 public:
  explicit TileProduct(const QuantizedProduct& product)
      : p_(product),
        blocks_((product.num_columns + kBlockRows - 1) / kBlockRows),
        groups_of_rows_(tiles_of(product.num_rows)),
        block_bytes_(product.b.words * kWordBytes * product.b.bits / 8) {
    if (product.next != nullptr) {
      ahead_ = product.next;
      lines_left_ = blocks_ * block_bytes_ / 64;
    }
    const int64_t steps = tiles_of(product.b.words) * ((groups_of_rows_ + 1) / 2) * ((blocks_ + 1) / 2);
    lines_ = (lines_left_ + steps - 1) / steps;
  }

  void run() {
    const QuantizedPanel& b = p_.b;
    tile_configure(shapes());
    for (int64_t block = 0, last = 0; last < b.groups; ++block) {
      last = at_most((block + 1) * b.block_groups, b.groups);
      for (int64_t g = block * b.block_groups; g < last; ++g) {
        const int64_t begin = g * b.group_words, end = at_most(begin + b.group_words, b.words);
        for (int64_t word = begin; word < end; word += kChunkWords) {
          const int64_t words = at_most(end - word, kChunkWords);
          const Weights8 weights = weights_of(word, words);
          for (int64_t m = 0; m < groups_of_rows_ * kTile; m += 2 * kTile) {
            int32_t* const sums = sums_.of[end - begin > kChunkWords ? m : 0];  // of one chunk: they stay in L1
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

  // sums of 32 rows from m on (+)= products over `words` words from `word` on
  void add_rows(int64_t m, const Weights8& weights, int64_t word, int64_t words, int32_t* sums, bool adds) {
    const bool two_rows = m + kTile < groups_of_rows_ * kTile;
    const int8_t* first;
    int64_t stride;
    const bool is_inside = 4 * word + tiles_of(words) * 64 <= p_.rows.stride;
    if (p_.indices == nullptr && m + 2 * kTile <= p_.num_rows && is_inside) {
      first = p_.rows.values + m * p_.rows.stride + 4 * word;
      stride = p_.rows.stride;
    } else {
      copy_rows(m, word, tiles_of(words) * 64);
      first = copies_[0];
      stride = kCopiedRow;
    }
    for (int64_t j = 0; j < blocks_; j += 2) {
      const bool two_columns = j + 1 < blocks_;
      const auto add = two_rows ? (two_columns ? &TileProduct::add_tiles<2, 2> : &TileProduct::add_tiles<2, 1>)
                                : (two_columns ? &TileProduct::add_tiles<1, 2> : &TileProduct::add_tiles<1, 1>);
      (this->*add)(first, stride, weights.tiles[j], weights.tiles[two_columns ? j + 1 : j], tiles_of(words),
                   sums + j * kTile, adds);
    }
  }

  template <int kRows, int kColumns>
  void add_tiles(const int8_t* a, int64_t stride, const uint8_t* b0, const uint8_t* b1, int64_t steps, int32_t* sums,
                 bool adds) {
    constexpr int64_t kStride = kQuantizedPanel * 4;
    int32_t* const below = sums + kTile * kQuantizedPanel;
    adds ? tile_load<0>(sums, kStride) : tile_zero<0>();
    if constexpr (kRows > 1) adds ? tile_load<1>(below, kStride) : tile_zero<1>();
    if constexpr (kColumns > 1) adds ? tile_load<2>(sums + kTile, kStride) : tile_zero<2>();
    if constexpr (kRows > 1 && kColumns > 1) adds ? tile_load<3>(below + kTile, kStride) : tile_zero<3>();
    for (int64_t s = 0; s < steps; ++s) {
      tile_load<4>(a + 64 * s, stride);
      if constexpr (kRows > 1) tile_load<5>(a + kTile * stride + 64 * s, stride);
      tile_load<6>(b0 + s * kTileBytes, 64);
      if constexpr (kColumns > 1) tile_load<7>(b1 + s * kTileBytes, 64);
      tile_multiply_bytes<0, 4, 6>();
      if constexpr (kRows > 1) tile_multiply_bytes<1, 5, 6>();
      if constexpr (kColumns > 1) tile_multiply_bytes<2, 4, 7>();
      if constexpr (kRows > 1 && kColumns > 1) tile_multiply_bytes<3, 5, 7>();
      ask();
    }
    tile_store<0>(sums, kStride);
    if constexpr (kRows > 1) tile_store<1>(below, kStride);
    if constexpr (kColumns > 1) tile_store<2>(sums + kTile, kStride);
    if constexpr (kRows > 1 && kColumns > 1) tile_store<3>(below + kTile, kStride);
  }

  void ask() {
    for (int64_t i = 0; i < lines_ && lines_left_ > 0; ++i, --lines_left_, ahead_ += 64)
      __builtin_prefetch(ahead_, 0, 2);
  }

  // 32 rows from m on, zeros behind the last.
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

  Weights8 weights_of(int64_t word, int64_t words) {
    Weights8 weights;
    for (int64_t j = 0; j < blocks_; ++j) {
      const uint8_t* const values = p_.b.values + j * block_bytes_ + word * kWordBytes * p_.b.bits / 8;
      weights.tiles[j] = values;
      if (p_.b.bits == 8 && words % kTile == 0) continue;
      uint8_t* const tiles = tiles_[j];
      if (p_.b.bits == 8) {
        __builtin_memcpy(tiles, values, static_cast<size_t>(words * kWordBytes));
      } else {
        const __m512i halves = _mm512_set1_epi8(0x0f);
        for (int64_t w = 0; w < words; w += 2) {  // the number of words is even
          const __m512i v = _mm512_loadu_si512(values + w / 2 * kWordBytes);
          _mm512_store_si512(tiles + w * kWordBytes, _mm512_and_si512(v, halves));
          _mm512_store_si512(tiles + (w + 1) * kWordBytes, _mm512_and_si512(_mm512_srli_epi16(v, 4), halves));
        }
      }
      const int64_t whole = tiles_of(words) * kTile;
      __builtin_memset(tiles + words * kWordBytes, 0, static_cast<size_t>((whole - words) * kWordBytes));
      weights.tiles[j] = tiles;
    }
    return weights;
  }

  // totals (+)= sums · scale, as end_group of kernels.inl.
  void end_group(int64_t g, int64_t first_row, const int32_t* sums, bool is_first) {
    const int64_t end_row = at_most(first_row + 2 * kTile, p_.num_rows);
    const QuantizedPanel& b = p_.b;
    const bool has_zeros = b.zeros != nullptr;
    const float unit = b.bits == 8 ? -1.0f : -1.0f / 16;
    for (int64_t j = 0; j < blocks_; ++j) {
      const int64_t at = (j * b.groups + g) * kBlockRows;
      const Floats scale = widen(b.scales + at);
      const Floats offset = has_zeros ? scale * widen(b.zeros + at) * broadcast(unit) : Floats{};
      for (int64_t m = first_row; m < end_row; ++m) {
        const int32_t correction = p_.rows.corrections[row(m) * b.groups + g];
        const Ints sum = load_ints(sums + (m - first_row) * kQuantizedPanel + j * kTile) +
                         broadcast_ints(has_zeros ? 0 : correction);
        float* const total = &totals_.of[m][j * kTile];
        Floats v = multiply_add(__builtin_convertvector(sum, Floats), scale, is_first ? Floats{} : load(total));
        if (has_zeros) v = multiply_add(broadcast(static_cast<float>(correction)), offset, v);
        store(total, v);
      }
    }
  }

  // c (+)= totals · scale of the activations, and c *= scales of the rows of weights after the last block.
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

  const QuantizedProduct& p_;
  const int64_t blocks_, groups_of_rows_, block_bytes_;
  const uint8_t* ahead_ = nullptr;
  int64_t lines_left_ = 0, lines_;
  Sums sums_;
  Totals totals_;
  alignas(64) int8_t copies_[2 * kTile][kCopiedRow];
  alignas(64) uint8_t tiles_[kPanelBlocks][kChunkSteps * kTileBytes];
};

void multiply(const QuantizedProduct& product) {
  if (product.num_rows <= kFewRows || product.b.group_words < kGroupWords) {
    return quantized_avx512vnni().multiply(product);
  }
  TileProduct(product).run();
}

double multiply_rate(int64_t iterations) {
  tile_configure(shapes());  // of zeros
  for (int64_t i = 0; i < iterations; ++i) {
    tile_multiply_bytes<0, 4, 6>(), tile_multiply_bytes<1, 5, 6>(), tile_multiply_bytes<2, 4, 7>(),
        tile_multiply_bytes<3, 5, 7>();
  }
  tile_release();
  return static_cast<double>(iterations) * 4 * 16 * 16 * 64 * 2;
}

}  // namespace

const QuantizedKernels& quantized_amx() {
  static const QuantizedKernels table = [] {
    QuantizedKernels own = quantized_avx512vnni();
    own.multiply = multiply;
    own.multiply_rate = multiply_rate;
    return own;
  }();
  return table;
}

}  // namespace switchgear::cpu
