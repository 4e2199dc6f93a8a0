// Inner products of pixels with columns. Included once for each instruction set (for_each_isa.h), so there is no guard.

#include "hypercolumn.h"

constexpr int kTilePixels = 4;

// kLanes<A> numbers that are stored as S.
template <class A, class S>
MOE_INLINE typename Vector<A>::type widened_vector(const S* from) {
  if constexpr (std::is_same_v<S, A>) {
    return *reinterpret_cast<const typename Vector<A>::unaligned*>(from);
  } else {
#if defined(__x86_64__) && MOE_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<S, torch::headeronly::Half>) return widened_halves(from);
#endif
    alignas(MOE_VECTOR_BYTES) A wide[kLanes<A>];
    convert_run(from, wide, kLanes<A>);
    return *reinterpret_cast<typename Vector<A>::type*>(wide);
  }
}

// The sum of n lanes, a power of two.
template <class A>
MOE_INLINE A folded(A* lane, int64_t n) {
  for (int64_t half = n / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// out[p][c] = <pixels[p], columns + c * depth> over n channels. Every product is summed in the same order, however many
// are taken at once. `next` are the pixels that come after these, which are fetched meanwhile.
template <int kPixels, int kColumns, class S, class A>
MOE_INLINE void tile_products(const S* const* pixels, const S* const* next, const A* columns, int64_t depth, int64_t n,
                              A* const* out, int64_t first) {
  using V = typename Vector<A>::type;
  using U = typename Vector<A>::unaligned;
  constexpr int64_t lanes = kLanes<A>;
  V sum[kPixels][kColumns] = {};
  A tail[kPixels][kColumns] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    V x[kPixels];
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      __builtin_prefetch(next[p] + i);
      x[p] = widened_vector<A>(pixels[p] + i);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const V y = *reinterpret_cast<const U*>(columns + c * depth + i);
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p) sum[p][c] += x[p] * y;
    }
  }
  for (; i < n; ++i) {
    for (int p = 0; p < kPixels; ++p) {
      const A x = static_cast<A>(pixels[p][i]);
      for (int c = 0; c < kColumns; ++c) tail[p][c] += x * columns[c * depth + i];
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      alignas(64) A lane[lanes];
      *reinterpret_cast<V*>(lane) = sum[p][c];
      out[p][first + c] = folded(lane, lanes) + tail[p][c];
    }
  }
}

// out[p][c] = <pixels[p], columns + c * depth> for `count` pixels and m columns.
template <class S, class A>
void products(const S* const* pixels, int64_t count, const A* columns, int64_t depth, int64_t m, int64_t n,
              A* const* out) {
  const auto over_pixels = [&](int64_t c, auto width) MOE_INLINE_LAMBDA {
    constexpr int kColumns = decltype(width)::value;
    int64_t p = 0;
    for (; p + kTilePixels <= count; p += kTilePixels) {
      const int64_t after = p + 2 * kTilePixels <= count ? p + kTilePixels : p;
      tile_products<kTilePixels, kColumns>(pixels + p, pixels + after, columns + c * depth, depth, n, out + p, c);
    }
    for (; p < count; ++p) {
      tile_products<1, kColumns>(pixels + p, pixels + p, columns + c * depth, depth, n, out + p, c);
    }
  };
  int64_t c = 0;
  for (; c + 4 <= m; c += 4) over_pixels(c, std::integral_constant<int, 4>{});
  if (m - c == 3) over_pixels(c, std::integral_constant<int, 3>{});
  if (m - c == 2) over_pixels(c, std::integral_constant<int, 2>{});
  if (m - c == 1) over_pixels(c, std::integral_constant<int, 1>{});
}

// What n numbers have among them: kNegative, kUnusual.
template <class S>
int traits(const S* x, int64_t n) {
  int negative = 0, unusual = 0;
  if constexpr (sizeof(S) == 2) {
    const uint16_t* bits = &x->x;
    const uint16_t largest = std::is_same_v<S, torch::headeronly::Half> ? 0x7bff : 0x5863;
#pragma omp simd reduction(| : negative, unusual)
    for (int64_t i = 0; i < n; ++i) {
      negative |= bits[i] > 0x8000;
      unusual |= (bits[i] & 0x7fff) > largest;
    }
  } else {
#pragma omp simd reduction(| : negative, unusual)
    for (int64_t i = 0; i < n; ++i) {
      const S size = x[i] < 0 ? -x[i] : x[i];
      negative |= x[i] < 0;
      unusual |= !(size <= S(1e15));
    }
  }
  return (negative ? kNegative : 0) | (unusual ? kUnusual : 0);
}

template <class A>
A largest(const A* x, int64_t n) {
  A result = x[0];
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// flags[i] = value[i] is not below `least`, and seen[i] < picked.
template <class A>
void flag_open(const A* __restrict value, const int32_t* __restrict seen, A least, int32_t picked,
               char* __restrict flags, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) flags[i] = !(value[i] < least) & (seen[i] < picked);
}

// What is flagged and not done becomes done; what was done is not flagged any more.
inline void flag_new(char* __restrict flags, char* __restrict done, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    flags[i] &= done[i] ^ 1;
    done[i] |= flags[i];
  }
}
