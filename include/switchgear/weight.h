// SPDX-License-Identifier: BSD-3-Clause
// The weight of all experts of a projection: a matrix [rows, cols] each, in one of several formats (exceptions: see ops.h).
//
//   format   data                                   scales, row_scales, zeros                       header
//   plain    [E,rows,cols] float, any strides                                                       here
//   panels   bytes in the order of an ISA's kernels                                                 panels.h
//   compact  rows of bytes, lossless                                                                compact.h
//   int8     [E,parts·B,W,64] uint8                 int8 per group, float32 per row, uint8 zeros    integers.h
//   int4     the same, two per byte                 the same                                        integers.h
//   fp8      [E,parts·B,C,512] uint8                float32 per group                               minifloat.h
//   mxfp4    [E,parts·B,C,256] uint8                e8m0 per 32 columns                             minifloat.h
//   nf4      [E,parts·B,C,256] uint8                float32 per 64 columns                          minifloat.h
//   nvfp4    [E,parts·B,C,256] uint8                e4m3 per 16 columns, float32 per row            minifloat.h
//   groups   [P,parts·B,C,64] uint8                 float16 per group, uint8 zeros                  groups.h
//   q8_0, …  [E,parts,rows/parts,bytes] uint8       in the data                                     gguf.h
//
// Each tensor but the data of GGUF's formats is contiguous, or each tensor[i] is, any multiple of 64 bytes after tensor[i - 1]: so all tensors of an
// expert can be parts of one record. `plain` has any strides. All tensors are on one device; only the CPU reads slots and records
// on the host (slot_of), and only it takes slots of plain weights.
#pragma once
#include <cstdint>
#include <iterator>
#include <utility>

#include "switchgear/tensor.h"

namespace switchgear {

// kBits1 to kBits4 are formats of one expert's matrix in a weight whose format is kGroups.
enum class Format : uint8_t {
  kPlain,
  kPanels,
  kCompact,
  kInt8,
  kInt4,
  kFp8,
  kMxfp4,
  kNf4,
  kGroups,
  kNvfp4,
  kQ80,
  kQ40,
  kQ41,
  kQ50,
  kQ51,
  kIq4Nl,
  kMxfp4Gguf,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIq4Xs,
  kBits1,
  kBits2,
  kBits3,
  kBits4
};
inline constexpr Format kLastFormat = Format::kIq4Xs;  // of a weight

// How the products of a format multiply.
enum class Family : uint8_t {
  kExact,       // plain numbers, in an order or packing of their own
  kIntegers,    // integers, by activations rounded to int8
  kMinifloats,  // numbers of 8 or 4 bits, decoded to floating point
  kGroups,      // integers of 1 to 4 bits, decoded to floating point
  kGguf         // blocks of a row, with scales among the codes
};

// Whose kernels read a format: the CPU's alone, CUDA's too, Hopper's wgmma too. CMake reads this word of each row.
enum class Readers : uint8_t { kCpu, kCuda, kHopper };

struct FormatRow {
  const char* name;
  Family family;
  int64_t bits;     // of a code; in groups at most
  DType scales;     // of groups of columns
  int64_t group;    // columns that share a scale; 0: as the weight says
  bool row_scales;  // each row has one more scale, float32
  Readers readers;
};

// By Format.
inline constexpr FormatRow kFormats[] = {
    {"plain", Family::kExact, 8, DType::kFloat32, 0, false, Readers::kCpu},
    {"panels", Family::kExact, 8, DType::kFloat32, 0, false, Readers::kCpu},
    {"compact", Family::kExact, 8, DType::kFloat32, 0, false, Readers::kCpu},
    {"int8", Family::kIntegers, 8, DType::kInt8, 0, true, Readers::kHopper},
    {"int4", Family::kIntegers, 4, DType::kInt8, 0, true, Readers::kHopper},
    {"fp8", Family::kMinifloats, 8, DType::kFloat32, 0, false, Readers::kHopper},
    {"mxfp4", Family::kMinifloats, 4, DType::kUInt8, 32, false, Readers::kHopper},
    {"nf4", Family::kMinifloats, 4, DType::kFloat32, 64, false, Readers::kHopper},
    {"groups", Family::kGroups, 4, DType::kFloat16, 0, false, Readers::kHopper},
    {"nvfp4", Family::kMinifloats, 4, DType::kUInt8, 16, true, Readers::kCuda},
    {"q8_0", Family::kGguf, 8, DType::kFloat16, 32, false, Readers::kCpu},
    {"q4_0", Family::kGguf, 4, DType::kFloat16, 32, false, Readers::kCpu},
    {"q4_1", Family::kGguf, 4, DType::kFloat16, 32, false, Readers::kCpu},
    {"q5_0", Family::kGguf, 5, DType::kFloat16, 32, false, Readers::kCpu},
    {"q5_1", Family::kGguf, 5, DType::kFloat16, 32, false, Readers::kCpu},
    {"iq4_nl", Family::kGguf, 4, DType::kFloat16, 32, false, Readers::kCpu},
    {"mxfp4_gguf", Family::kGguf, 4, DType::kFloat16, 32, false, Readers::kCpu},
    {"q2_k", Family::kGguf, 2, DType::kFloat16, 256, false, Readers::kCpu},
    {"q3_k", Family::kGguf, 3, DType::kFloat16, 256, false, Readers::kCpu},
    {"q4_k", Family::kGguf, 4, DType::kFloat16, 256, false, Readers::kCpu},
    {"q5_k", Family::kGguf, 5, DType::kFloat16, 256, false, Readers::kCpu},
    {"q6_k", Family::kGguf, 6, DType::kFloat16, 256, false, Readers::kCpu},
    {"iq4_xs", Family::kGguf, 4, DType::kFloat16, 256, false, Readers::kCpu},
    {"bits1", Family::kGroups, 1, DType::kFloat16, 0, false, Readers::kCpu},
    {"bits2", Family::kGroups, 2, DType::kFloat16, 0, false, Readers::kCpu},
    {"bits3", Family::kGroups, 3, DType::kFloat16, 0, false, Readers::kCpu},
    {"bits4", Family::kGroups, 4, DType::kFloat16, 0, false, Readers::kCpu},
};

constexpr const FormatRow& format_row(Format format) { return kFormats[static_cast<size_t>(format)]; }
const char* name_of(Format format);  // "plain", "panels", …; "unknown" for other numbers

struct Weight {
  Format format = Format::kPlain;
  TensorView data;                     // with `base`: describes the matrices as [E,most rows,cols]; data unused
  TensorView scales;                   // all but the exact formats
  TensorView row_scales;               // int8, int4, nvfp4: [E,parts·B,16] float32
  TensorView zeros;                    // int8, int4, groups; optional
  TensorView records;                  // groups: [S,2] int32, where experts are in `data`
  int64_t rows = 0, cols = 0;          // of a matrix; plain weights have those of `data`
  int64_t parts = 1;                   // equal shares of the rows, stored separately: 2 if all gates precede all ups
  int64_t group_size = 0;              // columns that share a scale; 0: the whole row
  int64_t element_bytes = 0;           // compact: 2 or 4, in all rows. No row says so: slots may hold anything
  const void* const* base = nullptr;   // [E] plain matrices, each with its own base pointer and number of rows
  const int64_t* row_count = nullptr;  // [E], each <= data.shape[1]
  TensorView slots;                    // [E] int32, optional: the data of expert e is at slots[e] in [0, num_stored())

  int64_t num_stored() const { return records.defined() ? records.shape[0] : data.shape[0]; }
  int64_t num_experts() const { return slots.defined() ? slots.shape[0] : num_stored(); }
  int64_t num_rows() const { return format == Format::kPlain ? data.shape[1] : rows; }
  int64_t num_cols() const { return format == Format::kPlain ? data.shape[2] : cols; }
  int64_t slot_of(int64_t expert) const { return slots.defined() ? slots.as<const int32_t>()[expert] : expert; }
};

constexpr bool is_integer(Format format) { return format_row(format).family == Family::kIntegers; }
constexpr bool is_minifloat(Format format) { return format_row(format).family == Family::kMinifloats; }
// Formats that products decode to floating point, from blocks of 16 rows and steps of 32 columns.
constexpr bool is_decoded(Format format) {
  return is_minifloat(format) || format_row(format).family == Family::kGroups;
}
constexpr bool is_gguf(Format format) { return format_row(format).family == Family::kGguf; }
// Formats whose storage has `parts`; others are stored as if there were one.
constexpr bool has_parts(Format format) { return format_row(format).family != Family::kExact; }
constexpr Format format_of_bits(int64_t bits) {
  return static_cast<Format>(static_cast<int64_t>(Format::kBits1) + bits - 1);
}
constexpr bool has_bits(Format format) { return format >= Format::kBits1; }
constexpr bool has_cuda_kernels(Format format) { return format_row(format).readers >= Readers::kCuda; }
constexpr bool has_wgmma_kernels(Format format) { return format_row(format).readers == Readers::kHopper; }
constexpr int64_t bits_of(Format format) { return format_row(format).bits; }

// run.operator()<format>(), compiled for each format that kTakes. Others run nothing; returns whether there was one.
template <bool (*kTakes)(Format), typename Run>
constexpr bool with_format(Format format, Run&& run) {
  const auto try_one = [&]<size_t kNumber>() {
    constexpr Format kFormat = static_cast<Format>(kNumber);
    if constexpr (kTakes(kFormat)) {
      if (format == kFormat) return run.template operator()<kFormat>(), true;
    }
    return false;
  };
  return [&]<size_t... kNumbers>(std::index_sequence<kNumbers...>) {
    return (try_one.template operator()<kNumbers>() || ...);
  }(std::make_index_sequence<std::size(kFormats)>());
}

}  // namespace switchgear
