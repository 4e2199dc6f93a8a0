// From a token's logits to its experts, gates and statistics, and the gradient of these; specified in
// moe_kernels/ops/routing.py.
//
// Sums over tokens are taken in chunks of a fixed number of tokens, in double, and the chunks added in order, so that
// they do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/philox.h"
#include "common.h"
#include "vector_math.h"

namespace moe_kernels {

constexpr int64_t kChunk = 96;  // tokens

struct Selection {
  int64_t num_experts, top_k;
  double noise_std;
  bool noisy, renormalize;
  uint64_t seed;
};

inline Selection make_selection(int64_t num_experts, const std::optional<Tensor>& seed, int64_t top_k, double noise_std,
                                bool renormalize) {
  return {num_experts,      top_k,       noise_std,
          seed.has_value(), renormalize, seed ? static_cast<uint64_t>(*data<int64_t>(*seed)) : 0};
}

inline int64_t chunks(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

template <class T>
MOE_INLINE void softmax(const T* logits, int64_t n, T* out, T& log_partition) {
  T largest = logits[0];
  for (int64_t e = 1; e < n; ++e) largest = std::max(largest, logits[e]);
  T sum{0};
  for (int64_t e = 0; e < n; ++e) out[e] = exponential(logits[e] - largest);
  for (int64_t e = 0; e < n; ++e) sum += out[e];
  for (int64_t e = 0; e < n; ++e) out[e] /= sum;
  log_partition = largest + std::log(sum);
}

// One token's clean logits L, noisy logits N and their softmaxes C and P.
template <class T>
struct Row {
  explicit Row(int64_t n) : noisy(n), clean(n), routed(n), d_clean(n), d_routed(n) {}

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

  std::vector<T> noisy, clean, routed, d_clean, d_routed;
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

// Everything that routing computes from clean logits.
struct SelectionOutputs {
  Tensor gates, experts, counts, sums, totals, confidence;
};

// The selection of all tokens, a chunk at a time in any order, then finish().
template <class T>
class Selector {
 public:
  Selector(const Selection& selection, int64_t tokens)
      : s_(selection),
        tokens_(tokens),
        out_{empty({tokens, s_.top_k}, scalar_type<T>),
             empty({tokens, s_.top_k}, ScalarType::Long),
             empty({s_.top_k, s_.num_experts}, ScalarType::Long),
             empty({4, s_.num_experts}, scalar_type<T>),
             empty({2}, scalar_type<T>),
             empty({tokens}, scalar_type<T>)},
        sums_(chunks(tokens) * width(), 0.0),
        counts_(chunks(tokens) * s_.top_k * s_.num_experts, 0) {}

  void select(const T* logits, int64_t begin, int64_t end, int64_t chunk) {
    const int64_t experts = s_.num_experts, k = s_.top_k;
    T *gate = mutable_data<T>(out_.gates), *surest = mutable_data<T>(out_.confidence);
    Row<T> row(experts);
    double *scores = &sums_[chunk * width()], *importance = scores + experts, *load = importance + experts;
    double *scaled_load = load + experts, *total = scaled_load + experts;
    int64_t* count = counts_.data() + chunk * k * experts;
    for (int64_t t = begin; t < end; ++t) {
      const T* l = logits + t * experts;
      int64_t* chosen = mutable_data<int64_t>(out_.experts) + t * k;
      row.fill(s_, l, t);
      select_largest(row.routed.data(), experts, k, chosen);
      surest[t] = row.routed[chosen[0]];
      T sum{0};
      for (int64_t j = 0; j < k; ++j) {
        gate[t * k + j] = row.routed[chosen[j]];
        sum += gate[t * k + j];
        ++count[j * experts + chosen[j]];
      }
      if (s_.renormalize) {
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
        if (s_.noisy) {
          load[e] += normal_cdf(static_cast<double>(l[e] - threshold) / s_.noise_std);
          scaled_load[e] += normal_cdf(static_cast<double>(row.clean[e] - threshold) / s_.noise_std);
        }
      }
      total[0] += static_cast<double>(row.log_partition) * row.log_partition;
      total[1] += entropy;
    }
  }

  const SelectionOutputs& finish() {
    std::vector<double> all(width(), 0.0);
    const int64_t cells = s_.top_k * s_.num_experts;
    int64_t* count = mutable_data<int64_t>(out_.counts);
    std::fill_n(count, cells, 0);
    for (int64_t chunk = 0; chunk < chunks(tokens_); ++chunk) {
      for (int64_t i = 0; i < width(); ++i) all[i] += sums_[chunk * width() + i];
      for (int64_t i = 0; i < cells; ++i) count[i] += counts_[chunk * cells + i];
    }
    convert(all.data(), mutable_data<T>(out_.sums), 4 * s_.num_experts);
    convert(all.data() + 4 * s_.num_experts, mutable_data<T>(out_.totals), 2);
    return out_;
  }

 private:
  int64_t width() const { return 4 * s_.num_experts + 2; }  // of a chunk's sums

  Selection s_;
  int64_t tokens_;
  SelectionOutputs out_;
  std::vector<double> sums_;
  std::vector<int64_t> counts_;
};

// Gradient of everything that Selector computes, by the clean logits of one token.
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

    std::vector<T>&d_routed = row.d_routed, &d_clean = row.d_clean;
    std::copy_n(g_scores, n, d_routed.begin());
    std::copy_n(g_importance, n, d_clean.begin());
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

}  // namespace moe_kernels
