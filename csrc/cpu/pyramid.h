// Pyramids: lists of maps (B, C_l, H_l, W_l) of the same images, which stand for hypercolumns on a grid; specified in
// moe_kernels/ops/hypercolumn.py.
#pragma once

#include <vector>

#include "common.h"
#include "common/pyramid.h"

namespace moe_kernels {

struct Grid {
  int64_t height, width;
  int64_t locations() const { return height * width; }
};

inline Grid grid_of(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 2 && sizes[0] >= 1 && sizes[1] >= 1 && sizes[0] <= INT32_MAX / sizes[1],
                  "grid: expected a height and a width of at least 1, and at most 2147483647 locations");
  return {sizes[0], sizes[1]};
}

// A tensor (B, C, H, W) as (B, H, W, C) without gaps; a copy only where it is not channels-last.
inline Tensor channels_last(const Tensor& map) {
  STD_TORCH_CHECK(map.dim() == 4, "maps: expected shape (B, C, H, W), got ", map.dim(), " dimensions");
  return dense(torch::stable::transpose(torch::stable::transpose(map, 1, 2), 2, 3));
}

// A tensor (B, H, W, C) as (B, C, H, W), the same memory.
inline Tensor channels_second(const Tensor& map) {
  return torch::stable::transpose(torch::stable::transpose(map, 2, 3), 1, 2);
}

// One map: the channels of a pixel stand side by side.
template <class T>
struct Level {
  const T* data;
  int64_t height, width, channels;
  int64_t first;  // where its channels begin in a hypercolumn

  int64_t pixels() const { return height * width; }
  const T* image(int64_t b) const { return data + b * pixels() * channels; }
};

template <class T>
class Pyramid {
 public:
  Pyramid(const std::vector<Tensor>& maps, const std::vector<int64_t>& sizes) : grid(grid_of(sizes)) {
    for (const Tensor& map : maps) {
      kept_.push_back(channels_last(map));
      const Tensor& pixels = kept_.back();
      STD_TORCH_CHECK(pixels.scalar_type() == maps[0].scalar_type() && pixels.size(0) == maps[0].size(0),
                      "maps: expected one dtype and one number of images");
      STD_TORCH_CHECK(pixels.size(1) >= 1 && pixels.size(2) >= 1, "maps: expected maps of at least one pixel");
      levels.push_back({data<T>(pixels), pixels.size(1), pixels.size(2), pixels.size(3), channels});
      channels += pixels.size(3);
    }
    batch = maps[0].size(0);
  }

  const Grid grid;
  int64_t batch = 0, channels = 0;
  std::vector<Level<T>> levels;

 private:
  std::vector<Tensor> kept_;
};

// Calls f with the maps as a Pyramid of their dtype.
template <class F>
auto by_pyramid(const std::vector<Tensor>& maps, const std::vector<int64_t>& grid, const F& f) {
  STD_TORCH_CHECK(!maps.empty(), "maps: expected at least one map, got none");
  return by_dtype("maps", maps[0].scalar_type(), [&](auto zero) { return f(Pyramid<decltype(zero)>(maps, grid)); });
}

// The taps of every location of an axis.
template <class A>
std::vector<Tap<A>> taps(int64_t in, int64_t out) {
  std::vector<Tap<A>> result;
  result.reserve(out);
  for (int64_t i = 0; i < out; ++i) result.push_back(tap<A>(i, in, out));
  return result;
}

// The corners of location y · width + x of the grid in a level.
template <class A, class T>
Corners<A> corners_at(const Level<T>& level, const Grid& grid, int64_t location) {
  return corners(tap<A>(location / grid.width, level.height, grid.height),
                 tap<A>(location % grid.width, level.width, grid.width), level.width);
}

}  // namespace moe_kernels
