// csrc/cuda/diverse_sampling.h on a CPU: groups, blocks, warps and lanes in turn, scratch and shared memory full of
// NaN.
#include <limits>
#include <string>
#include <vector>

#include "cuda_on_threads.h"
//
#include "cuda/diverse_sampling_kernel.h"
#include "cuda/diverse_sampling_launches.h"

using namespace moe_kernels;
using namespace moe_kernels::diverse_sampling;
using namespace moe_kernels::diverse_sampling::cuda;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class InTurn {
 public:
  InTurn(int64_t index, int64_t blocks, int64_t shared, bool backwards)
      : index_(index), blocks_(blocks), shared_(shared), backwards_(backwards) {}

  int64_t barriers = 0;

  int64_t index() const { return index_; }
  void barrier() { ++barriers; }

  // Between two barriers no block knows anything of another, so any order will do.
  template <class F>
  void each_block(const F& f) const {
    each(blocks_, [&](int64_t i) {
      std::vector<float> shared(shared_, kNaN);
      Block block{*this, i, shared.data()};
      f(block);
    });
  }

 private:
  struct Warp {
    const InTurn& group;
    int64_t number;

    int32_t index() const { return static_cast<int32_t>(number); }
    int32_t count() const { return static_cast<int32_t>(group.blocks_ * kWarps); }

    template <class F>
    void each_lane(const F& f) const {
      group.each(kLanes, [&](int64_t lane) { f(static_cast<int>(lane)); });
    }

    // Halves of the lanes, added again and again, as shuffles do.
    template <int kCount, class F, class G>
    void sum(const F& f, const G& g) const {
      float sums[kLanes][kCount] = {};
      each_lane([&](int lane) { f(lane, sums[lane]); });
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        for (int lane = 0; lane < offset; ++lane) {
          for (int i = 0; i < kCount; ++i) sums[lane][i] += sums[lane + offset][i];
        }
      }
      for (int i = 0; i < kCount; ++i) g(i, sums[0][i]);
    }

    template <class F>
    void offer(uint64_t* at, const F& f) const {
      each_lane([&](int lane) {
        const uint64_t key = f(lane);
        if (at != nullptr && *at < key) *at = key;
      });
    }
  };

  struct Block {
    const InTurn& group;
    int64_t number;
    float* shared;

    float* columns() const { return shared; }

    template <class F>
    void each_thread(const F& f) const {
      group.each(kThreads, [&](int64_t thread) { f(static_cast<int>(thread)); });
    }

    template <class F>
    void each_warp(const F& f) const {
      group.each(kWarps, [&](int64_t i) { f(Warp{group, number * kWarps + i}); });
    }
  };

  template <class F>
  void each(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(backwards_ ? n - 1 - i : i);
  }

  const int64_t index_, blocks_, shared_;
  const bool backwards_;
};

template <class S>
int64_t run(Problem problem, const std::vector<Map>& maps, int64_t groups, int64_t blocks, bool backwards,
            bool at_once) {
  if (!lay_out<S>(problem, maps).empty()) return -1;
  std::vector<uint64_t> best(int64_t{problem.images} * problem.tracks() * problem.samples, 0);
  std::vector<float> scratch(groups * problem.scratch_stride, kNaN);
  problem.best = best.data(), problem.scratch = scratch.data();
  const int64_t shared = shared_bytes(problem) / static_cast<int64_t>(sizeof(float));
  if (at_once) {
    std::vector<uint32_t> arrived(groups, 0);
    on_threads::launch(static_cast<int>(groups * blocks), kThreads, shared, [&] {
      sample_images<S>(problem, arrived.data(), static_cast<int32_t>(blocks), shared_memory());
    });
    return arrived[0] / blocks;
  }
  int64_t barriers = 0;
  for (int64_t g = 0; g < groups; ++g) {
    InTurn group(g, blocks, shared, backwards);
    for (int64_t image = g; image < problem.images; image += groups) sample<S>(group, problem, image);
    barriers += group.barriers;
  }
  return barriers;
}

}  // namespace

// maps: of each the address, height, width, channels. sizes: images, classes, samples, height and width of the grid,
// groups, blocks. choices: storage, penalty, metric. flags: normalized, background, backwards. Returns how many
// barriers there were, or -1 where the maps are too many.
extern "C" int64_t emulate(const int64_t* maps, int64_t count, const int64_t* sizes, const int64_t* choices,
                           const bool* flags, const float* scores, const bool* present, const int64_t* start,
                           int64_t* indices, int64_t* others) {
  std::vector<Map> list;
  for (int64_t i = 0; i < count; ++i, maps += 4) {
    list.push_back({reinterpret_cast<const void*>(maps[0]), maps[1], maps[2], maps[3]});
  }
  Problem problem{};
  problem.images = static_cast<int32_t>(sizes[0]), problem.classes = static_cast<int32_t>(sizes[1]);
  problem.samples = static_cast<int32_t>(sizes[2]);
  problem.height = static_cast<int32_t>(sizes[3]), problem.width = static_cast<int32_t>(sizes[4]);
  problem.penalty = static_cast<Penalty>(choices[1]), problem.metric = static_cast<Metric>(choices[2]);
  problem.normalized = flags[0], problem.background = flags[1];
  problem.scores = scores, problem.present = present, problem.start = start;
  problem.indices = indices, problem.others = others;
  switch (static_cast<Storage>(choices[0])) {
    case Storage::kFloat:
      return run<float>(problem, list, sizes[5], sizes[6], flags[2], flags[3]);
    case Storage::kBFloat16:
      return run<torch::headeronly::BFloat16>(problem, list, sizes[5], sizes[6], flags[2], flags[3]);
    case Storage::kHalf:
      return run<torch::headeronly::Half>(problem, list, sizes[5], sizes[6], flags[2], flags[3]);
  }
  return -1;
}

// Whether the keys of two candidates say which comes before the other.
extern "C" bool key_is_the_order(float a, int64_t i, float b, int64_t j) {
  const uint64_t one = key_of(a, static_cast<int32_t>(i)), other = key_of(b, static_cast<int32_t>(j));
  return location_of(one) == i && one > 0 && (one > other) == before(Candidate<float>{a, i}, Candidate<float>{b, j});
}

// rates and sizes of a GPU -> groups, and blocks of each.
extern "C" int64_t blocks_of(int64_t cache, double cache_rate, double memory_rate, int64_t resident, int64_t images,
                             int64_t bytes, int64_t* groups) {
  const Launch launch = launch_of({cache, cache_rate, memory_rate, resident}, images, bytes);
  *groups = launch.groups;
  return launch.blocks;
}
