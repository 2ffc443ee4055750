// SPDX-License-Identifier: BSD-3-Clause
// The table of the CUDA backend. Each op runs with its tensors' device current and restores the thread's device afterwards.
#include "switchgear/backend.h"

#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>

#include "ops.h"
#include "switchgear/check.h"

namespace switchgear {
namespace cuda {
namespace {

constexpr uint32_t formats_with_kernels() {
  uint32_t bits = 1u << static_cast<int>(Format::kPlain);
  for (size_t i = 0; i < std::size(kFormats); ++i) bits |= uint32_t{has_cuda_kernels(static_cast<Format>(i))} << i;
  return bits;
}

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(join(call, ": ", cudaGetErrorString(error)));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A tensor that every call of the op has. ops.cpp has checked that the others are on the same device.
const TensorView& tensor_of(const RouteArgs& args) { return args.router_logits; }
const TensorView& tensor_of(const RouteBackwardArgs& args) { return args.router_logits; }
const TensorView& tensor_of(const GateArgs& args) { return args.x; }
const TensorView& tensor_of(const RouteDynamicArgs& args) { return args.router_logits; }
const TensorView& tensor_of(const ColumnTopkArgs& args) { return args.values; }
const TensorView& tensor_of(const FitCapacityArgs& args) { return args.topk_ids; }
const TensorView& tensor_of(const AssignBalancedArgs& args) { return args.values; }
const TensorView& tensor_of(const AssignCappedArgs& args) { return args.values; }
const TensorView& tensor_of(const PlanArgs& args) { return args.topk_ids; }
const TensorView& tensor_of(const PermuteArgs& args) { return args.x; }
const TensorView& tensor_of(const CombineArgs& args) { return args.y; }
const TensorView& tensor_of(const CombineBackwardArgs& args) { return args.grad_y; }
const TensorView& tensor_of(const GroupedGemmArgs& args) { return args.x; }
const TensorView& tensor_of(const GroupedGemmWgradArgs& args) { return args.x; }
const TensorView& tensor_of(const GluArgs& args) { return args.h; }
const TensorView& tensor_of(const GluBackwardArgs& args) { return args.h; }
const TensorView& tensor_of(const MoeForwardArgs& args) { return args.x; }
const TensorView& tensor_of(const MoeBackwardArgs& args) { return args.x; }

template <typename Args, void (*op)(const Args&, Execution)>
void on_its_device(const Args& args, Execution exec) {
  const DeviceGuard guard(tensor_of(args).device.index);
  op(args, exec);
}

}  // namespace
}  // namespace cuda

const Backend& cuda_backend() {
  using namespace cuda;
  static constexpr Backend kBackend{
      .name = "cuda",
      .device = DeviceType::kCUDA,
      .route = on_its_device<RouteArgs, cuda::route>,
      .route_backward = on_its_device<RouteBackwardArgs, cuda::route_backward>,
      .gate = on_its_device<GateArgs, cuda::gate>,
      .plan = on_its_device<PlanArgs, cuda::plan>,
      .permute = on_its_device<PermuteArgs, cuda::permute>,
      .combine = on_its_device<CombineArgs, cuda::combine>,
      .combine_weight_backward = on_its_device<CombineBackwardArgs, cuda::combine_weight_backward>,
      .grouped_gemm = on_its_device<GroupedGemmArgs, cuda::grouped_gemm>,
      .grouped_gemm_wgrad = on_its_device<GroupedGemmWgradArgs, cuda::grouped_gemm_wgrad>,
      .glu = on_its_device<GluArgs, cuda::glu>,
      .glu_backward = on_its_device<GluBackwardArgs, cuda::glu_backward>,
      .moe_forward = on_its_device<MoeForwardArgs, cuda::moe_forward>,
      .moe_backward = on_its_device<MoeBackwardArgs, cuda::moe_backward>,
      .route_dynamic = on_its_device<RouteDynamicArgs, cuda::route_dynamic>,
      .column_topk = on_its_device<ColumnTopkArgs, cuda::column_topk>,
      .fit_capacity = on_its_device<FitCapacityArgs, cuda::fit_capacity>,
      .assign_balanced = on_its_device<AssignBalancedArgs, cuda::assign_balanced>,
      .assign_capped = on_its_device<AssignCappedArgs, cuda::assign_capped>,
      .formats = formats_with_kernels(),
      .takes_adapters = true};
  return kBackend;
}

}  // namespace switchgear
