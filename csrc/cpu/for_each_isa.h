// Includes MOE_FOR_EACH_ISA, a file of functions, once for each instruction set: in the namespaces avx512, avx2 and
// baseline of the namespace it is included in, with MOE_VECTOR_BYTES set. Vectors of the compiler's own kind are
// lowered where a function is defined, before it is inlined or cloned; so every function that touches one has to be
// defined under its instruction set. No guard: each file of kernels includes it for itself.

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif
#define MOE_VECTOR_BYTES 64
namespace avx512 {
#include MOE_FOR_EACH_ISA
}  // namespace avx512
#undef MOE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define MOE_VECTOR_BYTES 32
namespace avx2 {
#include MOE_FOR_EACH_ISA
}  // namespace avx2
#undef MOE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#if defined(__aarch64__)
#define MOE_VECTOR_BYTES 32  // pairs of its 32 registers
#else
#define MOE_VECTOR_BYTES 16
#endif
namespace baseline {
#include MOE_FOR_EACH_ISA
}  // namespace baseline
#undef MOE_VECTOR_BYTES
