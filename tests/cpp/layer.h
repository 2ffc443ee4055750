// SPDX-License-Identifier: BSD-3-Clause
// A whole layer and its gradients in float64 with bounds, for the tests of moe_forward and moe_backward on any backend.
#pragma once
#include "activation.h"
#include "cases.h"

namespace switchgear::test {

// How a backend stores a slot's share of y, or of grad_x, before it sums the slots of a token.
enum class Slots { kExact, kRounded };

// A layer with all arguments of a call of moe_forward and moe_backward. `aligned`: its rows start at multiples of 16 bytes;
// otherwise none does.
struct Layer {
  Layer(const Case& c, DType dtype, const GluOptions& o, bool biased, bool transposed, uint64_t seed,
        bool aligned = false)
      : c(c),
        dtype(dtype),
        options(o),
        N(o.gated ? 2 * c.I : c.I),
        random(seed),
        transposed(transposed),
        aligned(aligned) {
    ids = make_ids(random, c);
    plan = reference_plan(ids, c.E);
    topk_weights = random_array(random, DType::kFloat32, {c.T, c.K});
    x = rows({c.T, c.H}, 1.0, 3);
    grad_y = rows({c.T, c.H}, 1.0, 1);
    // h and y have variance 1, where activations are curved.
    gate_up_proj = matrices(transposed, N, c.H);
    down_proj = matrices(transposed, c.H, c.I);
    if (biased) {
      gate_up_bias = rows({c.E, N}, 1.0, 2);
      down_bias = rows({c.E, c.H}, 1.0, 0);
    }
  }

  Array rows(std::vector<int64_t> shape, double scale, int64_t padding) {
    Array array = empty(std::move(shape), padding);
    array.fill([&](int64_t) { return random.normal() * scale; });
    return array;
  }
  Array empty(std::vector<int64_t> shape, int64_t padding) const {
    const int64_t vector = 16 / size_of(dtype);
    if (aligned) padding = (vector - shape.back() % vector) % vector;
    return Array(dtype, std::move(shape), padding, aligned ? 0 : 1);
  }
  Array matrices(bool swap, int64_t rows, int64_t columns) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(columns));
    return this->rows({c.E, swap ? columns : rows, swap ? rows : columns}, scale, 0);
  }
  TensorView matrices_of(const Array& array) const {
    TensorView v = array;
    if (transposed) std::swap(v.shape[1], v.shape[2]), std::swap(v.stride[1], v.stride[2]);
    return v;
  }
  ExpertWeights weights() const {
    return {.gate_up_proj = {.data = matrices_of(gate_up_proj)},
            .down_proj = {.data = matrices_of(down_proj)},
            .gate_up_bias = gate_up_bias,
            .down_bias = down_bias};
  }

  Case c;
  DType dtype;
  GluOptions options;
  int64_t N;
  Random random;
  bool transposed, aligned;
  Array ids, topk_weights, x, grad_y, gate_up_proj, down_proj, gate_up_bias, down_bias;
  PlanArrays plan{0, 1, 1};
};

// The values of an array [R,C] or [B,R,C], decoded once: the reference reads each of them many times.
class Values {
 public:
  explicit Values(const Array& array)
      : rows_(array.view().ndim == 3 ? array.size(1) : 0), columns_(array.size(array.view().ndim - 1)) {
    values_.reserve(static_cast<size_t>(array.numel()));
    for (int64_t i = 0; i < array.numel(); ++i) {
      values_.push_back(rows_ > 0 ? array(i / (rows_ * columns_), i / columns_ % rows_, i % columns_)
                                  : array(i / columns_, i % columns_));
    }
  }
  float operator()(int64_t row, int64_t column) const { return values_[static_cast<size_t>(row * columns_ + column)]; }
  float operator()(int64_t e, int64_t row, int64_t column) const { return (*this)(e * rows_ + row, column); }

 private:
  int64_t rows_, columns_;
  std::vector<float> values_;
};

// Matrices of experts by what they multiply, in either layout.
struct Projection {
  Values values;
  bool transposed;

  Projection(const Array& array, bool transposed) : values(array), transposed(transposed) {}
  Bounded operator()(int64_t e, int64_t row, int64_t column) const {
    return {transposed ? values(e, column, row) : values(e, row, column)};
  }
};

// Calls body(s, t, k, e) for each used slot.
template <typename Body>
void for_each_slot(const Layer& l, Body&& body) {
  for (int64_t t = 0; t < l.c.T; ++t) {
    for (int64_t k = 0; k < l.c.K; ++k) {
      if (l.ids.id(t, k) >= 0) body(l.plan.slot_indices.id(t, k), t, k, l.ids.id(t, k));
    }
  }
}

using Table = std::vector<Bounded>;

inline void check_table(const Array& got, const Table& want, const char* name, bool transposed = false) {
  const int64_t rows = got.view().ndim == 3 ? got.size(1) : 0,
                columns = got.view().ndim == 3 ? got.size(2) : got.size(1);
  for (int64_t i = 0; i < got.numel(); ++i) {
    if (got.view().ndim == 2) {
      CHECK_CLOSE(got(i / columns, i % columns), want[static_cast<size_t>(i)], name);
    } else {  // want is [E, rows, columns] of the matrix; got may have its last two dimensions swapped
      const int64_t e = i / (rows * columns), r = i / columns % rows, column = i % columns;
      const int64_t at = transposed ? (e * columns + column) * rows + r : i;
      CHECK_CLOSE(got(e, r, column), want[static_cast<size_t>(at)], name);
    }
  }
}

inline void finish(Table& table, const std::vector<Sum>& sums, DType dtype, const std::vector<bool>& used,
                   int64_t width) {
  for (size_t i = 0; i < sums.size(); ++i) {  // without slots it is exactly 0
    const bool any = used[i / static_cast<size_t>(width)];
    table.push_back(!any ? Bounded{} : dtype == DType::kFloat32 ? sums[i].result() : rounded(sums[i].result(), dtype));
  }
}

inline Table h_table(const Layer& l) {  // [S,N], before rounding
  Table h(static_cast<size_t>(l.c.T * l.c.K * l.N));
  const Values x(l.x);
  const Projection gate_up(l.gate_up_proj, l.transposed);
  for_each_slot(l, [&](int64_t s, int64_t t, int64_t, int64_t e) {
    for (int64_t n = 0; n < l.N; ++n) {
      Sum sum;
      for (int64_t k = 0; k < l.c.H; ++k) sum.add({x(t, k)}, gate_up(e, n, k));
      if (l.gate_up_bias.defined()) sum.add({l.gate_up_bias(e, n)});
      h[static_cast<size_t>(s * l.N + n)] = sum.result();
    }
  });
  return h;
}

inline Gate gate_of(const Layer& l, const Bounded* h_row, int64_t i) {
  const GluOptions& o = l.options;
  return apply_gate(h_row[gate_column(o, i)], o.gated ? h_row[up_column(o, l.c.I, i)] : Bounded{}, o);
}

struct ForwardTables {
  Table y, h;
};

inline ForwardTables reference_forward(const Layer& l, Slots slots) {
  const Case& c = l.c;
  ForwardTables result;
  const Table h = h_table(l);
  for (const Bounded& v : h) result.h.push_back(v.error == 0 ? v : rounded(v, l.dtype));
  std::vector<Sum> sums(static_cast<size_t>(c.T * c.H));
  std::vector<bool> used(static_cast<size_t>(c.T));
  const Projection down(l.down_proj, l.transposed);
  for_each_slot(l, [&](int64_t s, int64_t t, int64_t k, int64_t e) {
    Table a;
    for (int64_t j = 0; j < c.I; ++j) a.push_back(rounded(gate_of(l, &h[static_cast<size_t>(s * l.N)], j).a, l.dtype));
    for (int64_t n = 0; n < c.H; ++n) {
      Sum out;
      for (int64_t j = 0; j < c.I; ++j) out.add(a[static_cast<size_t>(j)], down(e, n, j));
      if (l.down_bias.defined()) out.add({l.down_bias(e, n)});
      const Bounded slot = slots == Slots::kRounded ? rounded(out.result(), l.dtype) : out.result();
      sums[static_cast<size_t>(t * c.H + n)].add(slot, {l.topk_weights(t, k)});
    }
    used[static_cast<size_t>(t)] = true;
  });
  finish(result.y, sums, l.dtype, used, c.H);
  return result;
}

// ---- backward ------------------------------------------------------------------------------------------------------------

struct Gradients {
  explicit Gradients(const Layer& l) : Gradients(l, l.c.E) {}
  // num_experts: the number of trained ones
  Gradients(const Layer& l, int64_t num_experts)
      : x(l.empty({l.c.T, l.c.H}, 1)),
        gate_up_proj(l.empty({num_experts, l.gate_up_proj.size(1), l.gate_up_proj.size(2)}, 0)),
        down_proj(l.empty({num_experts, l.down_proj.size(1), l.down_proj.size(2)}, 0)),
        gate_up_bias(l.empty({num_experts, l.N}, 0)),
        down_bias(l.empty({num_experts, l.c.H}, 3)),
        topk_weights(DType::kFloat32, {l.c.T, l.c.K}) {}

  Array x, gate_up_proj, down_proj, gate_up_bias, down_bias, topk_weights;
};

struct GradientTables {
  Table x, gate_up_proj, down_proj, gate_up_bias, down_bias, topk_weights;
};

inline GradientTables reference_gradients(const Layer& l, const Array& h, Slots slots) {
  const int64_t T = l.c.T, H = l.c.H, I = l.c.I, E = l.c.E, K = l.c.K, N = l.N;
  const auto sums = [](int64_t count) { return std::vector<Sum>(static_cast<size_t>(count)); };
  auto x = sums(T * H), gate_up = sums(E * N * H), down = sums(E * H * I), gate_up_bias = sums(E * N),
       down_bias = sums(E * H);
  std::vector<bool> token_used(static_cast<size_t>(T)), expert_used(static_cast<size_t>(E));
  GradientTables result;
  result.topk_weights.resize(static_cast<size_t>(T * K));
  const Values all_x(l.x), grad_y(l.grad_y);
  const Projection gate_up_proj(l.gate_up_proj, l.transposed), down_proj(l.down_proj, l.transposed);
  for_each_slot(l, [&](int64_t s, int64_t t, int64_t k, int64_t e) {
    token_used[static_cast<size_t>(t)] = expert_used[static_cast<size_t>(e)] = true;
    const Bounded weight{l.topk_weights(t, k)};
    Table row;
    for (int64_t n = 0; n < N; ++n) row.push_back({h(s, n)});
    Table grad_h(static_cast<size_t>(N));
    Sum grad_weight;
    for (int64_t i = 0; i < I; ++i) {
      Sum g;
      for (int64_t n = 0; n < H; ++n) g.add({grad_y(t, n)}, down_proj(e, n, i));
      const Gate gate = gate_of(l, row.data(), i);
      grad_weight.add(g.result(), gate.a);
      const auto product = [&](Bounded a, Bounded b) {
        Sum one;
        one.add(a, b);
        return one.result();
      };
      const Bounded grad_a = product(g.result(), weight);
      grad_h[static_cast<size_t>(gate_column(l.options, i))] = rounded(product(grad_a, gate.per_gate), l.dtype);
      if (l.options.gated) {
        grad_h[static_cast<size_t>(up_column(l.options, I, i))] = rounded(product(grad_a, gate.per_up), l.dtype);
      }
      const Bounded weighted_a = rounded(product(weight, gate.a), l.dtype);
      for (int64_t n = 0; n < H; ++n) down[static_cast<size_t>((e * H + n) * I + i)].add({grad_y(t, n)}, weighted_a);
    }
    for (int64_t n = 0; n < H; ++n) {
      if (l.down_bias.defined()) grad_weight.add({grad_y(t, n)}, {l.down_bias(e, n)});
      down_bias[static_cast<size_t>(e * H + n)].add({grad_y(t, n)}, weight);
    }
    result.topk_weights[static_cast<size_t>(t * K + k)] = grad_weight.result();
    auto slot_x = sums(H);
    for (int64_t n = 0; n < N; ++n) {
      const Bounded grad = grad_h[static_cast<size_t>(n)];
      gate_up_bias[static_cast<size_t>(e * N + n)].add(grad);
      for (int64_t j = 0; j < H; ++j) {
        slot_x[static_cast<size_t>(j)].add(grad, gate_up_proj(e, n, j));
        if (slots == Slots::kExact) x[static_cast<size_t>(t * H + j)].add(grad, gate_up_proj(e, n, j));
        gate_up[static_cast<size_t>((e * N + n) * H + j)].add(grad, {all_x(t, j)});
      }
    }
    for (int64_t j = 0; j < H && slots == Slots::kRounded; ++j) {
      x[static_cast<size_t>(t * H + j)].add(rounded(slot_x[static_cast<size_t>(j)].result(), l.dtype));
    }
  });
  finish(result.x, x, l.dtype, token_used, H);
  finish(result.gate_up_proj, gate_up, l.dtype, expert_used, N * H);
  finish(result.down_proj, down, l.dtype, expert_used, H * I);
  finish(result.gate_up_bias, gate_up_bias, l.dtype, expert_used, N);
  finish(result.down_bias, down_bias, l.dtype, expert_used, H);
  return result;
}

}  // namespace switchgear::test
