// The arithmetic of expert_ffn on blocks that fit into a core's cache. Included once for each instruction set
// (for_each_isa.h), so there is no guard.
//
// Forward: the tokens of a block lie side by side in panels, the rows of the weights are broadcast as they stand. So
// the hidden features come out as the panel that the second product reads, and no weight has to be packed. Backward:
// the other way round. The gradient's rows are broadcast, panels of the weights, packed once for a unit of rows, lie in
// the vectors. So dz and the gated hidden features come out as the operands of the weights' gradients.

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

// Columns [first, first + count) of an expert's matrix as a panel [rows][width], padded with zeros.
template <class S>
void pack_panel(const Parameter<S>& matrix, int64_t at, int64_t rows, int64_t stride, int64_t count, int64_t width,
                accumulate_t<S>* panel) {
  for (int64_t k = 0; k < rows; ++k) {
    matrix.load(at + k * stride, count, panel + k * width);
    std::fill(panel + k * width + count, panel + (k + 1) * width, accumulate_t<S>(0));
  }
}

// One of the panels of a unit's weights: first those of w2, then those of w1.
template <class S>
void pack_weights(const Backward<S>& call, const Unit<accumulate_t<S>>& unit, int64_t index) {
  using A = accumulate_t<S>;
  const int64_t dim = call.ffn.dim, hidden = call.ffn.hidden;
  const int64_t of_w2 = (hidden + kPanelWidth<A> - 1) / kPanelWidth<A>;
  const auto pack = [&](const Parameter<S>& matrix, int64_t panel, int64_t rows, int64_t columns, A* to) {
    const int64_t first = panel * kPanelWidth<A>, count = std::min(kPanelWidth<A>, columns - first);
    pack_panel(matrix, unit.rows.expert * dim * hidden + first, rows, columns, count, panel_width<A>(count),
               to + first * rows);
  };
  if (index < of_w2) {
    pack(call.ffn.w2, index, dim, hidden, unit.packed_w2);
  } else {
    pack(call.ffn.w1, index - of_w2, hidden, dim, unit.packed_w1);
  }
}

// What the backward of a block of rows works in. Sizes in elements.
template <class A>
struct BackwardSpace {
  BackwardSpace(int64_t rows, int64_t dim, int64_t hidden, bool recompute)
      : rows(round_up(rows, kTileRows)),
        forward(rows, dim, hidden),
        hidden_block(forward.hidden_block),
        dy(rows * dim),
        dz(rows * hidden_block),
        dx(this->rows * round_up(dim, kLanes<A>)),
        z(recompute ? rows * hidden_block : 0),
        x(recompute ? forward.x + 2 * forward.group + forward.weights : 0),
        tile(kTileRows * kPanelWidth<A>),
        vectors((kLanes<A> + 1) * this->rows + 2 * dim) {}

  int64_t size() const { return dy + dz + dx + z + x + 3 * tile + vectors; }

  int64_t rows;
  Space<A> forward;
  int64_t hidden_block, dy, dz, dx, z, x;
  int64_t tile;     // of dz, of z and of dropout factors
  int64_t vectors;  // a row's products in lanes and its gate; the bias b2, and a token
};

// From the gradient of the output to dz, for a tile of rows and a panel of hidden features, in place in `tile`; `a`
// gets gate · D(φ(z)), the lanes of dots[i] sums of the product of da with D(φ(z)).
template <bool kDropout, class A>
MOE_INLINE void differentiate_tile(Activation activation, const A* z, const A* factors, const A* gates, int64_t rows,
                                   int64_t width, A* tile, A* a, A* dots) {
  by_activation(activation, [&](auto phi) MOE_INLINE_LAMBDA {
    for (int64_t i = 0; i < rows; ++i) {
      A* dot = dots + i * kLanes<A>;
      const A gate = gates[i];
      for (int64_t first = i * width; first < (i + 1) * width; first += kLanes<A>) {
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
          const int64_t c = first + lane;
          const auto both = decltype(phi)::template both<A>(z[c]);
          A value = both.value, slope = both.slope;
          if constexpr (kDropout) {
            value = dropped(value, factors[c]);
            slope = dropped(slope, factors[c]);
          }
          dot[lane] += tile[c] * value;
          a[c] = gate * value;
          // As in plain PyTorch ReLU lets nothing through, not even what is not finite.
          const A through = std::is_same_v<decltype(phi), Relu> ? dropped(tile[c], slope) : tile[c] * slope;
          tile[c] = gate * through;
        }
      }
    }
  });
}

// A block of a unit's rows, [first, first + count) of them: the gradients of its gates and tokens, and what the
// gradients of the weights are made of.
template <class S>
void backward_rows(const Backward<S>& call, const Unit<accumulate_t<S>>& unit, int64_t first, int64_t count,
                   int64_t block, accumulate_t<S>* memory) {
  using A = accumulate_t<S>;
  const Ffn<S>& ffn = call.ffn;
  const BackwardSpace<A> space(block, ffn.dim, ffn.hidden, call.saved == nullptr);
  const int64_t dim = ffn.dim, hidden = ffn.hidden, expert = unit.rows.expert, all = unit.rows.count;
  const Rows rows{expert, unit.rows.first + first, count};
  A *dy = memory, *dz = dy + space.dy, *dx = dz + space.dz, *z = dx + space.dx, *forward = z + space.z;
  A *tile = forward + space.x, *z_tile = tile + space.tile, *factors = z_tile + space.tile;
  A *dots = factors + space.tile, *gates = dots + space.rows * kLanes<A>, *bias = gates + space.rows,
    *token = bias + dim;
  // Of the chunk of rows that row `first + i` belongs to.
  const auto sums_of = [&](int64_t i) { return unit.sums + (first + i) / kSumRows * (hidden + dim); };
  std::fill(sums_of(0), sums_of(count - 1) + hidden + dim, 0.0);

  {
    ffn.b2.load(expert * dim, dim, bias);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t assignment = ffn.plan.assignment[rows.first + i], t = assignment / ffn.plan.top_k;
      A* row = dy + i * dim;
      convert(call.grad + t * dim, row, dim);
      convert(ffn.x + t * dim, token, dim);
      gates[i] = ffn.gates[assignment];
      A dot{0};
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < dim; ++c) dot += row[c] * bias[c];
      std::fill_n(dots + i * kLanes<A>, kLanes<A>, A(0));
      dots[i * kLanes<A>] = dot;
      double* sums = sums_of(i) + hidden;
      for (int64_t c = 0; c < dim; ++c) sums[c] += static_cast<double>(gates[i] * row[c]);
      scatter_packed(row, dim, all, first + i, unit.dy);
      for_panels<A>(dim, [&](int64_t c, int64_t valid, int64_t width) MOE_INLINE_LAMBDA {
        A* to = unit.x + c * all + (first + i) * width;
        std::copy_n(token + c, valid, to);
        std::fill(to + valid, to + width, A(0));
      });
    }
    for (int64_t c = dim; c < round_up(dim, kTileRows); ++c) {  // the features that fill up the last tile
      for (int64_t i = 0; i < count; ++i) unit.dy[(c / kTileRows * all + first + i) * kTileRows + c % kTileRows] = 0;
    }
  }

  const int64_t dx_stride = round_up(dim, kLanes<A>);
  if (call.saved == nullptr) pack_tokens(ffn, rows, forward);
  for (int64_t begin = 0; begin == 0 || begin < hidden; begin += space.hidden_block) {
    const int64_t end = std::min(hidden, begin + space.hidden_block);
    if (call.saved == nullptr) {
      A* group = forward + space.forward.x;
      first_product(ffn, rows, begin, end, forward, group, group + space.forward.group,
                    [&](int64_t f, int64_t features, int64_t column, int64_t valid, int64_t width, A* from)
                        MOE_INLINE_LAMBDA {
                          store_transposed(from, features, valid, width, z + column * space.hidden_block + f - begin,
                                           space.hidden_block);
                        });
    }
    for (int64_t f = begin; f < end; f += kPanelWidth<A>) {
      const int64_t valid = std::min(kPanelWidth<A>, hidden - f), width = panel_width<A>(valid);
      for (int64_t i = 0; i < count; i += kTileRows) {
        const int64_t tall = std::min<int64_t>(kTileRows, count - i);
        const A* from[kTileRows];
        tile_rows(static_cast<const A*>(dy + i * dim), dim, tall, from);
        // The processor does not foresee these rows, and the product leaves time to fetch them.
        for (int64_t r = 0; r < tall && call.saved != nullptr; ++r) {
          const S* next = call.saved + (rows.first + i + r) * hidden + f;
          for (int64_t c = 0; c < valid; c += 64 / sizeof(S)) __builtin_prefetch(next + c);
        }
        multiply_tile<A, false>(from, panel_of(unit.w2, f, 0, width), dim, tile, width, false);
        for (int64_t r = 0; r < tall; ++r) {
          const int64_t row = rows.first + i + r;
          if (call.saved != nullptr) {
            convert(call.saved + row * hidden + f, z_tile + r * width, valid);
          } else {
            std::copy_n(z + (i + r) * space.hidden_block + f - begin, valid, z_tile + r * width);
          }
          std::fill(z_tile + r * width + valid, z_tile + (r + 1) * width, A(0));
        }
        if (ffn.dropout.active) factors_by_row(ffn, rows.first + i, expert, f, valid, tall, width, factors);
        A *dot = dots + i * kLanes<A>, *a = unit.a + f * all + (first + i) * width;
        if (ffn.dropout.active) {
          differentiate_tile<true>(ffn.activation, z_tile, factors, gates + i, tall, width, tile, a, dot);
        } else {
          differentiate_tile<false>(ffn.activation, z_tile, factors, gates + i, tall, width, tile, a, dot);
        }
        for (int64_t r = 0; r < tall; ++r) {
          const int64_t at = first + i + r;
          std::copy_n(tile + r * width, valid, dz + (i + r) * space.hidden_block + f - begin);
          scatter_packed(tile + r * width, width, all, at, unit.dz + f * all);
        }
        double* sums = sums_of(i) + f;
        for (int64_t c = 0; c < valid; ++c) {
          A sum{0};
          for (int64_t r = 0; r < tall; ++r) sum += tile[r * width + c];
          sums[c] += static_cast<double>(sum);
        }
      }
    }
    for_panels<A>(dim, [&](int64_t c, int64_t, int64_t width) MOE_INLINE_LAMBDA {
      for (int64_t i = 0; i < count; i += kTileRows) {
        const A* from[kTileRows];
        tile_rows(static_cast<const A*>(dz + i * space.hidden_block), space.hidden_block,
                  std::min<int64_t>(kTileRows, count - i), from);
        multiply_tile<A, false>(from, panel_of(unit.w1, c, begin, width), end - begin, dx + i * dx_stride + c,
                                dx_stride, begin > 0);
      }
    });
  }

  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows.first + i, assignment = ffn.plan.assignment[row];
    A dot{0};
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) dot += dots[i * kLanes<A> + lane];
    call.grad_gates[assignment] = dot;
    if (ffn.plan.top_k == 1) {
      convert(dx + i * dx_stride, call.grad_x + assignment * dim, dim);
    } else {
      std::copy_n(dx + i * dx_stride, dim, call.grad_rows + row * dim);
    }
  }
}

// A part of the gradients of a unit's weights and biases: first the biases, then regions of w1, then of w2.
template <class S>
struct WeightTasks {
  using A = accumulate_t<S>;
  static constexpr int64_t kColumns = 3 * kPanelWidth<A>, kRegionRows = 384;

  WeightTasks(int64_t dim, int64_t hidden) : dim(dim), hidden(hidden) {}

  static int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
  int64_t of_w1() const { return parts(hidden, kRegionRows) * parts(dim, kColumns); }
  int64_t of_w2() const { return parts(dim, kRegionRows) * parts(hidden, kColumns); }
  int64_t count() const { return 1 + of_w1() + of_w2(); }

  void run(const Backward<S>& call, const Unit<A>& unit, int64_t index) const {
    const int64_t expert = unit.rows.expert;
    if (index == 0) {
      double* sums = call.bias_sums;
      if (unit.begins) std::fill_n(sums, hidden + dim, 0.0);
      for (int64_t chunk = 0; chunk < parts(unit.rows.count, kSumRows); ++chunk) {
        for (int64_t c = 0; c < hidden + dim; ++c) sums[c] += unit.sums[chunk * (hidden + dim) + c];
      }
      if (!unit.ends) return;
      convert(sums, call.b1.sums(expert), hidden);
      convert(sums + hidden, call.b2.sums(expert), dim);
      call.b1.store(expert, 0, hidden);
      call.b2.store(expert, 0, dim);
      return;
    }
    const bool first = index <= of_w1();
    const int64_t task = first ? index - 1 : index - 1 - of_w1();
    const int64_t height = first ? hidden : dim, columns = first ? dim : hidden, across = parts(columns, kColumns);
    const int64_t top = task / across * kRegionRows, bottom = std::min(height, top + kRegionRows);
    const int64_t left = task % across * kColumns, right = std::min(columns, left + kColumns);
    const Gradient<S>& gradient = first ? call.w1 : call.w2;
    const int64_t rows = unit.rows.count;
    multiply_transposed(first ? unit.dz : unit.dy, rows, Columns<A>{first ? unit.x : unit.a, rows, 0}, 0, rows, top,
                        bottom, left, right, gradient.sums(expert), columns, !unit.begins);
    if (!unit.ends) return;
    for (int64_t r = top; r < bottom; ++r) gradient.store(expert, r * columns + left, right - left);
  }

  int64_t dim, hidden;
};

template <class S>
void weight_gradients(const Backward<S>& call, const Unit<accumulate_t<S>>& unit, int64_t index) {
  WeightTasks<S>(call.ffn.dim, call.ffn.hidden).run(call, unit, index);
}

template <class A>
Sizes backward_sizes(int64_t unit, int64_t block, int64_t dim, int64_t hidden, bool recompute) {
  const int64_t wide_dim = round_up(dim, kLanes<A>), wide_hidden = round_up(hidden, kLanes<A>);
  const WeightTasks<A> tasks(dim, hidden);
  return {hidden * wide_dim,
          dim * wide_hidden,
          unit * wide_hidden,
          unit * round_up(dim, kTileRows),
          unit * wide_hidden,
          unit * wide_dim,
          BackwardSpace<A>(block, dim, hidden, recompute).size(),
          tasks.parts(dim, kPanelWidth<A>) + tasks.parts(hidden, kPanelWidth<A>),
          tasks.count()};
}
