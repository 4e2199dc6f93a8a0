// dispatch, gather, combine and their gradients; specified in moe_kernels/ops/dispatch.py.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "common.h"

namespace moe_kernels {
namespace {

// Tokens in the order in which capacity is given out: by descending priority (NaN first), ties to the lower
// token.
std::vector<int64_t> service_order(int64_t tokens, const std::optional<Tensor>& priority) {
  std::vector<int64_t> sequence(tokens);
  std::iota(sequence.begin(), sequence.end(), int64_t{0});
  if (!priority) return sequence;
  const Tensor values = dense(*priority);
  by_dtype("priority", values.scalar_type(), [&](auto zero) {
    const auto* value = data<decltype(zero)>(values);
    std::stable_sort(sequence.begin(), sequence.end(), [value](int64_t a, int64_t b) {
      const double x = static_cast<double>(value[a]), y = static_cast<double>(value[b]);
      return std::isnan(x) ? !std::isnan(y) : x > y;
    });
  });
  return sequence;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch(Tensor experts_in, int64_t num_experts,
                                                    std::optional<int64_t> capacity, std::optional<Tensor> priority) {
  const Tensor experts = dense(experts_in);
  const int64_t tokens = experts.size(0), top_k = experts.size(1), assignments = tokens * top_k;
  const int64_t* expert = data<int64_t>(experts);
  for (int64_t a = 0; a < assignments; ++a) {
    STD_TORCH_CHECK(0 <= expert[a] && expert[a] < num_experts, "experts: expected ids in [0, ", num_experts, "), got ",
                    expert[a]);
  }

  const Tensor kept = empty({tokens, top_k}, ScalarType::Bool);
  bool* keep = mutable_data<bool>(kept);
  std::fill(keep, keep + assignments, true);
  if (capacity) {
    std::vector<int64_t> served(num_experts, 0);
    const auto sequence = service_order(tokens, priority);
    for (int64_t j = 0; j < top_k; ++j) {
      for (const int64_t token : sequence) {
        const int64_t a = token * top_k + j;
        keep[a] = served[expert[a]]++ < *capacity;
      }
    }
  }

  // Counting sort by expert; the dropped ones are a bucket of their own behind the last expert.
  const auto bucket = [&](int64_t a) { return keep[a] ? expert[a] : num_experts; };
  std::vector<int64_t> next(num_experts + 2, 0);
  for (int64_t a = 0; a < assignments; ++a) ++next[bucket(a) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  const Tensor offsets = empty({num_experts + 1}, ScalarType::Long);
  std::copy(next.begin(), next.end() - 1, mutable_data<int64_t>(offsets));
  const Tensor order = empty({assignments}, ScalarType::Long);
  const Tensor inverse = empty({tokens, top_k}, ScalarType::Long);
  int64_t *assignment_at = mutable_data<int64_t>(order), *position = mutable_data<int64_t>(inverse);
  for (int64_t a = 0; a < assignments; ++a) {
    position[a] = next[bucket(a)]++;
    assignment_at[position[a]] = a;
  }
  return {order, offsets, inverse, kept};
}

// Positions that stand for a kept assignment are [0, kept_positions) of a plan that was checked.
int64_t kept_positions(const Tensor& order, const Tensor& offsets, const Tensor& inverse) {
  check_plan(order, offsets, inverse);
  return data<int64_t>(offsets)[offsets.numel() - 1];
}

Tensor gather(Tensor x_in, Tensor order_in, Tensor offsets_in, Tensor inverse_in) {
  const Tensor x = dense(x_in), order = dense(order_in), offsets = dense(offsets_in), inverse = dense(inverse_in);
  const int64_t rows = order.numel(), dim = x.size(1), top_k = inverse.size(1),
                kept = kept_positions(order, offsets, inverse);
  const Tensor out = empty({rows, dim}, x.scalar_type());
  by_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    const int64_t* assignment = data<int64_t>(order);
    torch::stable::parallel_for(0, rows, grain(dim), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        if (p < kept) {
          std::copy_n(from + assignment[p] / top_k * dim, dim, to + p * dim);
        } else {
          std::fill_n(to + p * dim, dim, T(0.f));
        }
      }
    });
  });
  return out;
}

// out[t] = Σ_j weight(t, j) rows[inverse[t, j]] over the kept assignments, in the order of j.
template <class T, class Weight>
void weighted_sum(const Tensor& rows, const Tensor& inverse, int64_t kept, const Tensor& out, const Weight& weight) {
  using A = accumulate_t<T>;
  const int64_t tokens = inverse.size(0), top_k = inverse.size(1), dim = rows.size(1);
  const T* from = data<T>(rows);
  T* to = mutable_data<T>(out);
  const int64_t* position = data<int64_t>(inverse);
  torch::stable::parallel_for(0, tokens, grain(dim * top_k), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(dim);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), A{0});
      for (int64_t j = 0; j < top_k; ++j) {
        const int64_t p = position[t * top_k + j];
        if (p >= kept) continue;
        const A w = weight(t * top_k + j);
        for (int64_t c = 0; c < dim; ++c) sum[c] += w * static_cast<A>(from[p * dim + c]);
      }
      convert(sum.data(), to + t * dim, dim);
    }
  });
}

Tensor gather_backward(Tensor grad_in, Tensor order_in, Tensor offsets_in, Tensor inverse_in) {
  const Tensor grad = dense(grad_in), order = dense(order_in), offsets = dense(offsets_in);
  const Tensor inverse = dense(inverse_in);
  const Tensor out = empty({inverse.size(0), grad.size(1)}, grad.scalar_type());
  by_dtype("grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    weighted_sum<T>(grad, inverse, kept_positions(order, offsets, inverse), out,
                    [](int64_t) { return accumulate_t<T>{1}; });
  });
  return out;
}

Tensor combine(Tensor y_in, Tensor gates_in, Tensor order_in, Tensor offsets_in, Tensor inverse_in) {
  const Tensor y = dense(y_in), gates = dense(gates_in), order = dense(order_in);
  const Tensor offsets = dense(offsets_in), inverse = dense(inverse_in);
  const Tensor out = empty({inverse.size(0), y.size(1)}, y.scalar_type());
  by_dtype("y", y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* gate = data<accumulate_t<T>>(gates);
    weighted_sum<T>(y, inverse, kept_positions(order, offsets, inverse), out, [gate](int64_t a) { return gate[a]; });
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_in, Tensor y_in, Tensor gates_in, Tensor order_in,
                                            Tensor offsets_in, Tensor inverse_in) {
  const Tensor grad = dense(grad_in), y = dense(y_in), gates = dense(gates_in);
  const Tensor order = dense(order_in), offsets = dense(offsets_in), inverse = dense(inverse_in);
  const int64_t rows = order.numel(), dim = y.size(1), top_k = inverse.size(1),
                kept = kept_positions(order, offsets, inverse);
  const Tensor grad_y = empty({rows, dim}, y.scalar_type());
  const Tensor grad_gates = empty({inverse.size(0), top_k}, gates.scalar_type());
  by_dtype("y", y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *g = data<T>(grad), *value = data<T>(y);
    const A* gate = data<A>(gates);
    const int64_t* assignment = data<int64_t>(order);
    T* to = mutable_data<T>(grad_y);
    A* to_gate = mutable_data<A>(grad_gates);
    torch::stable::parallel_for(0, rows, grain(dim), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t a = assignment[p];
        const T* row = g + a / top_k * dim;
        A dot{0};
        if (p < kept) {
          for (int64_t c = 0; c < dim; ++c) {
            dot += static_cast<A>(row[c]) * static_cast<A>(value[p * dim + c]);
            to[p * dim + c] = static_cast<T>(gate[a] * static_cast<A>(row[c]));
          }
        } else {
          std::fill_n(to + p * dim, dim, T(0.f));
        }
        to_gate[a] = dot;
      }
    });
  });
  return {grad_y, grad_gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("dispatch", TORCH_BOX(&dispatch));
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("gather_backward", TORCH_BOX(&gather_backward));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace moe_kernels
