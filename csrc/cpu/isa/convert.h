// Runs of 16-bit numbers to float and back, by integer arithmetic that compilers vectorize; where there is AVX-512,
// from float16 by its instruction. Included once for each instruction set (for_each_isa.h), so there is no guard.

template <class T>
MOE_INLINE float widened(uint16_t x);
template <>
MOE_INLINE float widened<torch::headeronly::BFloat16>(uint16_t x) {
  return __builtin_bit_cast(float, uint32_t{x} << 16);
}

// The exponent is moved by a product, which also gives infinity and NaN theirs; what is subnormal is 0.5 plus it, -
// 0.5.
template <>
MOE_INLINE float widened<torch::headeronly::Half>(uint16_t x) {
  const uint32_t sign = (uint32_t{x} & 0x8000) << 16, rest = uint32_t{x} & 0x7fff;
  const float normal = __builtin_bit_cast(float, (rest << 13) + (uint32_t{0xe0} << 23)) * 0x1p-112f;
  const float subnormal = __builtin_bit_cast(float, rest | (uint32_t{126} << 23)) - 0.5f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, rest < 0x400 ? subnormal : normal));
}

// To nearest, ties to even.
template <class T>
MOE_INLINE uint16_t narrowed(float x);
template <>
MOE_INLINE uint16_t narrowed<torch::headeronly::BFloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// The sum with a power of two, 2^13 times the place of the last bit, rounds; the products overflow to infinity where
// a half does.
template <>
MOE_INLINE uint16_t narrowed<torch::headeronly::Half>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), rest = bits & 0x7fffffff;
  const float scaled = __builtin_bit_cast(float, rest) * 0x1p112f * 0x1p-110f;
  const uint32_t exponent = rest & 0x7f800000, bias = exponent < 0x38800000 ? 0x38800000 : exponent;
  const uint32_t sum = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, bias + 0x07800000) + scaled);
  const uint32_t half = (sum >> 13 & 0x7c00) + (sum & 0x0fff);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (rest > 0x7f800000 ? 0x7e00 : half));
}

#if defined(__x86_64__) && MOE_VECTOR_BYTES == 64
MOE_INLINE __m512 widened_halves(const void* from) {  // with a mask, since gcc 12 warns of its own header without
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#endif

template <class From, class To>
void convert_run(const From* __restrict from, To* __restrict to, int64_t n) {
  if constexpr (sizeof(From) == 2 && std::is_same_v<To, float>) {
    const uint16_t* bits = &from->x;
    int64_t i = 0;
#if defined(__x86_64__) && MOE_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<From, torch::headeronly::Half>) {
      for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, widened_halves(bits + i));
    }
#endif
#pragma omp simd
    for (int64_t j = i; j < n; ++j) to[j] = widened<From>(bits[j]);
  } else if constexpr (sizeof(To) == 2 && std::is_same_v<From, float>) {
    uint16_t* bits = &to->x;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) bits[i] = narrowed<To>(from[i]);
  } else {
    convert(from, to, n);
  }
}
