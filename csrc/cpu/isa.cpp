#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace moe_kernels {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa chosen() {
  const char* wanted = std::getenv("MOE_KERNELS_ISA");
  const Isa limit = best();
  if (wanted == nullptr) return limit;
  for (const Isa candidate : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (candidate <= limit && std::strcmp(wanted, name(candidate)) == 0) return candidate;
  }
  return limit;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

const char* name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

}  // namespace moe_kernels
