#include "memory.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <new>
#include <unordered_map>

namespace moe_kernels {
namespace {

struct Block {
  void* memory;
  size_t bytes;
  int64_t last_use;  // counted in requests
};

class Pool {
 public:
  // A block of `bytes` to `most`.
  Block take(size_t bytes, size_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++requests_;
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const bool fits = bytes <= block->bytes && block->bytes <= most;
      if (fits && (best == free_.end() || block->bytes < best->bytes)) best = block;
    }
    Block taken{};
    if (best == free_.end()) {
      taken.bytes = (bytes / kAlignment + 1) * kAlignment;
      taken.memory = std::aligned_alloc(kAlignment, taken.bytes);
      if (taken.memory == nullptr) throw std::bad_alloc();
    } else {
      taken = *best;
      free_.erase(best);
    }
    used_[taken.memory] = taken.bytes;
    return taken;
  }

  void give(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(memory);
    free_.push_back({memory, found->second, requests_});
    used_.erase(found);
    while (free_.front().last_use + kPatience < requests_) {
      std::free(free_.front().memory);
      free_.pop_front();
    }
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr int64_t kPatience = 64;
  std::mutex mutex_;
  std::deque<Block> free_;  // the longest unused first
  std::unordered_map<void*, size_t> used_;
  int64_t requests_ = 0;
};

// Never destroyed: tensors may outlive everything static.
Pool& pool() {
  static Pool* const value = new Pool;
  return *value;
}

bool poisoned() {
  static const char* const value = std::getenv("MOE_KERNELS_POISON");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

constexpr size_t kLarge = 1 << 20;  // bytes from which the system maps pages of their own

// torch_from_blob with a deleter, which torch has since 2.11; this library is built for 2.10.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob() {
  static const FromBlob value = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return value;
}

// Memory of `bytes` to `most`.
void* take_between(size_t bytes, size_t most) {
  if (bytes == 0) return nullptr;
  const Block block = pool().take(bytes, most);
  if (poisoned()) std::memset(block.memory, 0xff, block.bytes);
  return block.memory;
}

}  // namespace

// For one call any block will do.
void* take_memory(size_t bytes) { return take_between(bytes, std::numeric_limits<size_t>::max()); }

void give_memory(void* memory) {
  if (memory != nullptr) pool().give(memory);
}

Tensor take_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  size_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 0;) {
    if (i + 1 < sizes.size()) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
    bytes *= sizes[i];
  }
  if (from_blob() == nullptr || bytes < kLarge) return torch::stable::empty({sizes.data(), sizes.size()}, dtype);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(from_blob()(
      take_between(bytes, bytes + bytes / 4), sizes.size(), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* memory, void*) { give_memory(memory); }, nullptr));
  return Tensor(handle);
}

}  // namespace moe_kernels
