// What diverse_sampling and farthest_points compute at a location, shared by their C++ and CUDA kernels; specified in
// moe_kernels/ops/diverse_sampling.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/pyramid.h"

namespace moe_kernels::diverse_sampling {

// In the order of PENALTIES and METRICS in moe_kernels/ops/diverse_sampling.py.
enum class Penalty : int64_t { kSum, kMax };
enum class Metric : int64_t { kCosine, kEuclidean };

inline constexpr int64_t kNone = -1;  // the location of an absent class, or where none is left

// A location and what it is chosen by: the score minus the penalty, for the background minus the penalty, for farthest
// points minus the penalty too, where that of a Euclidean distance is minus its square. The largest is chosen.
template <class A>
struct Candidate {
  A value;
  int64_t location;
};

template <class A>
MOE_HOST_DEVICE inline Candidate<A> no_candidate() {
  return {A(0), kNone};
}

// Whether `a` is chosen before `b`: NaN first, then the larger, then the lower index; kNone is behind all. A strict
// total order over different locations: the best does not depend on how a reduction is grouped.
template <class A>
MOE_HOST_DEVICE inline bool before(const Candidate<A>& a, const Candidate<A>& b) {
  if (a.location == kNone || b.location == kNone) return a.location != kNone;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.location < b.location;
}

template <class A>
MOE_HOST_DEVICE inline Candidate<A> best(const Candidate<A>& a, const Candidate<A>& b) {
  return before(a, b) ? a : b;
}

// The penalty of a location after another similarity; `first` says that there was none before. NaN stays.
template <class A>
MOE_HOST_DEVICE inline A penalized(Penalty rule, A penalty, A similarity, bool first) {
  if (first) return similarity;
  if (rule == Penalty::kSum) return penalty + similarity;
  return penalty > similarity || penalty != penalty ? penalty : similarity;
}

// 1 / norm, that of a column of zeros 0, so that its similarity to all is 0.
template <class A>
MOE_HOST_DEVICE inline A inverse_norm(A squared) {
  return squared == A(0) ? A(0) : A(1) / std::sqrt(squared);
}

// Minus the squared Euclidean distance, of the inner product and the squares of the two columns.
template <class A>
MOE_HOST_DEVICE inline A closeness(A product, A square, A other_square) {
  return A(2) * product - (square + other_square);
}

// A native map of inner products (or a channel) at the location whose corners in it are given; `stride` stands between
// the pixels' values. No pixel of weight 0 is read.
template <class A, class T>
MOE_HOST_DEVICE inline A resized(const T* map, const Corners<A>& c, int64_t stride) {
  A sum = 0;
  for (int k = 0; k < 4; ++k) {
    if (c.weight[k] != A(0)) sum += c.weight[k] * static_cast<A>(map[c.pixel[k] * stride]);
  }
  return sum;
}

// ‖Σ_a w_a F_a‖² over the four corners, of the products of their pixels: each with itself (00, 01, 10, 11), with the
// one to its right (in the upper and the lower row), with the one below (left and right), and the two diagonals. Where
// the corners cancel, rounding is as large as their squares, not as the result, and may leave it below 0.
template <class A>
MOE_HOST_DEVICE inline A resized_square(const Corners<A>& c, const A (&self)[4], A upper, A lower, A left, A right,
                                        A diagonal, A antidiagonal) {
  const A* w = c.weight;
  const A squares = w[0] * w[0] * self[0] + w[1] * w[1] * self[1] + w[2] * w[2] * self[2] + w[3] * w[3] * self[3];
  const A neighbours = w[0] * w[1] * upper + w[2] * w[3] * lower + w[0] * w[2] * left + w[1] * w[3] * right;
  const A crossing = w[0] * w[3] * diagonal + w[1] * w[2] * antidiagonal;
  const A result = squares + A(2) * (neighbours + crossing);
  return result < A(0) ? A(0) : result;
}

}  // namespace moe_kernels::diverse_sampling
