// The kernel of diverse_sampling and farthest_points: what diverse_sampling.h names, out of CUDA. A test runs the same
// with threads of a CPU, for which it defines what CUDA has.
#pragma once

#ifdef __CUDACC__
#include <cuda/atomic>
#endif
#include <cstdint>

#include "cuda/diverse_sampling.h"

namespace moe_kernels::diverse_sampling::cuda {

class Warp {
 public:
  __device__ Warp(int32_t index, int32_t count) : index_(index), count_(count) {}

  __device__ int32_t index() const { return index_; }
  __device__ int32_t count() const { return count_; }

  template <class F>
  __device__ void each_lane(const F& f) const {
    f(lane());
  }

  template <int kCount, class F, class G>
  __device__ void sum(const F& f, const G& g) const {
    constexpr int kAll = kCount <= 4 ? 4 : kCount <= 8 ? 8 : 16, kHolders = kLanes / kAll;
    static_assert(kCount <= kAll);
    float of_lane[kCount] = {}, sums[kAll] = {};
    f(lane(), of_lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = of_lane[i];
    const float total = halved<kAll, kLanes / 2>(sums);
    if (lane() % kHolders == 0 && lane() / kHolders < kCount) g(lane() / kHolders, total);
  }

  template <class F>
  __device__ void offer(uint64_t* at, const F& f) const {
    auto key = static_cast<unsigned long long>(f(lane()));
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const unsigned long long other = __shfl_xor_sync(~0u, key, offset);
      key = key < other ? other : key;
    }
    if (at != nullptr && lane() == 0 && key > 0) atomicMax(reinterpret_cast<unsigned long long*>(at), key);
  }

 private:
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  // Two halves of the lanes exchange halves of the sums, again and again, until every lane has one over all.
  template <int kCount, int kOffset>
  static __device__ float halved(const float (&sums)[kCount]) {
    if constexpr (kOffset == 0) {
      return sums[0];
    } else if constexpr (kCount == 1) {
      const float more[] = {sums[0] + __shfl_xor_sync(~0u, sums[0], kOffset)};
      return halved<1, kOffset / 2>(more);
    } else {
      constexpr int kHalf = kCount / 2;
      const bool upper = lane() & kOffset;
      float half[kHalf];
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float other = __shfl_xor_sync(~0u, upper ? sums[i] : sums[i + kHalf], kOffset);
        half[i] = (upper ? sums[i + kHalf] : sums[i]) + other;
      }
      return halved<kHalf, kOffset / 2>(half);
    }
  }

  const int32_t index_, count_;
};

// This block, and with it all of its group.
class Block {
 public:
  __device__ Block(int32_t index, int32_t blocks, float* columns) : index_(index), blocks_(blocks), columns_(columns) {}

  __device__ float* columns() const { return columns_; }

  template <class F>
  __device__ void each_thread(const F& f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class F>
  __device__ void each_warp(const F& f) const {
    f(Warp(index_ * kWarps + static_cast<int32_t>(threadIdx.x) / kLanes, blocks_ * kWarps));
    __syncthreads();
  }

 private:
  const int32_t index_, blocks_;
  float* const columns_;
};

class Group {
 public:
  __device__ Group(int32_t blocks, uint32_t* arrived, float* columns)
      : blocks_(blocks),
        index_(static_cast<int32_t>(blockIdx.x) / blocks),
        arrived_(arrived[index_]),
        block_(static_cast<int32_t>(blockIdx.x) % blocks, blocks, columns) {}

  __device__ int32_t index() const { return index_; }

  template <class F>
  __device__ void each_block(const F& f) const {
    f(block_);
  }

  // Behind the end of each_thread or each_warp, where all threads of a block have waited already.
  __device__ void barrier() {
    if (threadIdx.x == 0) {
      expected_ += blocks_;
      arrived_.fetch_add(1, ::cuda::memory_order_release);
      while (static_cast<int32_t>(arrived_.load(::cuda::memory_order_acquire) - expected_) < 0) {
      }
    }
    __syncthreads();
  }

 private:
  const int32_t blocks_, index_;
  ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> arrived_;
  uint32_t expected_ = 0;
  const Block block_;
};

// Everything that a thread does: images go round the groups, which have so many blocks.
template <class S>
__device__ void sample_images(const Problem& problem, uint32_t* arrived, int32_t blocks, float* columns) {
  Group group(blocks, arrived, columns);
  const auto groups = static_cast<int32_t>(gridDim.x) / blocks;
  for (int32_t image = group.index(); image < problem.images; image += groups) sample<S>(group, problem, image);
}

}  // namespace moe_kernels::diverse_sampling::cuda
