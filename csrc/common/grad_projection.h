// What grad_projection computes, shared by its C++ and CUDA kernels; specified in moe_kernels/ops/grad_projection.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace moe_kernels::grad_projection {

// In the order of RULES in moe_kernels/ops/grad_projection.py.
enum class Rule : int64_t { kNone, kL2sp, kDtnh, kPcgrad, kAgem, kDigrap, kGradvac };
inline constexpr int64_t kRules = 7;

// The columns of a record: the three moments of the last step, then counts.
inline constexpr int64_t kColumns = 6, kSteps = 3, kConflicts = 4, kSkipped = 5;

struct Moments {
  double dot, loss, regularizer;

  MOE_HOST_DEVICE Moments& operator+=(const Moments& other) {
    dot += other.dot, loss += other.loss, regularizer += other.regularizer;
    return *this;
  }
};

// What the sums over g and a raw reference (r / factor) become when g is multiplied by `gradient` and r by `reference`.
MOE_HOST_DEVICE inline Moments scaled(const Moments& raw, double gradient, double reference) {
  return {raw.dot * gradient * reference, raw.loss * gradient * gradient, raw.regularizer * reference * reference};
}

struct Weights {
  double a, b;
};

// d = a g + b λ r. No epsilon: what a division would not survive is no conflict, and sums that are not finite are none.
MOE_HOST_DEVICE inline Weights weights(Rule rule, double parameter, const Moments& m) {
  const double infinity = INFINITY, against = m.dot < 0 && m.dot > -infinity ? m.dot : 0;
  const double loss = m.loss > 0 ? against / m.loss : 0, regularizer = m.regularizer > 0 ? against / m.regularizer : 0;
  switch (rule) {
    case Rule::kNone:
      return {1, 0};
    case Rule::kL2sp:
      return {1, 1};
    case Rule::kDtnh:
      return {1 - loss, 1};
    case Rule::kPcgrad:
      return {1 - loss, 1 - regularizer};
    case Rule::kAgem:
      return {1, -regularizer};
    case Rule::kDigrap:
      return {1, -parameter * regularizer};
    case Rule::kGradvac: {
      const double norms = std::sqrt(m.loss) * std::sqrt(m.regularizer);
      double cosine = norms > 0 && norms < infinity ? m.dot / norms : parameter;
      if (cosine < -1) cosine = -1;
      if (!(cosine < parameter)) return {1, 1};
      const double sine = std::sqrt(1 - cosine * cosine);
      const double target_sine = std::sqrt(1 - parameter * parameter);
      const double ratio = std::sqrt(m.regularizer) / std::sqrt(m.loss);
      return {1 + ratio * (parameter * sine - cosine * target_sine) / target_sine, 1};
    }
  }
  return {1, 0};
}

// A weight as a factor of the elements: beside a gradient of the smallest numbers it may not fit into a float.
template <class A>
MOE_HOST_DEVICE inline A factor(double weight) {
  const double largest = sizeof(A) == sizeof(float) ? 3.4028234663852886e38 : 1.7976931348623157e308;
  return static_cast<A>(weight > largest ? largest : weight < -largest ? -largest : weight);
}

// Where r comes from: nowhere, given, or 2 (w - w0), of which the kernels compute w - w0.
enum class Reference { kNone, kGiven, kAnchor };

template <Reference kReference, class A>
MOE_HOST_DEVICE inline A raw_reference(A w, A reference) {
  if constexpr (kReference == Reference::kAnchor) return w - reference;
  if constexpr (kReference == Reference::kGiven) return reference;
  return A(0);
}

// d of one element; b has the λ and the factor of r in it.
template <Reference kReference, class A>
MOE_HOST_DEVICE inline A direction(A a, A b, A g, A w, A reference) {
  if constexpr (kReference == Reference::kNone) return a * g;
  return a * g + b * raw_reference<kReference>(w, reference);
}

// torch.optim.SGD with d in the place of the gradient. The step goes along from_buffer buffer + from_gradient d, which
// is the buffer, d or, for Nesterov, their sum, without a branch. Of two products compilers fuse the first with the
// addition: the sums of products stand in the order in which that rounds as torch's kernels do.
template <class A>
struct Sgd {
  A lr, weight_decay, keep, rest, from_gradient, from_buffer;
};

template <class A>
MOE_HOST_DEVICE inline Sgd<A> sgd_step(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                                       bool first_step) {
  const double buffered = momentum != 0, direct = nesterov || !buffered;
  return {static_cast<A>(lr),
          static_cast<A>(weight_decay),
          static_cast<A>(first_step ? 0 : momentum),
          static_cast<A>(first_step ? 1 : 1 - dampening),
          static_cast<A>(direct),
          static_cast<A>(nesterov ? momentum : buffered)};
}

// The buffer of a first step comes in as 0.
template <class A>
MOE_HOST_DEVICE inline void sgd(const Sgd<A>& s, A d, A& w, A& buffer) {
  if (s.weight_decay != A(0)) d = s.weight_decay * w + d;
  buffer = s.rest * d + s.keep * buffer;
  w -= s.lr * (s.from_buffer * buffer + s.from_gradient * d);
}

template <class A>
MOE_HOST_DEVICE inline void sgd(const Sgd<A>& s, A d, A& w) {
  if (s.weight_decay != A(0)) d = s.weight_decay * w + d;
  w -= s.lr * d;
}

// torch.optim.AdamW with d in the place of the gradient.
template <class A>
struct AdamW {
  A keep, beta1_rest, beta2, beta2_rest, step_size, bias2_root, eps;
};

// `step` counts this step; keep = 1 - lr * weight_decay.
template <class A>
MOE_HOST_DEVICE inline AdamW<A> adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay,
                                           double step) {
  return {static_cast<A>(1 - lr * weight_decay),
          static_cast<A>(1 - beta1),
          static_cast<A>(beta2),
          static_cast<A>(1 - beta2),
          static_cast<A>(lr / (1 - std::pow(beta1, step))),
          static_cast<A>(std::sqrt(1 - std::pow(beta2, step))),
          static_cast<A>(eps)};
}

template <class A>
MOE_HOST_DEVICE inline void adamw(const AdamW<A>& s, A d, A& w, A& exp_avg, A& exp_avg_sq) {
  w *= s.keep;
  exp_avg += s.beta1_rest * (d - exp_avg);
  exp_avg_sq = s.beta2_rest * d * d + s.beta2 * exp_avg_sq;
  w -= s.step_size * exp_avg / (std::sqrt(exp_avg_sq) / s.bias2_root + s.eps);
}

// Chunks: a list of tensors cut into pieces of `size` elements, numbered through; first[i] chunks stand before tensor
// i, first[tensors] is their number. Results depend on the size, so it follows from the list alone.
MOE_HOST_DEVICE inline int64_t chunks_of(int64_t numel, int64_t size) { return (numel + size - 1) / size; }

template <class I>
MOE_HOST_DEVICE inline int64_t tensor_of(const I* first, int64_t tensors, int64_t chunk) {
  int64_t low = 0, high = tensors;  // first[low] <= chunk < first[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

}  // namespace moe_kernels::grad_projection
