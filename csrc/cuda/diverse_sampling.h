// diverse_sampling and farthest_points on a GPU: everything that a thread computes. No CUDA stands here: tests run the
// same on a CPU, block after block. Specified in moe_kernels/ops/diverse_sampling.py.
//
// A group of blocks works on an image from its first sample to its last. All classes advance together, each a track
// with its penalties, and after them the background as one more. A step is two sections, each with a barrier of the
// group behind it:
//
// products: the new columns of up to kColumns tracks, gathered into shared memory, times every pixel of every map;
//
// update: these products resized, and the penalty and the key of every location. The largest key of 64 bits is chosen,
// so it does not matter who compares what when.
//
// Every sum has an order that the shapes alone decide. The code names what a machine has:
//
// Group: index(), barrier(), each_block(f), which calls f(block).
//
// Block: columns(), its shared memory; each_thread(f) and each_warp(f), which call f(thread) and f(warp), and behind
// which all threads wait.
//
// Warp: index() and count() in the group; each_lane(f), which calls f(lane); sum<n>(f, g), which calls f(lane, sums[n])
// and then g(i, i-th total); offer(at, f), by which the largest f(lane) of all warps comes to stand there, if not null.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/diverse_sampling.h"

namespace moe_kernels::diverse_sampling::cuda {

inline constexpr int kLanes = 32, kThreads = 384, kWarps = kThreads / kLanes;
// Columns that a pass over the features is multiplied by, and pixels that a warp reads at a time.
inline constexpr int kColumns = 4, kRows = 4;
static_assert(kColumns <= kWarps, "a block alone has a warp for every column");
// Floats of a column that shared memory has room for: four columns are 96 KB, which all but the smallest GPUs have.
inline constexpr int kSlots = 6144;
// Products of a pixel with itself, the one to its right, the one below and the one below that to the right, and of the
// second with the third.
inline constexpr int kPairs = 5;
inline constexpr int kPieces = 48;

enum class Storage { kFloat, kBFloat16, kHalf };

// What a thread reads at once, in the words in which registers hold it.
template <class S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  uint32_t word[4];

  MOE_HOST_DEVICE float operator[](int element) const {
    if constexpr (std::is_same_v<S, float>) {
      float value = 0;
      std::memcpy(&value, &word[element], sizeof value);
      return value;
    } else {
      return static_cast<float>(S(static_cast<uint16_t>(word[element / 2] >> element % 2 * 16), S::from_bits()));
    }
  }
};

// What the lanes of a warp read at once, and how many floats of a column in shared memory it is multiplied by.
template <class S>
inline constexpr int kStep = kLanes * Vector<S>::kSize;

// A map, or those of its channels that shared memory has room for.
struct Piece {
  const void* data;  // where a vector begins, as every pixel does
  int64_t stride;    // elements between two pixels
  int32_t height, width, channels;
  int32_t first_product;      // where those of its pixels begin
  int32_t first_slot;         // where its channels begin in a column in shared memory
  int32_t first_task, tasks;  // kRows pixels each, numbered through a segment

  MOE_HOST_DEVICE int32_t pixels() const { return height * width; }
};

// Pieces whose channels of a column are in shared memory at the same time.
struct Segment {
  int32_t first, end, slots, tasks;
};

struct Problem {
  Piece piece[kPieces];
  Segment segment[kPieces];
  int32_t pieces, segments;
  int32_t height, width;  // of the grid
  int32_t images, classes, samples;
  int32_t products;  // of a column: the pixels of all pieces
  Penalty penalty;
  Metric metric;
  bool normalized, background;
  const float* scores;     // (images, classes, locations)
  const bool* present;     // (images, classes) or null
  const int64_t* start;    // (images,) or null: the background's first sample
  int64_t* indices;        // (images, classes, samples)
  int64_t* others;         // (images, samples), where there is a background
  uint64_t* best;          // (images, tracks, samples), 0 at first
  float* scratch;          // of every group
  int64_t scratch_stride;  // floats of a group

  MOE_HOST_DEVICE int32_t locations() const { return height * width; }
  MOE_HOST_DEVICE int32_t tracks() const { return classes + 1; }  // the last is the background
  MOE_HOST_DEVICE bool native(const Piece& p) const { return p.height == height && p.width == width; }
};

// The memory of a group; where what begins is computed anew, as that takes no registers.
class Scratch {
 public:
  MOE_HOST_DEVICE Scratch(const Problem& problem, int64_t group)
      : problem_(problem), begin_(problem.scratch + group * problem.scratch_stride) {}

  static int64_t floats(const Problem& p) {
    const int64_t taken = (int64_t{p.tracks()} * p.locations() + 3) / 4;
    return int64_t{kPairs} * p.products + int64_t{p.tracks() + 1} * p.locations() + p.tracks() + 1 + taken;
  }

  // Of a column, or of pairs of neighbours: of all pixels.
  MOE_HOST_DEVICE float* products(int column) const { return begin_ + int64_t{column} * problem_.products; }
  // Of all locations: 1 / norm, or where distances are Euclidean the square.
  MOE_HOST_DEVICE float* norms() const { return products(kPairs); }
  // Of all locations of a track.
  MOE_HOST_DEVICE float* penalties(int32_t track) const { return norms() + int64_t{track + 1} * problem_.locations(); }
  // How many classes are there, then which, then the background.
  MOE_HOST_DEVICE int32_t* active() const { return reinterpret_cast<int32_t*>(penalties(problem_.tracks())); }
  // Of all locations of a track.
  MOE_HOST_DEVICE uint8_t* taken(int32_t track) const {
    return reinterpret_cast<uint8_t*>(active() + problem_.tracks() + 1) + int64_t{track} * problem_.locations();
  }

 private:
  const Problem& problem_;
  float* const begin_;
};

// ---- Keys: of 64 bits, the larger that of the candidate that comes before the other; 0 is that of none

MOE_HOST_DEVICE inline uint64_t key_of(float value, int32_t location) {
  value += 0.0f;  // -0 is 0
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value != value ? ~uint32_t{0} : bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  return uint64_t{bits} << 32 | ~static_cast<uint32_t>(location);
}

MOE_HOST_DEVICE inline int32_t location_of(uint64_t key) {
  return key == 0 ? static_cast<int32_t>(kNone) : static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// An image at a group.
struct Image {
  const Problem& problem;
  const int64_t index;
  const Scratch scratch;

  MOE_DEVICE Image(const Problem& p, int64_t image, int64_t group) : problem(p), index(image), scratch(p, group) {}

  template <class S>
  MOE_DEVICE const S* pixels(const Piece& p) const {
    return static_cast<const S*>(p.data) + index * p.pixels() * p.stride;
  }

  MOE_DEVICE Corners<float> corners_at(const Piece& p, int32_t location) const {
    return corners(tap<float>(location / problem.width, p.height, problem.height),
                   tap<float>(location % problem.width, p.width, problem.width), p.width);
  }

  MOE_DEVICE uint64_t* best(int32_t track, int32_t k) const {
    return problem.best + (index * problem.tracks() + track) * problem.samples + k;
  }

  // What a column is multiplied by.
  MOE_DEVICE float scale(int32_t location) const {
    return problem.normalized || problem.metric == Metric::kEuclidean ? 1.0f : scratch.norms()[location];
  }
};

// Tracks that advance together, and what each of them sampled last.
struct Tile {
  int32_t count = 0;

  MOE_DEVICE Tile(const Image& image, const int32_t* tracks, int32_t available, int32_t k) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      track_[i] = last_[i] = static_cast<int32_t>(kNone);
      if (i >= available) continue;
      count = i + 1;
      track_[i] = tracks[i];
      if (k > 0) last_[i] = location_of(*image.best(track_[i], k - 1));
    }
  }

  MOE_DEVICE int32_t track(int32_t column) const { return at(track_, column); }
  MOE_DEVICE int32_t last(int32_t column) const { return at(last_, column); }

 private:
  // Registers have no addresses.
  static MOE_DEVICE int32_t at(const int32_t (&of)[kColumns], int32_t column) {
    int32_t found = of[0];
#pragma unroll
    for (int i = 1; i < kColumns; ++i) found = column == i ? of[i] : found;
    return found;
  }

  int32_t track_[kColumns], last_[kColumns];
};

// Calls f with the number from 1 to kColumns as a constant.
template <int kNumber = kColumns, class F>
MOE_DEVICE void with_number(int32_t number, const F& f) {
  if constexpr (kNumber > 1) {
    if (number < kNumber) return with_number<kNumber - 1>(number, f);
  }
  f(std::integral_constant<int, kNumber>{});
}

template <class S>
MOE_DEVICE Vector<S> read(const S* from) {
  Vector<S> result;
  std::memcpy(&result, __builtin_assume_aligned(from, sizeof result), sizeof result);
  return result;
}

// ---- Norms: the products of neighbouring pixels, from which those of resized maps follow

template <class S>
MOE_DEVICE void pairs_of_lane(const S* pixels, const Piece& p, bool native, int32_t pixel, int lane,
                              float (&sum)[kPairs]) {
  const int64_t right = pixel % p.width + 1 < p.width ? p.stride : 0;
  const int64_t below = pixel / p.width + 1 < p.height ? p.width * p.stride : 0;
  const S* here = pixels + pixel * p.stride;
  for (int32_t c = lane * Vector<S>::kSize; c < p.channels; c += kStep<S>) {
    const Vector<S> a = read(here + c);
    Vector<S> b{}, d{}, e{};
    if (!native) {
      b = read(here + right + c);
      d = read(here + below + c);
      e = read(here + right + below + c);
    }
#pragma unroll
    for (int i = 0; i < Vector<S>::kSize; ++i) {
      sum[0] += a[i] * a[i], sum[1] += a[i] * b[i], sum[2] += a[i] * d[i], sum[3] += a[i] * e[i], sum[4] += b[i] * d[i];
    }
  }
}

template <class S, class Block>
MOE_DEVICE void pairs(Block& block, const Image& image) {
  const Problem& problem = image.problem;
  block.each_warp([&](const auto& warp) {
    int32_t i = 0;
    for (int64_t product = warp.index(); product < problem.products; product += warp.count()) {
      while (product >= problem.piece[i].first_product + problem.piece[i].pixels()) ++i;
      const Piece& p = problem.piece[i];
      const auto pixel = static_cast<int32_t>(product - p.first_product);
      const S* pixels = image.pixels<S>(p);
      const bool native = problem.native(p);
      warp.template sum<kPairs>(
          [&](int lane, float (&sum)[kPairs]) { pairs_of_lane(pixels, p, native, pixel, lane, sum); },
          [&](int pair, float total) { image.scratch.products(pair)[product] = total; });
    }
  });
}

MOE_DEVICE inline float square_at(const Image& image, int32_t location) {
  float square = 0;
  for (int32_t i = 0; i < image.problem.pieces; ++i) {
    const Piece& p = image.problem.piece[i];
    const auto pair = [&](int number, int64_t pixel) {
      return image.scratch.products(number)[p.first_product + pixel];
    };
    if (image.problem.native(p)) {
      square += pair(0, location);
      continue;
    }
    const Corners<float> c = image.corners_at(p, location);
    const float self[] = {pair(0, c.pixel[0]), pair(0, c.pixel[1]), pair(0, c.pixel[2]), pair(0, c.pixel[3])};
    square += resized_square(c, self, pair(1, c.pixel[0]), pair(1, c.pixel[2]), pair(2, c.pixel[0]),
                             pair(2, c.pixel[1]), pair(3, c.pixel[0]), pair(4, c.pixel[0]));
  }
  return square;
}

// Norms, and which classes there are.
template <class Block>
MOE_DEVICE void prepare(Block& block, const Image& image) {
  const Problem& problem = image.problem;
  block.each_warp([&](const auto& warp) {
    warp.each_lane([&](int lane) {
      const int64_t thread = warp.index() * kLanes + lane;
      if (thread == 0) {
        int32_t count = 0;
        for (int32_t c = 0; c < problem.classes; ++c) {
          if (problem.present == nullptr || problem.present[image.index * problem.classes + c]) {
            image.scratch.active()[++count] = c;
          }
        }
        image.scratch.active()[0] = count, image.scratch.active()[count + 1] = problem.classes;
      }
      if (problem.normalized) return;
      for (int64_t i = thread; i < problem.locations(); i += warp.count() * kLanes) {
        const float square = square_at(image, static_cast<int32_t>(i));
        image.scratch.norms()[i] = problem.metric == Metric::kEuclidean ? square : inverse_norm(square);
      }
    });
  });
}

// ---- Products: the new columns times every pixel

// Where a vector of channels stands in a column in shared memory: its quarters apart, so that what the lanes read
// together is side by side.
template <class S>
MOE_DEVICE int32_t slot_of(int32_t vector, int quarter) {
  return vector / kLanes * kStep<S> + quarter * 4 * kLanes + vector % kLanes * 4;
}

// A thread's part of the columns of a segment.
template <class S>
MOE_DEVICE void gather_of_thread(const Image& image, const Tile& tile, const Segment& segment, int thread,
                                 float* columns) {
  constexpr int kSize = Vector<S>::kSize;
  const int32_t vectors = segment.slots / kSize;
  for (int32_t v = thread; v < tile.count * vectors; v += kThreads) {
    const int32_t column = v / vectors, vector = v % vectors, location = tile.last(column);
    int32_t i = segment.first;
    while (i + 1 < segment.end && vector * kSize >= image.problem.piece[i + 1].first_slot) ++i;
    const Piece& p = image.problem.piece[i];
    const int32_t channel = vector * kSize - p.first_slot;
    float value[kSize] = {};
    if (location != kNone && channel < p.channels) {
      const S* pixels = image.pixels<S>(p);
      const float scale = image.scale(location);
      const auto at = [&](int64_t pixel) { return read(pixels + pixel * p.stride + channel); };
      if (image.problem.native(p)) {
        const Vector<S> a = at(location);
#pragma unroll
        for (int e = 0; e < kSize; ++e) value[e] = a[e] * scale;
      } else {
        const Corners<float> c = image.corners_at(p, location);
        const Vector<S> corner[] = {at(c.pixel[0]), at(c.pixel[1]), at(c.pixel[2]), at(c.pixel[3])};
        const Corners<float> side_by_side{{0, 1, 2, 3}, {c.weight[0], c.weight[1], c.weight[2], c.weight[3]}};
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const float values[] = {corner[0][e], corner[1][e], corner[2][e], corner[3][e]};
          value[e] = resized(values, side_by_side, 1) * scale;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) columns[column * segment.slots + slot_of<S>(vector, e / 4) + e % 4] = value[e];
  }
}

template <int kNumber, class S>
MOE_DEVICE void products_of_lane(const S* const (&row)[kRows], int32_t channels, const float* columns, int32_t slots,
                                 int lane, float (&sum)[kNumber * kRows]) {
  constexpr int kSize = Vector<S>::kSize;
#pragma unroll 2
  for (int32_t begin = 0; begin < channels; begin += kStep<S>) {
    const int32_t channel = begin + lane * kSize;
    Vector<S> vector[kRows] = {};
    if (channel < channels) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) vector[r] = read(row[r] + channel);
    }
#pragma unroll
    for (int quarter = 0; quarter < kSize / 4; ++quarter) {
#pragma unroll
      for (int j = 0; j < kNumber; ++j) {
        const auto z =
            *reinterpret_cast<const Vector<float>*>(columns + j * slots + begin + quarter * 4 * kLanes + lane * 4);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[j * kRows + r] += vector[r][quarter * 4 + e] * z[e];
          }
        }
      }
    }
  }
}

template <class S, class Block>
MOE_DEVICE void products(Block& block, const Image& image, const Tile& tile) {
  const Problem& problem = image.problem;
  for (int32_t s = 0; s < problem.segments; ++s) {
    const Segment& segment = problem.segment[s];
    float* columns = block.columns();
    block.each_thread([&](int thread) { gather_of_thread<S>(image, tile, segment, thread, columns); });
    with_number(tile.count, [&](auto number) {
      constexpr int kNumber = decltype(number)::value;
      block.each_warp([&](const auto& warp) {
        int32_t i = segment.first;
        for (int32_t task = warp.index(); task < segment.tasks; task += warp.count()) {
          while (task >= problem.piece[i].first_task + problem.piece[i].tasks) ++i;
          const Piece& p = problem.piece[i];
          const int32_t first = (task - p.first_task) * kRows, last = p.pixels() - 1;
          const S* pixels = image.pixels<S>(p);
          const S* row[kRows];
          for (int r = 0; r < kRows; ++r) row[r] = pixels + (first + r < last ? first + r : last) * p.stride;
          warp.template sum<kNumber * kRows>(
              [&](int lane, float (&sum)[kNumber* kRows]) {
                products_of_lane<kNumber>(row, p.channels, columns + p.first_slot, segment.slots, lane, sum);
              },
              [&](int which, float total) {
                const int column = which / kRows, pixel = first + which % kRows;
                if (pixel <= last) {
                  image.scratch.products(column)[p.first_product + pixel] = total;
                }
              });
        }
      });
    });
  }
}

// ---- Update: the penalties of all locations, and the best of them

MOE_DEVICE inline float similarity(const Image& image, int32_t column, int32_t last, int32_t location) {
  const Problem& problem = image.problem;
  float product = 0;
  for (int32_t i = 0; i < problem.pieces; ++i) {
    const Piece& p = problem.piece[i];
    const float* of_piece = image.scratch.products(column) + p.first_product;
    product += problem.native(p) ? of_piece[location] : resized(of_piece, image.corners_at(p, location), 1);
  }
  if (problem.normalized) return product;
  const float* norm = image.scratch.norms();
  if (problem.metric == Metric::kEuclidean) return closeness(product, norm[location], norm[last]);
  return product * norm[location];
}

// Brings a location of a track up to date; returns the key of it as the k-th sample.
MOE_DEVICE inline uint64_t update_of_location(const Image& image, const Tile& tile, int32_t column, int32_t k,
                                              int32_t location) {
  const Problem& problem = image.problem;
  const Scratch& scratch = image.scratch;
  const int32_t track = tile.track(column), last = tile.last(column);
  const bool scored = track < problem.classes;
  float* const own_penalty = scratch.penalties(track) + location;
  uint8_t* const own_taken = scratch.taken(track) + location;
  float penalty = 0;
  bool taken = false;
  if (k == 0) {
    for (int32_t a = 1; !scored && a <= scratch.active()[0]; ++a) {
      const int32_t other = scratch.active()[a];
      penalty = penalized(problem.penalty, penalty, scratch.penalties(other)[location], a == 1);
      taken = taken || scratch.taken(other)[location];
    }
    if (problem.start != nullptr) taken = location != problem.start[image.index];
  } else {
    const bool first = k == 1 && (scored || scratch.active()[0] == 0);
    const bool was = k > 1 || problem.start == nullptr ? *own_taken : false;
    penalty = penalized(problem.penalty, *own_penalty, similarity(image, column, last, location), first);
    taken = was || location == last;
  }
  *own_penalty = penalty, *own_taken = taken;
  if (taken) return 0;
  const float score =
      scored ? problem.scores[(image.index * problem.classes + track) * problem.locations() + location] : 0;
  return key_of(score - penalty, location);
}

template <class Block>
MOE_DEVICE void update(Block& block, const Image& image, const Tile& tile, int32_t k) {
  const Problem& problem = image.problem;
  block.each_warp([&](const auto& warp) {
    const int32_t column = warp.index() % tile.count, worker = warp.index() / tile.count;
    const int32_t workers = (warp.count() - column + tile.count - 1) / tile.count;
    if (k > 0 && tile.last(column) == kNone) return;
    const auto best_of_lane = [&](int lane) {
      uint64_t key = 0;
      for (int64_t i = worker * kLanes + lane; i < problem.locations(); i += int64_t{workers} * kLanes) {
        const uint64_t other = update_of_location(image, tile, column, k, static_cast<int32_t>(i));
        key = key < other ? other : key;
      }
      return key;
    };
    warp.offer(k < problem.samples ? image.best(tile.track(column), k) : nullptr, best_of_lane);
  });
}

// ---- All of it

template <class S, class Group>
MOE_DEVICE void step(Group& group, const Image& image, const Tile& tile, int32_t k) {
  if (k > 0) {
    group.each_block([&](auto& block) { products<S>(block, image, tile); });
    group.barrier();
  }
  group.each_block([&](auto& block) { update(block, image, tile, k); });
  group.barrier();
}

template <class S, class Group>
MOE_DEVICE void sample(Group& group, const Problem& problem, int64_t index) {
  const Image image(problem, index, group.index());
  if (!problem.normalized) {
    group.each_block([&](auto& block) { pairs<S>(block, image); });
    group.barrier();
  }
  group.each_block([&](auto& block) { prepare(block, image); });
  group.barrier();
  // After the last samples of the classes the background still wants the penalties that come of them.
  const int32_t active = image.scratch.active()[0], scored = problem.samples + problem.background;
  for (int32_t n = 0; n < scored + (problem.background ? problem.samples : 0); ++n) {
    const int32_t k = n < scored ? n : n - scored, end = n < scored ? active : active + 1;
    for (int32_t first = n < scored ? 0 : active; first < end; first += kColumns) {
      step<S>(group, image, Tile(image, image.scratch.active() + 1 + first, end - first, k), k);
    }
  }
  group.each_block([&](auto& block) {
    block.each_warp([&](const auto& warp) {
      warp.each_lane([&](int lane) {
        const int64_t scored = static_cast<int64_t>(problem.classes) * problem.samples;
        const int64_t all = scored + (problem.background ? problem.samples : 0);
        for (int64_t i = warp.index() * kLanes + lane; i < all; i += warp.count() * kLanes) {
          int64_t* to = i < scored ? problem.indices + index * scored + i
                                   : problem.others + index * problem.samples + (i - scored);
          *to = location_of(image.best(0, 0)[i]);
        }
      });
    });
  });
  // Without a step no other barrier stands between reading how many classes there are and preparing the next image.
  if (active == 0 && !problem.background) group.barrier();
}

}  // namespace moe_kernels::diverse_sampling::cuda
