// The arithmetic of expert_ffn on blocks that fit into a core's cache. Included once for each instruction set
// (for_each_isa.h), so there is no guard.
//
// Forward: the tokens of a block lie side by side in panels, the rows of the weights are broadcast as they stand. So
// the hidden features come out as the panel that the second product reads, and no weight has to be packed.

#include "gemm.h"

// Features of the tiles that are finished together: a cache line of float, so that what is transposed fills lines.
constexpr int64_t kGroup = 16;

// Calls `call` with the struct of functions of the activation.
template <class Call>
MOE_INLINE auto by_activation(Activation kind, const Call& call) {
  switch (kind) {
    case Activation::kGeluTanh:
      return call(Gated<TanhCubic>{});
    case Activation::kQuickGelu:
      return call(Gated<QuickSlope>{});
    case Activation::kRelu:
      return call(Relu{});
    case Activation::kSilu:
      return call(Gated<Identity>{});
    default:
      return call(Gelu{});
  }
}

// Philox (common/philox.h) of n counters at once; words[w][i] is word w of counter i.
constexpr int64_t kCounters = 128;
inline void philox_words(uint64_t seed, const uint64_t* counters, int64_t n, uint32_t (*words)[kCounters]) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Words four = philox(seed, counters[i]);
    words[0][i] = four.word[0], words[1][i] = four.word[1], words[2][i] = four.word[2], words[3][i] = four.word[3];
  }
}

// The first counter of a row of hidden features.
template <class S>
MOE_INLINE uint64_t first_counter(const Ffn<S>& ffn, int64_t row, int64_t expert) {
  return static_cast<uint64_t>(ffn.plan.token(row) * ffn.plan.num_experts + expert) * ((ffn.hidden + 3) / 4);
}

template <class S>
MOE_INLINE accumulate_t<S> factor_of(const Ffn<S>& ffn, uint32_t word) {
  using A = accumulate_t<S>;
  return uniform(word) >= ffn.dropout.p ? A(ffn.dropout.scale) : A(0);
}

// The dropout factors of `features` features from `first`, a multiple of four, on and of `count` rows:
// factors[feature][width].
template <class S>
void factors_by_feature(const Ffn<S>& ffn, int64_t row, int64_t expert, int64_t first, int64_t features, int64_t count,
                        int64_t width, accumulate_t<S>* factors) {
  uint64_t counters[kCounters];
  uint32_t words[4][kCounters];
  for (int64_t f = 0; f < features; f += 4) {
    for (int64_t t = 0; t < count; ++t) counters[t] = first_counter(ffn, row + t, expert) + (first + f) / 4;
    philox_words(ffn.dropout.seed, counters, count, words);
    for (int64_t i = 0; i < std::min<int64_t>(4, features - f); ++i) {
      for (int64_t t = 0; t < count; ++t) {
        factors[(f + i) * width + t] = factor_of(ffn, words[i][t]);
      }
    }
  }
}

// The same of `rows` rows and of `count` features from any on: factors[row][width].
template <class S>
void factors_by_row(const Ffn<S>& ffn, int64_t row, int64_t expert, int64_t first, int64_t count, int64_t rows,
                    int64_t width, accumulate_t<S>* factors) {
  uint64_t counters[kCounters];
  uint32_t words[4][kCounters];
  const int64_t group = first / 4, groups = (first + count + 3) / 4 - group;
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t begin = first_counter(ffn, row + r, expert) + group;
    for (int64_t i = 0; i < groups; ++i) counters[r * groups + i] = begin + i;
  }
  philox_words(ffn.dropout.seed, counters, rows * groups, words);
  uint32_t in_order[4 * kCounters];
  for (int64_t i = 0; i < rows * groups; ++i) {
    for (int64_t w = 0; w < 4; ++w) in_order[4 * i + w] = words[w][i];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t* from = in_order + 4 * r * groups + first % 4;
    for (int64_t c = 0; c < count; ++c) factors[r * width + c] = factor_of(ffn, from[c]);
    std::fill(factors + r * width + count, factors + (r + 1) * width, accumulate_t<S>(0));
  }
}

// The parameter's rows [first, first + kTileRows), `count` of which are there: where they stand, or widened.
template <class S>
void weight_rows(const Parameter<S>& weight, int64_t first, int64_t count, int64_t stride, int64_t begin, int64_t depth,
                 accumulate_t<S>* buffer, const accumulate_t<S>** rows) {
  using A = accumulate_t<S>;
  if (weight.wide) {
    tile_rows(static_cast<const A*>(weight.data) + first * stride + begin, stride, count, rows);
    return;
  }
  for (int64_t i = 0; i < std::min<int64_t>(count, kTileRows); ++i) {
    weight.load((first + i) * stride + begin, depth, buffer + i * depth);
  }
  tile_rows(buffer, depth, count, rows);
}

// What a thread works in. Sizes in elements.
template <class A>
struct Space {
  // Columns of the panels of a block of rows.
  static int64_t columns(int64_t rows) {
    return rows / kPanelWidth<A> * kPanelWidth<A> + panel_width<A>(rows % kPanelWidth<A>);
  }
  Space(int64_t rows, int64_t dim, int64_t hidden)
      : panel_columns(columns(rows)),
        hidden_block(block_of_hidden(panel_columns, dim, hidden)),
        x(panel_columns * dim),
        y(panel_columns * round_up(dim, kTileRows)),
        h(panel_columns * round_up(hidden_block, kGroup)),
        group(kGroup * kPanelWidth<A>),
        weights(kTileRows * std::max(dim, hidden_block)) {}

  // A block's tokens, hidden features and outputs should stay in the second cache.
  static int64_t block_of_hidden(int64_t columns, int64_t dim, int64_t hidden) {
    constexpr int64_t kBytes = 900 << 10;
    const int64_t left = kBytes / static_cast<int64_t>(sizeof(A)) / std::max<int64_t>(columns, 1) - 2 * dim;
    return std::clamp(std::max(left / kChain, int64_t{1}) * kChain, int64_t{1}, std::max(hidden, int64_t{1}));
  }

  int64_t size() const { return x + y + h + 2 * group + weights; }

  int64_t panel_columns, hidden_block, x, y, h;
  int64_t group;  // of pre-activations and of dropout factors
  int64_t weights;
};

// Tokens side by side: panels [dim][width], the columns that are not there zero.
template <class S>
void pack_tokens(const Ffn<S>& ffn, const Rows& rows, accumulate_t<S>* x) {
  using A = accumulate_t<S>;
  for_panels<A>(rows.count, [&](int64_t first, int64_t count, int64_t width) MOE_INLINE_LAMBDA {
    A* panel = x + first * ffn.dim;
    const S* tokens[kPanelWidth<A>];
    for (int64_t t = 0; t < count; ++t) tokens[t] = ffn.x + ffn.plan.token(rows.first + first + t) * ffn.dim;
    transpose<A>(
        ffn.dim, count, [&](int64_t t) MOE_INLINE_LAMBDA { return tokens[t]; },
        [&](int64_t c) MOE_INLINE_LAMBDA { return panel + c * width; },
        [](A value) MOE_INLINE_LAMBDA { return value; });
    for (int64_t c = 0; c < ffn.dim && count < width; ++c) {
      std::fill(panel + c * width + count, panel + (c + 1) * width, A(0));
    }
  });
}

// z = w1 x + b1 of the hidden features [begin, end), `kGroup` at a time: finish(feature, features, first column, valid
// columns, width, z) with z[feature][width].
template <class S, class Finish>
MOE_INLINE void first_product(const Ffn<S>& ffn, const Rows& rows, int64_t begin, int64_t end, const accumulate_t<S>* x,
                              accumulate_t<S>* z, accumulate_t<S>* weights, const Finish& finish) {
  using A = accumulate_t<S>;
  for (int64_t f = begin; f < end; f += kGroup) {
    const int64_t features = std::min(kGroup, end - f);
    for_panels<A>(rows.count, [&](int64_t first, int64_t count, int64_t width) MOE_INLINE_LAMBDA {
      for (int64_t i = 0; i < features; i += kTileRows) {
        const A* w[kTileRows];
        weight_rows(ffn.w1, rows.expert * ffn.hidden + f + i, features - i, ffn.dim, 0, ffn.dim, weights, w);
        multiply_tile<A, false>(w, Panel<A>{x + first * ffn.dim, width, width}, ffn.dim, z + i * width, width, false);
      }
      A bias[kGroup];
      ffn.b1.load(rows.expert * ffn.hidden + f, features, bias);
      for (int64_t i = 0; i < features; ++i) {
        for (int64_t t = 0; t < width; ++t) z[i * width + t] += bias[i];
      }
      finish(f, features, first, count, width, z);
    });
  }
}

// [features][width] into rows of `to`.
template <class A, class T>
MOE_INLINE void store_transposed(const A* from, int64_t features, int64_t count, int64_t width, T* to, int64_t stride) {
  transpose<A>(
      count, features, [&](int64_t i) MOE_INLINE_LAMBDA { return from + i * width; },
      [&](int64_t t) MOE_INLINE_LAMBDA { return to + t * stride; },
      [](A value) MOE_INLINE_LAMBDA { return saturated<T>(value); });
}

template <class A>
int64_t forward_space(int64_t rows, int64_t dim, int64_t hidden) {
  return Space<A>(rows, dim, hidden).size();
}

// A block of rows from tokens to gated outputs: to their tokens where one has one expert, else to `outputs`, row by
// row. `saved` (assignments, hidden) gets the pre-activations, if not null.
template <class S>
void forward_rows(const Ffn<S>& ffn, const Rows& rows, int64_t block, accumulate_t<S>* memory, S* saved,
                  accumulate_t<S>* outputs, S* y) {
  using A = accumulate_t<S>;
  const Space<A> space(block, ffn.dim, ffn.hidden);
  A *x = memory, *sums = x + space.x, *hidden = sums + space.y, *z = hidden + space.h;
  A *factors = z + space.group, *weights = factors + space.group;
  const int64_t padded_dim = round_up(ffn.dim, kTileRows);
  pack_tokens(ffn, rows, x);
  // Once even if there are no hidden features, for the zeros that they add up to.
  for (int64_t begin = 0; begin == 0 || begin < ffn.hidden; begin += space.hidden_block) {
    const int64_t end = std::min(ffn.hidden, begin + space.hidden_block), block = end - begin;
    first_product(
        ffn, rows, begin, end, x, z, weights,
        [&](int64_t f, int64_t features, int64_t first, int64_t count, int64_t width, A* z) MOE_INLINE_LAMBDA {
          if (saved != nullptr) {
            store_transposed(z, features, count, width, saved + (rows.first + first) * ffn.hidden + f, ffn.hidden);
          }
          A* to = hidden + first * block + (f - begin) * width;
          by_activation(ffn.activation, [&](auto phi) MOE_INLINE_LAMBDA {
            const int64_t n = features * width;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) to[i] = decltype(phi)::template value<A>(z[i]);
          });
          if (!ffn.dropout.active) return;
          factors_by_feature(ffn, rows.first + first, rows.expert, f, features, count, width, factors);
          for (int64_t i = 0; i < features; ++i) {
            for (int64_t t = 0; t < count; ++t) {
              to[i * width + t] = dropped(to[i * width + t], factors[i * width + t]);
            }
          }
        });
    for (int64_t c = 0; c < ffn.dim; c += kTileRows) {
      const A* w[kTileRows];
      weight_rows(ffn.w2, rows.expert * ffn.dim + c, ffn.dim - c, ffn.hidden, begin, block, weights, w);
      for_panels<A>(rows.count, [&](int64_t first, int64_t, int64_t width) MOE_INLINE_LAMBDA {
        multiply_tile<A, false>(w, Panel<A>{hidden + first * block, width, width}, block,
                                sums + first * padded_dim + c * width, width, begin > 0);
      });
    }
  }
  A* bias = x;  // the tokens are not needed any more
  ffn.b2.load(rows.expert * ffn.dim, ffn.dim, bias);
  for_panels<A>(rows.count, [&](int64_t first, int64_t count, int64_t width) MOE_INLINE_LAMBDA {
    A *panel = sums + first * padded_dim, gates[kPanelWidth<A>]{};
    const int64_t* assignment = ffn.plan.assignment + rows.first + first;
    for (int64_t t = 0; t < count; ++t) gates[t] = ffn.gates[assignment[t]];
    for (int64_t c = 0; c < ffn.dim; ++c) {
      for (int64_t t = 0; t < width; ++t) panel[c * width + t] = gates[t] * (panel[c * width + t] + bias[c]);
    }
    const auto from = [&](int64_t c) MOE_INLINE_LAMBDA { return panel + c * width; };
    if (ffn.plan.top_k == 1) {
      transpose<A>(
          count, ffn.dim, from, [&](int64_t t) MOE_INLINE_LAMBDA { return y + assignment[t] * ffn.dim; },
          [](A value) MOE_INLINE_LAMBDA { return static_cast<S>(value); });
    } else {
      A* to = outputs + (rows.first + first) * ffn.dim;
      transpose<A>(
          count, ffn.dim, from, [&](int64_t t) MOE_INLINE_LAMBDA { return to + t * ffn.dim; },
          [](A value) MOE_INLINE_LAMBDA { return value; });
    }
  });
}

#include "expert_ffn_backward.h"
