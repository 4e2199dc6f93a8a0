#include "memory.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <unordered_map>

namespace moe_kernels {
namespace {

struct Block {
  void* memory;
  size_t bytes;
};

class Pool {
 public:
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const bool fits = bytes <= block->bytes && block->bytes / 2 <= bytes;
      if (fits && (best == free_.end() || block->bytes < best->bytes)) best = block;
    }
    Block taken{};
    if (best == free_.end()) {
      taken.bytes = (bytes / kAlignment + 1) * kAlignment;
      taken.memory = std::aligned_alloc(kAlignment, taken.bytes);
      if (taken.memory == nullptr) throw std::bad_alloc();
    } else {
      taken = *best;
      free_bytes_ -= taken.bytes;
      free_.erase(best);
    }
    used_[taken.memory] = taken.bytes;
    used_bytes_ += taken.bytes;
    most_used_ = std::max(most_used_, used_bytes_);
    return taken;
  }

  void give(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(memory);
    free_.push_back({memory, found->second});
    free_bytes_ += found->second;
    used_bytes_ -= found->second;
    used_.erase(found);
    while (used_bytes_ + free_bytes_ > most_used_) {
      free_bytes_ -= free_.front().bytes;
      std::free(free_.front().memory);
      free_.pop_front();
    }
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::mutex mutex_;
  std::deque<Block> free_;  // the longest unused first
  std::unordered_map<void*, size_t> used_;
  size_t free_bytes_ = 0, used_bytes_ = 0, most_used_ = 0;
};

// Never destroyed: tensors may outlive everything static.
Pool& pool() {
  static Pool* const value = new Pool;
  return *value;
}

bool poisoned() {
  static const bool value = std::getenv("MOE_KERNELS_POISON") != nullptr;
  return value;
}

// torch_from_blob with a deleter, which torch has since 2.11; this library is built for 2.10.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob() {
  static const FromBlob value = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return value;
}

}  // namespace

void* take_memory(size_t bytes) {
  const Block block = pool().take(bytes);
  if (poisoned()) std::memset(block.memory, 0xff, block.bytes);
  return block.memory;
}

void give_memory(void* memory) { pool().give(memory); }

Tensor take_tensor(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[2]{rows, columns}, strides[2]{std::max<int64_t>(columns, 1), 1};
  if (from_blob() == nullptr || rows * columns == 0) return empty({rows, columns}, dtype);
  const size_t element = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  void* memory = take_memory(static_cast<size_t>(rows) * columns * element);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(from_blob()(
      memory, 2, sizes, strides, 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { give_memory(data); }, nullptr));
  return Tensor(handle);
}

}  // namespace moe_kernels
