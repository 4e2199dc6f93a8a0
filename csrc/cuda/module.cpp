// The CUDA extension's Python face: what was built. The kernels register themselves with torch when it is loaded.

// As in csrc/module.cpp, pybind11 is torch's copy, which is not for the stable ABI.
#undef TORCH_TARGET_VERSION
#include <cuda.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"built_torch", MOE_KERNELS_BUILT_TORCH},
      {"torch_target", MOE_KERNELS_TORCH_TARGET},
      {"cuda", std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION / 10 % 100)},
      {"cuda_arch", MOE_KERNELS_CUDA_ARCH},
  };
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of moe_kernels; importing it registers them with torch.";
  m.def("build_info", &build_info, "What this extension was built with and for which GPUs, as strings.");
}
