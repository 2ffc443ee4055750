// SPDX-License-Identifier: BSD-3-Clause
// What the tests share: poisoned arrays of exact size, reproducible random numbers, and the loop over ISAs and threads.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"
#include "switchgear/backend.h"
#include "switchgear/ops.h"

namespace switchgear::test {

// ---- numbers -----------------------------------------------------------------------------------------------------------

constexpr DType kFloatTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline int mantissa_bits(DType dtype) { return dtype == DType::kFloat32 ? 23 : dtype == DType::kBFloat16 ? 7 : 10; }
inline int min_exponent(DType dtype) { return dtype == DType::kFloat16 ? -14 : -126; }

// The nearest value of a dtype, ties to even, by definition: a multiple of the spacing at that magnitude.
inline float round_to(float v, DType dtype) {
  if (dtype == DType::kFloat32 || !std::isfinite(v) || v == 0.0f) return v;
  const int exponent = std::max(std::ilogb(v), min_exponent(dtype));
  const double spacing = std::ldexp(1.0, exponent - mantissa_bits(dtype));
  const double rounded = std::nearbyint(v / spacing) * spacing;
  const double largest = dtype == DType::kFloat16 ? 65504.0 : 0x1.fep127;
  return std::abs(rounded) > largest ? std::copysign(INFINITY, v) : static_cast<float>(rounded);
}

inline void encode(void* p, DType dtype, float v) {
  v = round_to(v, dtype);
  const auto bits = std::bit_cast<uint32_t>(v);
  if (dtype == DType::kFloat32) {
    std::memcpy(p, &v, 4);
    return;
  }
  auto half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kFloat16) {
    const double magnitude = std::abs(v);
    uint32_t code = 0x7e00;  // NaN
    if (std::isinf(v)) code = 0x7c00;
    if (std::isfinite(v) && magnitude < 0x1p-14) code = static_cast<uint32_t>(magnitude * 0x1p24);
    if (std::isfinite(v) && magnitude >= 0x1p-14) code = ((bits & 0x7fffffff) >> 13) - ((127 - 15) << 10);
    half = static_cast<uint16_t>(code | (bits >> 16 & 0x8000));
  }
  std::memcpy(p, &half, 2);
}

inline float decode(const void* p, DType dtype) {
  float v;
  if (dtype == DType::kFloat32) {
    std::memcpy(&v, p, 4);
    return v;
  }
  uint16_t half;
  std::memcpy(&half, p, 2);
  if (dtype == DType::kBFloat16) return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return mantissa != 0 ? NAN : std::copysign(INFINITY, half & 0x8000 ? -1.0f : 1.0f);
  const float magnitude =
      std::ldexp(static_cast<float>(exponent > 0 ? 1024 + mantissa : mantissa), std::max(exponent, 1) - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// splitmix64: the same numbers on every platform
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float normal() {  // Irwin-Hall: 12 uniform numbers have variance 1
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += unit();
    return static_cast<float>(sum);
  }

 private:
  uint64_t state_;
};

// ---- arrays ------------------------------------------------------------------------------------------------------------

// Memory that ends with its last element, so that the address sanitizer sees the first byte beyond. It starts one element (or
// `lead` elements) after an address aligned to 16 bytes, so that no kernel can rely on alignment. All bytes are 0xFF (NaN,
// -1) at first. `padding` elements follow each row but the last.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::vector<int64_t> shape, int64_t padding = 0, int64_t lead = 1)
      : padding_(padding), lead_(lead) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      view_.shape[i] = shape[i];
      view_.stride[i] = stride;
      stride = stride * shape[i] + (i == view_.ndim - 1 && i > 0 ? padding : 0);
    }
    const int64_t behind = stride > 0 && view_.ndim > 1 ? padding : 0;
    bytes_.assign(static_cast<size_t>((stride - behind + lead) * size_of(dtype)), 0xff);
    rebase();
  }
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;
  Array(const Array& other) : padding_(other.padding_), lead_(other.lead_), view_(other.view_), bytes_(other.bytes_) {
    rebase();
  }
  Array& operator=(const Array& other) {
    padding_ = other.padding_;
    lead_ = other.lead_;
    view_ = other.view_;
    bytes_ = other.bytes_;
    rebase();
    return *this;
  }

  operator const TensorView&() const { return view_; }
  const TensorView& view() const { return view_; }
  int64_t size(int i) const { return view_.shape[i]; }
  int64_t numel() const { return view_.numel(); }
  bool defined() const { return view_.defined(); }
  void poison(uint8_t byte = 0xff) { std::fill(bytes_.begin(), bytes_.end(), byte); }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  // Whether the padding is unchanged since poison(byte).
  bool padding_holds(uint8_t byte) const {
    if (padding_ == 0) return true;
    const int64_t item = size_of(view_.dtype), width = view_.shape[view_.ndim - 1] * item, pad = padding_ * item;
    for (int64_t p = lead_ * item + width; p + pad <= static_cast<int64_t>(bytes_.size()); p += width + pad) {
      for (int64_t i = 0; i < pad; ++i) {
        if (bytes_[static_cast<size_t>(p + i)] != byte) return false;
      }
    }
    return true;
  }

  template <typename... Indices>
  float operator()(Indices... indices) const {
    return decode(address(indices...), view_.dtype);
  }
  template <typename... Indices>
  int32_t id(Indices... indices) const {
    int32_t v;
    std::memcpy(&v, address(indices...), 4);
    return v;
  }
  template <typename... Indices>
  void set(float v, Indices... indices) {
    encode(address(indices...), view_.dtype, v);
  }
  template <typename... Indices>
  void set_id(int32_t v, Indices... indices) {
    std::memcpy(address(indices...), &v, 4);
  }

  // value(linear index) for each element, rows in order; padding stays poisoned.
  template <typename Value>
  void fill(Value&& value) {
    const int64_t width = view_.ndim > 0 ? view_.shape[view_.ndim - 1] : 0;
    for (int64_t i = 0; i < numel(); ++i) {
      char* p = view_.as<char>() + (i + i / width * padding_) * size_of(view_.dtype);
      if (view_.dtype == DType::kInt32) {
        const auto v = static_cast<int32_t>(value(i));
        std::memcpy(p, &v, 4);
      } else {
        encode(p, view_.dtype, static_cast<float>(value(i)));
      }
    }
  }

 private:
  template <typename... Indices>
  char* address(Indices... indices) const {
    const int64_t index[] = {static_cast<int64_t>(indices)...};
    int64_t offset = 0;
    for (size_t i = 0; i < sizeof...(indices); ++i) offset += index[i] * view_.stride[i];
    return view_.as<char>() + offset * size_of(view_.dtype);
  }
  void rebase() {
    if (!bytes_.empty()) view_.data = bytes_.data() + lead_ * size_of(view_.dtype);
  }

  int64_t padding_ = 0, lead_ = 0;
  TensorView view_;
  std::vector<uint8_t> bytes_;
};

inline Array random_array(Random& random, DType dtype, std::vector<int64_t> shape, double scale = 1.0,
                          int64_t padding = 0, int64_t lead = 1) {
  Array array(dtype, std::move(shape), padding, lead);
  array.fill([&](int64_t) { return random.normal() * scale; });
  return array;
}

// Equal elements, bit by bit; padding may differ.
inline bool same_bits(const Array& a, const Array& b) {
  const int64_t width = a.numel() > 0 ? a.view().shape[a.view().ndim - 1] : 0;
  if (a.numel() != b.numel()) return false;
  const int64_t item = size_of(a.view().dtype);
  const auto row_stride = [&](const Array& array) {
    return a.view().ndim > 1 ? array.view().stride[a.view().ndim - 2] : width;
  };
  for (int64_t row = 0; row * width < a.numel(); ++row) {
    const char* p = a.view().as<const char>() + row * row_stride(a) * item;
    const char* q = b.view().as<const char>() + row * row_stride(b) * item;
    if (std::memcmp(p, q, static_cast<size_t>(width * item)) != 0) return false;
  }
  return true;
}

// ---- ISAs and threads --------------------------------------------------------------------------------------------------

// SWITCHGEAR_QUICK=1, for emulators and sanitizers: one number of threads, and only the ISAs specific to the architecture.
// SWITCHGEAR_CPU_ISA: only that one.
inline bool is_quick() { return std::getenv("SWITCHGEAR_QUICK") != nullptr; }
inline std::vector<int> thread_counts() {
#if defined(__SANITIZE_THREAD__)
  return {4};  // one thread has no races
#elif defined(__SANITIZE_ADDRESS__)
  return is_quick() ? std::vector{4} : std::vector{1, 4};
#else
  return is_quick() ? std::vector{2} : std::vector{1, 2, 3, 5};
#endif
}
inline std::vector<std::string> isas_to_test() {
  if (std::getenv("SWITCHGEAR_CPU_ISA") != nullptr) return {cpu_isa()};
  std::vector<std::string> isas = available_cpu_isas();
  if (is_quick() && isas.size() > 1) isas.erase(isas.begin());  // generic
  return isas;
}

// run(exec) writes `outputs`. For each ISA, all thread counts give the same bits, although the outputs hold 0xFF in one run
// and 0x00 in the next: so every element is written. Then check() compares the outputs with the reference. The ISAs with
// VNNI, and neondot, only differ in kernels for integer weights and GGUF's types.
enum class Isas { kFloat, kAll };

template <typename Run, typename Check>
void for_each_isa(std::initializer_list<Array*> outputs, Run&& run, Check&& check, Isas isas = Isas::kFloat) {
  const std::string before = cpu_isa(), case_note = note;
  for (const std::string& isa : isas_to_test()) {
    const bool is_quantised = isa.ends_with("vnni") || isa.ends_with("dot");
    if (isas == Isas::kFloat && is_quantised) continue;
    set_cpu_isa(isa);
    note = case_note + " " + isa;
    std::vector<Array> first;
    for (const int threads : thread_counts()) {
      const auto poison = static_cast<uint8_t>(threads % 2 == 0 ? 0x00 : 0xff);
      for (Array* output : outputs) output->poison(poison);
      run(Execution{threads});
      for (Array* output : outputs) CHECK(output->padding_holds(poison), "wrote behind a row");
      if (first.empty()) {
        for (Array* output : outputs) first.push_back(*output);
      }
      for (size_t i = 0; i < first.size(); ++i) {
        CHECK(same_bits(first[i], *outputs.begin()[i]), "output ", i, " with ", threads, " threads");
      }
    }
    check();
  }
  set_cpu_isa(before);
  note = case_note;
}

}  // namespace switchgear::test
