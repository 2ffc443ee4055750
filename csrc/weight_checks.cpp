// SPDX-License-Identifier: BSD-3-Clause
// What a Weight must be, by format: the storage that weight.h and the headers it names describe.
#include "checks.h"

#include "switchgear/check.h"
#include "switchgear/compact.h"
#include "switchgear/gguf.h"
#include "switchgear/groups.h"
#include "switchgear/panels.h"

namespace switchgear {

const char* name_of(Format format) {
  return static_cast<size_t>(format) < std::size(kFormats) ? format_row(format).name : "unknown";
}

namespace {

using enum Kind;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows and columns, which the shape of `data` does not show.
void check_sizes(const char* name, const Weight& w, Dim& N, Dim& C) {
  const auto fits = [](const Dim& dim, int64_t size) {
    return size >= dim.minimum && (dim.size == Dim::kUnknown || dim.size == size);
  };
  const auto text = [](const Dim& dim) { return dim.size == Dim::kUnknown ? std::string(dim.name) : join(dim.size); };
  SWITCHGEAR_CHECK(ValueError, fits(N, w.rows) && fits(C, w.cols), name, ": expected matrices [", text(N), ", ",
                   text(C), "], got [", w.rows, ", ", w.cols, "] in ", name_of(w.format));
  N.size = w.rows;
  C.size = w.cols;
}

void panels_input(Call& call, const char* name, const Weight& w, Dim& experts) {
  const auto [rows, vector_bytes] = call.backend().panel_layout(call.float_dtype());
  SWITCHGEAR_CHECK(ValueError, w.cols % kPanelColumns == 0 && w.rows % rows == 0, name,
                   ": expected panels of multiples of ", rows, " rows and ", kPanelColumns, " columns, got [", w.rows,
                   ", ", w.cols, ']');
  Dim count{"panels", 1, w.rows / rows};
  Dim vectors{"vectors", 1, rows * w.cols * size_of(call.float_dtype()) / vector_bytes},
      bytes{"bytes", 1, vector_bytes};
  call.input(name, w.data, kUInt8, {&experts, &count, &vectors, &bytes}, Layout::kExperts);
  check_pointer(name, w.data.data, call.float_dtype());
}

void compact_input(Call& call, const char* name, const Weight& w, Dim& experts) {
  const DType dtype = call.float_dtype();
  Dim rows{"N", 1, w.rows}, bytes{"bytes"};
  call.input(name, w.data, kUInt8, {&experts, &rows, &bytes}, Layout::kExperts);
  SWITCHGEAR_CHECK(TypeError, dtype == DType::kBFloat16 || dtype == DType::kFloat32, name, ": expected ",
                   name_of(dtype), " like ", call.float_name(), ", got compact weights: ", describe(w.data));
  SWITCHGEAR_CHECK(ValueError, w.cols <= kMaxCompactColumns, name, ": expected at most ", kMaxCompactColumns,
                   " columns of compact weights, got ", w.cols);
  const int64_t element = w.element_bytes;
  SWITCHGEAR_CHECK(TypeError, element == 2 || element == size_of(dtype), name, ": expected compact ", name_of(dtype),
                   " like ", call.float_name(), ", got compact elements of ", element, " bytes: ", describe(w.data));
  const int64_t records = compact_records_bytes(w.cols, element == 4 ? DType::kFloat32 : DType::kBFloat16);
  SWITCHGEAR_CHECK(ValueError, bytes.size % kCompactHeader == 0 && bytes.size >= records + kCompactHeader, name,
                   ": expected compact rows of ", records, " bytes for ", w.cols, " columns and a multiple of ",
                   kCompactHeader, " for a header, got ", describe(w.data));
}

void check_parts(const char* name, const Weight& w) {
  SWITCHGEAR_CHECK(ValueError, w.parts >= 1 && w.rows % w.parts == 0, name, ": expected parts that divide N=", w.rows,
                   ", got ", w.parts);
}

// The number of blocks of 16 rows.
Dim blocks_of(const char* name, const Weight& w) {
  check_parts(name, w);
  return {"blocks", 1, w.parts * divide_up(w.rows / w.parts, 16)};
}

Dim groups_of(const Weight& w) { return {"groups", 1, w.group_size == 0 ? 1 : divide_up(w.cols, w.group_size)}; }

Kind kind_of_scales(Format format) {
  switch (format_row(format).scales) {
    case DType::kInt8: return kInt8;
    case DType::kUInt8: return kUInt8;
    case DType::kFloat16: return kFloat16;
    default: return kFloat32;
  }
}

void integers_input(Call& call, const WeightNames& names, const Weight& w, Dim& experts) {
  const bool is_power = w.group_size >= 16 && (w.group_size & (w.group_size - 1)) == 0;
  SWITCHGEAR_CHECK(ValueError, w.group_size == 0 || is_power, names.data,
                   ": expected a group_size of 0 (the whole row) or a power of two from 16 on, got ", w.group_size);
  constexpr int64_t kMaxColumns = int64_t{1} << 16;  // sums of this many products of a byte with at most 127 fit int32
  SWITCHGEAR_CHECK(ValueError, w.cols <= kMaxColumns, names.data, ": expected at most ", kMaxColumns, " columns, got ",
                   w.cols);
  Dim blocks = blocks_of(names.data, w), groups = groups_of(w);
  Dim words{"words", 1, divide_up(w.cols, 8) * bits_of(w.format) / 4}, word_bytes{"64", 1, 64}, block_rows{"16", 1, 16};
  call.input(names.data, w.data, kUInt8, {&experts, &blocks, &words, &word_bytes}, Layout::kExperts);
  call.input(names.scales, w.scales, kind_of_scales(w.format), {&experts, &blocks, &groups, &block_rows},
             Layout::kExperts);
  call.input(names.row_scales, w.row_scales, kFloat32, {&experts, &blocks, &block_rows}, Layout::kExperts);
  if (w.zeros.defined())
    call.input(names.zeros, w.zeros, kUInt8, {&experts, &blocks, &groups, &block_rows}, Layout::kExperts);
}

void minifloat_input(Call& call, const WeightNames& names, const Weight& w, Dim& experts) {
  const int64_t group = minifloat_group(w.format);
  SWITCHGEAR_CHECK(ValueError,
                   group == 0 ? w.group_size >= 0 && w.group_size % kMinifloatColumns == 0 : w.group_size == group,
                   names.data, ": expected a group_size of ",
                   group == 0 ? "0 (the whole row) or a multiple of 32" : join(group), ", got ", w.group_size);
  Dim blocks = blocks_of(names.data, w), groups = groups_of(w), steps{"steps", 1, divide_up(w.cols, kMinifloatColumns)};
  Dim step_bytes{"bytes", 1, minifloat_step_bytes(w.format)}, block_rows{"16", 1, kMinifloatRows};
  call.input(names.data, w.data, kUInt8, {&experts, &blocks, &steps, &step_bytes}, Layout::kExperts);
  call.input(names.scales, w.scales, kind_of_scales(w.format), {&experts, &blocks, &groups, &block_rows},
             Layout::kExperts);
  if (format_row(w.format).row_scales)
    call.input(names.row_scales, w.row_scales, kFloat32, {&experts, &blocks, &block_rows}, Layout::kExperts);
}

void groups_input(Call& call, const WeightNames& names, const Weight& w, Dim& experts) {
  SWITCHGEAR_CHECK(ValueError, w.group_size >= 0 && w.group_size % kMinifloatColumns == 0, names.data,
                   ": expected a group_size of 0 (the whole row) or a multiple of 32, got ", w.group_size);
  Dim planes{"planes"}, blocks = blocks_of(names.data, w), groups = groups_of(w);
  Dim steps{"steps", 1, divide_up(w.cols, kMinifloatColumns)}, bytes{"64", 1, kPlaneBytes};
  Dim block_rows{"16", 1, kMinifloatRows}, two{"2", 1, 2};
  call.input(names.data, w.data, kUInt8, {&planes, &blocks, &steps, &bytes}, Layout::kExperts);
  SWITCHGEAR_CHECK(ValueError, w.records.defined(), names.records, ": expected a tensor, got none");
  call.input(names.records, w.records, kInt32, {&experts, &two});
  call.input(names.scales, w.scales, kind_of_scales(w.format), {&experts, &blocks, &groups, &block_rows},
             Layout::kExperts);
  if (w.zeros.defined())
    call.input(names.zeros, w.zeros, kUInt8, {&experts, &blocks, &groups, &block_rows}, Layout::kExperts);
}

void gguf_input(Call& call, const WeightNames& names, const Weight& w, Dim& experts) {
  const auto [columns, bytes] = gguf_type(w.format);
  SWITCHGEAR_CHECK(ValueError, w.cols % columns == 0, names.data, ": expected a multiple of ", columns, " columns of ",
                   name_of(w.format), ", got ", w.cols);
  constexpr int64_t kMaxColumns = int64_t{1} << 20;  // a row taken apart fits in a thread's memory
  SWITCHGEAR_CHECK(ValueError, w.cols <= kMaxColumns, names.data, ": expected at most ", kMaxColumns, " columns, got ",
                   w.cols);
  check_parts(names.data, w);
  Dim parts{"parts", 1, w.parts}, rows{"rows", 1, w.rows / w.parts}, row_bytes{"bytes", 1, w.cols / columns * bytes};
  call.input(names.data, w.data, kUInt8, {&experts, &parts, &rows, &row_bytes}, Layout::kParts);
}

// E is the size of `slots` if defined; `experts` is that of the data.
void slots_input(Call& call, const char* name, const Weight& w, Dim& E) {
  SWITCHGEAR_CHECK(ValueError, w.base == nullptr, name, ": expected none beside matrices of their own");
  SWITCHGEAR_CHECK(ValueError, call.backend().device == DeviceType::kCPU || w.format != Format::kPlain, name,
                   ": expected none beside plain weights on this device, got ", describe(w.slots));
  call.input(name, w.slots, kInt32, {&E});
}

}  // namespace

void weight_input(Call& call, const WeightNames& names, const Weight& w, Dim& E, Dim& N, Dim& C) {
  Dim stored{"slots"};
  if (w.slots.defined()) slots_input(call, names.slots, w, E);
  Dim& experts = w.slots.defined() ? stored : E;
  if (w.format == Format::kPlain) {
    call.input(names.data, w, {&experts, &N, &C});
  } else {
    SWITCHGEAR_CHECK(ValueError, w.format <= kLastFormat && call.backend().takes(w.format), names.data,
                     ": expected plain weights on this device, got ", name_of(w.format), ": ", describe(w.data));
    check_sizes(names.data, w, N, C);
    switch (format_row(w.format).family) {
      case Family::kExact:
        w.format == Format::kPanels ? panels_input(call, names.data, w, experts)
                                    : compact_input(call, names.data, w, experts);
        break;
      case Family::kIntegers: integers_input(call, names, w, experts); break;
      case Family::kMinifloats: minifloat_input(call, names, w, experts); break;
      case Family::kGroups: groups_input(call, names, w, experts); break;
      case Family::kGguf: gguf_input(call, names, w, experts);
    }
  }
}

namespace {

// Each record is a range of 1 to 4 planes in the memory of `data`.
void check_records(const char* name, const Weight& w) {
  if (!readable(w.records)) return;
  const auto* records = w.records.as<const int32_t>();
  const int64_t planes = w.data.shape[0], plane_bytes = w.data.shape[1] * w.data.shape[2] * w.data.shape[3];
  const int64_t extent = w.data.extent();
  for (int64_t i = 0; i < w.records.shape[0]; ++i) {
    const int64_t first = records[2 * i], bits = records[2 * i + 1];
    SWITCHGEAR_CHECK(ValueError, bits >= 1 && bits <= kMostBits, name, ": expected 1 to ", kMostBits, " bits, got ",
                     bits, " at [", i, ']');
    const bool is_inside = first >= 0 && first < planes && first * w.data.stride[0] + bits * plane_bytes <= extent;
    SWITCHGEAR_CHECK(ValueError, is_inside, name, ": expected ", bits, " of ", planes, " planes, got those from ",
                     first, " on at [", i, ']');
  }
}

}  // namespace

void check_slots(Call& call, const WeightNames& names, Weight& w) {
  if (w.format == Format::kGroups) {
    call.own(w.records);
    check_records(names.records, w);
  }
  if (!w.slots.defined()) return;
  call.own(w.slots);
  check_range(names.slots, w.slots, 0, w.num_stored());
}

}  // namespace switchgear
