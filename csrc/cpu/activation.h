// Bias, activation and dropout of a row of hidden features, and their gradient, while the row is in cache.
#pragma once

#include <cstdint>
#include <string>

namespace moe_kernels {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu };

Activation activation_by_name(const std::string& name);

// z += bias, hidden = mask · φ(z). `bias` or `mask` may be null; `hidden` may be `z`. `mask` holds 0 or 1 /
// (1 − p).
void activation_forward(Activation kind, float* z, const float* bias, const float* mask, float* hidden, int64_t n);
void activation_forward(Activation kind, double* z, const double* bias, const double* mask, double* hidden, int64_t n);

// With h = mask · φ(z): grad becomes dz = gate · grad · mask · φ'(z), hidden = gate · h; returns Σ grad · h
// of the grad that came.
float activation_backward(Activation kind, const float* z, const float* mask, float gate, float* grad, float* hidden,
                          int64_t n);
double activation_backward(Activation kind, const double* z, const double* mask, double gate, double* grad,
                           double* hidden, int64_t n);

}  // namespace moe_kernels
