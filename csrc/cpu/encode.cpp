// SPDX-License-Identifier: BSD-3-Clause
// encode_weight. A task is a row of GGUF's blocks, and 16 rows of other formats. The rows that share a scale of fp8 are one
// task, which reads them twice. nvfp4 reads everything first, since its parts have one scale.
#include "switchgear/encode.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "encoders.h"
#include "experts.h"
#include "switchgear/gguf.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear {
namespace {

constexpr float kSmallestScale = 0x1p-126f;  // of fp8 and nvfp4
constexpr int64_t kRows = cpu::kEncodedRows;

class Encoding {
 public:
  Encoding(const TensorView& numbers, const Weight& weight, int64_t scale_rows, Execution exec)
      : numbers_(numbers),
        w_(weight),
        kernels_(cpu::encode_kernels()),
        scale_rows_(scale_rows),
        num_threads_(cpu::resolve_threads(exec.num_threads)) {}

  Encoded run() {
    if (is_gguf(w_.format)) {
      encode_blocks();
    } else {
      encode_rows();
    }
    return {.is_finite = is_finite_, .is_exact = is_finite_ && is_exact_};
  }

 private:
  const char* row(int64_t n, int64_t column = 0) const {
    return numbers_.as<const char>() + (n * numbers_.stride[0] + column) * size_of(numbers_.dtype);
  }

  void encode_blocks() {
    is_exact_ = false;
    const int64_t rows = w_.rows / w_.parts;
    cpu::parallel_for_shares(num_threads_, w_.rows, [&](int64_t n, int) {
      uint8_t* const out = w_.data.as<uint8_t>() + n / rows * w_.data.stride[1] + n % rows * w_.data.stride[2];
      if (!kernels_.encode_blocks(w_.format, numbers_.dtype, row(n), w_.cols, out)) is_finite_ = false;
    });
  }

  void encode_rows() {
    is_exact_ = is_minifloat(w_.format);
    if (format_row(w_.format).row_scales && !is_integer(w_.format)) scale_parts();
    const int64_t groups = cpu::ceil_div(w_.cols, size_);
    const int64_t scratch_bytes = cpu::Workspace::padded(cpu::scratch_floats(w_.cols, size_) * 4);
    cpu::Workspace workspace(num_threads_ * scratch_bytes);
    char* const scratch = static_cast<char*>(workspace.take_bytes(num_threads_ * scratch_bytes));
    const int64_t task_rows = std::max(kRows, scale_rows_), tasks = cpu::ceil_div(rows_, task_rows);
    cpu::parallel_for_shares(num_threads_, w_.parts * tasks, [&](int64_t task, int thread) {
      const int64_t part = task / tasks, first = task % tasks * task_rows, last = std::min(first + task_rows, rows_);
      if (w_.format == Format::kFp8) scale_rows(part, first, last);
      for (int64_t n = first; n < last; n += kRows) {
        const int64_t block = part * blocks_ + n / kRows, at = block * groups * kRows;
        const cpu::RowsToEncode rows{
            .format = has_planes() ? format_of_bits(bits_) : w_.format,
            .dtype = numbers_.dtype,
            .numbers = row(part * rows_ + n),
            .stride = numbers_.stride[0],
            .rows = std::min(kRows, last - n),
            .columns = w_.cols,
            .group_size = size_,
            .data = data_ + block * block_bytes(),
            .scales = w_.scales.as<char>() + at * size_of(w_.scales.dtype),
            .row_scales = w_.row_scales.defined() ? w_.row_scales.as<float>() + block * kRows : nullptr,
            .zeros = w_.zeros.defined() ? w_.zeros.as<uint8_t>() + at : nullptr,
            .scratch = reinterpret_cast<float*>(scratch + thread * scratch_bytes),
            .compares = is_exact_.load(std::memory_order_relaxed)};
        const Encoded found = kernels_.encode_rows(rows);
        if (!found.is_finite) is_finite_ = false;
        if (!found.is_exact) is_exact_ = false;
      }
    });
  }

  bool has_planes() const { return w_.format == Format::kGroups; }

  int64_t block_bytes() const {
    return has_planes() ? bits_ * w_.data.shape[2] * w_.data.shape[3] : w_.data.shape[2] * w_.data.shape[3];
  }

  // Writes fp8's scales of rows [first, last) of a part: one for all, or one for each.
  void scale_rows(int64_t part, int64_t first, int64_t last) {
    const int64_t groups = cpu::ceil_div(w_.cols, size_), together = scale_rows_ == 1 ? 1 : last - first;
    auto* const scales = w_.scales.as<float>() + part * blocks_ * groups * kRows;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t column = g * size_, count = std::min(size_, w_.cols - column);
      for (int64_t begin = first; begin < last; begin += together) {
        float largest = 0;
        for (int64_t n = begin; n < begin + together; ++n) {
          largest = larger(largest, kernels_.find_largest(numbers_.dtype, row(part * rows_ + n, column), count));
        }
        const float scale = largest == 0 ? 1 : std::max(largest / 448, kSmallestScale);
        for (int64_t n = begin; n < begin + together; ++n) scales[(n / kRows * groups + g) * kRows + n % kRows] = scale;
      }
      for (int64_t n = last; n % kRows != 0; ++n) scales[(n / kRows * groups + g) * kRows + n % kRows] = 0;
    }
  }

  // Writes nvfp4's scale of each part to all its rows.
  void scale_parts() {
    std::vector<float> largest(static_cast<size_t>(w_.rows));
    cpu::parallel_for_shares(num_threads_, w_.rows, [&](int64_t n, int) {
      largest[static_cast<size_t>(n)] = kernels_.find_largest(numbers_.dtype, row(n), w_.cols);
    });
    for (int64_t part = 0; part < w_.parts; ++part) {
      float most = 0;
      for (int64_t n = part * rows_; n < (part + 1) * rows_; ++n) most = larger(most, largest[static_cast<size_t>(n)]);
      const float scale = most == 0 ? 1 : std::max(most / (6 * 448), kSmallestScale);
      std::fill_n(w_.row_scales.as<float>() + part * blocks_ * kRows, blocks_ * kRows, scale);
    }
  }

  static float larger(float a, float b) { return b <= a ? a : b; }

  const TensorView& numbers_;
  const Weight& w_;
  const cpu::EncodeKernels& kernels_;
  const int64_t scale_rows_;
  const int num_threads_;
  const int64_t rows_ = w_.rows / w_.parts, blocks_ = cpu::ceil_div(rows_, kRows);  // of a part
  const int64_t size_ = w_.group_size == 0 ? w_.cols : std::min(w_.group_size, w_.cols);
  const int64_t bits_ = has_planes() ? w_.records.as<const int32_t>()[1] : 0;
  uint8_t* const data_ =
      w_.data.as<uint8_t>() + (has_planes() ? *w_.records.as<const int32_t>() * w_.data.stride[0] : 0);
  std::atomic<bool> is_finite_{true}, is_exact_{true};
};

}  // namespace

Encoded encode_weight(const TensorView& numbers, const Weight& given, int64_t scale_rows, Execution exec) {
  Weight weight = given;
  Call call(exec);
  Dim E{"1", 1, 1}, N{"N"}, C{"C"};
  call.input("numbers", numbers, Kind::kFloat, {&N, &C}, Layout::kRows);
  SWITCHGEAR_CHECK(ValueError, has_parts(weight.format), "weight: expected a format that rounds, got ",
                   name_of(weight.format));
  SWITCHGEAR_CHECK(ValueError, !weight.slots.defined(), "weight_slots: expected none");
  weight_input(call, kWeight, weight, E, N, C);
  SWITCHGEAR_CHECK(ValueError, scale_rows == 1 || (scale_rows > 0 && scale_rows % kRows == 0),
                   "scale_rows: expected 1 or a multiple of ", kRows, ", got ", scale_rows);
  for (const TensorView* tensor : {&weight.data, &weight.scales, &weight.row_scales, &weight.zeros}) {
    if (!tensor->defined()) continue;
    check_host("weight", *tensor);
    SWITCHGEAR_CHECK(ValueError, !share_memory(numbers, *tensor),
                     "weight: expected memory of its own, got memory shared with numbers");
  }
  check_slots(call, kWeight, weight);
  return Encoding(numbers, weight, scale_rows, exec).run();
}

}  // namespace switchgear
