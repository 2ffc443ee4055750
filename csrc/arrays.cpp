// SPDX-License-Identifier: BSD-3-Clause
#include "arrays.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "dlpack.h"
#include "switchgear/check.h"

namespace py = pybind11;

namespace switchgear {
namespace {

using namespace dlpack;

const DLPackExchangeAPI* find_exchange_api(PyTypeObject* type) {
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  if (!py::hasattr(handle, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = handle.attr("__dlpack_c_exchange_api__");
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) throw py::error_already_set();
  const auto* api = static_cast<const DLPackExchangeAPI*>(pointer);
  return api->version.major == 1 ? api : nullptr;
}

// A type of arrays: its exchange API, and torch's method that returns the storage of a tensor. Null for what it lacks.
struct ArrayType {
  PyTypeObject* type;
  const DLPackExchangeAPI* api;
  PyObject* untyped_storage;
};

ArrayType find_array_type(PyTypeObject* type) {
  const DLPackExchangeAPI* api = find_exchange_api(type);
  PyObject* storage = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "untyped_storage");
  PyErr_Clear();
  return {type, api, storage};
}

// Remembers each type that it sees, and keeps it alive.
ArrayType array_type(PyTypeObject* type) {
  static std::vector<ArrayType> seen;
  for (const auto& entry : seen) {
    if (entry.type == type) return entry;
  }
  const ArrayType found = find_array_type(type);
  Py_INCREF(type);
  return seen.emplace_back(found);
}

// Raises TypeError for a dtype or array that its own library cannot export. The first line of the library's error says why.
[[noreturn]] void refuse(const char* name, py::error_already_set& error) {
  std::string reason = py::str(error.value());
  reason.resize(std::min(reason.find('\n'), reason.size()));
  const std::string message = join(name, ": expected an array that DLPack describes, got: ", reason);
  py::raise_from(error, PyExc_TypeError, message.c_str());
  throw py::error_already_set();
}

// The `stream` argument of __dlpack__: the call's stream for CUDA memory, where 1 means the default stream.
py::object ready_on(py::handle array, std::optional<uintptr_t> stream) {
  if (!stream || !py::hasattr(array, "__dlpack_device__")) return py::none();
  const auto device = array.attr("__dlpack_device__")().cast<py::tuple>();
  const int type = py::int_(device[0]);  // of an IntEnum in many libraries
  if (type != kDLCUDA && type != kDLCUDAManaged) return py::none();
  return py::int_(*stream == 0 ? uintptr_t{1} : *stream);
}

// array.__dlpack__(max_version=(1, 0), stream=…), without arguments that an older producer may not know; null with an error
// set
PyObject* call_dlpack(py::handle array, std::optional<uintptr_t> stream) {
  static PyObject* const method = PyUnicode_InternFromString("__dlpack__");
  static PyObject* const version_alone = py::make_tuple("max_version").release().ptr();
  static PyObject* const stream_alone = py::make_tuple("stream").release().ptr();
  static PyObject* const both = py::make_tuple("max_version", "stream").release().ptr();
  static PyObject* const version = py::make_tuple(1, 0).release().ptr();
  const py::object stream_argument = ready_on(array, stream);
  const bool with_stream = !stream_argument.is_none();
  PyObject* const arguments[] = {array.ptr(), version, stream_argument.ptr()};
  PyObject* capsule = PyObject_VectorcallMethod(method, arguments, 1, with_stream ? both : version_alone);
  if (capsule != nullptr || !PyErr_ExceptionMatches(PyExc_TypeError)) return capsule;
  PyErr_Clear();
  PyObject* const without_version[] = {array.ptr(), stream_argument.ptr()};
  return PyObject_VectorcallMethod(method, without_version, 1, with_stream ? stream_alone : nullptr);
}

py::object request_capsule(const char* name, py::handle array, std::optional<uintptr_t> stream) {
  SWITCHGEAR_CHECK(TypeError, py::hasattr(array, "__dlpack__"), name, ": expected an array (with __dlpack__), got ",
                   Py_TYPE(array.ptr())->tp_name);
  PyObject* capsule = call_dlpack(array, stream);
  if (capsule == nullptr) {
    py::error_already_set error;
    if (!error.matches(PyExc_BufferError) && !error.matches(PyExc_RuntimeError)) throw error;
    // torch before 2.10 has no exchange API and does not export a tensor that requires grad.
    if (py::hasattr(array, "detach")) capsule = call_dlpack(array.attr("detach")(), stream);
    PyErr_Clear();
    if (capsule == nullptr) refuse(name, error);
  }
  return py::reinterpret_steal<py::object>(capsule);
}

DType dtype_of(const char* name, DLDataType dtype) {
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kFloat32;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBFloat16;
    if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kFloat16;
    if (dtype.code == kDLInt && dtype.bits == 32) return DType::kInt32;
    if (dtype.code == kDLInt && dtype.bits == 64) return DType::kInt64;
    if (dtype.code == kDLInt && dtype.bits == 8) return DType::kInt8;
    if (dtype.code == kDLUInt && dtype.bits == 8) return DType::kUInt8;
  }
  constexpr std::array<const char*, 7> kKinds{"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const std::string kind = dtype.code < kKinds.size() ? kKinds[dtype.code] : "float";  // of 8 bits and less
  throw TypeError(join(name, ": expected float32, bfloat16, float16, int32, int64, int8 or uint8, got ", kind,
                       int{dtype.bits}, dtype.lanes == 1 ? "" : " vectors"));
}

Device device_of(const char* name, DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: return {DeviceType::kCPU, 0};
    case kDLCUDA:
    case kDLCUDAManaged: return {DeviceType::kCUDA, device.device_id};
    default: throw ValueError(join(name, ": expected a CPU or CUDA device, got DLPack device ", device.device_type));
  }
}

TensorView view_of(const char* name, const DLTensor& tensor) {
  constexpr int kMaxDims = TensorView::kMaxDims;
  SWITCHGEAR_CHECK(ValueError, tensor.ndim >= 1 && tensor.ndim <= kMaxDims, name, ": expected 1 to ", kMaxDims,
                   " dimensions, got ", tensor.ndim);
  TensorView view = switchgear::view(nullptr, dtype_of(name, tensor.dtype));
  view.device = device_of(name, tensor.device);
  if (tensor.data != nullptr) view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  int64_t compact = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.stride[i] = tensor.strides != nullptr ? tensor.strides[i] : compact;
    compact *= tensor.shape[i];
  }
  set_unused_strides(view);
  return view;
}

// Raises ValueError or TypeError for a foreign array that is no array: readers of DLPack trust sizes and strides. Returns
// whether a stride is negative.
bool check_foreign(const char* name, const DLTensor& tensor) {
  constexpr int kMostDims = 64;  // torch's
  SWITCHGEAR_CHECK(ValueError, tensor.ndim >= 0 && tensor.ndim <= kMostDims, name, ": expected 0 to ", kMostDims,
                   " dimensions, got ", tensor.ndim);
  SWITCHGEAR_CHECK(TypeError, tensor.dtype.lanes == 1 && tensor.dtype.bits >= 8 && tensor.dtype.bits <= 128, name,
                   ": expected numbers of 8 to 128 bits, got ", tensor.dtype.lanes, " of ", int{tensor.dtype.bits});
  SWITCHGEAR_CHECK(ValueError, tensor.ndim == 0 || tensor.shape != nullptr, name, ": expected a shape, got none");
  int64_t count = 1, last = 0;  // elements, and the index of the last one in memory
  bool is_negative = false, overflows = false;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = tensor.shape[i], stride = tensor.strides != nullptr ? tensor.strides[i] : count;
    SWITCHGEAR_CHECK(ValueError, size >= 0, name, ": expected sizes of at least 0, got ", size, " in dimension ", i);
    int64_t span = 0;
    overflows |= stride == std::numeric_limits<int64_t>::min();
    overflows |= __builtin_mul_overflow(stride < 0 ? -(stride + 1) : stride, std::max<int64_t>(size - 1, 0), &span);
    overflows |= __builtin_add_overflow(last, span, &last);
    overflows |= __builtin_mul_overflow(count, std::max<int64_t>(size, 1), &count);
    is_negative |= stride < 0;
  }
  int64_t bytes = 0;
  overflows |= __builtin_mul_overflow(std::max(last, count), int64_t{tensor.dtype.bits}, &bytes);
  SWITCHGEAR_CHECK(ValueError, !overflows, name,
                   ": expected an array of less than 2^63 bits, got strides or sizes beyond");
  const bool is_empty = std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t size) { return size == 0; });
  SWITCHGEAR_CHECK(ValueError, is_empty || tensor.data != nullptr, name, ": expected data, got a null pointer");
  return is_negative;
}

// Bytes from a tensor's first element to the end of its last one.
uint64_t extent_of(const DLTensor& tensor) {
  uint64_t last = 0, compact = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const auto size = static_cast<uint64_t>(tensor.shape[i]);
    if (size == 0) return 0;
    last += (size - 1) * (tensor.strides != nullptr ? static_cast<uint64_t>(tensor.strides[i]) : compact);
    compact *= size;
  }
  return (last + 1) * tensor.dtype.bits / 8;
}

// Address of a torch storage's first byte; none with a Python error set.
std::optional<uint64_t> address_of(PyObject* storage) {
  static PyObject* const type = py::object(py::module_::import("torch").attr("UntypedStorage")).release().ptr();
  static PyObject* const method = PyObject_GetAttrString(type, "data_ptr");
  if (reinterpret_cast<PyObject*>(Py_TYPE(storage)) != type) return std::nullopt;
  const auto address = py::reinterpret_steal<py::object>(PyObject_Vectorcall(method, &storage, 1, nullptr));
  if (!address) return std::nullopt;
  const unsigned long long number = PyLong_AsUnsignedLongLong(address.ptr());
  return PyErr_Occurred() == nullptr ? std::optional<uint64_t>(number) : std::nullopt;
}

// torch's tensors do not notice that their storage was freed, as FSDP does with parameters, or made smaller: they then describe
// memory past its end. Arrays without torch's storages are not checked. Two calls of methods and len() cost 60 ns; the same
// methods looked up by name and nbytes() cost 120.
void check_storage(const char* name, py::handle array, const DLTensor& tensor) {
  PyObject* const method = array_type(Py_TYPE(array.ptr())).untyped_storage;
  if (method == nullptr || tensor.data == nullptr || tensor.device.device_type != kDLCPU) return;
  const uint64_t extent = extent_of(tensor);
  if (extent == 0) return;
  PyObject* const self = array.ptr();
  const auto storage = py::reinterpret_steal<py::object>(PyObject_Vectorcall(method, &self, 1, nullptr));
  const auto begin = storage ? address_of(storage.ptr()) : std::nullopt;
  const Py_ssize_t size = begin ? PyObject_Size(storage.ptr()) : -1;
  if (size < 0) return PyErr_Clear();
  SWITCHGEAR_CHECK(ValueError, *begin != 0, name, ": expected data, got a tensor whose storage was freed");
  const uint64_t first = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset - *begin;
  SWITCHGEAR_CHECK(ValueError, first + extent <= static_cast<uint64_t>(size), name, ": expected a storage of at least ",
                   first + extent, " bytes, got one of ", size, ", made smaller than its tensor");
}

const DLTensor& tensor_in(const char* name, py::handle capsule, bool& read_only) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
    const auto* managed =
        static_cast<const DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    SWITCHGEAR_CHECK(ValueError, managed->version.major == 1, name, ": expected DLPack 1, got version ",
                     managed->version.major);
    read_only = (managed->flags & kReadOnly) != 0;
    return managed->dl_tensor;
  }
  SWITCHGEAR_CHECK(TypeError, PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0, name,
                   ": expected a DLPack capsule from __dlpack__, got ", Py_TYPE(capsule.ptr())->tp_name);
  read_only = false;
  return static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->dl_tensor;
}

// The tensors that may follow the data of a weight, and their bits in the `fields` of its form.
struct Field {
  int64_t bit;
  TensorView Weight::* tensor;
  const char* suffix;
};
constexpr std::array<Field, 5> kFields{{{1, &Weight::scales, "scales"},
                                        {2, &Weight::row_scales, "row_scales"},
                                        {4, &Weight::zeros, "zeros"},
                                        {8, &Weight::records, "records"},
                                        {16, &Weight::slots, "slots"}}};

}  // namespace

void check_capsule(const char* name, py::handle capsule) {
  bool read_only = false;
  if (check_foreign(name, tensor_in(name, capsule, read_only))) {
    throw py::buffer_error(join(name, ": expected non-negative strides, got negative ones"));
  }
}

struct Arrays::Borrowed {
  DLTensor tensor;
  bool read_only = false;
};

Arrays::Borrowed Arrays::borrow(const char* name, py::handle array, bool allocated_by_op) {
  if (const DLPackExchangeAPI* api = array_type(Py_TYPE(array.ptr())).api) {
    Borrowed borrowed;
    if (api->dltensor_from_py_object_no_sync(array.ptr(), &borrowed.tensor) != 0) {
      py::error_already_set error;
      refuse(name, error);
    }
    if (!allocated_by_op) check_storage(name, array, borrowed.tensor);
    return borrowed;
  }
  // The capsule's destructor frees the memory, since we do not rename the capsule.
  const py::object& capsule = capsules_.emplace_back(request_capsule(name, array, stream_));
  Borrowed borrowed;
  borrowed.tensor = tensor_in(name, capsule, borrowed.read_only);
  // Negative strides are refused with those of torch's tensors.
  if (!check_foreign(name, borrowed.tensor)) check_storage(name, array, borrowed.tensor);
  return borrowed;
}

TensorView Arrays::in(const char* name, py::handle array) { return view_of(name, borrow(name, array).tensor); }

void* Arrays::memory(const char* name, py::handle array, int64_t bytes) {
  const DLTensor tensor = borrow(name, array).tensor;
  const bool flat = tensor.ndim == 1 && (tensor.strides == nullptr || tensor.strides[0] == 1);
  const int64_t size = flat ? tensor.shape[0] * tensor.dtype.bits * tensor.dtype.lanes / 8 : 0;
  SWITCHGEAR_CHECK(ValueError, flat && size >= bytes, name, ": expected a contiguous array of one dimension and ",
                   bytes, " bytes, got ", tensor.ndim, " dimensions and ", size, " bytes");
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

TensorView Arrays::out(const char* name, py::handle array) { return writable(name, array, true); }

TensorView Arrays::in_out(const char* name, py::handle array) { return writable(name, array, false); }

TensorView Arrays::writable(const char* name, py::handle array, bool allocated_by_op) {
  const Borrowed borrowed = borrow(name, array, allocated_by_op);
  const TensorView view = view_of(name, borrowed.tensor);
  SWITCHGEAR_CHECK(ValueError, !borrowed.read_only, name, ": expected a writable array, got a read-only ",
                   describe(view));
  return view;
}

Weight Arrays::weight(const char* name, py::handle tensors, py::handle form) {
  const bool is_one = !py::isinstance<py::list>(tensors) && !py::isinstance<py::tuple>(tensors);
  if (is_one && py::len(form) == 0) return {.data = in(name, tensors)};
  SWITCHGEAR_CHECK(TypeError, !is_one, name, ": expected a list of tensors beside a form, got one tensor");
  const auto items = py::reinterpret_borrow<py::sequence>(tensors);
  if (py::len(form) == 0) {
    if (items.size() != 1) return separate(name, items);
    const TensorView only = in(name, items[0]);
    return only.ndim == 2 ? separate(name, items) : Weight{.data = only};
  }

  constexpr size_t kNumbers = 7;
  SWITCHGEAR_CHECK(ValueError, py::len(form) == kNumbers, name, ": expected a form of ", kNumbers, " numbers, got ",
                   py::len(form));
  std::array<int64_t, kNumbers> numbers;
  for (size_t i = 0; i < kNumbers; ++i) {
    const py::object number = form[py::int_(i)];
    py::detail::make_caster<int64_t> caster;
    SWITCHGEAR_CHECK(TypeError, caster.load(number, true), name, ": expected a form of int64, got ",
                     Py_TYPE(number.ptr())->tp_name);
    numbers[i] = py::detail::cast_op<int64_t>(caster);
  }
  const auto [format, rows, cols, parts, group_size, fields, element_bytes] = numbers;
  SWITCHGEAR_CHECK(ValueError, format >= 0 && format <= static_cast<int64_t>(kLastFormat), name,
                   ": expected a format from 0 to ", static_cast<int>(kLastFormat), ", got ", format);
  Weight weight{.format = static_cast<Format>(format),
                .rows = rows,
                .cols = cols,
                .parts = parts,
                .group_size = group_size,
                .element_bytes = element_bytes};
  const auto expected = static_cast<size_t>(1 + std::popcount(static_cast<uint64_t>(fields)));
  SWITCHGEAR_CHECK(ValueError, fields >= 0 && fields < 32 && items.size() == expected, name, ": expected ", expected,
                   " tensors for the fields ", fields, ", got ", items.size());
  weight.data = in(name, items[0]);
  for (size_t item = 1; const auto& [bit, tensor, suffix] : kFields) {
    if ((fields & bit) == 0) continue;
    char field[64];
    std::snprintf(field, sizeof(field), "%s_%s", name, suffix);
    weight.*tensor = in(field, items[item++]);
  }
  return weight;
}

Adapter Arrays::adapter(const AdapterNames& names, py::handle tensors) {
  SWITCHGEAR_CHECK(TypeError, py::isinstance<py::list>(tensors) || py::isinstance<py::tuple>(tensors), names.adapter,
                   ": expected a list of tensors, got ", Py_TYPE(tensors.ptr())->tp_name);
  const auto items = py::reinterpret_borrow<py::sequence>(tensors);
  SWITCHGEAR_CHECK(ValueError, items.size() == 3 || items.size() == 4, names.adapter,
                   ": expected a, b, scales and possibly ranks, got ", items.size(), " tensors");
  Adapter adapter{.a = in(names.a, items[0]), .b = in(names.b, items[1]), .scales = in(names.scales, items[2])};
  if (items.size() == 4) adapter.ranks = in(names.ranks, items[3]);
  return adapter;
}

void Arrays::dropout(const std::array<Adapter*, 2>& adapters, py::handle seed, py::handle probabilities) {
  SWITCHGEAR_CHECK(ValueError, py::len(probabilities) == 2, "dropout: expected two probabilities in [0, 1), got ",
                   py::len(probabilities));
  for (size_t i = 0; i < 2; ++i) {
    adapters[i]->dropout = py::cast<double>(probabilities[py::int_(i)]);
    if (!(adapters[i]->dropout > 0)) continue;
    SWITCHGEAR_CHECK(ValueError, !seed.is_none(), "dropout_seed: expected a tensor beside dropout, got none");
    const TensorView view = in("dropout_seed", seed);
    SWITCHGEAR_CHECK(TypeError, view.dtype == DType::kInt64, "dropout_seed: expected int64, got ", describe(view));
    SWITCHGEAR_CHECK(ValueError, view.numel() == 1, "dropout_seed: expected one number, got ", describe(view));
    if (view.device.type == DeviceType::kCPU) {
      adapters[i]->seed = static_cast<uint64_t>(*view.as<const int64_t>());
    } else {
      adapters[i]->device_seed = view;
    }
  }
}

Weight Arrays::separate(const char* name, py::sequence weights) {
  Separate& own = separate_.emplace_back();
  SWITCHGEAR_CHECK(ValueError, weights.size() > 0, name, ": expected one matrix for each expert, got an empty list");
  TensorView all;  // [E, most rows, C]
  bool has_row_stride = false, has_column_stride = false;
  for (size_t e = 0; e < weights.size(); ++e) {
    char item[64];
    std::snprintf(item, sizeof(item), "%s[%zu]", name, e);
    const TensorView matrix = in(item, weights[e]);
    SWITCHGEAR_CHECK(ValueError, matrix.ndim == 2, item, ": expected shape [N_e, C], got ", describe(matrix));
    if (e == 0) {
      all = {.dtype = matrix.dtype, .device = matrix.device, .ndim = 3};
      all.shape = {static_cast<int64_t>(weights.size()), 0, matrix.shape[1]};
      all.stride = {0, 1, 1};
    }
    SWITCHGEAR_CHECK(TypeError, matrix.dtype == all.dtype, item, ": expected ", name_of(all.dtype), " like ", name,
                     "[0], got ", describe(matrix));
    SWITCHGEAR_CHECK(ValueError, matrix.device.type == all.device.type && matrix.device.index == all.device.index, item,
                     ": expected the device of ", name, "[0], got ", describe(matrix));
    SWITCHGEAR_CHECK(ValueError, matrix.shape[1] == all.shape[2], item, ": expected shape [N_e, C=", all.shape[2],
                     "], got ", describe(matrix));
    // Strides are those of the first expert that defines them: a dimension of size 1 has no stride.
    const auto same_stride = [&](int i, bool& known) {
      if (matrix.numel() == 0 || matrix.shape[i] == 1) return true;
      if (!known) all.stride[i + 1] = matrix.stride[i];
      known = true;
      return all.stride[i + 1] == matrix.stride[i];
    };
    const bool same_rows = same_stride(0, has_row_stride), same_columns = same_stride(1, has_column_stride);
    SWITCHGEAR_CHECK(ValueError, same_rows && same_columns, item, ": expected strides [", all.stride[1], ", ",
                     all.stride[2], "] like the experts before, got [", matrix.stride[0], ", ", matrix.stride[1], ']');
    all.shape[1] = std::max(all.shape[1], matrix.shape[0]);
    own.base.push_back(matrix.data);
    own.row_count.push_back(matrix.shape[0]);
  }
  return {.data = all, .base = own.base.data(), .row_count = own.row_count.data()};
}

}  // namespace switchgear
