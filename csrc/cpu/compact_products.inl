// SPDX-License-Identifier: BSD-3-Clause
// dot_products with compact B (compact.h): weights are unpacked between memory and multiplication. Included by kernels.inl
// after dot_products.inl.
//
//   work 2·M·N·K flop; traffic 1.5 bytes per bfloat16 instead of 2, 3.5 per float32 instead of 4, and 64 per row
//   Few rows: a step takes a record of 128 weights. With AVX-512 it goes from memory into registers and is multiplied there:
//   22 operations per record of bfloat16 beside the products, 38 of float32, so memory binds. It is 1.2× faster than a plain
//   read of the bfloat16 with one or two rows of A, 1.05× with 6. A second tile of rows finds the row of B in L1.
//   More rows: a chunk of B is unpacked into the scratch, as a transposed one would be, and multiplied from there.
//
// Weights have their exact bits and sums have the order of dot_products, so results have the bits of plain weights (except
// which NaN a NaN is).
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int64_t kCompactRows = 10;        // up to here unpacking B for each tile is faster than through the scratch
constexpr int64_t kCompactFitting = 16384;  // bytes of rows of A up to which one column at a time is best

// The positions of the next exceptions in kColumns rows.
template <int kColumns>
class NextExceptions {
 public:
  NextExceptions(const CompactRow& b, int64_t stride) {
    for (int j = 0; j < kColumns; ++j) rows_[j] = CompactExceptions({b.data + j * stride, b.header});
    find();
  }
  int64_t record() const { return record_; }
  template <typename Record>
  void apply(Record (&records)[kColumns]) {
    for (int j = 0; j < kColumns; ++j) {
      rows_[j].apply(record_, [&](int64_t i, uint16_t bits) { records[j].set(i, bits); });
    }
    find();
  }

 private:
  void find() {
    record_ = CompactExceptions::kNone;
    for (const auto& row : rows_) record_ = row.record() < record_ ? row.record() : record_;
  }

  int64_t record_;
  CompactExceptions rows_[kColumns];
};

// acc[i][j] += the products of `parts` vectors of words[i] and records[j].
template <typename Record, int kRows, int kColumns>
inline void add_record(Floats (&acc)[kRows][kColumns], const float* const (&words)[kRows],
                       const Record (&records)[kColumns], int parts) {
  const auto add_part = [&](int part) {
    Floats column[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) column[j] = records[j].words(part);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Floats row = load(words[i] + part * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) acc[i][j] = step<Record::Words::kDepth == 2>(row, column[j], acc[i][j]);
    }
  };
  if constexpr (kRecordsInRegisters) {
#pragma GCC unroll 32
    for (int part = 0; part < Record::kParts; ++part) {
      if (part == parts) break;
      add_part(part);
    }
  } else {
    for (int part = 0; part < parts; ++part) add_part(part);
  }
}

// kRows rows and kColumns columns of C += the products with rows of B, `stride` bytes apart. Prefetches kColumns rows from
// `ahead` on, as add_dot_tile does; with kSomeLines one line in kSparseBytes.
template <typename Record, int kRows, int kColumns, Prefetch kPrefetch>
void add_compact_tile(float* c, const Rows& a, const CompactRow& b, int64_t stride, int64_t depth, const char* ahead) {
  constexpr int64_t kAheadBytes = kColumns * Record::kBytes,
                    kAheadStep = kPrefetch == Prefetch::kSomeLines ? kSparseBytes : kLine;
  constexpr int64_t kDepth = Record::Words::kDepth, kRecordWords = kCompactRecord / kDepth;
  const int64_t whole = depth / kCompactRecord, rest = depth % kCompactRecord;
  const Exponents exponents(b.exponents());
  NextExceptions<kColumns> exceptions(b, stride);
  const float* words[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    words[i] = reinterpret_cast<const float*>(static_cast<const char*>(a.rows[i]) + a.offset);
  }
  Floats acc[kRows][kColumns];
  const uint8_t* next = b.records();
  const auto unpack = [&](Record(&records)[kColumns], int64_t r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) records[j].unpack(next + j * stride, exponents);
    if (r == exceptions.record()) exceptions.apply(records);
    next += Record::kBytes;
  };

  for (int64_t i = 0; i < kColumns * b.header; i += kLine) __builtin_prefetch(ahead + i, 0, 2);
  ahead += kColumns * b.header;
  for (int64_t r = 0; r < whole || (r == whole && rest > 0);) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) acc[i][j] = broadcast(0.0f);
    }
    const int64_t chunk_end = r + kChunkWords / kRecordWords;
    for (; r < whole && r < chunk_end; ++r) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kAheadBytes; i += kAheadStep) __builtin_prefetch(ahead + i, 0, 2);
      ahead += kAheadBytes;
      Record records[kColumns];
      unpack(records, r);
      add_record(acc, words, records, Record::kParts);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) words[i] += kRecordWords;
    }
    if (r == whole && rest > 0 && r < chunk_end) {  // past its end a row has finite numbers, times zeros of A
      Record records[kColumns];
      unpack(records, r++);
      float padded[kRows][kRecordWords] = {};
      for (int i = 0; i < kRows; ++i) {
        __builtin_memcpy(padded[i], words[i], static_cast<size_t>(rest * 4 / kDepth));
        words[i] = padded[i];
      }
      const int64_t step_depth = kCompactRecord / Record::kParts;
      add_record(acc, words, records, static_cast<int>((rest + step_depth - 1) / step_depth));
    }
    add_lanes(c, acc);
  }
}

// All columns of a few tiles of rows. The first tile brings a row of B into L1 for the others.
template <typename Record, int kFew, Prefetch kPrefetch>
void add_compact_columns(const Product& product, const Rows& a, const CompactRow& b) {
  const int64_t stride = product.b.n_stride;
  const RowsOfB rows(b.data, stride, product.num_columns, stride, lead_of(kPrefetch), product.next.data);
  constexpr int kMost = kPrefetch == Prefetch::kSomeLines ? 2 : kTileRows;  // rows of a tile: see choose_walk
  const int64_t tiles = num_row_tiles(product.num_rows);
  for_columns<kFew>(rows, [&]<int kColumns>(int64_t n) {
    const CompactRow row{b.data + n * rows.stride, b.header};
    for (int64_t t = 0, m = 0, count; t < tiles; ++t, m += count) {
      count = (product.num_rows - m) / (tiles - t);
      const char* const ahead = t == 0 ? rows.ahead_of(n) : rows.row(n);
      with_constant<kMost>(count, [&]<int kRows>() {
        add_compact_tile<Record, kRows, kColumns, kPrefetch>(product.c + m * kPanel + n, {a.rows + m, a.offset}, row,
                                                             rows.stride, product.depth, ahead);
      });
    }
  });
}

// Unpacks the words of B's rows for k in [k_begin, k_begin + depth) into the scratch, kScratchRow words apart (see pack_rows).
template <typename Record>
void unpack_rows(const Product& product, int64_t k_begin, int64_t depth) {
  const Matrix& b = product.b;
  const int64_t first = k_begin / kCompactRecord, header = compact_header(b.n_stride, product.depth, Record::kDType);
  float* out = static_cast<float*>(product.scratch);
  for (int64_t n = 0; n < product.num_columns; ++n, out += kScratchRow) {
    const CompactRow row{static_cast<const uint8_t*>(b.data) + n * b.n_stride, header};
    const Exponents exponents(row.exponents());
    CompactExceptions exceptions(row);
    exceptions.skip_to(first);
    for (int64_t k = 0, r = first; k < depth; k += kCompactRecord, ++r) {
      Record record;
      record.unpack(row.records() + r * Record::kBytes, exponents);
      exceptions.apply(r, [&](int64_t i, uint16_t bits) { record.set(i, bits); });
#pragma GCC unroll 32
      for (int part = 0; part < Record::kParts; ++part) {
        store(out + k / Record::Words::kDepth + part * kLanes, record.words(part));
      }
    }
  }
}

template <typename Record>
void compact_products_of(const Product& product) {
  using Words = typename Record::Words;
  using Packed = typename Words::Packed;
  constexpr bool kPairs = Words::kDepth == 2;
  constexpr int64_t kChunk = kChunkWords * Words::kDepth;
  static_assert(kChunk % kCompactRecord == 0);
  const int64_t depth = product.depth, num_columns = product.num_columns;
  const CompactRow b{static_cast<const uint8_t*>(product.b.data),
                     compact_header(product.b.n_stride, depth, Record::kDType)};
  const void* widened_rows[kMaxRows];

  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(product.num_rows));
  if (product.num_rows <= kCompactRows) {
    const Rows rows = rows_from(product, product.b.dtype, kPairs, 0, depth, widened_rows);
    choose_walk<Words>(product.num_rows, depth * 4 / Words::kDepth, product.b.n_stride, kCompactFitting,
                       [&]<int kColumns, Prefetch kPrefetch>() {
                         add_compact_columns<Record, kColumns, kPrefetch>(product, rows, b);
                       });
    return;
  }
  const auto* const unpacked = static_cast<const Element<Packed>*>(product.scratch);
  const auto* const next_product = static_cast<const uint8_t*>(product.next.data);
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t count = depth - k < kChunk ? depth - k : kChunk;
    const Rows rows = rows_from(product, product.b.dtype, kPairs, k, count, widened_rows);
    unpack_rows<Record>(product, k, count);
    const uint8_t* const next =
        k + kChunk < depth ? b.records() + (k + kChunk) / kCompactRecord * Record::kBytes : next_product;
    add_dot_chunk<Packed>(product, rows, {unpacked, kScratchRow * Words::kDepth, num_columns, count}, next,
                          product.b.n_stride);
  }
}

// Calls function.operator()<Record>() for what the rows of compact `b` hold.
template <typename Function>
void with_record(const Matrix& b, Function&& function) {
  if (b.compact_bytes == 4) return function.template operator()<UnpackedFloat>();
  if (b.dtype == DType::kFloat32) return function.template operator()<WidenedBFloat16>();
  function.template operator()<UnpackedBFloat16>();
}

void compact_products(const Product& product) {
  with_record(product.b, [&]<typename Record>() { compact_products_of<Record>(product); });
}

// out[n·stride + c] = b(n, first + c) in the dtype of b, for n < num_rows and c < count.
template <typename Record>
void expand_records(void* out, int64_t stride, const Matrix& b, int64_t depth, int64_t num_rows, int64_t first,
                    int64_t count) {
  constexpr int64_t kDepth = Record::Words::kDepth;
  const int64_t header = compact_header(b.n_stride, depth, Record::kDType), element = size_of(b.dtype);
  for (int64_t n = 0; n < num_rows; ++n) {
    const CompactRow row{static_cast<const uint8_t*>(b.data) + n * b.n_stride, header};
    const Exponents exponents(row.exponents());
    CompactExceptions exceptions(row);
    for (int64_t c = 0, length; c < count; c += length) {
      const int64_t r = (first + c) / kCompactRecord, begin = (first + c) % kCompactRecord;
      length = kCompactRecord - begin < count - c ? kCompactRecord - begin : count - c;
      Record record;
      record.unpack(row.records() + r * Record::kBytes, exponents);
      exceptions.skip_to(r);
      exceptions.apply(r, [&](int64_t i, uint16_t bits) { record.set(i, bits); });
      float words[kCompactRecord / kDepth];
#pragma GCC unroll 32
      for (int part = 0; part < Record::kParts; ++part) store(words + part * kLanes, record.words(part));
      char* const target = static_cast<char*>(out) + (n * stride + c) * element;
      if constexpr (kDepth == 2) {
        __builtin_memcpy(target, reinterpret_cast<const char*>(words) + begin * 2, static_cast<size_t>(length * 2));
      } else if (b.dtype == DType::kFloat32) {
        __builtin_memcpy(target, words + begin, static_cast<size_t>(length * 4));
      } else {  // widened bfloat16: its bits are the upper half of a word
        uint32_t bits[kCompactRecord];
        __builtin_memcpy(bits, words, sizeof words);
        for (int64_t i = 0; i < length; ++i) {
          const auto half = static_cast<uint16_t>(bits[begin + i] >> 16);
          __builtin_memcpy(target + 2 * i, &half, 2);
        }
      }
    }
  }
}

void expand_compact_rows(void* out, int64_t stride, const Matrix& b, int64_t depth, int64_t num_rows, int64_t first,
                         int64_t count) {
  with_record(b, [&]<typename Record>() { expand_records<Record>(out, stride, b, depth, num_rows, first, count); });
}

void unpack_chunk(const Product& product, int64_t k_begin, int64_t depth) {
  with_record(product.b, [&]<typename Record>() { unpack_rows<Record>(product, k_begin, depth); });
}

}  // namespace
}  // namespace switchgear::cpu
