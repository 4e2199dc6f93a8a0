// expert_ffn and its gradient; specified in moe_kernels/ops/expert_ffn.py.
//
// Expert by expert, in blocks of rows: gather, product, bias + activation + dropout on the block while it is
// in cache, product. A last pass sums a token's experts in the order of its choices, so no sum depends on
// scheduling.

#include <algorithm>
#include <tuple>

#include "../common/philox.h"
#include "activation.h"
#include "common.h"

namespace moe_kernels {
namespace {

// Rows of a block: enough to amortize what a product packs, few enough that the hidden block stays in the
// last cache.
constexpr int64_t kBlockRows = 4096;

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
    kept = offset[num_experts];
  }

  int64_t token(int64_t row) const { return assignment[row] / top_k; }

  // Calls f(expert, first row, number of rows) for every block of kept rows, in order. An expert's blocks are of equal
  // size but for one row, since a product of a few left-over rows costs nearly as much as one of many.
  template <class F>
  void for_blocks(int64_t block, const F& f) const {
    for (int64_t e = 0; e < num_experts; ++e) {
      const int64_t rows = offset[e + 1] - offset[e], blocks = (rows + block - 1) / block;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = offset[e] + rows * i / blocks;
        f(e, first, offset[e] + rows * (i + 1) / blocks - first);
      }
    }
  }

  int64_t largest_block(int64_t block) const {
    int64_t largest = 1;
    for (int64_t e = 0; e < num_experts; ++e) largest = std::max(largest, offset[e + 1] - offset[e]);
    return std::min(block, largest);
  }

  Tensor order, offsets, inverse;
  const int64_t *assignment, *offset, *position;
  int64_t num_experts, tokens, top_k, kept;
};

struct Dropout {
  Dropout(const std::optional<Tensor>& seed, double p)
      : active(seed.has_value()),
        seed(active ? *data<int64_t>(*seed) : 0),
        p(static_cast<float>(p)),
        scale(1.0 / (1.0 - p)) {}

  // The factors of one row, or null without dropout.
  template <class A>
  const A* mask(int64_t token, int64_t expert, int64_t num_experts, std::vector<A>& row) const {
    if (!active) return nullptr;
    const int64_t n = static_cast<int64_t>(row.size()), groups = (n + 3) / 4;
    for (int64_t group = 0; group < groups; ++group) {
      const Words words = philox(seed, (token * num_experts + expert) * groups + group);
      for (int64_t i = 0; i < std::min<int64_t>(4, n - 4 * group); ++i) {
        row[4 * group + i] = uniform(words.word[i]) >= p ? A(scale) : A(0);
      }
    }
    return row.data();
  }

  bool active;
  uint64_t seed;
  float p;
  double scale;
};

// One expert's slice of a stack of weights in the dtype of the arithmetic.
template <class S>
Tensor expert_weight(const Tensor& weights, int64_t expert) {
  using A = accumulate_t<S>;
  const Tensor slice = torch::stable::select(weights, 0, expert);
  if constexpr (std::is_same_v<S, A>) return slice;
  const Tensor wide = empty({slice.size(0), slice.size(1)}, scalar_type<A>);
  const S* from = data<S>(slice);
  A* to = mutable_data<A>(wide);
  torch::stable::parallel_for(0, slice.numel(), 16384,
                              [&](int64_t begin, int64_t end) { convert(from + begin, to + begin, end - begin); });
  return wide;
}

template <class S>
void gather_rows(const Plan& plan, const S* from, int64_t dim, int64_t first, int64_t rows, const Tensor& out) {
  using A = accumulate_t<S>;
  A* to = mutable_data<A>(out);
  torch::stable::parallel_for(0, rows, grain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) convert(from + plan.token(first + i) * dim, to + i * dim, dim);
  });
}

template <class S>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                   const Tensor& b2, const Tensor& gates, const Plan& plan, const Dropout& dropout,
                                   Activation activation, bool save) {
  using A = accumulate_t<S>;
  constexpr bool kWide = std::is_same_v<S, A>;
  const int64_t dim = x.size(1), hidden = w1.size(1), assignments = plan.order.numel();
  const int64_t block = plan.largest_block(kBlockRows);
  const Tensor y = empty({plan.tokens, dim}, x.scalar_type());
  const Tensor saved = empty({save ? assignments : 0, hidden}, x.scalar_type());
  const Tensor outputs = empty({assignments, dim}, scalar_type<A>);
  const Tensor xs = empty({block, dim}, scalar_type<A>);
  const Tensor scratch = empty({block, hidden}, scalar_type<A>);
  const Tensor active = empty({save && kWide ? block : 0, hidden}, scalar_type<A>);

  int64_t current = -1;
  Tensor weight1 = w1, weight2 = w2;
  plan.for_blocks(block, [&](int64_t e, int64_t first, int64_t rows) {
    if (e != current) {
      weight1 = transposed(expert_weight<S>(w1, e));
      weight2 = transposed(expert_weight<S>(w2, e));
      current = e;
    }
    gather_rows(plan, data<S>(x), dim, first, rows, xs);
    // Where it is saved in the dtype of the arithmetic, the first product writes the pre-activation in its
    // place.
    const bool in_place = save && kWide;
    const Tensor z = in_place ? rows_of(saved, first, rows) : rows_of(scratch, 0, rows);
    const Tensor a = in_place ? rows_of(active, 0, rows) : z;
    multiply(z, rows_of(xs, 0, rows), weight1);
    A *z_data = mutable_data<A>(z), *a_data = mutable_data<A>(a);
    S* saved_data = save ? mutable_data<S>(saved) + first * hidden : nullptr;
    // The bias in the dtype of the arithmetic.
    std::vector<A> bias(hidden);
    convert(data<S>(b1) + e * hidden, bias.data(), hidden);
    torch::stable::parallel_for(0, rows, grain(hidden), [&](int64_t begin, int64_t end) {
      std::vector<A> factors(dropout.active ? hidden : 0);
      for (int64_t i = begin; i < end; ++i) {
        A* row = z_data + i * hidden;
        const A* mask = dropout.mask(plan.token(first + i), e, plan.num_experts, factors);
        if (save && !kWide) {
          for (int64_t c = 0; c < hidden; ++c) saved_data[i * hidden + c] = saturated<S>(row[c] + bias[c]);
        }
        activation_forward(activation, row, bias.data(), mask, a_data + i * hidden, hidden);
      }
    });
    multiply(rows_of(outputs, first, rows), a, weight2);
  });
  if (save) {
    S* tail = mutable_data<S>(saved);
    std::fill(tail + plan.kept * hidden, tail + assignments * hidden, S(0.f));
  }

  const A *out = data<A>(outputs), *gate = data<A>(gates);
  const S* bias = data<S>(b2);
  S* to = mutable_data<S>(y);
  torch::stable::parallel_for(0, plan.tokens, grain(dim * plan.top_k), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(dim);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), A{0});
      for (int64_t j = 0; j < plan.top_k; ++j) {
        const int64_t row = plan.position[t * plan.top_k + j];
        if (row >= plan.kept) continue;
        const int64_t e = std::upper_bound(plan.offset, plan.offset + plan.num_experts + 1, row) - plan.offset - 1;
        const A g = gate[t * plan.top_k + j];
        const A* from = out + row * dim;
        const S* b = bias + e * dim;
        for (int64_t c = 0; c < dim; ++c) sum[c] += g * (from[c] + static_cast<A>(b[c]));
      }
      convert(sum.data(), to + t * dim, dim);
    }
  });
  return {y, saved};
}

// Sums of rows into bias gradients, in double: a running sum over thousands of rows in float would lose digits that
// plain PyTorch's pairwise sum keeps. Chunks of a fixed number of rows are summed apart and then in order, so the
// result does not depend on the number of threads.
class RowSums {
 public:
  RowSums(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), chunks_((rows + kRows - 1) / kRows), sums_(chunks_ * columns, 0.0) {}

  // f(first row, last row, sums of the chunk), in parallel.
  template <class F>
  void for_chunks(const F& f) {
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        f(chunk * kRows, std::min(rows_, (chunk + 1) * kRows), sums_.data() + chunk * columns_);
      }
    });
  }

  // out (+)= columns first … first + count of the sums.
  template <class A>
  void store(int64_t first, int64_t count, bool accumulate, A* out) const {
    for (int64_t c = 0; c < count; ++c) {
      double sum = accumulate ? static_cast<double>(out[c]) : 0.0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += sums_[chunk * columns_ + first + c];
      out[c] = static_cast<A>(sum);
    }
  }

 private:
  static constexpr int64_t kRows = 64;
  int64_t rows_, columns_, chunks_;
  std::vector<double> sums_;
};

template <class A>
MOE_INLINE void add_scaled(const A* row, A scale, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(scale * row[i]);
}

// out (+)= a b; the first block of an expert writes, the others add.
template <class A>
void accumulate_product(const Tensor& out, const Tensor& scratch, const Tensor& a, const Tensor& b, bool accumulate) {
  multiply(accumulate ? scratch : out, a, b);
  if (!accumulate) return;
  A* to = mutable_data<A>(out);
  const A* from = data<A>(scratch);
  torch::stable::parallel_for(0, out.numel(), 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] += from[i];
  });
}

// The gradient of one expert's parameters, summed in the dtype of the arithmetic and stored once.
template <class S>
struct ParameterGradient {
  using A = accumulate_t<S>;
  static constexpr bool kWide = std::is_same_v<S, A>;

  ParameterGradient(const Tensor& parameter)
      : grad(torch::stable::empty_like(parameter)),
        sum(kWide ? grad : empty({parameter.dim() == 3 ? parameter.size(1) : 1, parameter.size(-1)}, scalar_type<A>)) {}

  Tensor expert(int64_t e) const { return kWide ? torch::stable::select(grad, 0, e) : sum; }

  void clear(int64_t e) const {
    const Tensor slice = torch::stable::select(grad, 0, e);
    std::fill_n(mutable_data<S>(slice), slice.numel(), S(0.f));
  }

  void store(int64_t e) const {
    if constexpr (!kWide) {
      const Tensor slice = torch::stable::select(grad, 0, e);
      const A* from = data<A>(sum);
      S* to = mutable_data<S>(slice);
      torch::stable::parallel_for(0, slice.numel(), 16384,
                                  [&](int64_t begin, int64_t end) { convert(from + begin, to + begin, end - begin); });
    }
  }

  Tensor grad, sum;
};

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const Tensor& gates, const Tensor& saved, const Plan& plan, const Dropout& dropout, Activation activation) {
  using A = accumulate_t<S>;
  constexpr bool kWide = std::is_same_v<S, A>;
  const int64_t dim = x.size(1), hidden = w1.size(1), assignments = plan.order.numel();
  const int64_t block = plan.largest_block(kBlockRows);
  const bool have_z = saved.size(0) == assignments;
  const ParameterGradient<S> grad_w1(w1), grad_b1(b1), grad_w2(w2), grad_b2(b2);
  const Tensor grad_gates = torch::stable::new_zeros(gates, gates.sizes());
  const Tensor grad_x = empty({plan.tokens, dim}, x.scalar_type());
  const Tensor grad_rows = empty({assignments, dim}, scalar_type<A>);
  const Tensor xs = empty({block, dim}, scalar_type<A>), dys = empty({block, dim}, scalar_type<A>);
  const Tensor dz = empty({block, hidden}, scalar_type<A>), active = empty({block, hidden}, scalar_type<A>);
  const Tensor scratch_z = empty({have_z && kWide ? 0 : block, hidden}, scalar_type<A>);
  const bool several = plan.largest_block(assignments) > block;
  const Tensor scratch_w1 = empty({several ? hidden : 0, dim}, scalar_type<A>);
  const Tensor scratch_w2 = empty({several ? dim : 0, hidden}, scalar_type<A>);
  const A* gate = data<A>(gates);
  A* gate_grad = mutable_data<A>(grad_gates);

  int64_t current = -1;
  Tensor weight1 = w1, weight2 = w2;
  plan.for_blocks(block, [&](int64_t e, int64_t first, int64_t rows) {
    const bool again = e == current;
    if (!again) {
      weight1 = expert_weight<S>(w1, e);
      weight2 = expert_weight<S>(w2, e);
      current = e;
    }
    gather_rows(plan, data<S>(x), dim, first, rows, xs);
    gather_rows(plan, data<S>(grad), dim, first, rows, dys);
    const Tensor x_rows = rows_of(xs, 0, rows), dy_rows = rows_of(dys, 0, rows);
    const Tensor dz_rows = rows_of(dz, 0, rows), active_rows = rows_of(active, 0, rows);

    const Tensor z = have_z && kWide ? rows_of(saved, first, rows) : rows_of(scratch_z, 0, rows);
    if (!have_z) multiply(z, x_rows, transposed(weight1));
    A* z_data = mutable_data<A>(z);
    const S* stored = have_z ? data<S>(saved) + first * hidden : nullptr;
    const S *bias1 = data<S>(b1) + e * hidden, *bias2 = data<S>(b2) + e * dim;

    multiply(dz_rows, dy_rows, weight2);
    const A* dy = data<A>(dys);
    A *dz_data = mutable_data<A>(dz), *active_data = mutable_data<A>(active);
    RowSums sums(rows, hidden + dim);  // of dz, then of gate · dy
    sums.for_chunks([&](int64_t begin, int64_t end, double* sum) {
      std::vector<A> factors(dropout.active ? hidden : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t a = plan.assignment[first + i];
        A *row = z_data + i * hidden, *dz_row = dz_data + i * hidden;
        const A* dy_row = dy + i * dim;
        if (!have_z) {
          for (int64_t c = 0; c < hidden; ++c) row[c] += static_cast<A>(bias1[c]);
        } else if (!kWide) {
          convert(stored + i * hidden, row, hidden);
        }
        const A* mask = dropout.mask(plan.token(first + i), e, plan.num_experts, factors);
        A dot = activation_backward(activation, row, mask, gate[a], dz_row, active_data + i * hidden, hidden);
        for (int64_t c = 0; c < dim; ++c) dot += dy_row[c] * static_cast<A>(bias2[c]);
        gate_grad[a] = dot;
        add_scaled(dz_row, A{1}, hidden, sum);
        add_scaled(dy_row, gate[a], dim, sum + hidden);
      }
    });
    sums.store(0, hidden, again, mutable_data<A>(grad_b1.expert(e)));
    sums.store(hidden, dim, again, mutable_data<A>(grad_b2.expert(e)));

    accumulate_product<A>(grad_w2.expert(e), scratch_w2, transposed(dy_rows), active_rows, again);
    accumulate_product<A>(grad_w1.expert(e), scratch_w1, transposed(dz_rows), x_rows, again);
    multiply(rows_of(grad_rows, first, rows), dz_rows, weight1);
    if (first + rows == plan.offset[e + 1]) {
      for (const auto* parameter : {&grad_w1, &grad_b1, &grad_w2, &grad_b2}) parameter->store(e);
    }
  });

  for (int64_t e = 0; e < plan.num_experts; ++e) {
    if (plan.offset[e] < plan.offset[e + 1]) continue;
    for (const auto* parameter : {&grad_w1, &grad_b1, &grad_w2, &grad_b2}) parameter->clear(e);
  }

  const A* from = data<A>(grad_rows);
  S* to = mutable_data<S>(grad_x);
  torch::stable::parallel_for(0, plan.tokens, grain(dim * plan.top_k), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(dim);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), A{0});
      for (int64_t j = 0; j < plan.top_k; ++j) {
        const int64_t row = plan.position[t * plan.top_k + j];
        if (row >= plan.kept) continue;
        for (int64_t c = 0; c < dim; ++c) sum[c] += from[row * dim + c];
      }
      convert(sum.data(), to + t * dim, dim);
    }
  });
  return {grad_x, grad_w1.grad, grad_b1.grad, grad_w2.grad, grad_b2.grad, grad_gates};
}

std::tuple<Tensor, Tensor> expert_ffn(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor gates, Tensor order,
                                      Tensor offsets, Tensor inverse, std::optional<Tensor> seed,
                                      std::string activation, double dropout_p, bool save_preactivation) {
  return by_dtype("x", x.scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(dense(x), dense(w1), dense(b1), dense(w2), dense(b2), dense(gates),
                                   Plan(order, offsets, inverse), Dropout(seed, dropout_p),
                                   activation_by_name(activation), save_preactivation);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor gates, Tensor preactivation, Tensor order,
    Tensor offsets, Tensor inverse, std::optional<Tensor> seed, std::string activation, double dropout_p) {
  return by_dtype("x", x.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(dense(grad), dense(x), dense(w1), dense(b1), dense(w2), dense(b2), dense(gates),
                                    dense(preactivation), Plan(order, offsets, inverse), Dropout(seed, dropout_p),
                                    activation_by_name(activation));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_ffn", TORCH_BOX(&expert_ffn));
  m.impl("expert_ffn_backward", TORCH_BOX(&expert_ffn_backward));
}

}  // namespace moe_kernels
