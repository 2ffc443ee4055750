// SPDX-License-Identifier: BSD-3-Clause
// rms_norm: y = (x + residual) / rms · weight, and rotate_heads: the queries, keys and values of new tokens, each head
// normalised and rotated, which go straight to where attend reads them.
//
// Memory-bound: a few operations per element. Each row is computed in float32 by itself and rounded once; the sum of its squares
// has the order of dot_rows, which depends on the width alone.
#include <algorithm>
#include <cmath>
#include <vector>

#include "experts.h"
#include "ops.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;  // of rows: less is not worth another thread

int64_t grain_of(int64_t row_bytes) { return std::max<int64_t>(kGrainBytes / std::max<int64_t>(row_bytes, 1), 1); }

// A tensor of one dimension in float32.
std::vector<float> widened(const Kernels& k, const TensorView& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.numel()));
  if (tensor.defined()) k.load_row(values.data(), tensor.data, tensor.dtype, tensor.numel());
  return values;
}

// row · weight / √(mean of squares + eps), n elements
void normalize(const Kernels& k, float* row, const float* weight, float eps, int64_t n) {
  const float squares = k.dot_rows(row, row, DType::kFloat32, n);
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] * factor * weight[i];
}

// Pairs (i, i + half), or (2·i, 2·i + 1), turn by the angle of i.
void rotate(float* row, const float* cos, const float* sin, int64_t half, bool interleaved) {
  const auto turn = [&](int64_t i, float& a, float& b) {
    const float first = a, second = b;
    a = first * cos[i] - second * sin[i];
    b = second * cos[i] + first * sin[i];
  };
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) turn(i, row[2 * i], row[2 * i + 1]);
  } else {
    for (int64_t i = 0; i < half; ++i) turn(i, row[i], row[i + half]);
  }
}

char* row_at(const TensorView& t, int64_t b, int64_t token, int64_t head) {
  return offset(t, b * t.stride[0] + token * t.stride[1] + head * t.stride[2]);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& x = args.x;
  const int64_t width = x.shape[1];
  const std::vector<float> weight = widened(k, args.weight);
  parallel_for_ranges(
      context.num_threads, x.shape[0], grain_of(3 * width * size_of(x.dtype)), [&](int64_t begin, int64_t end, int) {
        std::vector<float> row(static_cast<size_t>(width));
        for (int64_t r = begin; r < end; ++r) {
          k.load_row(row.data(), row_of(x, r), x.dtype, width);
          if (args.residual.defined()) {
            k.add_scaled_row(row.data(), row_of(args.residual, r), x.dtype, 1.0f, width);
            k.store_row(row_of(args.sum, r), x.dtype, row.data(), width);
            k.load_row(row.data(), row_of(args.sum, r), x.dtype, width);  // as the next layer will read it
          }
          normalize(k, row.data(), weight.data(), args.eps, width);
          k.store_row(row_of(args.y, r), x.dtype, row.data(), width);
        }
      });
}

void rotate_heads(const RotateHeadsArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const int64_t num_tokens = args.q.shape[1], depth = args.q.shape[3],
                half = args.cos.defined() ? args.cos.shape[2] : 0;
  const int64_t width = depth * std::max(args.q.shape[2], args.k.shape[2]);
  const std::vector<float> q_weight = widened(k, args.q_weight), k_weight = widened(k, args.k_weight);
  const int64_t row_bytes =
      size_of(args.q.dtype) * 2 * (depth * (args.q.shape[2] + args.k.shape[2]) + args.v.shape[2] * args.v.shape[3]);
  const auto place = [&](int64_t begin, int64_t end, int) {
    std::vector<float> memory(static_cast<size_t>(width + 2 * half));
    float *const row = memory.data(), *const cos = row + width, *const sin = cos + half;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / num_tokens, token = i % num_tokens;
      const auto angles = [&](const TensorView& t, float* out) {
        const int64_t at = (t.shape[0] == 1 ? 0 : b) * t.stride[0] + token * t.stride[1];
        k.load_row(out, offset(t, at), t.dtype, half);
      };
      if (half > 0) {
        angles(args.cos, cos);
        angles(args.sin, sin);
      }
      const auto turn = [&](const TensorView& from, const std::vector<float>& weight, const TensorView& to) {
        const int64_t heads = from.shape[2], normed = static_cast<int64_t>(weight.size());
        for (int64_t head = 0; head < heads; ++head) {
          float* const at = row + head * depth;
          k.load_row(at, row_at(from, b, token, head), from.dtype, depth);
          if (normed == depth && heads > 1) normalize(k, at, weight.data(), args.eps, depth);
        }
        if (normed == heads * depth) normalize(k, row, weight.data(), args.eps, heads * depth);
        for (int64_t head = 0; head < heads; ++head) {
          rotate(row + head * depth, cos, sin, half, args.interleaved);
          k.store_row(row_at(to, b, token, head), to.dtype, row + head * depth, depth);
        }
      };
      turn(args.q, q_weight, args.q_out);
      turn(args.k, k_weight, args.k_out);
      for (int64_t head = 0; head < args.v.shape[2]; ++head) {
        std::memcpy(row_at(args.v_out, b, token, head), row_at(args.v, b, token, head),
                    static_cast<size_t>(args.v.shape[3] * size_of(args.v.dtype)));
      }
    }
  };
  parallel_for_ranges(context.num_threads, args.q.shape[0] * num_tokens, grain_of(row_bytes), place);
}

}  // namespace switchgear::cpu
