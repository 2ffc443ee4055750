// SPDX-License-Identifier: BSD-3-Clause
#include "quantize_rows.cuh"

#include "launch.h"
#include "moe.h"
#include "stored.h"
#include "switchgear/integers.h"

namespace switchgear::cuda {

namespace {

// Columns of activations that share a scale.
int64_t activation_block(const Weight& w) {
  return w.group_size > 0 ? std::max(w.group_size, kActivationBlock) : w.cols;
}

}  // namespace

QuantizedRows::QuantizedRows(Workspace& memory, const Weight& weight, int64_t rows) {
  if (!is_integer(weight.format)) return;
  const int64_t block = activation_block(weight), blocks = (weight.cols + block - 1) / block;
  values = take_rows(memory, DType::kBFloat16, rows, weight.cols);
  scales = view(memory.take<float>(rows * blocks), DType::kFloat32, rows, blocks);
}

void quantize_rows(const Rows& x, DType dtype, const Weight& weight, const QuantizedRows& out, void* stream) {
  if (x.count == 0) return;
  with_element_type(dtype, [&]<typename T>() {
    const int64_t block = activation_block(weight);
    const QuantizeParams<T> params{
        .x = static_cast<const T*>(x.data),
        .x_stride = x.stride,
        .values = out.values.as<__nv_bfloat16>(),
        .values_stride = out.values.stride[0],
        .scales = out.scales.as<float>(),
        .num_rows = x.count,
        .columns = static_cast<int32_t>(out.values.shape[1]),
        .block = static_cast<int32_t>(block),
        .num_blocks = static_cast<int32_t>(out.scales.shape[1]),
        .aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * sizeof(T) % 16 == 0};
    const int64_t items = params.num_rows * params.num_blocks;
    launch(quantize_rows_kernel<T>, dim3(static_cast<unsigned>((items + kQuantizeWarps - 1) / kQuantizeWarps)),
           dim3(32 * kQuantizeWarps), 0, stream, params);
  });
}

}  // namespace switchgear::cuda
