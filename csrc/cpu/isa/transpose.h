// Transposition in squares as wide as a vector. Included once for each instruction set (for_each_isa.h), so there is no
// guard.

#include "vector.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MOE_SHUFFLES 1
#endif
#endif

#ifdef MOE_SHUFFLES
// The first halves of two vectors element by element in turn, or the second halves.
template <bool kSecond, class V, size_t... i>
MOE_INLINE V interleave(V a, V b, std::index_sequence<i...>) {
  constexpr size_t n = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * n + (kSecond ? n / 2 : 0))...);
}
#endif

// to(i)[j] = from(j)[i] for a square as wide as a vector; from and to give the addresses of rows.
template <class A, class From, class To>
MOE_INLINE void transpose_square(const From& from, const To& to) {
  constexpr int n = kLanes<A>;
#ifdef MOE_SHUFFLES
  using V = typename Vector<A>::type;
  using U = typename Vector<A>::unaligned;
  V rows[n], next[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) rows[i] = *reinterpret_cast<const U*>(from(i));
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<false>(rows[i], rows[i + n / 2], std::make_index_sequence<n>());
      next[2 * i + 1] = interleave<true>(rows[i], rows[i + n / 2], std::make_index_sequence<n>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) *reinterpret_cast<U*>(to(i)) = rows[i];
#else
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) to(i)[j] = from(j)[i];
  }
#endif
}

// to(i)[j] = round(from(j)[i]) for i < rows, j < columns; from and to give the addresses of rows, of dtypes that may
// differ, and round takes A to the second.
template <class A, class From, class To, class Round>
MOE_INLINE void transpose(int64_t rows, int64_t columns, const From& from, const To& to, const Round& round) {
  using F = std::remove_const_t<std::remove_pointer_t<decltype(from(0))>>;
  using T = std::remove_pointer_t<decltype(to(0))>;
  constexpr int64_t n = kLanes<A>;
  for (int64_t i = 0; i < rows; i += n) {
    for (int64_t j = 0; j < columns; j += n) {
      if (i + n > rows || j + n > columns) {
        for (int64_t k = i; k < std::min(rows, i + n); ++k) {
          for (int64_t l = j; l < std::min(columns, j + n); ++l) to(k)[l] = round(static_cast<A>(from(l)[k]));
        }
      } else if constexpr (std::is_same_v<F, A> && std::is_same_v<T, A>) {
        transpose_square<A>([&](int64_t l) MOE_INLINE_LAMBDA { return from(j + l) + i; },
                            [&](int64_t k) MOE_INLINE_LAMBDA { return to(i + k) + j; });
      } else {
        A in[n][n], out[n][n];
        for (int64_t l = 0; l < n; ++l) convert(from(j + l) + i, in[l], n);
        transpose_square<A>([&](int64_t l) MOE_INLINE_LAMBDA { return in[l]; },
                            [&](int64_t k) MOE_INLINE_LAMBDA { return out[k]; });
        for (int64_t k = 0; k < n; ++k) {
          for (int64_t l = 0; l < n; ++l) to(i + k)[j + l] = round(out[k][l]);
        }
      }
    }
  }
}
