// Large memory that is kept from one call for the next.
//
// The system hands out pages zeroed, one fault at a time; where it has to ask a hypervisor for them, a forward that
// saves 40 MB of pre-activations takes a third longer. malloc gives such blocks back as soon as they are freed.
#pragma once

#include <cstddef>

#include "common.h"

namespace moe_kernels {

// At least `bytes`, aligned to 64, and back. What the last 64 requests had no use for goes back to the system at
// the next release; so an idle process holds what its last steps needed. With
// MOE_KERNELS_POISON=1 in the environment everything taken holds NaN (tests).
void* take_memory(size_t bytes);
void give_memory(void* memory);

// Memory for one call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(take_memory(size * sizeof(T)))) {}
  ~Scratch() { give_memory(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }

 private:
  T* data_;
};

// A tensor whose memory, where it is large, is taken so and given back when it dies; it cannot be resized. torch
// before 2.11 knows no such tensors: there it is torch's own.
Tensor take_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace moe_kernels
