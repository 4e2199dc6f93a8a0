// Weighted sums of rows, of which all interpolation is made. Included once for each instruction set (for_each_isa.h),
// so there is no guard.

#include "convert.h"
#include "transpose.h"

// Elements [i, i + kVectors · lanes) of start + Σ_j weights[j] rows[j].
template <int kVectors, class A>
MOE_INLINE void weighted(const A* const* rows, const A* weights, int64_t terms, const A* start, int64_t i,
                         typename Vector<A>::type* sum) {
  using V = typename Vector<A>::type;
  using U = typename Vector<A>::unaligned;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = start ? *reinterpret_cast<const U*>(start + i + v * kLanes<A>) : V{};
  }
  for (int64_t j = 0; j < terms; ++j) {
    const A weight = weights[j];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += weight * *reinterpret_cast<const U*>(rows[j] + i + v * kLanes<A>);
  }
}

// The same, one element.
template <class A>
MOE_INLINE A weighted_element(const A* const* rows, const A* weights, int64_t terms, const A* start, int64_t i) {
  A sum = start ? start[i] : A(0);
  for (int64_t j = 0; j < terms; ++j) sum += weights[j] * rows[j][i];
  return sum;
}

// out = start + Σ_j weights[j] rows[j] over n elements, in the order of j; start may be null.
template <class A>
void weighted_sum(const A* const* rows, const A* weights, int64_t terms, const A* start, A* out, int64_t n) {
  using V = typename Vector<A>::type;
  using U = typename Vector<A>::unaligned;
  constexpr int64_t lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    V sum[4];
    weighted<4>(rows, weights, terms, start, i, sum);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) *reinterpret_cast<U*>(out + i + v * lanes) = sum[v];
  }
  for (; i + lanes <= n; i += lanes) {
    V sum[1];
    weighted<1>(rows, weights, terms, start, i, sum);
    *reinterpret_cast<U*>(out + i) = sum[0];
  }
  for (; i < n; ++i) out[i] = weighted_element(rows, weights, terms, start, i);
}

// The sum over n elements of the squares of Σ_j weights[j] rows[j].
template <class A>
double square_sum(const A* const* rows, const A* weights, int64_t terms, int64_t n) {
  using V = typename Vector<A>::type;
  constexpr int64_t lanes = kLanes<A>;
  V squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    V sum[4];
    weighted<4, A>(rows, weights, terms, nullptr, i, sum);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) squares[v] += sum[v] * sum[v];
  }
  A rest = 0;
  for (; i < n; ++i) {
    const A element = weighted_element<A>(rows, weights, terms, nullptr, i);
    rest += element * element;
  }
  double total = rest;
  const V all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  for (int64_t lane = 0; lane < lanes; ++lane) total += all[lane];
  return total;
}

// Rows, `stride` apart, of one channel each, n pixels long, to pixels of the channels, `pixel` apart.
template <class A, class From, class To>
void interleave_channels(const From* from, int64_t stride, int64_t channels, int64_t n, To* to, int64_t pixel) {
  transpose<A>(
      n, channels, [=](int64_t channel) MOE_INLINE_LAMBDA { return from + channel * stride; },
      [=](int64_t i) MOE_INLINE_LAMBDA { return to + i * pixel; },
      [](A value) MOE_INLINE_LAMBDA { return static_cast<To>(value); });
}

// One row of one channel resized along both axes: rows low and high of the map, and along x the pixels left and right.
template <class A, class T>
void resize_row(const T* low, const T* high, A high_weight, const int32_t* left, const int32_t* right,
                const A* right_weight, int64_t n, A* out) {
  if (high_weight == A(0)) high = low;
  const A low_weight = A(1) - high_weight;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A w = right_weight[i], v = A(1) - w;
    const A top = v * static_cast<A>(low[left[i]]) + w * static_cast<A>(low[right[i]]);
    const A bottom = v * static_cast<A>(high[left[i]]) + w * static_cast<A>(high[right[i]]);
    out[i] = low_weight * top + high_weight * bottom;
  }
}
