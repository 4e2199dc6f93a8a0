// Products of blocks that lie in cache. Included once for each instruction set (for_each_isa.h), so there is no guard.
//
// A tile of C, kTileRows rows by a panel's width, stays in registers while k runs: C[i][j] = Σ_k a(i, k) b(k, j). The
// elements of `a` are broadcast one by one, from rows that may lie anywhere or from a packed [k][kTileRows]; `b` is a
// panel [k][width], whose rows are one to three vectors. With AVX-512 a tile of eight rows
// by three vectors needs eleven loads for 24 multiply-adds, and leaves registers enough that compilers spill none.

#include "transpose.h"

constexpr int kTileRows = MOE_VECTOR_BYTES / 8;
constexpr int kPanelVectors = 3;
// As many terms are summed in one chain; the chains' sums are then added. A longer chain would lose digits.
constexpr int64_t kChain = 384;

template <class A>
constexpr int64_t kPanelWidth = kPanelVectors * kLanes<A>;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The width of a panel of n ≤ kPanelWidth columns.
template <class A>
int64_t panel_width(int64_t n) {
  return std::min(kPanelWidth<A>, round_up(n, kLanes<A>));
}

template <class A, int kVectors, bool kPacked>
MOE_INLINE void tile(const A* const* rows, const A* panel, int64_t panel_stride, int64_t depth, A* c, int64_t stride,
                     bool accumulate) {
  using V = typename Vector<A>::type;
  using U = typename Vector<A>::unaligned;
  constexpr int64_t lanes = kLanes<A>;
  const A* ends[kTileRows];
  const A* packed = rows[0];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) ends[i] = kPacked ? nullptr : rows[i] + depth;
  V sum[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sum[i][j] = V{};
  }
  for (int64_t k = -depth; k < 0; ++k) {
    V b[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      b[j] = *reinterpret_cast<const U*>(panel + j * lanes);
      __builtin_prefetch(panel + 4 * panel_stride + j * lanes);  // without it the second cache's latency shows
    }
    panel += panel_stride;
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const A a = kPacked ? packed[i] : ends[i][k];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[i][j] += a * b[j];
    }
    if (kPacked) packed += kTileRows;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      U* to = reinterpret_cast<U*>(c + i * stride + j * lanes);
      *to = accumulate ? *to + sum[i][j] : sum[i][j];
    }
  }
}

// Columns side by side: row k at data + k · stride. A packed panel's stride is its width; a matrix's own columns will
// do where there are as many as the width.
template <class A>
struct Panel {
  const A* data;
  int64_t width, stride;
};

// One tile, in chains: C[kTileRows][width] (+)= Σ_{k < depth} a(i, k) panel[k]. rows: kTileRows pointers, or the packed
// operand behind the first.
template <class A, bool kPacked>
void multiply_tile(const A* const* rows, const Panel<A>& panel, int64_t depth, A* c, int64_t stride, bool accumulate) {
  // Chains begin at multiples of kChain, so that sums do not depend on how a caller cuts the depth at such.
  for (int64_t begin = 0; begin == 0 || begin < depth; begin += kChain) {
    const int64_t count = std::min(kChain, depth - begin);
    const A* shifted[kTileRows];
    for (int i = 0; i < kTileRows; ++i) shifted[i] = kPacked ? rows[0] + begin * kTileRows : rows[i] + begin;
    const A* from = panel.data + begin * panel.stride;
    const bool add = accumulate || begin > 0;
    switch (panel.width / kLanes<A>) {
      case 1:
        tile<A, 1, kPacked>(shifted, from, panel.stride, count, c, stride, add);
        break;
      case 2:
        tile<A, 2, kPacked>(shifted, from, panel.stride, count, c, stride, add);
        break;
      default:
        tile<A, 3, kPacked>(shifted, from, panel.stride, count, c, stride, add);
    }
  }
}

// The part of a tile that is there: `tall` rows by `count` columns of C.
template <class A, bool kPacked>
void multiply_part(const A* const* rows, const Panel<A>& panel, int64_t depth, int64_t tall, int64_t count, A* c,
                   int64_t stride, bool accumulate) {
  if (tall == kTileRows && count == panel.width) {
    multiply_tile<A, kPacked>(rows, panel, depth, c, stride, accumulate);
    return;
  }
  A spare[kTileRows * kPanelWidth<A>];
  multiply_tile<A, kPacked>(rows, panel, depth, spare, panel.width, false);
  for (int64_t i = 0; i < tall; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      c[i * stride + j] = spare[i * panel.width + j] + (accumulate ? c[i * stride + j] : A(0));
    }
  }
}

// Pointers to kTileRows rows of `stride` elements, of which `count` are there; the others repeat the last.
template <class A>
void tile_rows(const A* first, int64_t stride, int64_t count, const A** rows) {
  for (int64_t i = 0; i < kTileRows; ++i) rows[i] = first + std::min(i, count - 1) * stride;
}

// f(first column, valid columns, width) for the panels of so many columns.
template <class A, class F>
MOE_INLINE void for_panels(int64_t columns, const F& f) {
  for (int64_t first = 0; first < columns; first += kPanelWidth<A>) {
    const int64_t count = std::min(kPanelWidth<A>, columns - first);
    f(first, count, panel_width<A>(count));
  }
}

// Whether a matrix of so many columns can be read as it stands, without a vector that reaches over its edge.
template <class A>
bool whole_vectors(int64_t columns) {
  return columns % kLanes<A> == 0;
}

// Columns from `column` on of a matrix, from row `row` on.
template <class A>
MOE_INLINE Panel<A> panel_of(const Columns<A>& matrix, int64_t column, int64_t row, int64_t width) {
  if (matrix.stride > 0) return {matrix.data + row * matrix.stride + column, width, matrix.stride};
  return {matrix.data + column * matrix.rows + row * width, width, width};
}

// A row of `count` elements into a packed operand [count / kTileRows][rows][kTileRows], as row `at`.
template <class A>
MOE_INLINE void scatter_packed(const A* row, int64_t count, int64_t rows, int64_t at, A* packed) {
  const int64_t whole = count / kTileRows * kTileRows;
  for (int64_t c = 0; c < whole; c += kTileRows) {
    std::memcpy(packed + (c * rows + at * kTileRows), row + c, sizeof(A) * kTileRows);
  }
  for (int64_t c = whole; c < count; ++c) packed[whole * rows + at * kTileRows + c - whole] = row[c];
}

// Rows [top, bottom) and columns [left, right) of out (+)= packedᵀ b over the rows [begin, end) of both; `left` begins
// a panel, `top` a tile. packed: [columns / kTileRows][rows][kTileRows].
template <class A>
void multiply_transposed(const A* packed, int64_t rows, const Columns<A>& b, int64_t begin, int64_t end, int64_t top,
                         int64_t bottom, int64_t left, int64_t right, A* out, int64_t stride, bool accumulate) {
  for (int64_t r = top; r < bottom; r += kTileRows) {
    const A* operand = packed + r * rows + begin * kTileRows;
    for_panels<A>(right - left, [&](int64_t c, int64_t count, int64_t width) MOE_INLINE_LAMBDA {
      multiply_part<A, true>(&operand, panel_of(b, left + c, begin, width), end - begin,
                             std::min<int64_t>(kTileRows, bottom - r), count, out + r * stride + left + c, stride,
                             accumulate);
    });
  }
}
