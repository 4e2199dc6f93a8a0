// The products of routing on blocks of tokens that fit into a core's cache. Included once for each instruction set
// (for_each_isa.h), so there is no guard.
//
// Forward: tokens lie side by side in panels, the rows of the projection are broadcast; so norms and scores are taken
// from projected features that are still in cache. Backward: the rows of the gradient are broadcast.

#include "gemm.h"

// out[r][columns] = row r of `rows` (stride), r < count, times the panels of x (depth): `columns` tokens, padded.
template <class T>
void project(const T* rows, int64_t stride, int64_t count, const T* x, int64_t columns, int64_t depth, T* out) {
  const int64_t tall = round_up(count, kTileRows);
  for (int64_t r = 0; r < count; r += kTileRows) {
    const T* w[kTileRows];
    tile_rows(rows + r * stride, stride, count - r, w);
    for_panels<T>(columns, [&](int64_t first, int64_t, int64_t width) MOE_INLINE_LAMBDA {
      multiply_tile<T, false>(w, Panel<T>{x + first * depth, width, width}, depth, out + first * tall + r * width,
                              width, false);
    });
  }
}

// Tokens (count, dim) side by side: panels [dim][width], the columns that are not there zero.
template <class T>
void pack_transposed(const T* from, int64_t count, int64_t dim, T* to) {
  for_panels<T>(count, [&](int64_t first, int64_t valid, int64_t width) MOE_INLINE_LAMBDA {
    T* panel = to + first * dim;
    transpose<T>(
        dim, valid, [&](int64_t t) MOE_INLINE_LAMBDA { return from + (first + t) * dim; },
        [&](int64_t c) MOE_INLINE_LAMBDA { return panel + c * width; },
        [](T value) MOE_INLINE_LAMBDA { return value; });
    for (int64_t c = 0; c < dim && valid < width; ++c)
      std::fill(panel + c * width + valid, panel + (c + 1) * width, T(0));
  });
}

// Panels [tall][width] of `count` tokens into rows of `to` (count, rows).
template <class T>
void unpack_transposed(const T* from, int64_t tall, int64_t rows, int64_t count, T* to) {
  for_panels<T>(count, [&](int64_t first, int64_t valid, int64_t width) MOE_INLINE_LAMBDA {
    const T* panel = from + first * tall;
    transpose<T>(
        valid, rows, [&](int64_t c) MOE_INLINE_LAMBDA { return panel + c * width; },
        [&](int64_t t) MOE_INLINE_LAMBDA { return to + (first + t) * rows; },
        [](T value) MOE_INLINE_LAMBDA { return value; });
  });
}

template <class T>
int64_t logits_space(int64_t tokens, int64_t dim, int64_t features, int64_t experts) {
  return round_up(tokens, kLanes<T>) * (dim + round_up(features, kTileRows) + round_up(experts, kTileRows));
}

// s q̂ Êᵀ of the projected tokens in the panels of `q`, to which the bias is added, into panels of scores.
template <class T>
void score(const RoutingForward<T>& call, int64_t count, T* q, T* scores) {
  const int64_t tall = round_up(call.features, kTileRows), experts = round_up(call.experts, kTileRows);
  for_panels<T>(count, [&](int64_t first, int64_t, int64_t width) MOE_INLINE_LAMBDA {
    T *panel = q + first * tall, *score = scores + first * experts, square[kPanelWidth<T>]{};
    for (int64_t f = 0; f < call.features; ++f) {
#pragma omp simd
      for (int64_t t = 0; t < width; ++t) {
        const T value = panel[f * width + t] + call.bias[f];
        panel[f * width + t] = value;
        square[t] += value * value;
      }
    }
    for (int64_t r = 0; r < call.experts; r += kTileRows) {
      const T* rows[kTileRows];
      tile_rows(call.directions + r * call.stride, call.stride, call.experts - r, rows);
      multiply_tile<T, false>(rows, Panel<T>{panel, width, width}, call.features, score + r * width, width, false);
    }
    for (int64_t t = 0; t < width; ++t) {
      const T norm = std::sqrt(square[t]);
      square[t] = call.scale / (norm < T(kSmallestNorm) ? T(kSmallestNorm) : norm);
    }
    for (int64_t e = 0; e < call.experts; ++e) {
      for (int64_t t = 0; t < width; ++t) score[e * width + t] *= square[t];
    }
  });
}

// The logits of the tokens [first, first + count), and where there is a projection what it gives.
template <class T>
void block_logits(const RoutingForward<T>& call, int64_t first, int64_t count, T* memory) {
  const int64_t columns = round_up(count, kLanes<T>), tall = round_up(call.features, kTileRows);
  T *x = memory, *q = x + columns * call.dim, *scores = q + columns * tall;
  pack_transposed(call.x + first * call.dim, count, call.dim, x);
  if (call.projection == nullptr) {
    project(call.directions, call.stride, call.experts, x, count, call.dim, scores);
  } else {
    project(call.projection, call.dim, call.features, x, count, call.dim, q);
    score(call, count, q, scores);
    unpack_transposed(q, tall, call.features, count, call.projected + first * call.features);
  }
  unpack_transposed(scores, round_up(call.experts, kTileRows), call.experts, count, call.logits + first * call.experts);
}

// dq[i] = Σ_e weights[i][e] directions[e] + along[i] q[i] for `count` tokens; all rows lie side by side.
template <class T>
void project_back(const T* weights, int64_t experts, const T* directions, int64_t stride, const T* q, const T* along,
                  int64_t count, int64_t features, T* dq) {
  for (int64_t i = 0; i < count; i += kTileRows) {
    const int64_t tall = std::min<int64_t>(kTileRows, count - i);
    const T* rows[kTileRows];
    tile_rows(weights + i * experts, experts, tall, rows);
    for_panels<T>(features, [&](int64_t c, int64_t valid, int64_t width) MOE_INLINE_LAMBDA {
      multiply_part<T, false>(rows, Panel<T>{directions + c, width, stride}, experts, tall, valid,
                              dq + i * features + c, features, false);
    });
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < features; ++c) dq[i * features + c] += along[i] * q[i * features + c];
  }
}

// From the gradient of a block's rows (count, width of `rows`) that of its tokens, rows · matrix, into grad_x (tokens,
// dim), unless null; and the rows packed, as the operand of multiply_transposed over all tokens.
template <class T>
void block_gradient(const T* rows, int64_t features, const Columns<T>& matrix, int64_t dim, int64_t first,
                    int64_t count, int64_t tokens, T* packed, T* grad_x) {
  for (int64_t i = 0; i < count; ++i) scatter_packed(rows + i * features, features, tokens, first + i, packed);
  const int64_t whole = features / kTileRows * kTileRows;
  for (int64_t i = first; i < first + count; ++i) {  // the features that fill up the last tile
    for (int64_t c = features; c < round_up(features, kTileRows); ++c)
      packed[whole * tokens + i * kTileRows + c - whole] = 0;
  }
  for (int64_t i = 0; i < count && grad_x != nullptr; i += kTileRows) {
    const int64_t tall = std::min<int64_t>(kTileRows, count - i);
    const T* from[kTileRows];
    tile_rows(rows + i * features, features, tall, from);
    for_panels<T>(dim, [&](int64_t c, int64_t valid, int64_t width) MOE_INLINE_LAMBDA {
      multiply_part<T, false>(from, panel_of(matrix, c, 0, width), features, tall, valid,
                              grad_x + (first + i) * dim + c, dim, false);
    });
  }
}

// A matrix (rows, columns) as a product reads it: as it stands, or packed into `memory`.
template <class T>
Columns<T> readable(const T* matrix, int64_t rows, int64_t columns, T* memory) {
  if (whole_vectors<T>(columns)) return {matrix, rows, columns};
  for_panels<T>(columns, [&](int64_t first, int64_t count, int64_t width) MOE_INLINE_LAMBDA {
    for (int64_t k = 0; k < rows; ++k) {
      T* row = memory + first * rows + k * width;
      std::copy_n(matrix + k * columns + first, count, row);
      std::fill(row + count, row + width, T(0));
    }
  });
  return {memory, rows, 0};
}

// Elements that `readable` may need.
template <class T>
int64_t readable_space(int64_t rows, int64_t columns) {
  return whole_vectors<T>(columns) ? 0 : rows * round_up(columns, kLanes<T>);
}

// A part of out (rows, columns) = packedᵀ b over all tokens, a piece of the tokens at a time so that b's stays in
// cache.
template <class T>
void transposed_part(const T* packed, int64_t tokens, const Columns<T>& b, int64_t rows, int64_t columns, int64_t part,
                     T* out) {
  const int64_t across = (columns + kPanelWidth<T> - 1) / kPanelWidth<T>;
  const int64_t top = part / across * kPartRows, left = part % across * kPanelWidth<T>;
  constexpr int64_t kPiece = 2 * kChain;
  const int64_t pieces = std::max<int64_t>(1, (tokens + kPiece - 1) / kPiece);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    multiply_transposed(packed, tokens, b, tokens * piece / pieces, tokens * (piece + 1) / pieces, top,
                        std::min(rows, top + kPartRows), left, std::min(columns, left + kPanelWidth<T>), out, columns,
                        piece > 0);
  }
}

template <class T>
int64_t transposed_parts(int64_t rows, int64_t columns) {
  return (rows + kPartRows - 1) / kPartRows * ((columns + kPanelWidth<T> - 1) / kPanelWidth<T>);
}

template <class T>
int64_t packed_space(int64_t tokens, int64_t features) {
  return tokens * round_up(features, kTileRows);
}
