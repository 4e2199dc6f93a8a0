// The instruction sets that the micro-kernels are written for, and the one that is used.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_kernels {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best that this processor has, or what MOE_KERNELS_ISA (baseline, avx2, avx512) in the environment asks for.
// Decided once; throws if that is not there.
Isa isa();
const char* name(Isa isa);

}  // namespace moe_kernels

// Calls FUNCTION, which for_each_isa.h has made once for each instruction set, in the version of isa().
#if defined(__x86_64__)
#define MOE_BY_ISA(FUNCTION, ...)                                                      \
  (::moe_kernels::isa() == ::moe_kernels::Isa::kAvx512 ? avx512::FUNCTION(__VA_ARGS__) \
   : ::moe_kernels::isa() == ::moe_kernels::Isa::kAvx2 ? avx2::FUNCTION(__VA_ARGS__)   \
                                                       : baseline::FUNCTION(__VA_ARGS__))
#else
#define MOE_BY_ISA(FUNCTION, ...) baseline::FUNCTION(__VA_ARGS__)
#endif
