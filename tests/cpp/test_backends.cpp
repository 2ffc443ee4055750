// SPDX-License-Identifier: BSD-3-Clause
// Which backend runs an op, and what is checked before.
#include "support.h"

namespace switchgear::test {
namespace {

// Nothing is mapped at this address: reading it crashes the test.
void* const kDeviceMemory = reinterpret_cast<void*>(0x1000);

template <typename... Sizes>
TensorView device_view(DType dtype, Sizes... sizes) {
  TensorView tensor = view(kDeviceMemory, dtype, sizes...);
  tensor.device = {DeviceType::kCUDA, 1};
  return tensor;
}

template <typename Run>
std::string complaint(Run&& run) {
  try {
    run();
  } catch (const ValueError& error) {
    return error.what();
  }
  return "none";
}

int64_t bytes_taken = 0;

void* take(void* context, int64_t bytes) {
  bytes_taken = bytes;
  return context;
}

TEST(ops_run_on_the_backend_of_their_tensors) {
  const TensorView ids = device_view(DType::kInt32, 3, 2);
  PlanArgs args{.topk_ids = ids};
  args.plan.expert_offsets = device_view(DType::kInt32, 5);
  args.plan.token_indices = device_view(DType::kInt32, 6);
  args.plan.slot_indices = device_view(DType::kInt32, 3, 2);
  // A missing backend is reported first, although the outputs share memory.
  const std::string without = complaint([&] { plan(args); });
  CHECK(without == "topk_ids: expected a tensor in host memory, got int32[3, 2] on cuda:1", without);

  static Execution seen;
  static int calls = 0;
  static const Backend recorder{.name = "recorder",
                                .device = DeviceType::kCUDA,
                                .plan = [](const PlanArgs&, Execution exec) { seen = exec, ++calls; }};
  register_backend(recorder);

  args.plan.expert_offsets.data = reinterpret_cast<void*>(0x2000);
  args.plan.token_indices.data = reinterpret_cast<void*>(0x3000);
  args.plan.slot_indices.data = reinterpret_cast<void*>(0x4000);
  int stream = 0;
  plan(args, {.stream = &stream, .allocator = {take, &stream}, .allow_tf32 = true});
  CHECK(calls == 1 && seen.stream == &stream && seen.allow_tf32);
  CHECK(seen.allocator.allocate(seen.allocator.context, 77) == &stream && bytes_taken == 77);

  args.plan.slot_indices.device.index = 0;
  const std::string other = complaint([&] { plan(args); });
  CHECK(other == "slot_indices: expected a tensor on cuda:1 like topk_ids, got int32[3, 2] on cuda:0", other);
  args.plan.slot_indices.device = {};
  const std::string host = complaint([&] { plan(args); });
  CHECK(host == "slot_indices: expected a tensor on cuda:1 like topk_ids, got int32[3, 2] on the CPU", host);
  CHECK(calls == 1);

  // The CPU's backend needs no registration, beside any other.
  Array host_ids(DType::kInt32, {3, 2}), offsets(DType::kInt32, {5}), tokens(DType::kInt32, {6}),
      slots(DType::kInt32, {3, 2});
  host_ids.fill([](int64_t i) { return i % 4; });
  plan({.topk_ids = host_ids, .plan = {offsets, tokens, slots}});
  CHECK(offsets.id(4) == 6 && calls == 1);
}

TEST(the_environment_chooses_the_isa) {
  const char* const variable = std::getenv("SWITCHGEAR_CPU_ISA");
  const std::vector<std::string> isas = available_cpu_isas();
  const bool is_forced = variable != nullptr && *variable != '\0';
  const std::string chosen = is_forced ? variable : best_cpu_isa(isas, bf16_rate(this_processor()));
  CHECK(cpu_isa() == chosen, cpu_isa());
  for (const std::string& isa : isas) {
    set_cpu_isa(isa);
    CHECK(cpu_isa() == isa, cpu_isa());
  }
  const std::string unknown = complaint([] { set_cpu_isa("sse"); });
  CHECK(unknown.find("isa: expected one of generic") == 0 && unknown.ends_with(", got sse"), unknown);
  CHECK(cpu_isa() == isas.back(), "an error changed it");
  set_cpu_isa(chosen);
}

}  // namespace
}  // namespace switchgear::test
