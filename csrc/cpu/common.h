// What the C++ kernels share: stable-ABI tensors as typed arrays, dtypes, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#define MOE_INLINE inline __attribute__((always_inline))
#define MOE_INLINE_LAMBDA __attribute__((always_inline))

namespace moe_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Narrow dtypes are storage only.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr ScalarType scalar_type = std::is_same_v<T, double>    ? ScalarType::Double
                                          : std::is_same_v<T, float>   ? ScalarType::Float
                                          : std::is_same_v<T, int64_t> ? ScalarType::Long
                                                                       : ScalarType::Bool;

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether (order, offsets, inverse) is what dispatch gives: two permutations, each the inverse of the other, and
// offsets that rise from 0 within them. The kernels index memory by them, and anybody can build a Dispatch.
inline void check_plan(const Tensor& order, const Tensor& offsets, const Tensor& inverse) {
  for (const Tensor* tensor : {&order, &offsets, &inverse}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long, "dispatch: expected int64 tensors, got ",
                    torch::headeronly::toString(tensor->scalar_type()));
  }
  STD_TORCH_CHECK(inverse.dim() == 2, "dispatch.inverse: expected shape (T, k)");
  const int64_t n = order.numel(), segments = offsets.numel();
  STD_TORCH_CHECK(segments >= 1 && inverse.numel() == n, "dispatch: order, offsets and inverse do not belong together");
  const int64_t *assignment = data<int64_t>(order), *offset = data<int64_t>(offsets),
                *position = data<int64_t>(inverse);
  bool right = offset[0] == 0 && offset[segments - 1] <= n;
  for (int64_t e = 1; e < segments; ++e) right &= offset[e - 1] <= offset[e];
  for (int64_t p = 0; p < n && right; ++p) {
    right = 0 <= assignment[p] && assignment[p] < n && position[assignment[p]] == p;
  }
  STD_TORCH_CHECK(right,
                  "dispatch: expected inverse permutations and offsets that rise from 0, as dispatch() gives them");
}

// Call f with a zero of the floating-point type of `dtype`.
template <class F>
auto by_dtype(const char* name, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The nearest finite value that can be stored: where the range of float16 ends, its last number and not infinity, of
// which the backward could make nothing. What is infinite before stays so.
template <class S, class A>
MOE_INLINE S saturated(A value) {
  if constexpr (std::is_same_v<S, torch::headeronly::Half>) {
    constexpr A largest = 65504, infinity = std::numeric_limits<A>::infinity();
    value = value > largest && value < infinity ? largest : value < -largest && value > -infinity ? -largest : value;
  }
  return static_cast<S>(value);
}

// A matrix whose columns a product reads in vectors: as it stands (stride > 0), or packed in panels side by side.
template <class A>
struct Columns {
  const A* data;
  int64_t rows, stride;
};

template <class From, class To>
MOE_INLINE void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// Rows a thread takes at least, so that small work stays on one thread.
inline int64_t grain(int64_t work_per_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work_per_row)); }

inline int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Calls f(thread) for every thread below threads(), at once as far as there are any. Inside, threads() is another
// number.
template <class F>
void on_every_thread(const F& f) {
  torch::stable::parallel_for(0, threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) f(thread);
  });
}

// Calls f(thread, i) for every i < n, each thread's in rising order.
template <class F>
void share(int64_t n, const F& f) {
  const int64_t step = threads();
  on_every_thread([&](int64_t thread) {
    for (int64_t i = thread; i < n; i += step) f(thread, i);
  });
}

}  // namespace moe_kernels
