// SPDX-License-Identifier: BSD-3-Clause
// What each op refuses: every tensor with every property that it must not have. Errors name the argument, and nothing has been
// written.
#include "checked_ops.h"

namespace switchgear::test {
namespace {

void refuses_tensor(Op& op, const Tensor& t) {
  const auto refuses = [&](const char* what, const std::string& expected,
                           const std::function<void(TensorView&)>& change) {
    const Changed changed(*t.view, change);
    op.refuses(expected, join(t.name, ' ', what));
  };
  const std::string named = join(t.name, ": expected ");
  const int last = t.view->ndim - 1;
  refuses("of int64", join("TypeError: ", named), [](TensorView& v) { v.dtype = DType::kInt64; });
  if (t.view->ndim < TensorView::kMaxDims) {
    refuses("with one more dimension", named + "shape", [&](TensorView& v) {
      v.shape[v.ndim] = v.stride[v.ndim] = 1;
      ++v.ndim;
    });
  }
  if (!t.optional) refuses("missing", named + "shape", [](TensorView& v) { v = {}; });
  refuses("without memory", named + "data, got a null pointer", [](TensorView& v) { v.data = nullptr; });
  refuses("at an odd address", named + "data aligned", [](TensorView& v) { v.data = v.as<char>() + 1; });
  refuses("reversed", named + "non-negative strides", [&](TensorView& v) { v.stride[0] = -v.stride[0]; });
  refuses("with gaps in its rows", named, [&](TensorView& v) {
    v.stride[last] = 2;
    if (t.memory == Memory::kMatrices) v.stride[last - 1] = 2 * v.shape[last];
  });
  if (t.memory == Memory::kContiguous && last > 0) {
    refuses("with gaps behind its rows", named + "a contiguous", [](TensorView& v) { ++v.stride[0]; });
  }
  if (t.output && t.memory != Memory::kContiguous) {
    refuses("with rows one element apart", named + "elements that do not share",
            [](TensorView& v) { v.stride[0] = v.shape[1] - 1; });
  }
  for (int i = 0; i <= last; ++i) {
    if ((t.own >> i & 1) != 0) continue;
    refuses("that is smaller", "", [&](TensorView& v) { --v.shape[i]; });
    refuses("that is empty", "", [&](TensorView& v) { v.shape[i] = 0; });
  }
  for (size_t j = 0; t.output && j < op.tensors.size(); ++j) {
    if (op.tensors[j].view == t.view) continue;
    const std::string expected = ": expected memory of its own, got memory shared with ";
    const int64_t bytes = op.tensors[j].view->extent(), own = t.view->extent();
    const auto moved = [&](int64_t by) {
      return [&, by](TensorView& v) { v.data = op.tensors[j].view->as<char>() + by; };
    };
    refuses("at the start of another", expected, moved(0));
    refuses("at the last element of another", expected, moved(bytes - 4));
    refuses("up to the first element of another", expected, moved(4 - own));
  }
}

TEST(ops_refuse_what_tensors_must_not_be) {
  std::vector<Op> ops = all_ops();
  for (Op& op : ops) {
    op.bind();
    const std::string complaint = complaint_of(op.run);
    CHECK(complaint == "none", op.name, ": ", complaint);
    for (const Tensor& t : op.tensors) refuses_tensor(op, t);
  }
}

TEST(ops_accept_no_tokens) {
  std::vector<Op> ops = all_ops();
  for (Op& op : ops) {
    op.bind();
    for (const Tensor& t : op.tensors) {
      TensorView& v = *t.view;
      for (int i = 0; i < v.ndim && t.name != std::string("expert_offsets"); ++i) {
        if (v.shape[i] == T || v.shape[i] == S) v.shape[i] = 0;
      }
      if (v.numel() == 0) v.data = nullptr;
    }
    const std::string complaint = complaint_of(op.run);
    CHECK(complaint == "none", op.name, ": ", complaint);
  }
}
// Tensors of a call share their dtype, except those that stay in float32.
TEST(ops_refuse_other_dtypes) {
  auto l = limits_of(permute_args(), permute_op);
  l.refuses("TypeError: permuted_x: expected bfloat16 like x, got float32[6, 4]",
            [](PermuteArgs& a) { a.x.dtype = DType::kBFloat16; });
  l.refuses("TypeError: topk_weights: expected float32, got float16[3, 2]",
            [](PermuteArgs& a) { a.topk_weights.dtype = DType::kFloat16; });
  auto g = limits_of(gate_args(), gate_op);
  g.accepts("x in bfloat16", [](GateArgs& a) { a.x.dtype = DType::kBFloat16; });
  g.refuses("TypeError: weight: expected bfloat16 like x, got float16[5, 4]",
            [](GateArgs& a) { a.x.dtype = DType::kBFloat16, a.weight.dtype = DType::kFloat16; });
}

// ---- memory --------------------------------------------------------------------------------------------------------------

// Two blocks of columns of one matrix may be side by side, but not share a column, in either order.
TEST(outputs_may_be_columns_of_the_matrix_of_inputs) {
  GluArgs& a = keep(glu_args());
  Array both(DType::kFloat32, {S, 24});
  both.fill([](int64_t) { return 0; });
  const auto columns = [&](int64_t first, int64_t count) {
    TensorView v = both;
    v.data = v.as<float>() + first;
    v.shape[1] = count;
    return v;
  };
  struct Place {
    int64_t h, a;
    bool overlaps;
  };
  for (const auto& [h, at, overlaps] : {Place{0, 14, false},
                                        {0, 16, false},
                                        {0, 13, true},
                                        {10, 0, false},
                                        {7, 0, false},
                                        {6, 0, true},
                                        {3, 5, true},
                                        {5, 5, true}}) {
    a.h = columns(h, N), a.a = columns(at, I);
    const std::string complaint = complaint_of([&] { glu(a, {1}); });
    CHECK((complaint.find("a: expected memory of its own") == 0) == overlaps, "h at ", h, ", a at ", at, ": ",
          complaint);
  }
  // One row further on: the last column of h is that of no other row.
  a.h = columns(0, N), a.a = columns(14, I);
  a.h.shape[0] = a.a.shape[0] = S - 1;
  a.a.data = a.a.as<float>() + 24;
  CHECK(complaint_of([&] { glu(a, {1}); }) == "none");
  a.a.data = a.a.as<float>() - 1;
  CHECK(complaint_of([&] { glu(a, {1}); }).find("a: expected memory of its own") == 0);
}

// Outputs with strides: elements of their own in any order of dimensions, or not.
TEST(outputs_do_not_share_elements) {
  auto l = limits_of(grouped_gemm_wgrad_args(), grouped_gemm_wgrad_op);
  using Args = GroupedGemmWgradArgs;
  l.accepts("columns first", [](Args& a) { a.grad_weight.stride = {N * H, 1, N}; });
  l.accepts("experts between", [](Args& a) { a.grad_weight.stride = {H, E * H, 1}; });
  l.refuses("grad_weight: expected elements that do not share memory",
            [](Args& a) { a.grad_weight.stride = {H, E * H - 1, 1}; });
  l.refuses("grad_weight: expected elements that do not share memory",
            [](Args& a) { a.grad_weight.stride = {N * H, 1, N - 1}; });
  l.refuses("grad_weight: expected elements that do not share memory",
            [](Args& a) { a.grad_weight.stride = {0, H, 1}; });
  l.refuses("grad_weight: expected a stride of 1 in one of the last two dimensions",
            [](Args& a) { a.grad_weight.stride = {N * H, 2, 2 * N}; });
}

// Experts with their own base pointers and numbers of rows.
TEST(separate_matrices_are_checked_one_by_one) {
  auto l = limits_of(grouped_gemm_args(), grouped_gemm_op);
  using Args = GroupedGemmArgs;
  std::array<const void*, E> base;
  std::array<int64_t, E> rows;
  rows.fill(N);
  for (int64_t e = 0; e < E; ++e) base[static_cast<size_t>(e)] = l.args.weight.data.as<const float>() + e * N * H;
  l.args.weight.base = base.data();
  l.args.weight.row_count = rows.data();
  l.accepts("separate matrices", [](Args&) {});
  l.refuses("weight: expected a number of rows for each expert, got none",
            [](Args& a) { a.weight.row_count = nullptr; });
  const auto with = [&](int64_t count, const void* p, const char* expected) {
    const auto before = std::pair(rows[2], base[2]);
    rows[2] = count, base[2] = p;
    if (expected == nullptr) l.accepts("another matrix", [](Args&) {});
    if (expected != nullptr) l.refuses(expected, [](Args&) {});
    std::tie(rows[2], base[2]) = before;
  };
  with(N + 1, base[2], "weight[2]: expected 0 to 14 rows, got 15");
  with(-1, base[2], "weight[2]: expected 0 to 14 rows, got -1");
  with(1, nullptr, "weight: expected data, got a null pointer");
  with(0, nullptr, nullptr);
  with(N, static_cast<const char*>(base[2]) + 1, "weight: expected data aligned to its elements (float32)");
  const char* const out = l.args.out.as<const char>();
  with(N, out + 4 * (S * N - 1), "out: expected memory of its own, got memory shared with weight");
  with(1, out - 4 * (H - 1), "out: expected memory of its own, got memory shared with weight");
}

// Kernels read copies of indices, which live as long as the call, whether they fit its own 256 places or not.
TEST(indices_are_copied) {
  Call call({});
  std::vector<Array> all;
  for (const int64_t count : {200, 56, 1, 300, 0, 255, 2}) {
    all.emplace_back(DType::kInt32, std::vector<int64_t>{count});
    all.back().fill([&](int64_t i) { return 1000 * count + i; });
  }
  std::vector<TensorView> copies;
  for (const Array& indices : all) {
    copies.push_back(indices);
    call.own(copies.back());
  }
  for (size_t j = 0; j < all.size(); ++j) {
    CHECK((copies[j].data != all[j].view().data) == (all[j].numel() > 0));
    for (int64_t i = 0; i < all[j].numel(); ++i) CHECK(copies[j].as<const int32_t>()[i] == all[j].id(i), j, " at ", i);
  }
  TensorView remote = all[0];
  remote.device.type = DeviceType::kCUDA;
  call.own(remote);
  CHECK(remote.data == all[0].view().data, "memory of a device is not read");
}

TEST(dimensions_of_size_1_continue_those_after_them) {
  struct Case {
    std::array<int64_t, 4> shape, stride, expected;
    int ndim;
  };
  const Case cases[] = {
      {{1, 64}, {1, 1}, {64, 1}, 2},              // a row
      {{1, 64}, {999, 2}, {1, 2}, 2},             // a row with gaps
      {{64, 1}, {3, 7}, {3, 1}, 2},               // a column
      {{1, 8, 64}, {1, 64, 1}, {512, 64, 1}, 3},  // the matrix of one expert
      {{1, 8, 64}, {1, 1, 8}, {512, 1, 8}, 3},    // transposed
      {{1, 8, 64}, {1, 80, 1}, {640, 80, 1}, 3},  // with gaps behind its rows
      {{4, 1, 64}, {64, 1, 1}, {64, 64, 1}, 3},   // one row of each of four
      {{4, 1, 64}, {128, 5, 2}, {128, 1, 2}, 3},  // with gaps
      {{1, 1, 1}, {9, 9, 9}, {1, 1, 1}, 3},
      {{2, 3, 1, 16}, {48, 16, 1, 1}, {48, 16, 16, 1}, 4},
      {{1, 0}, {5, 1}, {1, 1}, 2},
  };
  for (const Case& c : cases) {
    TensorView tensor;
    tensor.ndim = c.ndim;
    tensor.shape = c.shape;
    tensor.stride = c.stride;
    set_unused_strides(tensor);
    for (int i = 0; i < c.ndim; ++i) CHECK(tensor.stride[i] == c.expected[i], describe(tensor), " at ", i);
  }
}

}  // namespace
}  // namespace switchgear::test
