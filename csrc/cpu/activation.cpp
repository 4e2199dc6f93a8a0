#include "activation.h"

#include "vector_math.h"

namespace moe_kernels {
namespace {

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

template <class F, class T>
MOE_INLINE void forward(T* z, const T* bias, const T* mask, T* hidden, int64_t n) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) hidden[i] = F::template value<T>(z[i]);
  if (mask != nullptr) {
    for (int64_t i = 0; i < n; ++i) hidden[i] *= mask[i];
  }
}

template <class F, class T>
MOE_INLINE T backward(const T* z, const T* mask, T gate, T* grad, T* hidden, int64_t n) {
  if (mask != nullptr) {
    for (int64_t i = 0; i < n; ++i) grad[i] *= mask[i];
  }
  T dot{0};
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; ++i) {
    const auto both = F::template both<T>(z[i]);
    dot += grad[i] * both.value;
    hidden[i] = gate * both.value;
    grad[i] *= gate * both.slope;
  }
  if (mask != nullptr) {
    for (int64_t i = 0; i < n; ++i) hidden[i] *= mask[i];
  }
  return dot;
}

template <class Call>
MOE_INLINE auto by_activation(Activation kind, const Call& call) {
  switch (kind) {
    case Activation::kGeluTanh:
      return call(Gated<TanhCubic>{});
    case Activation::kQuickGelu:
      return call(Gated<QuickSlope>{});
    case Activation::kRelu:
      return call(Relu{});
    case Activation::kSilu:
      return call(Gated<Identity>{});
    default:
      return call(Gelu{});
  }
}

}  // namespace

Activation activation_by_name(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(name == "silu", "activation: expected gelu, gelu_tanh, quick_gelu, relu or silu, got ", name);
  return Activation::kSilu;
}

// The four below differ in type alone; a template cannot be cloned by instruction set.

MOE_MULTIVERSION
void activation_forward(Activation kind, float* z, const float* bias, const float* mask, float* hidden, int64_t n) {
  by_activation(kind, [=](auto f) MOE_INLINE_LAMBDA { forward<decltype(f)>(z, bias, mask, hidden, n); });
}

MOE_MULTIVERSION
void activation_forward(Activation kind, double* z, const double* bias, const double* mask, double* hidden, int64_t n) {
  by_activation(kind, [=](auto f) MOE_INLINE_LAMBDA { forward<decltype(f)>(z, bias, mask, hidden, n); });
}

MOE_MULTIVERSION
float activation_backward(Activation kind, const float* z, const float* mask, float gate, float* grad, float* hidden,
                          int64_t n) {
  return by_activation(kind,
                       [=](auto f) MOE_INLINE_LAMBDA { return backward<decltype(f)>(z, mask, gate, grad, hidden, n); });
}

MOE_MULTIVERSION
double activation_backward(Activation kind, const double* z, const double* mask, double gate, double* grad,
                           double* hidden, int64_t n) {
  return by_activation(kind,
                       [=](auto f) MOE_INLINE_LAMBDA { return backward<decltype(f)>(z, mask, gate, grad, hidden, n); });
}

}  // namespace moe_kernels
