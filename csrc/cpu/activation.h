// The activations of expert_ffn and their slopes, as straight-line code that the compiler vectorizes.
#pragma once

#include <string>

#include "common.h"
#include "vector_math.h"

namespace moe_kernels {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu };

inline Activation activation_by_name(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(name == "silu", "activation: expected gelu, gelu_tanh, quick_gelu, relu or silu, got ", name);
  return Activation::kSilu;
}

template <class T>
struct ValueAndSlope {
  T value, slope;
};

struct Gelu {
  template <class T>
  static MOE_INLINE T value(T z) {
    return z * normal_cdf(z);
  }
  template <class T>
  static MOE_INLINE ValueAndSlope<T> both(T z) {
    const T cdf = normal_cdf(z);
    return {z * cdf, cdf + z * normal_pdf(z)};
  }
};

// z σ(u(z)), of which the tanh form of GELU, quick GELU and SiLU are cases; Inner gives u and u'.
template <class Inner>
struct Gated {
  template <class T>
  static MOE_INLINE T value(T z) {
    return both(z).value;
  }
  template <class T>
  static MOE_INLINE ValueAndSlope<T> both(T z) {
    const auto u = Inner::template both<T>(z);
    T slope;
    const T s = sigmoid(u.value, slope);
    return {z * s, s + z * slope * u.slope};
  }
};

struct TanhCubic {
  template <class T>
  static MOE_INLINE ValueAndSlope<T> both(T z) {
    constexpr T scale = T(1.5957691216057307117);  // 2 √(2/π)
    return {scale * z * (T(1) + T(0.044715) * z * z), scale * (T(1) + T(0.134145) * z * z)};
  }
};

struct QuickSlope {
  template <class T>
  static MOE_INLINE ValueAndSlope<T> both(T z) {
    return {T(1.702) * z, T(1.702)};
  }
};

struct Identity {
  template <class T>
  static MOE_INLINE ValueAndSlope<T> both(T z) {
    return {z, T(1)};
  }
};

struct Relu {
  template <class T>
  static MOE_INLINE T value(T z) {
    return z < T(0) ? T(0) : z;  // this way round NaN stays NaN
  }
  template <class T>
  static MOE_INLINE ValueAndSlope<T> both(T z) {
    return {value(z), z <= T(0) ? T(0) : T(1)};
  }
};

}  // namespace moe_kernels
