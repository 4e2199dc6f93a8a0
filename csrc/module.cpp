// The extension's Python face: what was built, and which instruction set this machine gives it.
// No torch header stands here; the kernels in cpu/ register themselves with torch when the library is loaded.

// This pybind11 is the copy among torch's headers, which refuses to be compiled for the stable ABI. Only
// kernels need that, and none is in this file.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()},
      {"cxx_standard", std::to_string(__cplusplus / 100 % 100)},
      {"built_torch", MOE_KERNELS_BUILT_TORCH},
      {"torch_target", MOE_KERNELS_TORCH_TARGET},
      {"isa", moe_kernels::name(moe_kernels::isa())},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  moe_kernels::isa();  // raises here if what the environment asks for is not there
  m.doc() = "C++ kernels of moe_kernels; importing it registers them with torch.";
  m.def("build_info", &build_info,
        "What this extension was built with and the instruction set that its kernels use here, as strings.");
}
