// SPDX-License-Identifier: BSD-3-Clause
#include "checks.h"

#include <algorithm>
#include <cstring>

#include "registry.h"
#include "switchgear/check.h"

namespace switchgear {
namespace {

constexpr int kMaxThreads = 4096;

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

std::string to_string(Call::Shape shape) {  // "[T=4, H]"
  std::string text = "[";
  for (const Dim* dim : shape) {
    if (text.size() > 1) text += ", ";
    text += dim->size == Dim::kUnknown ? std::string(dim->name) : join(dim->name, '=', dim->size);
  }
  return text + ']';
}

std::string to_string(Device device) {
  return device.type == DeviceType::kCPU ? "the CPU" : join("cuda:", device.index);
}

// The stride of a dimension of size 1 does not matter.
bool unit_stride(const TensorView& tensor, int i) { return tensor.shape[i] == 1 || tensor.stride[i] == 1; }

void check_strides(const char* name, const TensorView& tensor, Layout layout) {
  if (tensor.numel() == 0) return;
  const int last = tensor.ndim - 1;
  for (int i = 0; i <= last; ++i) {
    SWITCHGEAR_CHECK(ValueError, tensor.shape[i] == 1 || tensor.stride[i] >= 0, name,
                     ": expected non-negative strides, got ", describe(tensor));
  }
  switch (layout) {
    case Layout::kContiguous:
      SWITCHGEAR_CHECK(ValueError, tensor.contiguous(), name, ": expected a contiguous tensor, got ", describe(tensor));
      break;
    case Layout::kExperts:
      SWITCHGEAR_CHECK(ValueError, tensor.contiguous() || tensor.contiguous_apart(), name,
                       ": expected contiguous experts, adjacent or a multiple of 64 bytes apart, got ",
                       describe(tensor));
      break;
    case Layout::kParts:
      SWITCHGEAR_CHECK(
          ValueError,
          unit_stride(tensor, last) && (tensor.shape[last - 1] == 1 || tensor.stride[last - 1] == tensor.shape[last]),
          name, ": expected contiguous rows one after the other, got ", describe(tensor));
      break;
    case Layout::kRows:
      SWITCHGEAR_CHECK(ValueError, unit_stride(tensor, last), name, ": expected contiguous rows, got ",
                       describe(tensor));
      break;
    case Layout::kMatrices:
      SWITCHGEAR_CHECK(ValueError, tensor.stride[last] == 1 || tensor.stride[last - 1] == 1, name,
                       ": expected a stride of 1 in one of the last two dimensions, got ", describe(tensor));
      break;
  }
}

// Whether two indices may name one element: some stride is less than what the smaller strides span.
bool overlaps_itself(const TensorView& tensor) {
  if (tensor.numel() == 0) return false;
  std::array<int, TensorView::kMaxDims> order{};  // dimensions by stride
  int count = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 1) continue;
    int at = count++;
    for (; at > 0 && tensor.stride[order[at - 1]] > tensor.stride[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  int64_t span = 1;
  for (int i = 0; i < count; ++i) {
    const int64_t stride = tensor.stride[order[i]];
    if (stride < span) return true;
    span += stride * (tensor.shape[order[i]] - 1);
  }
  return false;
}

// Bytes that a tensor covers: `width` of every `period`, from `begin` to `end`. Period 0: all of them.
struct Extent {
  uintptr_t begin = 0, end = 0, period = 0, width = 0;
};

Extent extent_of(const TensorView& tensor) {
  if (tensor.numel() == 0) return {};
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
  Extent extent{.begin = begin, .end = begin + static_cast<uintptr_t>(tensor.extent())};
  if (tensor.ndim == 2 && unit_stride(tensor, 1)) {
    const auto item = static_cast<uintptr_t>(size_of(tensor.dtype));
    extent.period = static_cast<uintptr_t>(tensor.stride[0]) * item;
    extent.width = static_cast<uintptr_t>(tensor.shape[1]) * item;
  }
  return extent;
}

bool overlap(const Extent& a, const Extent& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  // Two blocks of columns of one matrix may be side by side.
  if (a.period == b.period && a.period >= a.width + b.width && a.period > 0) {
    const uintptr_t gap =
        a.begin <= b.begin ? (b.begin - a.begin) % a.period : a.period - (a.begin - b.begin) % a.period;
    return gap < a.width || gap + b.width > a.period;
  }
  return true;
}

TensorView matrix_of(const Weight& weight, int64_t expert) {
  TensorView matrix{.data = const_cast<void*>(weight.base[expert]), .dtype = weight.data.dtype, .ndim = 2};
  matrix.shape = {weight.row_count[expert], weight.data.shape[2]};
  matrix.stride = {weight.data.stride[1], weight.data.stride[2]};
  return matrix;
}

std::string position(const TensorView& tensor, int64_t index) {  // "[3, 1]"
  return tensor.ndim == 2 ? join('[', index / tensor.shape[1], ", ", index % tensor.shape[1], ']')
                          : join('[', index, ']');
}

}  // namespace

void check_pointer(const char* name, const void* data, DType dtype) {
  SWITCHGEAR_CHECK(ValueError, data != nullptr, name, ": expected data, got a null pointer");
  SWITCHGEAR_CHECK(ValueError, reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(dtype)) == 0, name,
                   ": expected data aligned to its elements (", name_of(dtype), "), got the address ", data);
}

void check_host(const char* name, const TensorView& tensor) {
  SWITCHGEAR_CHECK(ValueError, readable(tensor), name, ": expected a tensor in host memory, got ", describe(tensor));
  if (tensor.numel() > 0) check_pointer(name, tensor.data, tensor.dtype);
}

bool share_memory(const TensorView& a, const TensorView& b) { return overlap(extent_of(a), extent_of(b)); }

void check_threads(Execution exec) {
  SWITCHGEAR_CHECK(ValueError, exec.num_threads >= 0 && exec.num_threads <= kMaxThreads,
                   "num_threads: expected 0 (the default) to ", kMaxThreads, ", got ", exec.num_threads);
}

Call::Call(Execution exec) { check_threads(exec); }

void Call::check_device(const char* name, const TensorView& tensor) {
  const Device device = tensor.device;
  if (backend_ == nullptr) {  // the first tensor of the call
    backend_ = find_backend(device.type);
    SWITCHGEAR_CHECK(ValueError, backend_ != nullptr, name, ": expected a tensor in ",
                     device.type == DeviceType::kCPU ? "device" : "host", " memory, got ", describe(tensor));
    device_ = device;
    first_name_ = name;
  }
  SWITCHGEAR_CHECK(ValueError, device.type == device_.type && device.index == device_.index, name,
                   ": expected a tensor on ", to_string(device_), " like ", first_name_, ", got ", describe(tensor),
                   device.type == DeviceType::kCPU ? " on the CPU" : "");
}

void Call::check_type(const char* name, const TensorView& tensor, Kind kind, Shape shape) {
  SWITCHGEAR_CHECK(ValueError, tensor.defined(), name, ": expected shape ", to_string(shape), ", got none");
  check_device(name, tensor);
  const auto check_dtype = [&](DType expected) {
    SWITCHGEAR_CHECK(TypeError, tensor.dtype == expected, name, ": expected ", name_of(expected), ", got ",
                     describe(tensor));
  };
  switch (kind) {
    case Kind::kInt32: check_dtype(DType::kInt32); break;
    case Kind::kUInt8: check_dtype(DType::kUInt8); break;
    case Kind::kFloat16: check_dtype(DType::kFloat16); break;
    case Kind::kInt8: check_dtype(DType::kInt8); break;
    case Kind::kFloat32: check_dtype(DType::kFloat32); break;
    case Kind::kFloat:
      SWITCHGEAR_CHECK(TypeError, is_float(tensor.dtype), name, ": expected float32, bfloat16 or float16, got ",
                       describe(tensor));
      if (float_name_ == nullptr) {
        float_name_ = name;
        float_dtype_ = tensor.dtype;
      }
      SWITCHGEAR_CHECK(TypeError, tensor.dtype == float_dtype_, name, ": expected ", name_of(float_dtype_), " like ",
                       float_name_, ", got ", describe(tensor));
      break;
  }
  bool matches = tensor.ndim == static_cast<int>(shape.size());
  for (int i = 0; matches && i < tensor.ndim; ++i) {
    const Dim& dim = *shape.begin()[i];
    matches = dim.size == Dim::kUnknown || dim.size == tensor.shape[i];
  }
  SWITCHGEAR_CHECK(ValueError, matches, name, ": expected shape ", to_string(shape), ", got ", describe(tensor));
  for (int i = 0; i < tensor.ndim; ++i) {
    Dim& dim = *shape.begin()[i];
    SWITCHGEAR_CHECK(ValueError, tensor.shape[i] >= dim.minimum, name, ": expected ", dim.name, " of at least ",
                     dim.minimum, ", got ", describe(tensor));
    dim.size = tensor.shape[i];
  }
}

void Call::input(const char* name, const TensorView& tensor, Kind kind, Shape shape, Layout layout) {
  check_type(name, tensor, kind, shape);
  check_strides(name, tensor, layout);
  if (tensor.numel() > 0) check_pointer(name, tensor.data, tensor.dtype);
  entries_[count_++] = {.name = name, .tensor = &tensor};
}

void Call::output(const char* name, const TensorView& tensor, Kind kind, Shape shape, Layout layout) {
  input(name, tensor, kind, shape, layout);
  entries_[count_ - 1].output = true;
  SWITCHGEAR_CHECK(ValueError, !overlaps_itself(tensor), name, ": expected elements that do not share memory, got ",
                   describe(tensor));
}

void Call::input(const char* name, const Weight& weight, Shape shape) {
  if (weight.base == nullptr) return input(name, weight.data, Kind::kFloat, shape, Layout::kMatrices);
  check_type(name, weight.data, Kind::kFloat, shape);
  check_strides(name, weight.data, Layout::kMatrices);
  SWITCHGEAR_CHECK(ValueError, weight.row_count != nullptr, name,
                   ": expected a number of rows for each expert, got none");
  for (int64_t e = 0; e < weight.data.shape[0]; ++e) {
    const int64_t rows = weight.row_count[e];
    SWITCHGEAR_CHECK(ValueError, rows >= 0 && rows <= weight.data.shape[1], name, '[', e, "]: expected 0 to ",
                     weight.data.shape[1], " rows, got ", rows);
    if (rows > 0) check_pointer(name, weight.base[e], weight.data.dtype);
  }
  entries_[count_++] = {.name = name, .tensor = &weight.data, .separate = &weight};
}

void Call::check_overlap() const {
  for (int i = 0; i < count_; ++i) {
    if (!entries_[i].output) continue;
    const Extent extent = extent_of(*entries_[i].tensor);
    for (int j = 0; j < count_; ++j) {
      const Entry& other = entries_[j];
      if (j == i) continue;
      bool shares = false;
      if (other.separate == nullptr) {
        shares = overlap(extent, extent_of(*other.tensor));
      } else {
        for (int64_t e = 0; e < other.tensor->shape[0] && !shares; ++e) {
          shares = overlap(extent, extent_of(matrix_of(*other.separate, e)));
        }
      }
      SWITCHGEAR_CHECK(ValueError, !shares, entries_[i].name, ": expected memory of its own, got memory shared with ",
                       other.name);
    }
  }
}

void Call::own(TensorView& indices) {
  if (!readable(indices) || indices.numel() == 0) return;
  const auto count = static_cast<size_t>(indices.numel());
  int32_t* copy = few_.data() + few_used_;
  if (count <= few_.size() - few_used_) {
    few_used_ += count;
  } else {
    copy = many_.emplace_back(std::make_unique_for_overwrite<int32_t[]>(count)).get();
  }
  std::memcpy(copy, indices.data, count * sizeof(int32_t));
  indices.data = copy;
}

void check_range(const char* name, const TensorView& indices, int64_t low, int64_t high) {
  if (!readable(indices)) return;
  const auto* values = indices.as<const int32_t>();
  const int64_t count = indices.numel();
  high = std::min(high, int64_t{1} << 31);  // above all values
  // One unsigned comparison and no branch, so that the loop is vectorised.
  const auto first = static_cast<uint32_t>(low);
  const auto width = static_cast<uint32_t>(high - low);
  uint32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint32_t>(values[i]) - first >= width;
  if (outside == 0) return;
  const int64_t at = std::find_if(values, values + count, [&](int32_t v) { return v < low || v >= high; }) - values;
  throw ValueError(
      join(name, ": expected values in [", low, ", ", high, "), got ", values[at], " at ", position(indices, at)));
}

void check_experts(const char* name, const TensorView& experts, int64_t num_experts) {
  check_range(name, experts, 0, num_experts);
  if (!readable(experts)) return;
  const auto* values = experts.as<const int32_t>();
  for (int64_t i = 1; i < experts.numel(); ++i) {
    SWITCHGEAR_CHECK(ValueError, values[i - 1] < values[i], name, ": expected ascending values, got ", values[i],
                     " after ", values[i - 1], " at [", i, ']');
  }
}

void check_offsets(const char* name, const TensorView& expert_offsets, int64_t num_slots) {
  if (!readable(expert_offsets)) return;
  const auto* offsets = expert_offsets.as<const int32_t>();
  const int64_t last = expert_offsets.shape[0] - 1;
  SWITCHGEAR_CHECK(ValueError, offsets[0] == 0, name, ": expected 0 first, got ", offsets[0]);
  for (int64_t e = 0; e < last; ++e) {
    SWITCHGEAR_CHECK(ValueError, offsets[e] <= offsets[e + 1], name, ": expected values that do not decrease, got ",
                     offsets[e + 1], " after ", offsets[e], " at [", e + 1, ']');
  }
  SWITCHGEAR_CHECK(ValueError, offsets[last] <= num_slots, name, ": expected at most ", num_slots, " slots, got ",
                   offsets[last], " at [", last, ']');
}

}  // namespace switchgear
