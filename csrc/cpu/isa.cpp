#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace moe_kernels {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512f") ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa chosen() {
  const char* wanted = std::getenv("MOE_KERNELS_ISA");
  if (wanted == nullptr) return best();
  std::string here;
  for (const Isa candidate : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (candidate > best()) break;
    if (std::strcmp(wanted, name(candidate)) == 0) return candidate;
    here += std::string(here.empty() ? "" : ", ") + name(candidate);
  }
  throw std::invalid_argument("MOE_KERNELS_ISA: expected one of what this processor has, " + here + "; got '" + wanted +
                              "'");
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

const char* name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

}  // namespace moe_kernels
