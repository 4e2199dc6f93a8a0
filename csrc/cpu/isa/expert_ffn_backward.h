// The arithmetic of expert_ffn's gradient: a part of expert_ffn.h, which includes it once for each instruction set.
//
// The other way round than forward: the gradient's rows are broadcast, panels of the weights, packed once for a unit of
// rows, lie in the vectors. So dz and the gated hidden features come out as the operands of the weights' gradients.

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
