// What the scheduling of expert_ffn (expert_ffn.cpp) and its arithmetic (isa/expert_ffn.h) share.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/philox.h"
#include "activation.h"
#include "common.h"
#include "memory.h"

namespace moe_kernels {

// Who goes where, checked.
struct Plan {
  Plan(const Tensor& order_in, const Tensor& offsets_in, const Tensor& inverse_in)
      : order(dense(order_in)), offsets(dense(offsets_in)), inverse(dense(inverse_in)) {
    check_plan(order, offsets, inverse);
    assignment = data<int64_t>(order);
    offset = data<int64_t>(offsets);
    position = data<int64_t>(inverse);
    num_experts = offsets.numel() - 1;
    tokens = inverse.size(0);
    top_k = inverse.size(1);
    assignments = order.numel();
    kept = offset[num_experts];
  }

  int64_t token(int64_t row) const { return assignment[row] / top_k; }

  Tensor order, offsets, inverse;
  const int64_t *assignment, *offset, *position;
  int64_t num_experts, tokens, top_k, assignments, kept;
};

// Kept rows of one expert.
struct Rows {
  int64_t expert, first, count;
};

// The factors of hidden features, 0 or 1 / (1 - p), from the words of Philox: a word for each feature, four to a
// counter.
struct Dropout {
  Dropout(const std::optional<Tensor>& seed, double p)
      : active(seed.has_value()),
        seed(active ? *data<int64_t>(*seed) : 0),
        p(static_cast<float>(p)),
        scale(1.0 / (1.0 - p)) {}

  bool active;
  uint64_t seed;
  float p;
  double scale;
};

// A stack of parameters, stored in the dtype of the tokens or in that of the arithmetic.
template <class S>
struct Parameter {
  using A = accumulate_t<S>;

  explicit Parameter(const Tensor& tensor)
      : wide(tensor.scalar_type() == scalar_type<A>), data(tensor.const_data_ptr()) {}

  // Elements [at, at + n) in the dtype of the arithmetic.
  MOE_INLINE void load(int64_t at, int64_t n, A* to) const {
    if (wide) {
      convert(static_cast<const A*>(data) + at, to, n);
    } else {
      convert(static_cast<const S*>(data) + at, to, n);
    }
  }

  bool wide;
  const void* data;
};

// A dropped value is zero, even if it was not finite.
template <class A>
MOE_INLINE A dropped(A value, A factor) {
  return factor == A(0) ? A(0) : value * factor;
}

// One call: x, parameters, gates and shapes.
template <class S>
struct Ffn {
  using A = accumulate_t<S>;
  const Plan& plan;
  Dropout dropout;
  Activation activation;
  int64_t dim, hidden;
  const S* x;
  Parameter<S> w1, b1, w2, b2;
  const A* gates;
};

// The gradient of a stack of parameters, in the parameter's dtype, and the sums that it is stored from: the gradient
// itself where that has the dtype of the arithmetic, else one expert's at a time.
template <class S>
struct Gradient {
  using A = accumulate_t<S>;

  explicit Gradient(const Tensor& parameter)
      : tensor(take_tensor({parameter.sizes().begin(), parameter.sizes().end()}, parameter.scalar_type())),
        wide(tensor.scalar_type() == scalar_type<A>),
        size(parameter.size(0) > 0 ? parameter.numel() / parameter.size(0) : 0),
        scratch(empty({wide ? 0 : size}, scalar_type<A>)) {}

  A* sums(int64_t expert) const { return wide ? mutable_data<A>(tensor) + expert * size : mutable_data<A>(scratch); }

  // Elements [at, at + n) of an expert from its sums.
  MOE_INLINE void store(int64_t expert, int64_t at, int64_t n) const {
    if (!wide) convert(sums(expert) + at, mutable_data<S>(tensor) + expert * size + at, n);
  }

  void clear(int64_t expert) const {
    const Tensor slice = torch::stable::select(tensor, 0, expert);
    torch::stable::zero_(const_cast<Tensor&>(slice));
  }

  Tensor tensor;
  bool wide;
  int64_t size;
  Tensor scratch;
};

// Rows whose part of the biases' gradients is summed apart, so that the sums do not depend on the blocks.
constexpr int64_t kSumRows = 48;

// Rows that the backward takes through all its products together, and what they leave for the weights' gradients.
template <class A>
struct Unit {
  Rows rows;
  bool begins, ends;         // its expert
  Columns<A> w1, w2;         // as the products read them
  A *packed_w1, *packed_w2;  // panels [hidden][width] of w1, [dim][width] of w2
  A *dz, *dy;                // packed: [hidden / kTileRows][rows][kTileRows], [dim / kTileRows][rows][kTileRows]
  A *a, *x;                  // panels [rows][width] over hidden and over dim
  double* sums;              // of dz and of gate · dy, a row of hidden + dim for each block of rows
};

// What a call of the backward needs, in elements, and its numbers of tasks.
struct Sizes {
  int64_t w1, w2, dz, dy, a, x;  // of a unit
  int64_t space;                 // of a thread
  int64_t packs, weight_tasks;   // tasks of a unit
  int64_t operands() const { return dz + dy + a + x; }
};

// One call of the backward.
template <class S>
struct Backward {
  using A = accumulate_t<S>;
  Ffn<S> ffn;
  const S* grad;
  const S* saved;  // null: computed again
  S* grad_x;       // where a token has one expert
  A* grad_rows;    // where it has several
  A* grad_gates;
  const Gradient<S>&w1, &b1, &w2, &b2;
  double* bias_sums;  // of an expert, hidden + dim
};

}  // namespace moe_kernels
