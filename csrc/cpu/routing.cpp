// routing and its gradient; specified in moe_kernels/ops/routing.py. All arithmetic is float or double.
//
// Chunks of tokens go from x to everything that is decided about them while they are in cache. The products are in
// isa/routing.h, the decisions in selection.h. No result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common.h"
#include "isa.h"
#include "memory.h"
#include "selection.h"
#include "vector_math.h"

#define MOE_FOR_EACH_ISA "isa/routing.h"

namespace moe_kernels {
namespace {

constexpr double kSmallestNorm = 1e-12;             // torch.nn.functional.normalize's
constexpr double kMaxLogScale = 4.605170185988092;  // ln 100
constexpr int64_t kPartRows = 64;                   // of the gradient of a weight, in one task

// What the logits are made from: tokens x (…, dim), a projection (features, dim) with bias or none, and the directions
// (experts, stride) of what it gives, or of the tokens themselves.
template <class T>
struct RoutingForward {
  const T *x, *projection, *bias, *directions;
  int64_t stride;
  T scale;
  int64_t dim, features, experts;
  T *logits, *projected;
};

#include "for_each_isa.h"

// The rows of the embedding at unit length, and their norms (never below kSmallestNorm).
template <class T>
struct Directions {
  explicit Directions(const Tensor& embedding)
      : experts(embedding.size(0)),
        features(embedding.size(1)),
        stride((features + 15) / 16 * 16),
        unit(experts * stride),
        norm(experts),
        clamped(experts) {
    const T* from = data<T>(embedding);
    for (int64_t e = 0; e < experts; ++e) {
      double square = 0;
      for (int64_t i = 0; i < features; ++i)
        square += static_cast<double>(from[e * features + i]) * from[e * features + i];
      clamped[e] = std::sqrt(square) < kSmallestNorm;
      norm[e] = clamped[e] ? kSmallestNorm : std::sqrt(square);
      for (int64_t i = 0; i < features; ++i) unit[e * stride + i] = static_cast<T>(from[e * features + i] / norm[e]);
    }
  }

  int64_t experts, features, stride;  // the rows are padded with zeros, to whole vectors
  std::vector<T> unit;
  std::vector<double> norm;
  std::vector<bool> clamped;
};

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  T sum{0};
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
T scale_of(const Tensor& log_scale) {
  return std::exp(std::min(*data<T>(log_scale), static_cast<T>(kMaxLogScale)));
}

template <class F>
auto by_wide_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32 or float64, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return f(float{});
}

// Logits and selection of all tokens.
template <class T>
SelectionOutputs run_forward(const RoutingForward<T>& call, const Selection& selection, int64_t tokens) {
  Selector<T> selector(selection, tokens);
  const int64_t space = MOE_BY_ISA(logits_space<T>, kChunk, call.dim, call.features, call.experts);
  const Scratch<T> memory(threads() * space);
  share(chunks(tokens), [&](int64_t thread, int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(tokens, begin + kChunk);
    MOE_BY_ISA(block_logits, call, begin, end - begin, memory.data() + thread * space);
    selector.select(call.logits, begin, end, chunk);
  });
  return selector.finish();
}

// out (rows, columns) = Σ_t packed[t] ⊗ b[t].
template <class T>
void transposed_product(const T* packed, int64_t tokens, const Columns<T>& b, int64_t rows, int64_t columns, T* out) {
  torch::stable::parallel_for(0, MOE_BY_ISA(transposed_parts<T>, rows, columns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      MOE_BY_ISA(transposed_part, packed, tokens, b, rows, columns, part, out);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routing_cosine(
    Tensor x_in, Tensor projection_in, Tensor bias_in, Tensor embedding_in, Tensor log_scale,
    std::optional<Tensor> seed, int64_t top_k, double noise_std, bool renormalize) {
  const Tensor x = dense(x_in), projection = dense(projection_in), bias = dense(bias_in);
  const Tensor embedding = dense(embedding_in);
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), features = projection.size(0), experts = embedding.size(0);
    const Tensor logits = empty({tokens, experts}, scalar_type<T>);
    const Tensor projected = take_tensor({tokens, features}, scalar_type<T>);
    const Directions<T> directions(embedding);
    const RoutingForward<T> call{data<T>(x),
                                 data<T>(projection),
                                 data<T>(bias),
                                 directions.unit.data(),
                                 directions.stride,
                                 scale_of<T>(log_scale),
                                 x.size(1),
                                 features,
                                 experts,
                                 mutable_data<T>(logits),
                                 mutable_data<T>(projected)};
    const auto out = run_forward(call, make_selection(experts, seed, top_k, noise_std, renormalize), tokens);
    return std::make_tuple(out.gates, out.experts, out.counts, out.sums, out.totals, out.confidence, logits, projected);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routing_cosine_backward(
    Tensor grad_gates, Tensor grad_sums, Tensor grad_totals, Tensor x_in, Tensor projection_in, Tensor embedding_in,
    Tensor log_scale, Tensor logits_in, Tensor projected_in, Tensor experts_in, std::optional<Tensor> seed,
    int64_t top_k, double noise_std, bool renormalize) {
  const Tensor x = dense(x_in), projection = dense(projection_in), embedding = dense(embedding_in);
  const Tensor logits = dense(logits_in), projected = dense(projected_in);
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), dim = x.size(1), features = projection.size(0), experts = embedding.size(0);
    const SelectionGradient<T> gradient(make_selection(experts, seed, top_k, noise_std, renormalize), grad_gates,
                                        grad_sums, grad_totals, experts_in);
    const Directions<T> directions(embedding);
    const T scale = scale_of<T>(log_scale);
    const T *l = data<T>(logits), *q = data<T>(projected);
    const Tensor grad_x = empty({tokens, dim}, scalar_type<T>);

    const Scratch<T> of_projection(MOE_BY_ISA(readable_space<T>, features, dim));
    const Columns<T> matrix = MOE_BY_ISA(readable<T>, data<T>(projection), features, dim, of_projection.data());
    const Scratch<T> packed_dq(MOE_BY_ISA(packed_space<T>, tokens, features));
    const Scratch<T> packed_weights(MOE_BY_ISA(packed_space<T>, tokens, experts));  // s dL / ‖q‖
    const int64_t space = kChunk * (features + experts + 1);
    const Scratch<T> memory(threads() * space);
    // A chunk's share of the gradients of the bias and, last, of the logarithm of the scale.
    const int64_t width = features + 1;
    std::vector<double> partial(chunks(tokens) * width, 0.0);
    share(chunks(tokens), [&](int64_t thread, int64_t chunk) {
      T *dq = memory.data() + thread * space, *weights = dq + kChunk * features, *along_q = weights + kChunk * experts;
      const int64_t begin = chunk * kChunk, count = std::min(tokens, begin + kChunk) - begin;
      double* sums = partial.data() + chunk * width;
      Row<T> row(experts);
      for (int64_t i = 0; i < count; ++i) {
        T* w = weights + i * experts;
        gradient.logits(row, l + (begin + i) * experts, begin + i, w);
        const T along = dot(w, l + (begin + i) * experts, experts);  // Σ_e dL_e L_e
        const T norm = std::sqrt(dot(q + (begin + i) * features, q + (begin + i) * features, features));
        const bool clamped = norm < T(kSmallestNorm);
        const T inverse = T(1) / (clamped ? T(kSmallestNorm) : norm);
        for (int64_t e = 0; e < experts; ++e) w[e] *= scale * inverse;
        along_q[i] = clamped ? T(0) : -along * inverse * inverse;
        sums[features] += along;
      }
      MOE_BY_ISA(project_back<T>, weights, experts, directions.unit.data(), directions.stride, q + begin * features,
                 along_q, count, features, dq);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < features; ++c) sums[c] += dq[i * features + c];
      }
      MOE_BY_ISA(block_gradient<T>, dq, features, matrix, dim, begin, count, tokens, packed_dq.data(),
                 mutable_data<T>(grad_x));
      MOE_BY_ISA(block_gradient<T>, weights, experts, matrix, dim, begin, count, tokens, packed_weights.data(),
                 nullptr);
    });

    const Tensor grad_projection = empty({features, dim}, scalar_type<T>);
    const Tensor grad_bias = empty({features}, scalar_type<T>);
    const Tensor grad_embedding = empty({experts, features}, scalar_type<T>);
    const Tensor grad_log_scale = empty({1}, scalar_type<T>);
    const Scratch<T> of_x(MOE_BY_ISA(readable_space<T>, tokens, dim));
    const Scratch<T> of_q(MOE_BY_ISA(readable_space<T>, tokens, features));
    transposed_product<T>(packed_dq.data(), tokens, MOE_BY_ISA(readable<T>, data<T>(x), tokens, dim, of_x.data()),
                          features, dim, mutable_data<T>(grad_projection));
    transposed_product<T>(packed_weights.data(), tokens, MOE_BY_ISA(readable<T>, q, tokens, features, of_q.data()),
                          experts, features, mutable_data<T>(grad_embedding));  // of the unit directions
    T* de = mutable_data<T>(grad_embedding);
    for (int64_t e = 0; e < experts; ++e) {
      T* row = de + e * features;
      const T* unit = directions.unit.data() + e * directions.stride;
      const T along = directions.clamped[e] ? T(0) : dot(row, unit, features);
      for (int64_t i = 0; i < features; ++i) row[i] = static_cast<T>((row[i] - along * unit[i]) / directions.norm[e]);
    }
    std::vector<double> total(width, 0.0);
    for (int64_t chunk = 0; chunk < chunks(tokens); ++chunk) {
      for (int64_t i = 0; i < width; ++i) total[i] += partial[chunk * width + i];
    }
    convert(total.data(), mutable_data<T>(grad_bias), features);
    const bool limited = *data<T>(log_scale) > static_cast<T>(kMaxLogScale);
    *mutable_data<T>(grad_log_scale) = limited ? T(0) : static_cast<T>(total[features]);
    return std::make_tuple(grad_x, grad_projection, grad_bias, grad_embedding, grad_log_scale);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routing_linear(Tensor x_in, Tensor weight_in,
                                                                                  std::optional<Tensor> seed,
                                                                                  int64_t top_k, double noise_std,
                                                                                  bool renormalize) {
  const Tensor x = dense(x_in), weight = dense(weight_in);
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), dim = x.size(1), experts = weight.size(0);
    const Tensor logits = empty({tokens, experts}, scalar_type<T>);
    const RoutingForward<T> call{data<T>(x), nullptr, nullptr, data<T>(weight),         dim,    T(1),
                                 dim,        0,       experts, mutable_data<T>(logits), nullptr};
    const auto out = run_forward(call, make_selection(experts, seed, top_k, noise_std, renormalize), tokens);
    return std::make_tuple(out.gates, out.experts, out.counts, out.sums, out.totals, out.confidence, logits);
  });
}

std::tuple<Tensor, Tensor> routing_linear_backward(Tensor grad_gates, Tensor grad_sums, Tensor grad_totals, Tensor x_in,
                                                   Tensor weight_in, Tensor logits_in, Tensor experts_in,
                                                   std::optional<Tensor> seed, int64_t top_k, double noise_std,
                                                   bool renormalize) {
  const Tensor x = dense(x_in), weight = dense(weight_in), logits = dense(logits_in);
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), dim = x.size(1), experts = weight.size(0);
    const SelectionGradient<T> gradient(make_selection(experts, seed, top_k, noise_std, renormalize), grad_gates,
                                        grad_sums, grad_totals, experts_in);
    const Tensor grad_x = empty({tokens, dim}, scalar_type<T>);
    const Tensor grad_weight = empty({experts, dim}, scalar_type<T>);
    const Scratch<T> of_weight(MOE_BY_ISA(readable_space<T>, experts, dim));
    const Columns<T> matrix = MOE_BY_ISA(readable<T>, data<T>(weight), experts, dim, of_weight.data());
    const Scratch<T> packed(MOE_BY_ISA(packed_space<T>, tokens, experts)), memory(threads() * kChunk * experts);
    share(chunks(tokens), [&](int64_t thread, int64_t chunk) {
      T* dl = memory.data() + thread * kChunk * experts;
      const int64_t begin = chunk * kChunk, count = std::min(tokens, begin + kChunk) - begin;
      Row<T> row(experts);
      for (int64_t i = 0; i < count; ++i) {
        gradient.logits(row, data<T>(logits) + (begin + i) * experts, begin + i, dl + i * experts);
      }
      MOE_BY_ISA(block_gradient<T>, dl, experts, matrix, dim, begin, count, tokens, packed.data(),
                 mutable_data<T>(grad_x));
    });
    const Scratch<T> of_x(MOE_BY_ISA(readable_space<T>, tokens, dim));
    transposed_product<T>(packed.data(), tokens, MOE_BY_ISA(readable<T>, data<T>(x), tokens, dim, of_x.data()), experts,
                          dim, mutable_data<T>(grad_weight));
    return std::make_tuple(grad_x, grad_weight);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("routing_cosine", TORCH_BOX(&routing_cosine));
  m.impl("routing_cosine_backward", TORCH_BOX(&routing_cosine_backward));
  m.impl("routing_linear", TORCH_BOX(&routing_linear));
  m.impl("routing_linear_backward", TORCH_BOX(&routing_linear_backward));
}

}  // namespace moe_kernels
