// SPDX-License-Identifier: BSD-3-Clause
// dot_products with plain B and sorted rows of A, as for panels: each chunk of B is packed as part of a panel. Included by
// kernels.inl after panel_products.inl.
//
//   work 2·M·N·K flop; traffic: B once, a packed chunk (64 KB for 16 columns) to L2 and back, A once per panel, from L2 or L3
//   Packing takes a tenth of the time of 64 rows. It pays for narrow vectors: in place, a tile of 6 rows and 2 columns takes
//   8 KB of B from L2 for 768 cycles of multiply-adds, a packed one 1 KB of A; and rows of A are widened to float32 once per
//   layer instead of once per panel. Zen 3, one core, depth 2048, weights from L2, percent of the multiply-adds with 24, 60
//   and 240 rows: float32 72, 81, 86 (in place 67, 69, 69), bfloat16 73, 83, 87 (in place 58, 62, 61). A layer with 16-bit
//   weights gains from 7 rows on, where in place a second tile reads and widens them again; one with float32 from 20 on.
//
// Sums are those of panels, so the bits are those of dot_products in place. A tile prefetches one row of the next chunk.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int64_t kGap = kLine / 4;  // words: stores to all parts at the same step do not share a set of L1
constexpr int64_t kWaitingBytes = 4 * kSumLevels * kMaxRows * kPanel;
static_assert(kWaitingBytes + 4 * (kChunkWords * kPanel + kParts * kGap) <= kProductScratch);

// Where position p of a step begins in a packed chunk.
inline int64_t packed_word(int p, int64_t group, int64_t step, int64_t steps) {
  const int64_t part = p / kClasses * kGroups + group;
  return ((part * steps + step) * kClasses + p % kClasses) * kWide * kLanes + part * kGap;
}

// Rows of B run along k. Missing columns become zeros. Steps of a cache line of B are packed together.
template <typename Words>
void pack_parts_along_k(float* out, const Element<Words>* b, int64_t stride, int64_t num_columns, int64_t steps) {
  constexpr int64_t kTogether = kLine / (kLanes * sizeof(Element<Words>));
  for (int64_t first = 0; first < steps; first += kTogether) {
    for (int64_t n = 0; n < kPanel; n += kLanes) {
      const int64_t valid = num_columns - n, group = n / (kWide * kLanes);
      float* const target = out + n % (kWide * kLanes);
      for (int64_t step = first; step < first + kTogether && step < steps; ++step) {
        Floats block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          block[i] = i < valid ? Words::load_whole(b + (n + i) * stride + step * kLanes) : broadcast(0.0f);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int p = 0; p < kLanes; ++p) store(target + packed_word(p, group, step, steps), block[kSumOrder[p]]);
      }
    }
  }
}

// The same for B that runs along n.
template <typename Words>
void pack_parts_along_n(float* out, const Element<Words>* b, int64_t stride, int64_t num_columns, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int p = 0; p < kLanes; ++p) {
      const auto* const row = b + (step * kLanes + kSumOrder[p]) * stride;
      for (int64_t n = 0; n < kPanel; n += kLanes) {
        const int64_t rest = num_columns - n, valid = rest < kLanes ? rest : kLanes, group = n / (kWide * kLanes);
        store(out + n % (kWide * kLanes) + packed_word(p, group, step, steps),
              valid > 0 ? Words::load_along_k(row + n, valid) : broadcast(0.0f));
      }
    }
  }
}

template <typename Words>
void packed_products_of(const Product& product) {
  using T = Element<Words>;
  const Matrix& b = product.b;
  const int64_t num_columns = product.num_columns, depth = product.depth;
  float* const packed = static_cast<float*>(product.scratch) + kWaitingBytes / 4;
  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(product.num_rows));
  for (int64_t k = 0; k < depth; k += kChunkWords) {
    const int64_t count = depth - k < kChunkWords ? depth - k : kChunkWords, steps = count / kLanes;
    const T* const data = static_cast<const T*>(b.data) + k * b.k_stride;
    const T* next = nullptr;  // rows of the next chunk: a tile prefetches one of them
    if (b.k_stride == 1) {
      pack_parts_along_k<Words>(packed, data, b.n_stride, num_columns, steps);
      next = k + count < depth ? data + count : static_cast<const T*>(product.next.data);
    } else {
      pack_parts_along_n<Words>(packed, data, b.k_stride, num_columns, steps);
    }
    int64_t prefetched = 0;
    for_near_parts<typename Words::Packed>(steps, [&](int first, int last) {
      const float* const from = packed + first * (steps * kPanel + kGap);
      const PartsOfB<float> parts{.data = from, .steps = steps, .first = first, .end = last, .gap = kGap};
      const int64_t due = next != nullptr ? num_columns * last / kParts : 0;
      const int64_t stride = count * static_cast<int64_t>(sizeof(T)) / (steps * (last - first));
      add_parts_of_rows<typename Words::Packed>(product, k, parts, [&](int64_t) {
        if (prefetched >= due) return LinesAhead{0, reinterpret_cast<const char*>(from), 0};
        return LinesAhead{1, reinterpret_cast<const char*>(next + prefetched++ * b.n_stride), stride};
      });
    });
  }
  for (int64_t m = 0; m < product.num_rows && num_columns < kPanel; ++m) {  // not 0 yet if a row is not finite
    __builtin_memset(product.c + m * kPanel + num_columns, 0, static_cast<size_t>(kPanel - num_columns) * 4);
  }
}

}  // namespace
}  // namespace switchgear::cpu
