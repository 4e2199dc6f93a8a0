// diverse_sampling and farthest_points on a GPU: one launch, whose blocks stay and in groups go through the images.
// What a thread computes stands in diverse_sampling.h and diverse_sampling_kernel.h, where it can be tested.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/diverse_sampling_kernel.h"
#include "cuda/diverse_sampling_launches.h"

namespace moe_kernels::diverse_sampling::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

static_assert(sizeof(Problem) <= 4000, "a launch has 4 KB of arguments on every driver");

template <Storage kStorage>
__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const __grid_constant__ Problem problem, uint32_t* arrived, int32_t blocks) {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  using S = std::conditional_t<kStorage == Storage::kFloat, float,
                               std::conditional_t<kStorage == Storage::kHalf, Half, BFloat16>>;
  extern __shared__ float4 columns[];
  sample_images<S>(problem, arrived, blocks, reinterpret_cast<float*>(columns));
}

// ---- Arguments

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) cudaGetLastError();  // or the next one to ask would be told of it
  STD_TORCH_CHECK(status == cudaSuccess, "diverse_sampling: ", what, ": ", cudaGetErrorString(status));
}

int64_t attribute(cudaDeviceAttr name, int32_t device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

Device device_of(int32_t device, int blocks_of_multiprocessor) {
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const auto hertz = [&](cudaDeviceAttr name) { return 1e3 * static_cast<double>(attribute(name, device)); };
  const double bus_bytes = static_cast<double>(attribute(cudaDevAttrGlobalMemoryBusWidth, device)) / 8;
  // What a multiprocessor gets out of the L2: about half of the 64 bytes that its port takes in a cycle.
  return {attribute(cudaDevAttrL2CacheSize, device),
          32 * static_cast<double>(multiprocessors) * hertz(cudaDevAttrClockRate),
          2 * bus_bytes * hertz(cudaDevAttrMemoryClockRate), multiprocessors * blocks_of_multiprocessor};
}

int32_t small(int64_t value, const char* name) {
  STD_TORCH_CHECK(0 <= value && value <= INT32_MAX, name, ": expected 0 to 2147483647, got ", value);
  return static_cast<int32_t>(value);
}

// Pixels that vectors of so many channels fill: a copy with zeros, where they do not.
Tensor in_vectors(const Tensor& pixels, int64_t size) {
  const int64_t channels = pixels.size(3);
  if (channels % size == 0 && reinterpret_cast<uintptr_t>(pixels.const_data_ptr()) % 16 == 0) return pixels;
  const int64_t shape[] = {pixels.size(0), pixels.size(1), pixels.size(2), (channels + size - 1) / size * size};
  Tensor filled = torch::stable::new_zeros(pixels, {shape, 4});
  Tensor part = torch::stable::narrow(filled, 3, 0, channels);
  torch::stable::copy_(part, pixels);
  return filled;
}

// The problem's maps, channels last, and its launch.
class Sampling {
 public:
  Problem problem{};

  Sampling(const Tensors& maps, const std::vector<int64_t>& grid, int64_t samples) {
    STD_TORCH_CHECK(!maps.empty(), "maps: expected at least one map, got none");
    STD_TORCH_CHECK(grid.size() == 2 && grid[0] >= 1 && grid[1] >= 1,
                    "grid: expected a height and a width of at least 1");
    for (const Tensor& map : maps) {
      STD_TORCH_CHECK(map.dim() == 4, "maps: expected shape (B, C, H, W), got ", map.dim(), " dimensions");
      STD_TORCH_CHECK(map.is_cuda() && map.get_device_index() == maps[0].get_device_index() &&
                          map.scalar_type() == maps[0].scalar_type() && map.size(0) == maps[0].size(0),
                      "maps: expected one device, one dtype and one number of images");
      STD_TORCH_CHECK(map.size(2) >= 1 && map.size(3) >= 1, "maps: expected maps of at least one pixel");
      const Tensor pixels = torch::stable::transpose(torch::stable::transpose(map, 1, 2), 2, 3);
      maps_.push_back(pixels.is_contiguous() ? pixels : torch::stable::contiguous(pixels));
    }
    small(grid[0] * grid[1], "grid");
    problem.height = small(grid[0], "grid"), problem.width = small(grid[1], "grid");
    problem.images = small(maps[0].size(0), "maps"), problem.samples = small(samples, "num_samples");
  }

  const Tensor& like() const { return maps_[0]; }

  // A contiguous tensor of the caller's that the kernel reads.
  template <class T>
  const T* input(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_cuda() &&
                        tensor.get_device_index() == like().get_device_index(),
                    name, ": expected ", numel, " elements of ", torch::headeronly::toString(dtype),
                    " on the device of the maps, got ", tensor.numel(), " of ",
                    torch::headeronly::toString(tensor.scalar_type()));
    kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }

  void run() {
    if (problem.images == 0 || problem.samples == 0) return;
    switch (like().scalar_type()) {
      case ScalarType::Float:
        return run<Storage::kFloat, float>();
      case ScalarType::BFloat16:
        return run<Storage::kBFloat16, torch::headeronly::BFloat16>();
      case ScalarType::Half:
        return run<Storage::kHalf, torch::headeronly::Half>();
      default:
        STD_TORCH_CHECK(false, "maps: expected float32, bfloat16 or float16 on a GPU, got ",
                        torch::headeronly::toString(like().scalar_type()));
    }
  }

 private:
  template <Storage kStorage, class S>
  void run() {
    std::vector<Map> maps;
    for (Tensor& pixels : maps_) {
      pixels = in_vectors(pixels, Vector<S>::kSize);
      maps.push_back({pixels.const_data_ptr(), pixels.size(1), pixels.size(2), small(pixels.size(3), "maps")});
    }
    const std::string wrong = lay_out<S>(problem, maps);
    STD_TORCH_CHECK(wrong.empty(), wrong);

    const int32_t device = like().get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto kernel = sample_kernel<kStorage>;
    const int64_t shared = shared_bytes(problem);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of sample_kernel");
    int resident = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, shared),
          "occupancy of sample_kernel");
    const Launch launch =
        launch_of(device_of(device, resident), problem.images, image_bytes(problem, static_cast<int64_t>(sizeof(S))));

    // What has to be 0 comes first: the best of every track and step, and the blocks that have arrived at a barrier.
    const int64_t keys = int64_t{problem.images} * problem.tracks() * problem.samples;
    const int64_t zeros = keys + (launch.groups + 3) / 4 * 2;
    const int64_t bytes = zeros * 8 + launch.groups * problem.scratch_stride * 4;
    const Tensor memory = torch::stable::new_empty(like(), {&bytes, 1}, ScalarType::Byte);
    problem.best = static_cast<uint64_t*>(memory.mutable_data_ptr());
    problem.scratch = reinterpret_cast<float*>(problem.best + zeros);
    auto* arrived = reinterpret_cast<uint32_t*>(problem.best + keys);

    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    const auto stream = static_cast<cudaStream_t>(current);
    check(cudaMemsetAsync(problem.best, 0, zeros * 8, stream), "cudaMemsetAsync");
    auto blocks = static_cast<int32_t>(launch.blocks);
    void* arguments[] = {&problem, &arrived, &blocks};
    const dim3 all(static_cast<unsigned>(launch.groups * launch.blocks)), threads(kThreads);
    // All blocks have to be there at once, or a barrier would wait for ever: a cooperative launch sees to that.
    check(cudaLaunchCooperativeKernel(kernel, all, threads, arguments, shared, stream), "launch of sample_kernel");
  }

  Tensors maps_, kept_;
};

Tensor new_indices(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, ScalarType::Long);
}

// ---- The operators

std::tuple<Tensor, Tensor> diverse_sampling(Tensor scores, std::optional<Tensor> present, Tensors maps,
                                            std::vector<int64_t> grid, bool normalized, int64_t num_samples,
                                            int64_t penalty, bool background) {
  Sampling sampling(maps, grid, num_samples);
  Problem& problem = sampling.problem;
  STD_TORCH_CHECK(scores.dim() == 3, "scores: expected shape (B, C, N), got ", scores.dim(), " dimensions");
  STD_TORCH_CHECK(penalty == 0 || penalty == 1, "penalty: expected 0 or 1, got ", penalty);
  const int64_t images = problem.images, classes = scores.size(1);
  problem.classes = small(classes, "scores");
  problem.scores = sampling.input<float>(scores, ScalarType::Float, images * classes * problem.locations(), "scores");
  if (present) problem.present = sampling.input<bool>(*present, ScalarType::Bool, images * classes, "present");
  problem.penalty = static_cast<Penalty>(penalty), problem.metric = Metric::kCosine;
  problem.normalized = normalized, problem.background = background;
  const Tensor indices = new_indices(scores, {images, classes, num_samples});
  const Tensor others = new_indices(scores, {images, background ? num_samples : 0});
  problem.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  problem.others = static_cast<int64_t*>(others.mutable_data_ptr());
  sampling.run();
  return {indices, others};
}

Tensor farthest_points(Tensors maps, std::vector<int64_t> grid, int64_t num_points, Tensor start, int64_t metric) {
  Sampling sampling(maps, grid, num_points);
  Problem& problem = sampling.problem;
  STD_TORCH_CHECK(metric == 0 || metric == 1, "metric: expected 0 or 1, got ", metric);
  problem.start = sampling.input<int64_t>(start, ScalarType::Long, problem.images, "start");
  problem.penalty = Penalty::kMax, problem.metric = static_cast<Metric>(metric), problem.background = true;
  const Tensor others = new_indices(start, {problem.images, num_points});
  problem.others = static_cast<int64_t*>(others.mutable_data_ptr());
  sampling.run();
  return others;
}

}  // namespace
}  // namespace moe_kernels::diverse_sampling::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("diverse_sampling", TORCH_BOX(&moe_kernels::diverse_sampling::cuda::diverse_sampling));
  m.impl("farthest_points", TORCH_BOX(&moe_kernels::diverse_sampling::cuda::farthest_points));
}
