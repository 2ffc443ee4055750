// SPDX-License-Identifier: BSD-3-Clause
// Rows so far apart that their offsets need more than 32 bits. The same op on adjacent rows must have the same bits.
#include <sys/mman.h>

#include "layer.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

// A copy of an array [R,W] or [B,R,W] whose first dimension has a stride of about 2^29 elements. Pages that are never touched
// cost nothing.
class Far {
 public:
  explicit Far(const Array& near, int64_t stride = (int64_t{1} << 29) + 8) : near_(near) {
    view_ = near;
    view_.stride[0] = stride;  // TMA needs a multiple of 16 bytes
    bytes_ = static_cast<size_t>((view_.shape[0] * view_.stride[0]) * size_of(view_.dtype));
    view_.data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (view_.data == MAP_FAILED) throw std::runtime_error("no address space");
    for (int64_t i = 0; i < view_.shape[0]; ++i) std::memcpy(far(i), at(near_, i), row_bytes());
  }
  Far(const Far&) = delete;
  ~Far() { munmap(view_.data, bytes_); }

  operator const TensorView&() const { return view_; }
  bool same_as(const Array& want) const {
    for (int64_t i = 0; i < view_.shape[0]; ++i) {
      if (std::memcmp(far(i), at(want, i), row_bytes()) != 0) return false;
    }
    return true;
  }

 private:
  size_t row_bytes() const { return static_cast<size_t>(near_.numel() / near_.size(0) * size_of(view_.dtype)); }
  char* far(int64_t i) const { return view_.as<char>() + i * view_.stride[0] * size_of(view_.dtype); }
  static const char* at(const Array& array, int64_t i) {
    return array.view().as<const char>() + i * array.view().stride[0] * size_of(array.view().dtype);
  }

  Array near_;
  TensorView view_;
  size_t bytes_;
};

template <typename Op>
void run(Op&& op) {
  OpMemory memory(0xff);
  op(memory.execution());
}

// A layer whose rows are whole vectors, and everything that its ops read and write.
struct Problem {
  Problem(const Case& c, DType dtype)
      : l(c, dtype, {}, false, false, 5, true),
        h(l.empty({c.T * c.K, l.N}, 0)),
        a(l.empty({c.T * c.K, c.I}, 0)),
        rows(l.empty({c.T * c.K, c.H}, 0)),
        y(l.empty({c.T, c.H}, 0)) {
    Random random(6);
    for (Array* array : {&h, &a, &rows}) array->fill([&](int64_t) { return random.normal(); });
  }
  Layer l;
  Array h, a, rows, y;
};

constexpr Case kFew{"few rows", 6, 64, 32, 3, 2}, kMany{"more rows than decoding takes", 40, 64, 32, 2, 1};

TEST(far_rows_of_stages) {
  for (const DType dtype : kFloatTypes) {
    note = name_of(dtype);
    Problem p(kFew, dtype);
    const Plan plan = p.l.plan.plan();
    const Far x(p.l.x), rows(p.rows), grad_y(p.l.grad_y), h(p.h), a(p.a);

    Array permuted = p.rows;
    const Far far_permuted(permuted);
    run([&](Execution e) { cuda::permute({.x = p.l.x, .plan = plan, .permuted_x = permuted}, e); });
    run([&](Execution e) { cuda::permute({.x = x, .plan = plan, .permuted_x = far_permuted}, e); });
    CHECK(far_permuted.same_as(permuted), "permute");

    const Far far_y(p.y);
    const TensorView weights = p.l.topk_weights;
    run([&](Execution e) {
      cuda::combine({.permuted_y = p.rows, .plan = plan, .topk_weights = weights, .y = p.y}, e);
    });
    run([&](Execution e) {
      cuda::combine({.permuted_y = rows, .plan = plan, .topk_weights = weights, .y = far_y}, e);
    });
    CHECK(far_y.same_as(p.y), "combine");

    Array grads[2] = {p.l.topk_weights, p.l.topk_weights};
    run([&](Execution e) {
      cuda::combine_weight_backward(
          {.grad_y = p.l.grad_y, .permuted_y = p.rows, .plan = plan, .grad_topk_weights = grads[0]}, e);
    });
    run([&](Execution e) {
      cuda::combine_weight_backward({.grad_y = grad_y, .permuted_y = rows, .plan = plan, .grad_topk_weights = grads[1]},
                                    e);
    });
    CHECK(same_bits(grads[0], grads[1]), "combine_weight_backward");

    Array gated = p.a, grad_h = p.h;
    const Far far_gated(gated), far_grad_h(grad_h);
    run([&](Execution e) { cuda::glu({.h = p.h, .a = gated}, e); });
    run([&](Execution e) { cuda::glu({.h = h, .a = far_gated}, e); });
    CHECK(far_gated.same_as(gated), "glu");
    run([&](Execution e) { cuda::glu_backward({.grad_a = p.a, .h = p.h, .grad_h = grad_h}, e); });
    run([&](Execution e) { cuda::glu_backward({.grad_a = a, .h = h, .grad_h = far_grad_h}, e); });
    CHECK(far_grad_h.same_as(grad_h), "glu_backward");
  }
}

TEST(far_rows_of_routing) {
  Random random(7);
  const int64_t T = 9, K = 3;
  for (const int64_t E : {8, 40, 1100}) {  // 1100: route_wide
    note = join(E, " experts");
    const Array logits = random_rows(Rows::kAligned, random, DType::kFloat32, T, E, 2.0);
    const Far far(logits);
    const RouteOptions options{.top_k = K};
    Array ids[2], weights[2];
    for (int i = 0; i < 2; ++i) {
      ids[i] = Array(DType::kInt32, {T, K});
      weights[i] = Array(DType::kFloat32, {T, K});
      const TensorView& given = i == 0 ? logits.view() : static_cast<const TensorView&>(far);
      run([&](Execution e) {
        cuda::route({.router_logits = given, .options = options, .topk_ids = ids[i], .topk_weights = weights[i]}, e);
      });
    }
    CHECK(same_bits(ids[0], ids[1]) && same_bits(weights[0], weights[1]), "route");

    Array grad = logits;
    const Far far_grad(grad);
    const auto backward = [&](const TensorView& given, const TensorView& out) {
      run([&](Execution e) {
        cuda::route_backward({.grad_topk_weights = weights[0],
                              .router_logits = given,
                              .topk_ids = ids[0],
                              .options = options,
                              .grad_router_logits = out},
                             e);
      });
    };
    backward(logits, grad);
    backward(far, far_grad);
    CHECK(far_grad.same_as(grad), "route_backward");

    Array limits(DType::kInt32, {1});
    limits.set_id(4, 0);
    Array chosen[2], dynamic[2];
    for (int i = 0; i < 2; ++i) {
      chosen[i] = Array(DType::kInt32, {T, E});
      dynamic[i] = Array(DType::kInt32, {T, K});
      Array dynamic_weights(DType::kFloat32, {T, K});
      const TensorView& given = i == 0 ? logits.view() : static_cast<const TensorView&>(far);
      run([&](Execution e) { cuda::column_topk({.values = given, .limits = limits, .topk_ids = chosen[i]}, e); });
      run([&](Execution e) {
        cuda::route_dynamic({.router_logits = given,
                             .options = {.top_p = 0.5},
                             .topk_ids = dynamic[i],
                             .topk_weights = dynamic_weights},
                            e);
      });
    }
    CHECK(same_bits(chosen[0], chosen[1]), "column_topk");
    CHECK(same_bits(dynamic[0], dynamic[1]), "route_dynamic");
  }
}

// A stride in bytes of more than 32 bits, which chunks are not copied whole with.
TEST(far_rows_of_a_product) {
  simt::device() = simt::sm_80();
  Random random(3);
  const int64_t S = 5, N = 24, C = 40;
  const Array x = random_rows(Rows::kAligned, random, DType::kFloat32, S, C);
  const Array weight = random_rows(Rows::kAligned, random, DType::kFloat32, N, C);
  const Far far_x(x, (int64_t{1} << 30) + 8), far_weight(weight, (int64_t{1} << 30) + 8);
  Array offsets(DType::kInt32, {2}), out[2] = {Array(DType::kFloat32, {S, N}), Array(DType::kFloat32, {S, N})};
  offsets.fill([&](int64_t i) { return i * S; });
  for (const bool far : {false, true}) {
    const TensorView& rows = far ? static_cast<const TensorView&>(far_weight) : weight.view();
    TensorView matrices = view(rows.data, DType::kFloat32, 1, N, C);
    matrices.stride = {N * rows.stride[0], rows.stride[0], 1, 0};
    run([&](Execution e) {
      cuda::grouped_gemm({.x = far ? static_cast<const TensorView&>(far_x) : x.view(),
                          .weight = {.data = matrices},
                          .expert_offsets = offsets,
                          .out = out[far]},
                         e);
    });
  }
  CHECK(same_bits(out[0], out[1]));
  simt::device() = simt::sm_90();
}

TEST(far_rows_of_the_layer) {
  int variant = 0;
  for (const simt::Device& device : {simt::sm_80(), simt::sm_90()}) {
    for (const Case& c : {kFew, kMany}) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
        if (!takes_variant(variant++)) continue;
        simt::device() = device;
        note = join("sm_", device.major, "0 ", c.name, " ", name_of(dtype));
        Problem p(c, dtype);
        const Far x(p.l.x), grad_y(p.l.grad_y), h(p.h), y(p.y), grad_x(p.l.x), gate_up(p.l.gate_up_proj),
            down(p.l.down_proj);
        ExpertWeights near_weights = p.l.weights(), far_weights = near_weights;
        far_weights.gate_up_proj.data = gate_up;
        far_weights.down_proj.data = down;
        const auto forward = [&](const TensorView& x, const ExpertWeights& weights, const TensorView& y,
                                 const TensorView& h) {
          run([&](Execution e) {
            cuda::moe_forward({.x = x,
                               .weights = weights,
                               .topk_ids = p.l.ids,
                               .topk_weights = p.l.topk_weights,
                               .options = p.l.options,
                               .y = y,
                               .h = h},
                              e);
          });
        };
        forward(p.l.x, near_weights, p.y, p.h);
        forward(x, far_weights, y, h);
        CHECK(y.same_as(p.y), "y");
        CHECK(h.same_as(p.h), "h");

        Array near_grad_x = p.l.x, gate_up_grad = p.l.gate_up_proj, down_grad = p.l.down_proj;
        const Far far_gate_up_grad(gate_up_grad), far_down_grad(down_grad);
        Array grads[2] = {p.l.topk_weights, p.l.topk_weights};
        const auto backward = [&](bool far) {
          const auto either = [&](const Array& near_one, const Far& far_one) {
            return far ? static_cast<const TensorView&>(far_one) : near_one.view();
          };
          run([&](Execution e) {
            cuda::moe_backward({.grad_y = either(p.l.grad_y, grad_y),
                                .x = either(p.l.x, x),
                                .h = either(p.h, h),
                                .weights = far ? far_weights : near_weights,
                                .topk_ids = p.l.ids,
                                .topk_weights = p.l.topk_weights,
                                .options = p.l.options,
                                .grad_x = either(near_grad_x, grad_x),
                                .grad_gate_up_proj = either(gate_up_grad, far_gate_up_grad),
                                .grad_down_proj = either(down_grad, far_down_grad),
                                .grad_topk_weights = grads[far]},
                               e);
          });
        };
        backward(false);
        backward(true);
        CHECK(grad_x.same_as(near_grad_x), "grad_x");
        CHECK(far_gate_up_grad.same_as(gate_up_grad), "grad_gate_up_proj");
        CHECK(far_down_grad.same_as(down_grad), "grad_down_proj");
        CHECK(same_bits(grads[0], grads[1]), "grad_topk_weights");
      }
    }
  }
  simt::device() = simt::sm_90();
}

}  // namespace
}  // namespace switchgear::test
