// hypercolumn: merge, gather, resized sum, norm and their gradients on pyramids; specified in
// moe_kernels/ops/hypercolumn.py.
//
// Everything is a weighted sum of rows of channels. What is resized is blended along y for one row of the grid at a
// time, then along x. No pixel of weight 0 is read, and no result depends on the number of threads.

#include "hypercolumn.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"
#include "isa.h"
#include "memory.h"
#include "pyramid.h"

#define MOE_FOR_EACH_ISA "isa/hypercolumn.h"

namespace moe_kernels {
namespace {

#include "for_each_isa.h"

// What is summed: rows of elements and their weights.
template <class A>
struct Terms {
  std::vector<const A*> rows;
  std::vector<A> weights;

  void clear() { rows.clear(), weights.clear(); }
  void add(const A* row, A weight) {
    if (weight == A(0)) return;
    rows.push_back(row), weights.push_back(weight);
  }
  void add(const A* pixels, int64_t channels, const Tap<A>& tap) {
    add(pixels + tap.low * channels, tap.low_weight);
    add(pixels + tap.high * channels, tap.high_weight);
  }
  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// A run of elements as A: where it stands, or converted into `wide`.
template <class T>
const accumulate_t<T>* widened_run(const T* run, std::vector<accumulate_t<T>>& wide, int64_t n) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return run;
  } else {
    wide.resize(n);
    MOE_BY_ISA(convert_run, run, wide.data(), n);
    return wide.data();
  }
}

// out = start + Σ weights · rows, stored as T; `wide` is memory for where that is not A.
template <class T, class A>
void store_sum(const A* const* rows, const A* weights, int64_t terms, const A* start, T* out, int64_t n,
               std::vector<A>& wide) {
  if constexpr (std::is_same_v<T, A>) {
    MOE_BY_ISA(weighted_sum, rows, weights, terms, start, out, n);
  } else {
    wide.resize(n);
    MOE_BY_ISA(weighted_sum, rows, weights, terms, start, wide.data(), n);
    MOE_BY_ISA(convert_run, wide.data(), out, n);
  }
}

// What resizing a pixel takes.
template <class A>
struct Workspace {
  std::vector<A> pixels[4], sum;
  Terms<A> terms;
};

// The channels of an image at one place.
template <class T, class A>
void store_pixel(const T* image, int64_t channels, const Corners<A>& at, T* out, Workspace<A>& w) {
  w.terms.clear();
  for (int j = 0; j < 4; ++j) {
    if (at.weight[j] == A(0)) continue;
    const T* pixel = image + at.pixel[j] * channels;
    if (at.weight[j] == A(1)) {
      std::copy_n(pixel, channels, out);
      return;
    }
    w.terms.add(widened_run(pixel, w.pixels[j], channels), at.weight[j]);
  }
  store_sum(w.terms.rows.data(), w.terms.weights.data(), w.terms.size(), static_cast<const A*>(nullptr), out, channels,
            w.sum);
}

// A level's rows for the rows of the grid, which one thread asks for in their order.
template <class T>
class Blend {
 public:
  using A = accumulate_t<T>;

  Blend(const Level<T>& level, int64_t grid_height) : level_(level), taps_(taps<A>(level.height, grid_height)) {}

  // Row y of the grid before it is resized along x: (width, channels).
  const A* row(int64_t b, int64_t y) {
    const Tap<A>& tap = taps_[y];
    Terms<A>& terms = terms_;
    terms.clear();
    if (tap.low_weight != A(0)) terms.add(wide(b, tap.low), tap.low_weight);
    if (tap.high_weight != A(0)) terms.add(wide(b, tap.high), tap.high_weight);
    if (terms.size() == 1 && terms.weights[0] == A(1)) return terms.rows[0];
    blended_.resize(elements());
    MOE_BY_ISA(weighted_sum, terms.rows.data(), terms.weights.data(), terms.size(), static_cast<const A*>(nullptr),
               blended_.data(), elements());
    return blended_.data();
  }

 private:
  int64_t elements() const { return level_.width * level_.channels; }

  // Row r of the map; of two neighbours one is even.
  const A* wide(int64_t b, int64_t r) {
    const int64_t number = b * level_.height + r, slot = r % 2;
    const T* row = level_.data + number * elements();
    if (number_[slot] == number) return wide_[slot].data();
    if (!std::is_same_v<T, A>) number_[slot] = number;
    return widened_run(row, wide_[slot], elements());
  }

  const Level<T>& level_;
  const std::vector<Tap<A>> taps_;
  std::vector<A> blended_, wide_[2];
  int64_t number_[2] = {-1, -1};
  Terms<A> terms_;
};

// Calls f(b, y, rows, terms) for every row of the grid: rows[l] is that of level l, blended along y, and terms memory.
template <class T, class F>
void for_rows(const Pyramid<T>& pyramid, const F& f) {
  const int64_t height = pyramid.grid.height;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<Blend<T>> blends;
    blends.reserve(pyramid.levels.size());
    for (const Level<T>& level : pyramid.levels) blends.emplace_back(level, height);
    std::vector<const accumulate_t<T>*> rows(blends.size());
    Terms<accumulate_t<T>> terms;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / height, y = i % height;
      for (size_t l = 0; l < blends.size(); ++l) rows[l] = blends[l].row(b, y);
      f(b, y, rows, terms);
    }
  };
  torch::stable::parallel_for(0, pyramid.batch * height, grain(pyramid.grid.width * pyramid.channels), run);
}

template <class T>
std::vector<std::vector<Tap<accumulate_t<T>>>> taps_along_x(const Pyramid<T>& pyramid) {
  std::vector<std::vector<Tap<accumulate_t<T>>>> result;
  for (const Level<T>& level : pyramid.levels) {
    result.push_back(taps<accumulate_t<T>>(level.width, pyramid.grid.width));
  }
  return result;
}

void check_points(const Tensor& points, int64_t batch, const Grid& grid) {
  STD_TORCH_CHECK(points.scalar_type() == ScalarType::Long && points.dim() == 2 && points.size(0) == batch,
                  "points: expected an int64 tensor of shape (", batch, ", P)");
  const int64_t* location = data<int64_t>(points);
  for (int64_t p = 0; p < points.numel(); ++p) {
    STD_TORCH_CHECK(-1 <= location[p] && location[p] < grid.locations(), "points: expected locations in [-1, ",
                    grid.locations(), "), got ", location[p]);
  }
}

Tensor hypercolumn_gather(std::vector<Tensor> maps, Tensor points_in, std::vector<int64_t> grid) {
  const Tensor points = dense(points_in);
  return by_pyramid(maps, grid, [&](const auto& pyramid) {
    using T = std::decay_t<decltype(*pyramid.levels[0].data)>;
    using A = accumulate_t<T>;
    check_points(points, pyramid.batch, pyramid.grid);
    const int64_t *location = data<int64_t>(points), per_image = points.size(1), n = points.numel();
    const Tensor out = take_tensor({pyramid.batch, per_image, pyramid.channels}, maps[0].scalar_type());
    T* to = mutable_data<T>(out);
    torch::stable::parallel_for(0, n, grain(4 * pyramid.channels), [&](int64_t begin, int64_t end) {
      Workspace<A> workspace;
      for (int64_t p = begin; p < end; ++p) {
        T* column = to + p * pyramid.channels;
        if (location[p] < 0) {
          std::fill_n(column, pyramid.channels, T(0.f));
          continue;
        }
        for (const Level<T>& level : pyramid.levels) {
          store_pixel(level.image(p / per_image), level.channels, corners_at<A>(level, pyramid.grid, location[p]),
                      column + level.first, workspace);
        }
      }
    });
    return out;
  });
}

// For each pixel of a map, or of one axis of it, what its gradient is the weighted sum of, in a fixed order.
template <class A>
struct Contributions {
  std::vector<int64_t> first, source;
  std::vector<A> weight;

  // visit(f) calls f(pixel, source, weight) for all of them, the same at every call.
  template <class Visit>
  Contributions(int64_t pixels, const Visit& visit) : first(pixels + 2) {
    visit([&](int64_t pixel, int64_t, A weight) { first[pixel + 2] += weight != A(0); });
    for (int64_t pixel = 0; pixel < pixels; ++pixel) first[pixel + 2] += first[pixel + 1];
    source.resize(first[pixels + 1]), weight.resize(first[pixels + 1]);
    visit([&](int64_t pixel, int64_t from, A w) {
      if (w == A(0)) return;
      const int64_t at = first[pixel + 1]++;
      source[at] = from, weight[at] = w;
    });
  }

  // The terms of a pixel, where row s is at rows + s · stride.
  void collect(int64_t pixel, const A* rows, int64_t stride, Terms<A>& terms) const {
    terms.clear();
    for (int64_t i = first[pixel]; i < first[pixel + 1]; ++i) terms.add(rows + source[i] * stride, weight[i]);
  }
};

// The taps of an axis, each kind of number by itself; a pixel without weight is the other one.
template <class A>
struct TapArrays {
  explicit TapArrays(const std::vector<Tap<A>>& taps) {
    for (const Tap<A>& tap : taps) {
      low.push_back(static_cast<int32_t>(tap.low));
      high.push_back(static_cast<int32_t>(tap.high_weight == A(0) ? tap.low : tap.high));
      high_weight.push_back(tap.high_weight);
    }
  }
  std::vector<int32_t> low, high;
  std::vector<A> high_weight;
};

// A map of any size: (B, C, H, W) as it stands, or its pixels.
template <class T>
struct Source {
  using A = accumulate_t<T>;

  Source(const Tensor& map, const Grid& size)
      : planes(map.is_contiguous() && map.size(1) > 1),
        kept(planes ? map : channels_last(map)),
        channels(map.size(1)),
        height(map.size(2)),
        width(map.size(3)),
        along_y(taps<A>(height, size.height)),
        along_x(taps<A>(width, size.width)),
        columns(along_x) {}

  // Row y of an image, resized, to pixels that are `stride` apart.
  void store_row(int64_t b, int64_t y, T* out, int64_t stride, Workspace<A>& w) const {
    const T* image = data<T>(kept) + b * channels * height * width;
    const Tap<A>& tap = along_y[y];
    const int64_t n = static_cast<int64_t>(along_x.size());
    if (!planes) {
      for (int64_t x = 0; x < n; ++x) {
        store_pixel(image, channels, corners(tap, along_x[x], width), out + x * stride, w);
      }
    } else if (tap.high_weight == A(0) && width == n) {
      MOE_BY_ISA(interleave_channels<A>, image + tap.low * width, height * width, channels, n, out, stride);
    } else {
      w.sum.resize(channels * n);
      for (int64_t c = 0; c < channels; ++c) {
        const T* plane = image + c * height * width;
        MOE_BY_ISA(resize_row<A>, plane + tap.low * width, plane + tap.high * width, tap.high_weight,
                   columns.low.data(), columns.high.data(), columns.high_weight.data(), n, w.sum.data() + c * n);
      }
      MOE_BY_ISA(interleave_channels<A>, w.sum.data(), n, channels, n, out, stride);
    }
  }

  bool planes;
  Tensor kept;
  int64_t channels, height, width;
  std::vector<Tap<A>> along_y, along_x;
  TapArrays<A> columns;
};

Tensor hypercolumn_merge(std::vector<Tensor> maps, std::vector<int64_t> sizes) {
  const Grid size = grid_of(sizes);
  STD_TORCH_CHECK(!maps.empty(), "maps: expected at least one map, got none");
  int64_t channels = 0;
  for (const Tensor& map : maps) {
    STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == maps[0].size(0) && map.scalar_type() == maps[0].scalar_type() &&
                        map.size(2) >= 1 && map.size(3) >= 1,
                    "maps: expected shape (", maps[0].size(0), ", C, h, w) and one dtype");
    channels += map.size(1);
  }
  const Tensor out = take_tensor({maps[0].size(0), size.height, size.width, channels}, maps[0].scalar_type());
  by_dtype("maps", maps[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Source<T>> sources;
    for (const Tensor& map : maps) sources.emplace_back(map, size);
    const int64_t n = maps[0].size(0) * size.height;
    torch::stable::parallel_for(0, n, grain(size.width * channels), [&](int64_t begin, int64_t end) {
      Workspace<accumulate_t<T>> workspace;
      for (int64_t i = begin; i < end; ++i) {
        T* to = mutable_data<T>(out) + i * size.width * channels;
        for (size_t m = 0; m < sources.size(); to += maps[m++].size(1)) {
          sources[m].store_row(i / size.height, i % size.height, to, channels, workspace);
        }
      }
    });
  });
  return channels_second(out);
}

std::vector<Tensor> hypercolumn_gather_backward(Tensor grad_in, Tensor points_in, std::vector<int64_t> sizes,
                                                std::vector<int64_t> grid_sizes) {
  const Tensor grad = dense(grad_in), points = dense(points_in);
  const Grid grid = grid_of(grid_sizes);
  const int64_t batch = grad.size(0), per_image = grad.size(1), channels = grad.size(2);
  check_points(points, batch, grid);
  STD_TORCH_CHECK(points.size(1) == per_image && sizes.size() % 3 == 0,
                  "hypercolumn_gather_backward: grad, points and sizes do not belong together");
  int64_t first = 0;
  for (size_t l = 0; l < sizes.size(); l += 3) {
    STD_TORCH_CHECK(sizes[l] >= 0 && sizes[l + 1] >= 1 && sizes[l + 2] >= 1, "sizes: expected those of maps");
    first += sizes[l];
  }
  STD_TORCH_CHECK(first == channels, "sizes: expected ", channels, " channels, got ", first);
  std::vector<Tensor> grads;
  by_dtype("grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    std::vector<A> wide;
    const A* g = widened_run(data<T>(grad), wide, grad.numel());
    first = 0;
    for (size_t l = 0; l < sizes.size(); l += 3) {
      const int64_t count = sizes[l], height = sizes[l + 1], width = sizes[l + 2], pixels = height * width;
      const Tensor out = take_tensor({batch, height, width, count}, grad.scalar_type());
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t* location = data<int64_t>(points) + b * per_image;
        const Contributions<A> contributions(pixels, [&](const auto& f) {
          for (int64_t p = 0; p < per_image; ++p) {
            if (location[p] < 0) continue;
            const Corners<A> at = corners_at<A>(Level<T>{nullptr, height, width, count, first}, grid, location[p]);
            for (int j = 0; j < 4; ++j) f(at.pixel[j], p, at.weight[j]);
          }
        });
        T* to = mutable_data<T>(out) + b * pixels * count;
        torch::stable::parallel_for(0, pixels, grain(count), [&](int64_t begin, int64_t end) {
          Terms<A> terms;
          std::vector<A> sum;
          for (int64_t pixel = begin; pixel < end; ++pixel) {
            contributions.collect(pixel, g + b * per_image * channels + first, channels, terms);
            store_sum(terms.rows.data(), terms.weights.data(), terms.size(), static_cast<const A*>(nullptr),
                      to + pixel * count, count, sum);
          }
        });
      }
      grads.push_back(channels_second(out));
      first += count;
    }
  });
  return grads;
}

Tensor hypercolumn_resize_sum(std::vector<Tensor> maps, std::vector<int64_t> grid, std::optional<Tensor> bias_in) {
  return by_pyramid(maps, grid, [&](const auto& pyramid) {
    using T = std::decay_t<decltype(*pyramid.levels[0].data)>;
    using A = accumulate_t<T>;
    const int64_t channels = pyramid.levels[0].channels, height = pyramid.grid.height, width = pyramid.grid.width;
    for (const Level<T>& level : pyramid.levels) {
      STD_TORCH_CHECK(level.channels == channels, "maps: expected ", channels, " channels as of the first, got ",
                      level.channels);
    }
    std::vector<A> wide_bias;
    const A* start = nullptr;
    Tensor bias;
    if (bias_in) {
      bias = dense(*bias_in);
      STD_TORCH_CHECK(bias.scalar_type() == maps[0].scalar_type() && bias.numel() == channels, "bias: expected ",
                      channels, " elements of the dtype of the maps");
      start = widened_run(data<T>(bias), wide_bias, channels);
    }
    const auto along_x = taps_along_x(pyramid);
    const Tensor out = take_tensor({pyramid.batch, height, width, channels}, maps[0].scalar_type());
    for_rows(pyramid, [&](int64_t b, int64_t y, const auto& rows, auto& terms) {
      std::vector<A> sum;
      for (int64_t x = 0; x < width; ++x) {
        terms.clear();
        for (size_t l = 0; l < rows.size(); ++l) terms.add(rows[l], channels, along_x[l][x]);
        store_sum(terms.rows.data(), terms.weights.data(), terms.size(), start,
                  mutable_data<T>(out) + ((b * height + y) * width + x) * channels, channels, sum);
      }
    });
    return channels_second(out);
  });
}

// What each pixel of an axis gets from its locations.
template <class A>
Contributions<A> contributions_along(int64_t in, int64_t out) {
  return Contributions<A>(in, [&](const auto& f) {
    for (int64_t i = 0; i < out; ++i) {
      const Tap<A> t = tap<A>(i, in, out);
      f(t.low, i, t.low_weight);
      f(t.high, i, t.high_weight);
    }
  });
}

std::vector<Tensor> hypercolumn_resize_sum_backward(Tensor grad_in, std::vector<int64_t> sizes) {
  const Tensor grad = channels_last(grad_in);
  STD_TORCH_CHECK(sizes.size() % 2 == 0 && std::all_of(sizes.begin(), sizes.end(), [](int64_t n) { return n >= 1; }),
                  "sizes: expected heights and widths of at least 1");
  const int64_t batch = grad.size(0), height = grad.size(1), width = grad.size(2), channels = grad.size(3);
  std::vector<Tensor> grads;
  by_dtype("grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    std::vector<A> wide;
    const A* g = widened_run(data<T>(grad), wide, grad.numel());
    const int64_t row = width * channels;
    for (size_t l = 0; l < sizes.size(); l += 2) {
      const int64_t rows = sizes[l], columns = sizes[l + 1];
      const auto along_y = contributions_along<A>(rows, height), along_x = contributions_along<A>(columns, width);
      const Tensor out = take_tensor({batch, rows, columns, channels}, grad.scalar_type());
      T* to = mutable_data<T>(out);
      torch::stable::parallel_for(0, batch * rows, grain(row * height / rows), [&](int64_t begin, int64_t end) {
        Terms<A> terms;
        std::vector<A> blended(row), sum;
        for (int64_t i = begin; i < end; ++i) {
          along_y.collect(i % rows, g + i / rows * height * row, row, terms);
          MOE_BY_ISA(weighted_sum, terms.rows.data(), terms.weights.data(), terms.size(),
                     static_cast<const A*>(nullptr), blended.data(), row);
          for (int64_t x = 0; x < columns; ++x) {
            along_x.collect(x, blended.data(), channels, terms);
            store_sum(terms.rows.data(), terms.weights.data(), terms.size(), static_cast<const A*>(nullptr),
                      to + (i * columns + x) * channels, channels, sum);
          }
        }
      });
      grads.push_back(channels_second(out));
    }
  });
  return grads;
}

// (B, H, W): f of the square of every hypercolumn.
template <class F>
Tensor of_squares(const std::vector<Tensor>& maps, const std::vector<int64_t>& grid, const F& f) {
  return by_pyramid(maps, grid, [&](const auto& pyramid) {
    using A = accumulate_t<std::decay_t<decltype(*pyramid.levels[0].data)>>;
    const int64_t height = pyramid.grid.height, width = pyramid.grid.width;
    const auto along_x = taps_along_x(pyramid);
    const Tensor out = empty({pyramid.batch, height, width}, scalar_type<A>);
    for_rows(pyramid, [&](int64_t b, int64_t y, const auto& rows, auto& terms) {
      A* to = mutable_data<A>(out) + (b * height + y) * width;
      for (int64_t x = 0; x < width; ++x) {
        double squares = 0;
        for (size_t l = 0; l < rows.size(); ++l) {
          const int64_t channels = pyramid.levels[l].channels;
          terms.clear();
          terms.add(rows[l], channels, along_x[l][x]);
          squares += MOE_BY_ISA(square_sum, terms.rows.data(), terms.weights.data(), terms.size(), channels);
        }
        to[x] = static_cast<A>(f(squares));
      }
    });
    return out;
  });
}

}  // namespace

Tensor hypercolumn_norm(std::vector<Tensor> maps, std::vector<int64_t> grid) {
  return of_squares(maps, grid, [](double square) { return std::sqrt(square); });
}

Tensor hypercolumn_square(const std::vector<Tensor>& maps, const std::vector<int64_t>& grid) {
  return of_squares(maps, grid, [](double square) { return square; });
}

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("hypercolumn_merge", TORCH_BOX(&hypercolumn_merge));
  m.impl("hypercolumn_gather", TORCH_BOX(&hypercolumn_gather));
  m.impl("hypercolumn_gather_backward", TORCH_BOX(&hypercolumn_gather_backward));
  m.impl("hypercolumn_resize_sum", TORCH_BOX(&hypercolumn_resize_sum));
  m.impl("hypercolumn_resize_sum_backward", TORCH_BOX(&hypercolumn_resize_sum_backward));
  m.impl("hypercolumn_norm", TORCH_BOX(&hypercolumn_norm));
}

}  // namespace moe_kernels
