// SPDX-License-Identifier: BSD-3-Clause
#include "stored.h"

#include <bit>

#include "stored_decode.cuh"
#include "stored_sm90.h"
#include "switchgear/check.h"
#include "switchgear/integers.h"

namespace switchgear::cuda {

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_between(const TensorView& tensor) { return tensor.stride[0] * size_of(tensor.dtype); }

// Indices of blocks and steps then stay far below 2^31.
constexpr int64_t kMostColumns = 1 << 20;

void check_aligned(const char* name, const TensorView& tensor) {
  SWITCHGEAR_CHECK(ValueError, reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0, name,
                   ": expected stored weights at multiples of 16 bytes on a CUDA device, got ", describe(tensor));
}

// Rows of one part as a matrix of its own.
StoredOperand part_of(const StoredOperand& w, int32_t part) {
  StoredOperand one = w;
  one.rows = w.part_rows;
  one.parts = 1;
  one.first_block = part * w.part_blocks;
  return one;
}

void stored_forward(const Gemm& g, const StoredOperand& w, void* stream) {
  const bool is_wide = g.dtype == DType::kFloat32;
  if (is_wide && !is_integer(w.format)) {
    return g.allow_tf32 ? decoded_gemm_tf32(g, w, false, stream) : decoded_gemm_f32(g, w, false, stream);
  }
  if (sm90_takes(g, w)) return stored_sm90(g, w, stream);
  if (!with_format<has_cuda_kernels>(w.format, [&]<Format kFormat>() { stored_gemm_of<kFormat>(g, w, stream); })) {
    throw std::logic_error("stored_gemm: no kernel for this format");
  }
}

}  // namespace

StoredOperand stored_operand(const char* name, const Weight& weight) {
  SWITCHGEAR_CHECK(ValueError, weight.cols <= kMostColumns && weight.rows <= kMostColumns, name, ": expected at most ",
                   kMostColumns, " rows and columns in ", name_of(weight.format), " on a CUDA device, got [",
                   weight.rows, ", ", weight.cols, ']');
  for (const TensorView* tensor : {&weight.data, &weight.scales, &weight.row_scales, &weight.zeros}) {
    if (tensor->defined()) check_aligned(name, *tensor);
  }
  const auto bytes = [](const TensorView& tensor) { return tensor.as<const std::byte>(); };
  StoredOperand w{.format = weight.format,
                  .bits = static_cast<int32_t>(bits_of(weight.format)),
                  .scale_bytes = static_cast<int32_t>(kMinifloatRows * size_of(format_row(weight.format).scales)),
                  .unit = is_integer(weight.format) ? 8 : kStepColumns,
                  .data = bytes(weight.data),
                  .scales = bytes(weight.scales),
                  .row_scales = bytes(weight.row_scales),
                  .zeros = bytes(weight.zeros),
                  .data_stride = bytes_between(weight.data),
                  .scales_stride = bytes_between(weight.scales),
                  .row_scales_stride = bytes_between(weight.row_scales),
                  .zeros_stride = bytes_between(weight.zeros),
                  .slots = weight.slots.as<const int32_t>(),
                  .records = weight.records.as<const int32_t>(),
                  .num_stored = static_cast<int32_t>(weight.num_stored()),
                  .data_bytes = weight.data.extent(),
                  .plane_bytes = weight.data.shape[1] * weight.data.shape[2] * weight.data.shape[3],
                  .rows = static_cast<int32_t>(weight.rows),
                  .cols = static_cast<int32_t>(weight.cols)};
  const int64_t part_rows = weight.rows / weight.parts;
  const bool one = part_rows % kStepRows == 0;  // all blocks are whole: parts follow each other as if they were one
  w.parts = one ? 1 : static_cast<int32_t>(weight.parts);
  w.part_rows = static_cast<int32_t>(one ? weight.rows : part_rows);
  w.part_blocks = static_cast<int32_t>(divide_up(w.part_rows, kStepRows));
  const int64_t size = weight.group_size > 0 ? weight.group_size : divide_up(weight.cols, kStepColumns) * kStepColumns;
  w.groups = static_cast<int32_t>(divide_up(weight.cols, size));
  w.group_size = static_cast<int32_t>(size);
  w.group_steps = static_cast<int32_t>(divide_up(size, kStepColumns));
  // ⌊step · m / 2^31⌋ = ⌊step / g⌋ for m = ⌊2^31 / g⌋ + 1 (or 2^31, for g = 1) and step · g < 2^31: both are at most
  // 2^15.
  constexpr uint32_t kOne = 1u << 31;
  if (w.groups > 1) w.group_magic = kOne / static_cast<uint32_t>(w.group_steps) + (w.group_steps > 1 ? 1 : 0);
  return w;
}

void stored_gemm(const Gemm& g, const StoredOperand& w, bool transposed, void* stream) {
  if (g.num_slots == 0) return;
  if (transposed) {
    switch (g.dtype) {
      case DType::kBFloat16: return decoded_gemm_bf16(g, w, true, stream);
      case DType::kFloat16: return decoded_gemm_f16(g, w, true, stream);
      default: return g.allow_tf32 ? decoded_gemm_tf32(g, w, true, stream) : decoded_gemm_f32(g, w, true, stream);
    }
  }
  if (w.parts == 1 || g.epilogue != Epilogue::kStore) return stored_forward(g, w, stream);
  // A tile is 16 rows of one part: one launch for each.
  for (int32_t part = 0; part < w.parts; ++part) {
    Gemm one = g;
    const int64_t first = static_cast<int64_t>(part) * w.part_rows * size_of(g.dtype);
    one.n = w.part_rows;
    one.out = static_cast<std::byte*>(g.out) + first;
    if (g.bias != nullptr) one.bias = static_cast<const std::byte*>(g.bias) + first;
    stored_forward(one, part_of(w, part), stream);
  }
}

void forward_gemm(Gemm& g, const char* name, const Weight& weight, const QuantizedRows& quantized, void* stream) {
  if (weight.format == Format::kPlain) return gemm(g, stream);
  StoredOperand w = stored_operand(name, weight);
  const Rows rows = g.a;
  if (quantized.defined()) {
    quantize_rows(rows, g.dtype, weight, quantized, stream);
    const int64_t block = weight.group_size > 0 ? std::max(weight.group_size, kActivationBlock) : int64_t{kStepColumns};
    w.x_scales = quantized.scales.as<const float>();
    w.x_blocks = static_cast<int32_t>(quantized.scales.shape[1]);
    w.x_shift = std::countr_zero(static_cast<uint64_t>(block / kStepColumns));
    g.a = {quantized.values.data, quantized.values.stride[0], rows.count, rows.indices};
  }
  stored_gemm(g, w, false, stream);
  g.a = rows;
}

void backward_gemm(const Gemm& g, const char* name, const Weight& weight, void* stream) {
  if (weight.format == Format::kPlain) return gemm(g, stream);
  stored_gemm(g, stored_operand(name, weight), true, stream);
}

}  // namespace switchgear::cuda
