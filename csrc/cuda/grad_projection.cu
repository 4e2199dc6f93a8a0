// grad_projection on a GPU: the launches. What a thread computes stands in grad_projection.h, where it can be tested.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/grad_projection_launches.h"

namespace moe_kernels::grad_projection::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The sum over a block, in an order that its size alone decides; thread 0 has it.
__device__ Moments block_sum(Moments sum) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Moments of_warp[kWarps];
  const auto across_warp = [&](int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sum += {__shfl_down_sync(~0u, sum.dot, offset), __shfl_down_sync(~0u, sum.loss, offset),
              __shfl_down_sync(~0u, sum.regularizer, offset)};
    }
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  across_warp(32);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < kWarps ? of_warp[lane] : Moments{0, 0, 0};
    across_warp(kWarps);
  }
  return sum;
}

// The second bound: so many blocks at once have enough loads under way to fill the memory bus.
__global__ void __launch_bounds__(kThreads, 4)
    moments_kernel(const __grid_constant__ Table<Update::kMoments> table, const __grid_constant__ Settings settings,
                   Moments* partials) {
  if (settings.skipped()) return;
  const Moments sum = block_sum(moments_of_thread(table, settings, blockIdx.x, threadIdx.x));
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    settle_kernel(const __grid_constant__ Ranges ranges, const __grid_constant__ Settings settings, Rows rows,
                  const Moments* partials, Weights* weights_of) {
  Moments sum{0, 0, 0};
  if (settings.reduce && !settings.skipped()) {
    sum = block_sum(partial_sum(partials, ranges.begin[blockIdx.x], ranges.begin[blockIdx.x + 1], threadIdx.x));
  }
  if (threadIdx.x == 0) settle(settings, rows, weights_of, ranges.first + blockIdx.x, sum);
}

static_assert(sizeof(Table<Update::kAdamW>) + sizeof(Settings) <= 32700, "a launch can have 32,764 bytes");

template <Update kUpdate>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(const __grid_constant__ Table<kUpdate> table, const __grid_constant__ Settings settings,
                  const Weights* weights_of) {
  if (settings.skipped()) return;
  const Piece share_of_block = piece(table, gridDim.x - 1 - blockIdx.x);  // what was read last is still in the cache
  const int32_t tensor = share_of_block.tensor;
  by_types(table.dtype[tensor], table.reference_dtype[tensor], [&](auto types) {
    using T = decltype(types);
    using A = typename T::A;
    __shared__ Shared<kUpdate, A> shared;
    if (threadIdx.x == 0) shared = share<kUpdate, A>(table, settings, weights_of, tensor);
    __syncthreads();
    update_of_thread<kUpdate, T>(table, settings, shared, share_of_block, threadIdx.x);
  });
}

// The current stream of the tensors' device, and memory that its next users take over in its order.
class Gpu {
 public:
  explicit Gpu(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Moments* partials(int64_t count) { return memory<Moments>(count); }
  Weights* weights(int64_t count) { return memory<Weights>(count); }

  void moments(const Table<Update::kMoments>& table, const Settings& settings, Moments* partials) {
    moments_kernel<<<table.blocks(), kThreads, 0, stream_>>>(table, settings, partials);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void settle(const Ranges& ranges, const Settings& settings, const Rows& rows, const Moments* partials,
              Weights* weights_of) {
    settle_kernel<<<ranges.segments, kThreads, 0, stream_>>>(ranges, settings, rows, partials, weights_of);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <Update kUpdate>
  void update(const Table<kUpdate>& table, const Settings& settings, const Weights* weights_of) {
    update_kernel<kUpdate><<<table.blocks(), kThreads, 0, stream_>>>(table, settings, weights_of);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  template <class T>
  T* memory(int64_t count) {
    const int64_t doubles = count * static_cast<int64_t>(sizeof(T) / sizeof(double));
    owned_.push_back(torch::stable::new_empty(like_, {&doubles, 1}, ScalarType::Double));
    return static_cast<T*>(owned_.back().mutable_data_ptr());
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Tensors owned_;
};

// ---- Arguments

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The operands of a call, from lists that have a tensor for each gradient or, of the references, for the first ones.
class Operands {
 public:
  Operands(const Tensors& grads, const std::vector<int64_t>& segments, int64_t rows, int32_t device)
      : list_(grads.size()), grads_(grads), device_(device) {
    STD_TORCH_CHECK(segments.size() == grads.size(), "segments: expected ", grads.size(), ", got ", segments.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      list_[i].numel = grads[i].numel();
      list_[i].dtype = list_[i].reference_dtype = dtype_of(grads[i], "grads");
      STD_TORCH_CHECK(-1 <= segments[i] && segments[i] < rows, "segments: expected rows of the record, -1 to ",
                      rows - 1, ", got ", segments[i]);
      list_[i].segment = static_cast<int32_t>(segments[i]);
    }
    add(kGrad, grads, "grads");
  }

  // Of the gradients' dtypes.
  void add(Role role, const Tensors& tensors, const char* name) {
    STD_TORCH_CHECK(tensors.size() == list_.size(), name, ": expected ", list_.size(), " tensors, got ",
                    tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      STD_TORCH_CHECK(dtype_of(tensors[i], name) == list_[i].dtype, name, ": expected ",
                      torch::headeronly::toString(grads_[i].scalar_type()), " as the others of tensor ", i, ", got ",
                      torch::headeronly::toString(tensors[i].scalar_type()));
      put(role, i, tensors[i], list_[i].numel, name);
    }
  }

  void add_references(const Tensors& tensors) {
    STD_TORCH_CHECK(tensors.size() <= list_.size(), "references: expected at most ", list_.size(), " tensors, got ",
                    tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      list_[i].reference_dtype = dtype_of(tensors[i], "references");
      put(kReference, i, tensors[i], list_[i].numel, "references");
    }
  }

  void add_steps(const Tensors& tensors) {
    STD_TORCH_CHECK(tensors.size() == list_.size(), "steps: expected ", list_.size(), " tensors, got ", tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      STD_TORCH_CHECK(tensors[i].scalar_type() == ScalarType::Float, "steps: expected float32, got ",
                      torch::headeronly::toString(tensors[i].scalar_type()));
      put(kStep, i, tensors[i], 1, "steps");
    }
  }

  const std::vector<Operand>& list() const { return list_; }

 private:
  void put(Role role, size_t i, const Tensor& tensor, int64_t numel, const char* name) {
    STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name,
                    ": expected the device of the others for tensor ", i);
    list_[i].pointer[role] = tensor.mutable_data_ptr();
  }

  std::vector<Operand> list_;
  const Tensors& grads_;
  const int32_t device_;
};

Scalar scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  Scalar result{0, tensor.const_data_ptr(), dtype_of(tensor, name)};
  if (tensor.is_cuda()) return result;
  return {value(result), nullptr};
}

const float* device_float(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->is_cuda() && tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float, name,
                  ": expected one float32 on the device");
  return static_cast<const float*>(tensor->const_data_ptr());
}

Rule checked(int64_t rule) {
  STD_TORCH_CHECK(0 <= rule && rule < kRules, "rule: expected 0 to ", kRules - 1, ", got ", rule);
  return static_cast<Rule>(rule);
}

Rows rows_of(const Tensor& record) {
  STD_TORCH_CHECK(record.scalar_type() == ScalarType::Double && record.dim() == 2 && record.size(1) == kColumns &&
                      record.is_contiguous(),
                  "record: expected a contiguous float64 tensor of shape (S, ", kColumns, ")");
  return {static_cast<double*>(record.mutable_data_ptr()), kColumns};
}

// ---- The operators

Tensor grad_projection_moments(const Tensors& grads, const Tensors& references, const Tensors& params, bool maximize,
                               std::optional<Tensor> grad_scale) {
  const auto count = static_cast<int64_t>(grads.size());
  STD_TORCH_CHECK(count > 0, "grads: expected at least one tensor");
  std::vector<int64_t> segments(count);
  for (int64_t i = 0; i < count; ++i) segments[i] = i;
  Operands operands(grads, segments, count, grads[0].get_device_index());
  operands.add_references(references);
  Settings settings;
  settings.anchored = !params.empty();
  if (settings.anchored) operands.add(kParam, params, "params");
  settings.maximize = maximize;
  settings.grad_scale = device_float(grad_scale, "grad_scale");
  Gpu gpu(grads[0]);
  const int64_t shape[] = {count, 3};
  Tensor result = torch::stable::new_empty(grads[0], {shape, 2}, ScalarType::Double);
  reduce(gpu, operands.list(), settings, {static_cast<double*>(result.mutable_data_ptr()), 3}, count, nullptr);
  return result;
}

void grad_projection(const Tensors& grads, const Tensors& references, const Tensors& params, Tensor record,
                     const std::vector<int64_t>& segments, Tensor coefficient, int64_t rule, double parameter,
                     bool reduce) {
  Operands operands(grads, segments, record.size(0), record.get_device_index());
  operands.add_references(references);
  Settings settings;
  settings.anchored = !params.empty();
  if (settings.anchored) operands.add(kParam, params, "params");
  settings.rule = checked(rule), settings.parameter = parameter, settings.reduce = reduce;
  settings.coefficient = scalar(coefficient, "coefficient");
  Gpu gpu(record);
  run<Update::kProject>(gpu, operands.list(), settings, rows_of(record), record.size(0));
}

void grad_projection_sgd(const Tensors& params, const Tensors& grads, const Tensors& references,
                         const Tensors& momentum_buffers, Tensor record, const std::vector<int64_t>& segments,
                         bool anchored, Tensor coefficient, int64_t rule, double parameter, bool reduce, Tensor lr,
                         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                         bool first_step, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  Operands operands(grads, segments, record.size(0), record.get_device_index());
  operands.add(kParam, params, "params");
  operands.add_references(references);
  if (momentum != 0) operands.add(kFirst, momentum_buffers, "momentum_buffers");
  Settings settings;
  settings.rule = checked(rule), settings.parameter = parameter, settings.reduce = reduce;
  settings.coefficient = scalar(coefficient, "coefficient"), settings.lr = scalar(lr, "lr");
  settings.anchored = anchored, settings.maximize = maximize;
  settings.momentum = momentum, settings.dampening = dampening, settings.weight_decay = weight_decay;
  settings.nesterov = nesterov, settings.first_step = first_step;
  settings.grad_scale = device_float(grad_scale, "grad_scale");
  settings.found_inf = device_float(found_inf, "found_inf");
  Gpu gpu(record);
  run<Update::kSgd>(gpu, operands.list(), settings, rows_of(record), record.size(0));
}

void grad_projection_adamw(const Tensors& params, const Tensors& grads, const Tensors& references,
                           const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps, Tensor record,
                           const std::vector<int64_t>& segments, bool anchored, Tensor coefficient, int64_t rule,
                           double parameter, bool reduce, Tensor lr, double beta1, double beta2, double eps,
                           double weight_decay, bool maximize, std::optional<Tensor> grad_scale,
                           std::optional<Tensor> found_inf) {
  Operands operands(grads, segments, record.size(0), record.get_device_index());
  operands.add(kParam, params, "params");
  operands.add_references(references);
  operands.add(kFirst, exp_avgs, "exp_avgs");
  operands.add(kSecond, exp_avg_sqs, "exp_avg_sqs");
  operands.add_steps(steps);
  Settings settings;
  settings.rule = checked(rule), settings.parameter = parameter, settings.reduce = reduce;
  settings.coefficient = scalar(coefficient, "coefficient"), settings.lr = scalar(lr, "lr");
  settings.anchored = anchored, settings.maximize = maximize;
  settings.beta1 = beta1, settings.beta2 = beta2, settings.eps = eps, settings.weight_decay = weight_decay;
  settings.grad_scale = device_float(grad_scale, "grad_scale");
  settings.found_inf = device_float(found_inf, "found_inf");
  Gpu gpu(record);
  run<Update::kAdamW>(gpu, operands.list(), settings, rows_of(record), record.size(0));
}

}  // namespace
}  // namespace moe_kernels::grad_projection::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  using namespace moe_kernels::grad_projection::cuda;
  m.impl("grad_projection_moments", TORCH_BOX(&grad_projection_moments));
  m.impl("grad_projection", TORCH_BOX(&::moe_kernels::grad_projection::cuda::grad_projection));
  m.impl("grad_projection_sgd", TORCH_BOX(&grad_projection_sgd));
  m.impl("grad_projection_adamw", TORCH_BOX(&grad_projection_adamw));
}
