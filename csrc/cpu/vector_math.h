// exp and the normal distribution function as straight-line float code that the compiler vectorizes; double
// goes to the C library.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common.h"

namespace moe_kernels {

MOE_INLINE double exponential(double x) { return std::exp(x); }

// 2^n · p(f) with x / ln 2 = n + f, |f| ≤ 1/2; p by Chebyshev fit, relative error below 3e-8 before rounding.
MOE_INLINE float exponential(float x) {
  constexpr float kOverflow = 88.72f, kUnderflow = -87.33f;
  const float clamped = x > kOverflow ? kOverflow : x < kUnderflow ? kUnderflow : x;
  const float scaled = clamped * 1.44269504f;
  const float whole = (scaled + 12582912.0f) - 12582912.0f;  // rounds to the nearest integer
  // The product and the fraction are taken apart so that f keeps its low bits.
  const float f = (clamped - whole * 0.693145752f - whole * 1.42860677e-6f) * 1.44269504f;
  float p = 1.546973217e-4f;
  p = p * f + 1.340043217e-3f;
  p = p * f + 9.618025602e-3f;
  p = p * f + 5.550327214e-2f;
  p = p * f + 2.402265121e-1f;
  p = p * f + 6.931472067e-1f;
  p = p * f + 1.0f;
  // Two factors: 2^128 is no float, and at the other end 2^n may be too small to be normal.
  const int32_t n = static_cast<int32_t>(whole), half = n >> 1;
  const float power =
      __builtin_bit_cast(float, (half + 127) << 23) * p * __builtin_bit_cast(float, (n - half + 127) << 23);
  return x > kOverflow ? std::numeric_limits<float>::infinity() : x < kUnderflow ? 0.0f : power;
}

MOE_INLINE double normal_cdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

// Φ(−y) = exp(−y²/2) t p(t) for y ≥ 0, t = 1 / (1 + 0.3 y); p by weighted least squares towards equal ripples in the
// relative error, which is below 4e-9 before rounding. So the far negative side keeps its digits, where 1 + erf loses
// them, and with it GELU.
MOE_INLINE float normal_cdf(float x) {
  const float y = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.3f * y);
  float p = -2.061308087e-02f;
  p = p * t + 1.123771492e-01f;
  p = p * t - 2.280707467e-01f;
  p = p * t + 1.915860139e-01f;
  p = p * t - 7.925093386e-02f;
  p = p * t + 9.605975611e-02f;
  p = p * t + 7.842491581e-02f;
  p = p * t + 1.102274654e-01f;
  p = p * t + 1.195728243e-01f;
  p = p * t + 1.196866349e-01f;
  const float tail = exponential(-0.5f * x * x) * t * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

template <class T>
MOE_INLINE T normal_pdf(T x) {
  return T(0.39894228040143267794) * exponential(T(-0.5) * x * x);
}

// σ(x) and its slope σ(x) (1 − σ(x)), both without cancellation.
template <class T>
MOE_INLINE T sigmoid(T x, T& slope) {
  const T e = exponential(x < T(0) ? x : -x), inverse = T(1) / (T(1) + e);
  slope = e * inverse * inverse;
  return x < T(0) ? e * inverse : inverse;
}

}  // namespace moe_kernels
