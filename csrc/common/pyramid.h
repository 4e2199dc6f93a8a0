// Bilinear interpolation with align_corners=False along one axis, as torch computes it; shared by C++ and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace moe_kernels {

// The two pixels of a map between which a location lies, and their weights, which sum to 1.
template <class A>
struct Tap {
  int64_t low, high;
  A low_weight, high_weight;
};

// Location `i` of an axis of `out` locations in a map of `in` pixels along it.
template <class A>
MOE_HOST_DEVICE inline Tap<A> tap(int64_t i, int64_t in, int64_t out) {
  A source = static_cast<A>(in) / static_cast<A>(out) * (static_cast<A>(i) + A(0.5)) - A(0.5);
  source = source < A(0) ? A(0) : source;
  const int64_t last = in - 1, whole = static_cast<int64_t>(source), low = whole < last ? whole : last;
  const A high_weight = source - static_cast<A>(low);
  return {low, low < last ? low + 1 : last, A(1) - high_weight, high_weight};
}

// The four pixels, as indices into a map of so many columns, and their weights.
template <class A>
struct Corners {
  int64_t pixel[4];
  A weight[4];
};

template <class A>
MOE_HOST_DEVICE inline Corners<A> corners(const Tap<A>& y, const Tap<A>& x, int64_t columns) {
  return {{y.low * columns + x.low, y.low * columns + x.high, y.high * columns + x.low, y.high * columns + x.high},
          {y.low_weight * x.low_weight, y.low_weight * x.high_weight, y.high_weight * x.low_weight,
           y.high_weight * x.high_weight}};
}

}  // namespace moe_kernels
