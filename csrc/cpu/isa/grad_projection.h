// The arithmetic of grad_projection on runs of elements. Included once for each instruction set (for_each_isa.h), so
// there is no guard.

#include "convert.h"
#include "vector.h"

// Elements that are fetched ahead: the processor itself stops at the end of a page.
constexpr int64_t kAhead = 256;

// The moments of g and the raw reference over n elements. Products are double too: the square of a small float is 0.
template <Reference kReference, class A>
void add_moments(const A* g, const A* w, const A* reference, int64_t n, Moments& sum) {
  constexpr int64_t lanes = kLanes<double>, width = 4 * lanes, line = 64 / sizeof(A);
  using V = typename Vector<double>::type;
  typedef A U __attribute__((vector_size(lanes * sizeof(A)), aligned(alignof(A)), may_alias));
  V dot[4] = {}, loss[4] = {}, regularizer[4] = {};
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const int64_t ahead = std::min(i + kAhead, n - width);
    for (int64_t j = 0; j < width; j += line) {
      __builtin_prefetch(g + ahead + j);
      if constexpr (kReference != Reference::kNone) __builtin_prefetch(reference + ahead + j);
      if constexpr (kReference == Reference::kAnchor) __builtin_prefetch(w + ahead + j);
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const V x = __builtin_convertvector(*reinterpret_cast<const U*>(g + i + j * lanes), V);
      loss[j] += x * x;
      if constexpr (kReference != Reference::kNone) {
        U raw = *reinterpret_cast<const U*>(reference + i + j * lanes);
        if constexpr (kReference == Reference::kAnchor) raw = *reinterpret_cast<const U*>(w + i + j * lanes) - raw;
        const V y = __builtin_convertvector(raw, V);
        dot[j] += x * y;
        regularizer[j] += y * y;
      }
    }
  }
  const V dots = (dot[0] + dot[1]) + (dot[2] + dot[3]);
  const V losses = (loss[0] + loss[1]) + (loss[2] + loss[3]);
  const V regularizers = (regularizer[0] + regularizer[1]) + (regularizer[2] + regularizer[3]);
  for (int64_t j = 0; j < lanes; ++j) sum += {dots[j], losses[j], regularizers[j]};
  for (; i < n; ++i) {
    const double x = g[i], y = raw_reference<kReference>(w ? w[i] : A(0), reference ? reference[i] : A(0));
    sum += {x * y, x * x, y * y};
  }
}

template <Reference kReference, class A>
void combine(A a, A b, A* __restrict g, const A* __restrict w, const A* __restrict reference, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A weight = kReference == Reference::kAnchor ? w[i] : A(0);
    g[i] = direction<kReference>(a, b, g[i], weight, kReference == Reference::kNone ? A(0) : reference[i]);
  }
}

// Without a buffer there is no momentum; that of a first step is not read.
template <Reference kReference, class A>
void sgd_run(const Sgd<A>& step, bool first, A a, A b, const A* __restrict g, A* __restrict w,
             const A* __restrict reference, A* __restrict buffer, int64_t n) {
  const auto d = [=](int64_t i) MOE_INLINE_LAMBDA {
    return direction<kReference>(a, b, g[i], w[i], kReference == Reference::kNone ? A(0) : reference[i]);
  };
  if (!buffer) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sgd(step, d(i), w[i]);
  } else if (first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A momentum(0);
      sgd(step, d(i), w[i], momentum);
      buffer[i] = momentum;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sgd(step, d(i), w[i], buffer[i]);
  }
}

template <Reference kReference, class A>
void adamw_run(const AdamW<A>& step, A a, A b, const A* __restrict g, A* __restrict w, const A* __restrict reference,
               A* __restrict exp_avg, A* __restrict exp_avg_sq, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A d = direction<kReference>(a, b, g[i], w[i], kReference == Reference::kNone ? A(0) : reference[i]);
    adamw(step, d, w[i], exp_avg[i], exp_avg_sq[i]);
  }
}

// g / scale, as torch's fused optimizers unscale.
template <class A>
void unscale(A* __restrict g, A scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] /= scale;
}
