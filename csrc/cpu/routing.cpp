// routing and its gradient; specified in moe_kernels/ops/routing.py. All arithmetic is float or double.
//
// Sums over tokens are taken in chunks of a fixed number of tokens, in double, and the chunks added in order,
// so that they do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../common/philox.h"
#include "common.h"
#include "vector_math.h"

namespace moe_kernels {
namespace {

constexpr int64_t kChunk = 128;                     // tokens
constexpr double kEps = 1e-12;                      // the smallest norm, torch.nn.functional.normalize's
constexpr double kMaxLogScale = 4.605170185988092;  // ln 100

struct Selection {
  int64_t num_experts, top_k;
  double noise_std;
  bool noisy, renormalize;
  uint64_t seed;
};

Selection make_selection(int64_t num_experts, const std::optional<Tensor>& seed, int64_t top_k, double noise_std,
                         bool renormalize) {
  return {num_experts,      top_k,       noise_std,
          seed.has_value(), renormalize, seed ? static_cast<uint64_t>(*data<int64_t>(*seed)) : 0};
}

// Number of chunks, and f(first token, last token, chunk) in parallel for each.
int64_t chunks(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

template <class F>
void for_chunks(int64_t tokens, const F& f) {
  torch::stable::parallel_for(0, chunks(tokens), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      f(chunk * kChunk, std::min(tokens, (chunk + 1) * kChunk), chunk);
    }
  });
}

template <class T>
void softmax(const T* logits, int64_t n, T* out, T& log_partition) {
  T largest = logits[0];
  for (int64_t e = 1; e < n; ++e) largest = std::max(largest, logits[e]);
  T sum{0};
  for (int64_t e = 0; e < n; ++e) sum += out[e] = std::exp(logits[e] - largest);
  for (int64_t e = 0; e < n; ++e) out[e] /= sum;
  log_partition = largest + std::log(sum);
}

// One token's clean logits L, noisy logits N and their softmaxes C and P.
template <class T>
struct Row {
  explicit Row(int64_t n) : noisy(n), clean(n), routed(n) {}

  void fill(const Selection& s, const T* logits, int64_t token) {
    softmax(logits, s.num_experts, clean.data(), log_partition);
    std::copy_n(logits, s.num_experts, noisy.data());
    routed = clean;
    if (!s.noisy) return;
    for (int64_t e = 0; e < s.num_experts; ++e) {
      noisy[e] += static_cast<T>(s.noise_std) * static_cast<T>(normal(s.seed, token * s.num_experts + e));
    }
    T unused;
    softmax(noisy.data(), s.num_experts, routed.data(), unused);
  }

  std::vector<T> noisy, clean, routed;
  T log_partition;
};

// The k largest of values, ties to the lowest index; NaN counts as the largest.
template <class T>
void select_largest(const T* values, int64_t n, int64_t k, int64_t* chosen) {
  const auto before = [](T a, T b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; ++e) {
      if (std::find(chosen, chosen + j, e) != chosen + j) continue;
      if (best < 0 || before(values[e], values[best])) best = e;
    }
    chosen[j] = best;
  }
}

struct SelectionOutputs {
  Tensor gates, experts, counts, sums, totals, confidence;
};

template <class T>
SelectionOutputs select_experts(const Selection& s, const Tensor& logits_tensor) {
  const int64_t tokens = logits_tensor.size(0), experts = s.num_experts, k = s.top_k;
  const Tensor gates = empty({tokens, k}, scalar_type<T>), ids = empty({tokens, k}, ScalarType::Long);
  const Tensor counts = empty({k, experts}, ScalarType::Long);
  const Tensor sums = empty({4, experts}, scalar_type<T>), totals = empty({2}, scalar_type<T>);
  const Tensor confidence = empty({tokens}, scalar_type<T>);
  const T* logits = data<T>(logits_tensor);
  T *gate = mutable_data<T>(gates), *surest = mutable_data<T>(confidence);
  int64_t* id = mutable_data<int64_t>(ids);
  // A chunk's share: 4 E sums, 2 totals; k E counts.
  const int64_t width = 4 * experts + 2;
  std::vector<double> partial(chunks(tokens) * width, 0.0);
  std::vector<int64_t> partial_counts(chunks(tokens) * k * experts, 0);

  for_chunks(tokens, [&](int64_t begin, int64_t end, int64_t chunk) {
    Row<T> row(experts);
    double *scores = &partial[chunk * width], *importance = scores + experts, *load = importance + experts;
    double *scaled_load = load + experts, *total = scaled_load + experts;
    int64_t* count = partial_counts.data() + chunk * k * experts;
    for (int64_t t = begin; t < end; ++t) {
      const T* l = logits + t * experts;
      int64_t* chosen = id + t * k;
      row.fill(s, l, t);
      select_largest(row.routed.data(), experts, k, chosen);
      surest[t] = row.routed[chosen[0]];
      T sum{0};
      for (int64_t j = 0; j < k; ++j) {
        gate[t * k + j] = row.routed[chosen[j]];
        sum += gate[t * k + j];
        ++count[j * experts + chosen[j]];
      }
      if (s.renormalize) {
        const T floor = std::numeric_limits<T>::epsilon();
        const T divisor = sum < floor ? floor : sum;
        for (int64_t j = 0; j < k; ++j) gate[t * k + j] /= divisor;
      }
      double entropy = row.log_partition;
      const T threshold = row.noisy[chosen[k - 1]];
      for (int64_t e = 0; e < experts; ++e) {
        scores[e] += row.routed[e];
        importance[e] += row.clean[e];
        entropy -= static_cast<double>(row.clean[e]) * l[e];
        if (s.noisy) {
          load[e] += normal_cdf(static_cast<double>(l[e] - threshold) / s.noise_std);
          scaled_load[e] += normal_cdf(static_cast<double>(row.clean[e] - threshold) / s.noise_std);
        }
      }
      total[0] += static_cast<double>(row.log_partition) * row.log_partition;
      total[1] += entropy;
    }
  });

  std::vector<double> all(width, 0.0);
  int64_t* count = mutable_data<int64_t>(counts);
  std::fill_n(count, k * experts, 0);
  for (int64_t chunk = 0; chunk < chunks(tokens); ++chunk) {
    for (int64_t i = 0; i < width; ++i) all[i] += partial[chunk * width + i];
    for (int64_t i = 0; i < k * experts; ++i) count[i] += partial_counts[chunk * k * experts + i];
  }
  convert(all.data(), mutable_data<T>(sums), 4 * experts);
  convert(all.data() + 4 * experts, mutable_data<T>(totals), 2);
  return {gates, ids, counts, sums, totals, confidence};
}

// Gradient of everything that select_experts computes, by the clean logits of one token.
template <class T>
struct SelectionGradient {
  SelectionGradient(const Selection& selection, const Tensor& grad_gates, const Tensor& grad_sums,
                    const Tensor& grad_totals, const Tensor& experts)
      : s(selection),
        gates(dense(grad_gates)),
        sums(dense(grad_sums)),
        totals(dense(grad_totals)),
        ids(dense(experts)) {}

  void logits(Row<T>& row, const T* l, int64_t token, T* grad) const {
    const int64_t n = s.num_experts, k = s.top_k;
    const T *g_scores = data<T>(sums), *g_importance = g_scores + n, *g_load = g_importance + n;
    const T *g_scaled = g_load + n, *g_gates = data<T>(gates) + token * k;
    const T g_z = data<T>(totals)[0], sigma = static_cast<T>(s.noise_std);
    const int64_t* chosen = data<int64_t>(ids) + token * k;
    row.fill(s, l, token);

    std::vector<T> d_routed(g_scores, g_scores + n), d_clean(g_importance, g_importance + n);
    T sum{1}, mean{0};
    if (s.renormalize) {
      sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += row.routed[chosen[j]];
      const T floor = std::numeric_limits<T>::epsilon();
      if (sum < floor) {
        sum = floor;  // the sum is a constant there
      } else {
        for (int64_t j = 0; j < k; ++j) mean += g_gates[j] * row.routed[chosen[j]] / sum;
      }
    }
    for (int64_t j = 0; j < k; ++j) d_routed[chosen[j]] += (g_gates[j] - mean) / sum;

    std::fill_n(grad, n, T{0});
    if (s.noisy) {
      const T threshold = row.noisy[chosen[k - 1]];
      T d_threshold{0};
      for (int64_t e = 0; e < n; ++e) {
        const T by_load = g_load[e] * normal_pdf((l[e] - threshold) / sigma) / sigma;
        const T by_scaled = g_scaled[e] * normal_pdf((row.clean[e] - threshold) / sigma) / sigma;
        grad[e] += by_load;
        d_clean[e] += by_scaled;
        d_threshold -= by_load + by_scaled;
      }
      grad[chosen[k - 1]] += d_threshold;
    }
    T routed_mean{0}, clean_mean{0};
    for (int64_t e = 0; e < n; ++e) {
      routed_mean += d_routed[e] * row.routed[e];
      clean_mean += d_clean[e] * row.clean[e];
    }
    const T d_partition = 2 * row.log_partition * g_z;
    for (int64_t e = 0; e < n; ++e) {
      grad[e] += row.routed[e] * (d_routed[e] - routed_mean) + row.clean[e] * (d_clean[e] - clean_mean + d_partition);
    }
  }

  Selection s;
  Tensor gates, sums, totals, ids;
};

// a · b and a · a over n features, for every row b of a matrix: what one token's logits are made of.
template <class T>
MOE_INLINE T dot(const T* a, const T* b, int64_t n) {
  T sum{0};
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
MOE_INLINE void add_bias_and_score(T* q, const T* bias, const T* directions, T scale, int64_t features, int64_t experts,
                                   T* logits) {
  for (int64_t i = 0; i < features; ++i) q[i] += bias[i];
  const T norm = std::sqrt(dot(q, q, features));
  const T factor = scale / (norm < T(kEps) ? T(kEps) : norm);
  for (int64_t e = 0; e < experts; ++e) logits[e] = factor * dot(q, directions + e * features, features);
}

MOE_MULTIVERSION
void score(float* q, const float* bias, const float* directions, float scale, int64_t features, int64_t experts,
           float* logits) {
  add_bias_and_score(q, bias, directions, scale, features, experts, logits);
}

MOE_MULTIVERSION
void score(double* q, const double* bias, const double* directions, double scale, int64_t features, int64_t experts,
           double* logits) {
  add_bias_and_score(q, bias, directions, scale, features, experts, logits);
}

// dq of one token from weights a_e = s dL_e / ‖q‖ of the directions, and the coefficient of q itself.
template <class T>
MOE_INLINE void combine_directions(const T* weights, const T* directions, const T* q, T along_q, int64_t features,
                                   int64_t experts, T* dq) {
  for (int64_t i = 0; i < features; ++i) dq[i] = along_q * q[i];
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < features; ++i) dq[i] += weights[e] * directions[e * features + i];
  }
}

MOE_MULTIVERSION
void project_back(const float* weights, const float* directions, const float* q, float along_q, int64_t features,
                  int64_t experts, float* dq) {
  combine_directions(weights, directions, q, along_q, features, experts, dq);
}

MOE_MULTIVERSION
void project_back(const double* weights, const double* directions, const double* q, double along_q, int64_t features,
                  int64_t experts, double* dq) {
  combine_directions(weights, directions, q, along_q, features, experts, dq);
}

// The rows of the embedding at unit length, and their norms (never below kEps).
template <class T>
struct Directions {
  explicit Directions(const Tensor& embedding)
      : experts(embedding.size(0)),
        features(embedding.size(1)),
        unit(experts * features),
        norm(experts),
        clamped(experts) {
    const T* from = data<T>(embedding);
    for (int64_t e = 0; e < experts; ++e) {
      double square = 0;
      for (int64_t i = 0; i < features; ++i)
        square += static_cast<double>(from[e * features + i]) * from[e * features + i];
      clamped[e] = std::sqrt(square) < kEps;
      norm[e] = clamped[e] ? kEps : std::sqrt(square);
      for (int64_t i = 0; i < features; ++i) unit[e * features + i] = static_cast<T>(from[e * features + i] / norm[e]);
    }
  }

  int64_t experts, features;
  std::vector<T> unit;
  std::vector<double> norm;
  std::vector<bool> clamped;
};

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routing_cosine(
    Tensor x, Tensor projection, Tensor bias_in, Tensor embedding_in, Tensor log_scale, std::optional<Tensor> seed,
    int64_t top_k, double noise_std, bool renormalize) {
  const Tensor bias = dense(bias_in), embedding = dense(embedding_in);
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), features = projection.size(0), experts = embedding.size(0);
    const Tensor logits = empty({tokens, experts}, scalar_type<T>);
    const Tensor projected = empty({tokens, features}, scalar_type<T>);
    multiply(projected, x, transposed(projection));
    const Directions<T> directions(embedding);
    const T scale = scale_of<T>(log_scale);
    T *q = mutable_data<T>(projected), *l = mutable_data<T>(logits);
    for_chunks(tokens, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t t = begin; t < end; ++t) {
        score(q + t * features, data<T>(bias), directions.unit.data(), scale, features, experts, l + t * experts);
      }
    });
    const auto out = select_experts<T>(make_selection(experts, seed, top_k, noise_std, renormalize), logits);
    return std::make_tuple(out.gates, out.experts, out.counts, out.sums, out.totals, out.confidence, logits, projected);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routing_cosine_backward(
    Tensor grad_gates, Tensor grad_sums, Tensor grad_totals, Tensor x, Tensor projection, Tensor embedding_in,
    Tensor log_scale, Tensor logits, Tensor projected, Tensor experts_in, std::optional<Tensor> seed, int64_t top_k,
    double noise_std, bool renormalize) {
  const Tensor embedding = dense(embedding_in);
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), features = projection.size(0), experts = embedding.size(0);
    const SelectionGradient<T> gradient(make_selection(experts, seed, top_k, noise_std, renormalize), grad_gates,
                                        grad_sums, grad_totals, experts_in);
    const Directions<T> directions(embedding);
    const T scale = scale_of<T>(log_scale);
    const Tensor d_projected = empty({tokens, features}, scalar_type<T>);
    const Tensor weights = empty({tokens, experts}, scalar_type<T>);  // s dL / ‖q‖
    const T *l = data<T>(logits), *q = data<T>(projected);
    T *dq = mutable_data<T>(d_projected), *weight = mutable_data<T>(weights);
    // A chunk's share of the gradients of the bias and, last, of the logarithm of the scale.
    const int64_t width = features + 1;
    std::vector<double> partial(chunks(tokens) * width, 0.0);
    for_chunks(tokens, [&](int64_t begin, int64_t end, int64_t chunk) {
      Row<T> row(experts);
      for (int64_t t = begin; t < end; ++t) {
        T* w = weight + t * experts;
        gradient.logits(row, l + t * experts, t, w);
        const T along = dot(w, l + t * experts, experts);  // Σ_e dL_e L_e
        const T norm = std::sqrt(dot(q + t * features, q + t * features, features));
        const bool clamped = norm < T(kEps);
        const T inverse = T(1) / (clamped ? T(kEps) : norm);
        for (int64_t e = 0; e < experts; ++e) w[e] *= scale * inverse;
        project_back(w, directions.unit.data(), q + t * features, clamped ? T(0) : -along * inverse * inverse, features,
                     experts, dq + t * features);
        double* sums = partial.data() + chunk * width;
        for (int64_t i = 0; i < features; ++i) sums[i] += dq[t * features + i];
        sums[features] += along;
      }
    });

    const Tensor grad_x = empty({tokens, x.size(1)}, scalar_type<T>);
    const Tensor grad_projection = empty({features, x.size(1)}, scalar_type<T>);
    const Tensor grad_bias = empty({features}, scalar_type<T>);
    const Tensor grad_embedding = empty({experts, features}, scalar_type<T>);
    const Tensor grad_log_scale = empty({1}, scalar_type<T>);
    multiply(grad_x, d_projected, projection);
    multiply(grad_projection, transposed(d_projected), x);
    multiply(grad_embedding, transposed(weights), projected);  // of the unit directions
    T* de = mutable_data<T>(grad_embedding);
    for (int64_t e = 0; e < experts; ++e) {
      T* row = de + e * features;
      const T* unit = directions.unit.data() + e * features;
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routing_linear(Tensor x, Tensor weight,
                                                                                  std::optional<Tensor> seed,
                                                                                  int64_t top_k, double noise_std,
                                                                                  bool renormalize) {
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t experts = weight.size(0);
    const Tensor logits = empty({x.size(0), experts}, scalar_type<T>);
    multiply(logits, x, transposed(weight));
    const auto out = select_experts<T>(make_selection(experts, seed, top_k, noise_std, renormalize), logits);
    return std::make_tuple(out.gates, out.experts, out.counts, out.sums, out.totals, out.confidence, logits);
  });
}

std::tuple<Tensor, Tensor> routing_linear_backward(Tensor grad_gates, Tensor grad_sums, Tensor grad_totals, Tensor x,
                                                   Tensor weight, Tensor logits, Tensor experts_in,
                                                   std::optional<Tensor> seed, int64_t top_k, double noise_std,
                                                   bool renormalize) {
  return by_wide_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tokens = x.size(0), experts = weight.size(0);
    const SelectionGradient<T> gradient(make_selection(experts, seed, top_k, noise_std, renormalize), grad_gates,
                                        grad_sums, grad_totals, experts_in);
    const Tensor d_logits = empty({tokens, experts}, scalar_type<T>);
    T* dl = mutable_data<T>(d_logits);
    for_chunks(tokens, [&](int64_t begin, int64_t end, int64_t) {
      Row<T> row(experts);
      for (int64_t t = begin; t < end; ++t) gradient.logits(row, data<T>(logits) + t * experts, t, dl + t * experts);
    });
    const Tensor grad_x = empty({tokens, x.size(1)}, scalar_type<T>);
    const Tensor grad_weight = empty({experts, x.size(1)}, scalar_type<T>);
    multiply(grad_x, d_logits, weight);
    multiply(grad_weight, transposed(d_logits), x);
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
