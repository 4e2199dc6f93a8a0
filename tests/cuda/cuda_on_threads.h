// As much of CUDA as a kernel needs, out of threads: each of a launch's is one of the CPU's.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#define __device__

namespace on_threads {

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}

  void wait() {
    std::unique_lock lock(mutex_);
    const int64_t turn = turn_;
    if (++arrived_ == count_) {
      arrived_ = 0, ++turn_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  const int count_;
  int arrived_ = 0;
  int64_t turn_ = 0;
};

struct Warp {
  Barrier barrier{32};
  uint64_t value[32];
};

struct Block {
  Block(int threads, size_t shared_floats)
      : barrier(threads), warps(threads / 32), shared(shared_floats + 4, std::numeric_limits<float>::quiet_NaN()) {}

  Barrier barrier;
  std::deque<Warp> warps;
  std::vector<float> shared;
};

struct Index {
  unsigned x;
};

inline thread_local Block* block;

}  // namespace on_threads

inline thread_local on_threads::Index threadIdx, blockIdx;
inline on_threads::Index gridDim;

inline void __syncthreads() { on_threads::block->barrier.wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  on_threads::Warp& warp = on_threads::block->warps[threadIdx.x / 32];
  std::memcpy(&warp.value[threadIdx.x % 32], &value, sizeof value);
  warp.barrier.wait();
  std::memcpy(&value, &warp.value[threadIdx.x % 32 ^ offset], sizeof value);
  warp.barrier.wait();
  return value;
}

inline void atomicMax(unsigned long long* at, unsigned long long value) {
  unsigned long long found = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (found < value && !__atomic_compare_exchange_n(at, &found, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// The dynamic shared memory of this thread's block.
inline float* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(on_threads::block->shared.data());
  return reinterpret_cast<float*>((address + 15) / 16 * 16);
}

namespace cuda {

enum thread_scope { thread_scope_device };
enum memory_order { memory_order_acquire = __ATOMIC_ACQUIRE, memory_order_release = __ATOMIC_RELEASE };

template <class T, thread_scope>
class atomic_ref {
 public:
  explicit atomic_ref(T& at) : at_(&at) {}
  void fetch_add(T value, memory_order order) { __atomic_fetch_add(at_, value, order); }
  T load(memory_order order) const {
    std::this_thread::yield();
    return __atomic_load_n(at_, order);
  }

 private:
  T* const at_;
};

}  // namespace cuda

namespace on_threads {

// Calls kernel() on every thread of every block.
template <class F>
void launch(int blocks, int threads, size_t shared_floats, const F& kernel) {
  gridDim.x = static_cast<unsigned>(blocks);
  std::deque<Block> all;
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; ++b) all.emplace_back(threads, shared_floats);
  for (int b = 0; b < blocks; ++b) {
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([&, b, t] {
        block = &all[b], blockIdx.x = static_cast<unsigned>(b), threadIdx.x = static_cast<unsigned>(t);
        kernel();
      });
    }
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace on_threads
