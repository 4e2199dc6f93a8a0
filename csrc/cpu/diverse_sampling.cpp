// diverse_sampling and farthest_points; specified in moe_kernels/ops/diverse_sampling.py.
//
// What takes time is reading the features: a step multiplies them with the columns that were picked, or with their sum.
// So the classes advance together, and a location is looked at only where it may be the best. A penalty never falls
// from step to step: the largest similarity not at all, their sum where no feature is negative. So what a location was
// worth when it was last looked at bounds what it is worth now (Minoux, 1978), and most are left alone. That holds for
// the rounded numbers too, since rounding keeps an order; so the picks are bit for bit those of looking at all.
//
// What is multiplied are pixels of the pyramid; products are resized afterwards. No result depends on the number of
// threads or on the rest of the batch.

#include "common/diverse_sampling.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "hypercolumn.h"
#include "isa.h"
#include "memory.h"
#include "pyramid.h"

#define MOE_FOR_EACH_ISA "isa/diverse_sampling.h"

namespace moe_kernels::diverse_sampling {
namespace {

// What features may have among them: negative ones; ones that are not finite, or whose products may not be.
constexpr int kNegative = 1, kUnusual = 2;

#include "for_each_isa.h"

constexpr int64_t kPixels = 32, kLocations = 128;  // that a thread takes at once
constexpr int64_t kAlone = 1 << 17;                // multiplications that one thread does sooner than two

// Items [begin, end) of a list.
struct Piece {
  size_t list;
  int64_t begin, end;
};

// A list cut into pieces, and about how many multiplications they are.
struct Pieces {
  std::vector<Piece> all;
  int64_t work = 0;

  void cut(size_t list, int64_t begin, int64_t end, int64_t step, int64_t work_each) {
    work += (end - begin) * work_each;
    for (; begin < end; begin += step) all.push_back({list, begin, std::min(begin + step, end)});
  }

  template <class F>
  void share(const F& f) const {
    if (work < kAlone) {
      for (const Piece& piece : all) f(piece);
      return;
    }
    std::atomic<size_t> next{0};
    on_every_thread([&](int64_t) {
      for (size_t i = next++; i < all.size(); i = next++) f(all[i]);
    });
  }
};

// Calls f(i) for every flag i that is set.
template <class F>
void each(const std::vector<char>& flags, const F& f) {
  const int64_t n = static_cast<int64_t>(flags.size());
  for (int64_t begin = 0; begin < n; begin += 8) {
    uint64_t word = 0;
    std::memcpy(&word, &flags[begin], std::min<int64_t>(8, n - begin));
    for (; word; word &= word - 1) f(begin + __builtin_ctzll(word) / 8);
  }
}

// The hypercolumns of one image and their products with columns.
template <class T>
class Image {
 public:
  using A = accumulate_t<T>;

  // norms: of its locations; null where the columns count as they are.
  Image(const Pyramid<T>& pyramid, int64_t b, const A* norms) : pyramid_(pyramid), b_(b), inverse_(locations(), A(1)) {
    for (const Level<T>& level : pyramid.levels) {
      first_pixel_.push_back(pixels_);
      sizes_.push_back(level.pixels());
      pixels_ += level.pixels();
      along_y_.push_back(taps<A>(level.height, pyramid.grid.height));
      along_x_.push_back(taps<A>(level.width, pyramid.grid.width));
      all_.cut(sizes_.size() - 1, 0, level.pixels(), kPixels, level.channels);
    }
    constexpr A smallest = std::numeric_limits<A>::min();  // below it the inverse is infinite
    for (int64_t i = 0; norms && i < locations(); ++i) inverse_[i] = norms[i] < smallest ? A(0) : A(1) / norms[i];
  }

  int64_t locations() const { return pyramid_.grid.locations(); }
  int64_t channels() const { return pyramid_.channels; }
  int64_t pixels() const { return pixels_; }

  // What the features have among them.
  int traits() const {
    std::atomic<int> found{0};
    all_.share([&](const Piece& piece) {
      const Level<T>& level = pyramid_.levels[piece.list];
      const T* values = level.image(b_) + piece.begin * level.channels;
      found |= MOE_BY_ISA(traits, values, (piece.end - piece.begin) * level.channels);
    });
    return found;
  }

  // Flags the pixels that some locations, in rising order, are resized from.
  void flag(const std::vector<int64_t>& some, std::vector<char>& flags) const {
    const int64_t width = pyramid_.grid.width;
    for (size_t l = 0; l < sizes_.size(); ++l) {
      char* to = &flags[first_pixel_[l]];
      const int64_t columns = pyramid_.levels[l].width;
      int64_t y = 0;
      for (const int64_t i : some) {
        while ((y + 1) * width <= i) ++y;
        const Tap<A>&above = along_y_[l][y], &beside = along_x_[l][i - y * width];
        const int64_t low = above.low * columns, high = (above.high_weight == A(0) ? above.low : above.high) * columns;
        const int64_t left = beside.low, right = beside.high_weight == A(0) ? left : beside.high;
        to[low + left] = to[low + right] = to[high + left] = to[high + right] = 1;
      }
    }
  }

  // The products of flagged pixels with m columns, m side by side for every pixel of the pyramid.
  void multiply(const std::vector<char>& flags, const A* columns, int64_t m, A* out) const {
    std::vector<int32_t> numbers;
    numbers.reserve(pixels_);
    Pieces pieces;
    std::vector<int64_t> end(sizes_.size() + 1, 0);
    each(flags, [&](int64_t p) { numbers.push_back(static_cast<int32_t>(p)); });
    for (size_t l = 0; l < sizes_.size(); ++l) {
      const int64_t after = first_pixel_[l] + sizes_[l];
      end[l + 1] = std::lower_bound(numbers.begin() + end[l], numbers.end(), after) - numbers.begin();
      pieces.cut(l, end[l], end[l + 1], kPixels, pyramid_.levels[l].channels * m);
    }
    pieces.share([&](const Piece& piece) {
      const Level<T>& level = pyramid_.levels[piece.list];
      const T* rows[kPixels];
      A* to[kPixels];
      const int64_t count = piece.end - piece.begin;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t number = numbers[piece.begin + p];
        rows[p] = level.image(b_) + (number - first_pixel_[piece.list]) * level.channels;
        to[p] = out + number * m;
      }
      MOE_BY_ISA(products, rows, count, columns + level.first, channels(), m, level.channels, to);
    });
  }

  // The products of location i with `count` of m columns, of those of its pixels.
  void resize(const A* products, int64_t m, int64_t i, int64_t count, A* out) const {
    std::fill_n(out, count, A(0));
    for (size_t l = 0; l < sizes_.size(); ++l) {
      const A* map = products + first_pixel_[l] * m;
      const Corners<A> c = at(l, i);
      for (int64_t j = 0; j < count; ++j) out[j] += resized(map + j, c, m);
    }
    for (int64_t j = 0; j < count; ++j) out[j] *= inverse_[i];
  }

  // The column of location i.
  void gather(int64_t i, A* column) const {
    std::vector<A> wide[4];
    for (size_t l = 0; l < sizes_.size(); ++l) {
      const Level<T>& level = pyramid_.levels[l];
      const Corners<A> c = at(l, i);
      const A* rows[4];
      A weights[4];
      int64_t terms = 0;
      for (int j = 0; j < 4; ++j) {
        if (c.weight[j] == A(0)) continue;
        const T* pixel = level.image(b_) + c.pixel[j] * level.channels;
        if constexpr (std::is_same_v<T, A>) {
          rows[terms] = pixel;
        } else {
          wide[j].resize(level.channels);
          MOE_BY_ISA(convert_run, pixel, wide[j].data(), level.channels);
          rows[terms] = wide[j].data();
        }
        weights[terms++] = c.weight[j] * inverse_[i];
      }
      MOE_BY_ISA(weighted_sum, rows, weights, terms, static_cast<const A*>(nullptr), column + level.first,
                 level.channels);
    }
  }

 private:
  Corners<A> at(size_t l, int64_t i) const {
    const int32_t width = static_cast<int32_t>(pyramid_.grid.width), y = static_cast<int32_t>(i) / width;
    return corners(along_y_[l][y], along_x_[l][i - y * width], pyramid_.levels[l].width);
  }

  const Pyramid<T>& pyramid_;
  const int64_t b_;
  std::vector<A> inverse_;
  int64_t pixels_ = 0;
  std::vector<int64_t> sizes_, first_pixel_;
  Pieces all_;  // of the pixels, level by level
  std::vector<std::vector<Tap<A>>> along_y_, along_x_;
};

struct Rule {
  Penalty penalty;
  Metric metric;
};

template <class A>
inline constexpr A infinity = std::numeric_limits<A>::infinity();

constexpr int32_t kClosed = std::numeric_limits<int32_t>::max();
constexpr int64_t kFirst = 32;  // locations that are looked at first, at the least

// One sequence of picks: of a class, of the background, or of farthest points.
template <class A>
struct Chain {
  const A* scores;                  // null: 0
  std::vector<A> penalty;           // of every location when it was last looked at, or a lower bound of it
  std::vector<A> value;             // the score minus that
  std::vector<int32_t> seen;        // how many of the picks were penalizing then; kClosed: it cannot be picked any more
  int32_t picked = 0;               // picks that penalize, those of other chains too
  std::vector<A> columns, squares;  // their columns, or the sum of these, and the squares of their norms
  std::vector<int64_t> active;      // the locations that are looked at next
  std::vector<char> flags;          // theirs
  int64_t looked = 0;               // how many were in this step
  Candidate<A> found;               // the best of which the value is known
  A top = 0, drop = 0;              // the largest value before that was looked at, and how far below it the best was

  Chain(const A* scores, int64_t n, A least) : scores(scores), penalty(n, least), value(n, A(0)), seen(n, 0) {
    if (scores) std::copy_n(scores, n, value.begin());
  }

  void close(int64_t i) { seen[i] = kClosed, value[i] = -infinity<A>; }
  void consider(int64_t i) { found = best(found, {value[i], i}); }
  void revalue(int64_t i) {
    if (seen[i] != kClosed) value[i] = scores ? scores[i] - penalty[i] : -penalty[i];
  }

  void begin_step() {
    looked = 0, found = no_candidate<A>();
    for (size_t i = 0; picked == 0 && i < value.size(); ++i) {
      if (seen[i] == 0) consider(i);
    }
  }

  // Makes active what may be better than what was found in this step: before anything was, the most promising locations
  // (how far the best fell below its bound in the step before tells how many those are), and then never many more than
  // were looked at already.
  void activate(bool lazy) {
    if (!lazy) return collect(-infinity<A>);
    if (looked == 0) {
      top = MOE_BY_ISA(largest, value.data(), static_cast<int64_t>(value.size()));
      collect(found.location == kNone ? top - drop / 4 : found.value);
      if (static_cast<int64_t>(active.size()) < kFirst) collect(bound(kFirst));
    } else {
      collect(found.value);
      if (static_cast<int64_t>(active.size()) > 8 * looked) collect(std::max(found.value, bound(8 * looked)));
    }
    looked += static_cast<int64_t>(active.size());
  }

  // Those of which the value is not known and not below `least`.
  void collect(A least) {
    const int64_t n = static_cast<int64_t>(value.size());
    flags.resize(n);
    MOE_BY_ISA(flag_open, value.data(), seen.data(), least, picked, flags.data(), n);
    active.clear();
    each(flags, [&](int64_t i) { active.push_back(i); });
  }

  // The value that `count` of those whose value is not known are not below.
  A bound(int64_t count) const {
    std::vector<A> values;
    for (size_t i = 0; i < value.size(); ++i) {
      if (seen[i] < picked) values.push_back(value[i] == value[i] ? value[i] : infinity<A>);
    }
    if (count >= static_cast<int64_t>(values.size())) return -infinity<A>;
    std::nth_element(values.begin(), values.begin() + count, values.end(), std::greater<A>());
    return values[count];
  }
};

// Advances chains in the hypercolumns of an image.
template <class T>
class Sampler {
 public:
  using A = accumulate_t<T>;
  using Chains = std::vector<Chain<A>>;

  // squares: of the locations' norms; only a Euclidean metric asks for them. unit: whether no column is longer than 1.
  Sampler(const Image<T>& image, Rule rule, const A* squares, bool unit)
      : image_(image), rule_(rule), squares_(squares) {
    const int traits = image.traits();
    const bool cosine = rule.metric == Metric::kCosine;
    lazy_ = !(traits & kUnusual) && (rule.penalty == Penalty::kMax || !(traits & kNegative));
    least_ = cosine && traits == 0 ? A(0) : cosine && unit ? A(-1.0001) : -std::numeric_limits<A>::infinity();
  }

  // Adds a chain that was not penalized yet.
  void add(Chains& chains, const A* scores) const { chains.emplace_back(scores, image_.locations(), least_); }

  // A pick of every chain, written to picks[chain].
  void advance(Chains& chains, std::vector<int64_t>& picks) {
    step_.from.clear();
    for (Chain<A>& chain : chains) chain.begin_step();
    do {
      for (Chain<A>& chain : chains) chain.activate(lazy_);
    } while (look(chains));
    for (size_t c = 0; c < chains.size(); ++c) {
      Chain<A>& chain = chains[c];
      picks[c] = chain.found.location;
      if (picks[c] == kNone) continue;
      chain.drop = std::isfinite(chain.top - chain.found.value) ? chain.top - chain.found.value : A(0);
      take(chain, picks[c]);
    }
  }

  // Makes a location a pick of a chain.
  void take(Chain<A>& chain, int64_t location) const {
    chain.close(location);
    std::vector<A> column(image_.channels());
    image_.gather(location, column.data());
    penalize(chain, column, 1);
    if (rule_.metric == Metric::kEuclidean) chain.squares.push_back(squares_[location]);
  }

  // All picks of some chains penalize another, which has none yet.
  void join(Chain<A>& chain, const Chains& others) const {
    std::vector<A> bound(image_.locations(), least_);
    bool first = true;
    for (const Chain<A>& other : others) {
      if (other.picked == 0) continue;
      for (int64_t i = 0; i < image_.locations(); ++i) {
        bound[i] = penalized(rule_.penalty, bound[i], other.penalty[i], first);
      }
      first = false;
    }
    if (rule_.penalty == Penalty::kSum) {  // which is rounded in another way than the products with the sum will be
      for (A& penalty : bound) penalty *= A(0.999);
    }
    chain.penalty = std::move(bound);
    for (const Chain<A>& other : others) {
      if (other.picked != 0) penalize(chain, other.columns, other.picked);
    }
  }

  // More picks that penalize a chain, with their columns or the sum of them.
  void penalize(Chain<A>& chain, const std::vector<A>& columns, int32_t picks) const {
    if (chain.picked == 0) {
      for (int64_t i = 0; i < image_.locations(); ++i) chain.revalue(i);
    }
    chain.picked += picks;
    const int64_t depth = image_.channels();
    if (rule_.penalty == Penalty::kMax || chain.columns.empty()) {
      chain.columns.insert(chain.columns.end(), columns.begin(), columns.end());
    } else {
      for (int64_t d = 0; d < depth; ++d) chain.columns[d] += columns[d];
    }
  }

 private:
  // The products of a step.
  struct Step {
    std::vector<int64_t> from, at;  // of every chain: its first column that is multiplied, and where it stands
    std::vector<A> columns;
    int64_t m = 0;                   // how many they are
    std::vector<A> products;         // m of each pixel that is done
    std::vector<char> done, wanted;  // flags of the pixels
  };

  // Brings the active locations of all chains up to date; false where there is none.
  bool look(Chains& chains) {
    if (std::all_of(chains.begin(), chains.end(), [](const auto& chain) { return chain.active.empty(); })) return false;
    const int64_t depth = image_.channels();
    const bool sum = rule_.penalty == Penalty::kSum;
    bool reusable = !step_.from.empty();
    std::vector<int64_t> from;
    for (const Chain<A>& chain : chains) {
      from.push_back(sum ? 0 : chain.picked);
      for (const int64_t i : chain.active) from.back() = std::min<int64_t>(from.back(), chain.seen[i]);
      reusable = reusable && step_.from[from.size() - 1] <= from.back();
    }
    if (!reusable) {
      step_.from = from, step_.at.clear(), step_.columns.clear();
      for (size_t c = 0; c < chains.size(); ++c) {
        step_.at.push_back(static_cast<int64_t>(step_.columns.size()) / depth);
        const auto first = chains[c].columns.begin() + from[c] * depth;
        step_.columns.insert(step_.columns.end(), first, chains[c].columns.end());
      }
      step_.m = static_cast<int64_t>(step_.columns.size()) / depth;
      step_.products.resize(std::max<size_t>(step_.products.size(), image_.pixels() * step_.m));
      step_.done.assign(image_.pixels(), 0);
    }
    step_.wanted.assign(image_.pixels(), 0);
    Pieces pieces;
    for (size_t c = 0; c < chains.size(); ++c) {
      image_.flag(chains[c].active, step_.wanted);
      pieces.cut(c, 0, static_cast<int64_t>(chains[c].active.size()), kLocations, 64 * step_.m);
    }
    MOE_BY_ISA(flag_new, step_.wanted.data(), step_.done.data(), image_.pixels());
    image_.multiply(step_.wanted, step_.columns.data(), step_.m, step_.products.data());
    pieces.share([&](const Piece& piece) {
      Chain<A>& chain = chains[piece.list];
      const int64_t first = step_.from[piece.list], at = step_.at[piece.list];
      const int64_t count = static_cast<int64_t>(chain.columns.size()) / depth - first;
      std::vector<A> similarity(count);
      for (int64_t a = piece.begin; a < piece.end; ++a) {
        const int64_t i = chain.active[a];
        image_.resize(step_.products.data() + at, step_.m, i, count, similarity.data());
        A penalty = chain.penalty[i];
        for (int64_t j = sum ? 0 : chain.seen[i] - first; j < count; ++j) {
          const A similar = closeness_of(chain, i, first + j, similarity[j]);
          penalty = penalized(rule_.penalty, penalty, similar, sum || first + j == 0);
        }
        chain.penalty[i] = penalty;
        chain.revalue(i);
        chain.seen[i] = chain.picked;
      }
    });
    for (Chain<A>& chain : chains) {
      for (const int64_t i : chain.active) chain.consider(i);
    }
    return true;
  }

  // How close location i is to the column of a pick, of their product.
  A closeness_of(const Chain<A>& chain, int64_t i, int64_t pick, A product) const {
    if (rule_.metric == Metric::kCosine) return product;
    return closeness(product, squares_[i], chain.squares[pick]);
  }

  const Image<T>& image_;
  const Rule rule_;
  const A* const squares_;
  Step step_;
  bool lazy_;  // whether a penalty never falls
  A least_;    // that a similarity can be
};

// Calls f(b) for every image: as many at once as there are threads, the rest one by one, each on all threads.
template <class F>
void over_images(int64_t batch, const F& f) {
  const int64_t together = batch / threads() * threads();
  if (threads() > 1 && together) {
    share(together, [&](int64_t, int64_t b) { f(b); });
  }
  for (int64_t b = threads() > 1 ? together : 0; b < batch; ++b) f(b);
}

std::tuple<Tensor, Tensor> diverse_sampling(Tensor scores_in, std::optional<Tensor> present_in,
                                            std::vector<Tensor> maps, std::vector<int64_t> grid, bool normalized,
                                            int64_t samples, int64_t penalty, bool background) {
  return by_pyramid(maps, grid, [&](const auto& pyramid) {
    using T = std::decay_t<decltype(*pyramid.levels[0].data)>;
    using A = accumulate_t<T>;
    const int64_t batch = pyramid.batch, n = pyramid.grid.locations();
    STD_TORCH_CHECK(scores_in.dim() == 3 && scores_in.scalar_type() == scalar_type<A> && scores_in.size(0) == batch &&
                        scores_in.size(2) == n,
                    "scores: expected a tensor (", batch, ", C, ", n, ") of the dtype of the arithmetic");
    STD_TORCH_CHECK(samples >= 0 && 0 <= penalty && penalty < 2, "num_samples or penalty: out of range");
    STD_TORCH_CHECK(pyramid.channels >= 1, "maps: expected at least one channel, got none");
    const Tensor scores = dense(scores_in);
    const int64_t classes = scores.size(1), others = background ? samples : 0;
    std::optional<Tensor> present;
    if (present_in) present = dense(*present_in);
    STD_TORCH_CHECK(!present || (present->scalar_type() == ScalarType::Bool && present->numel() == batch * classes),
                    "present: expected a bool tensor (", batch, ", ", classes, ")");
    const Rule rule{static_cast<Penalty>(penalty), Metric::kCosine};
    std::optional<Tensor> norms;
    if (!normalized) norms = hypercolumn_norm(maps, grid);

    const Tensor picks = empty({batch, classes, samples}, ScalarType::Long);
    const Tensor rest = empty({batch, others}, ScalarType::Long);
    std::fill_n(mutable_data<int64_t>(picks), picks.numel(), kNone);
    over_images(batch, [&](int64_t b) {
      const Image<T> image(pyramid, b, norms ? data<A>(*norms) + b * n : nullptr);
      Sampler<T> sampler(image, rule, nullptr, !normalized);
      typename Sampler<T>::Chains chains, behind;
      std::vector<int64_t> numbers;
      for (int64_t c = 0; c < classes; ++c) {
        if (present && !data<bool>(*present)[b * classes + c]) continue;
        sampler.add(chains, data<A>(scores) + (b * classes + c) * n);
        numbers.push_back(c);
      }
      if (background) sampler.add(behind, nullptr);
      std::vector<int64_t> picked(std::max<size_t>(chains.size(), 1));
      for (int64_t k = 0; k < samples; ++k) {
        sampler.advance(chains, picked);
        for (size_t c = 0; c < chains.size(); ++c) {
          mutable_data<int64_t>(picks)[(b * classes + numbers[c]) * samples + k] = picked[c];
          if (background && picked[c] != kNone) behind[0].close(picked[c]);
        }
      }
      for (int64_t k = 0; k < others; ++k) {
        if (k == 0) sampler.join(behind[0], chains);
        sampler.advance(behind, picked);
        mutable_data<int64_t>(rest)[b * samples + k] = picked[0];
      }
    });
    return std::tuple<Tensor, Tensor>(picks, rest);
  });
}

Tensor farthest_points(std::vector<Tensor> maps, std::vector<int64_t> grid, int64_t points, Tensor start_in,
                       int64_t metric) {
  return by_pyramid(maps, grid, [&](const auto& pyramid) {
    using T = std::decay_t<decltype(*pyramid.levels[0].data)>;
    using A = accumulate_t<T>;
    const int64_t batch = pyramid.batch, n = pyramid.grid.locations();
    STD_TORCH_CHECK(start_in.scalar_type() == ScalarType::Long && start_in.numel() == batch,
                    "start: expected an int64 tensor (", batch, ",)");
    STD_TORCH_CHECK(points >= 0 && 0 <= metric && metric < 2, "num_points or metric: out of range");
    STD_TORCH_CHECK(pyramid.channels >= 1, "maps: expected at least one channel, got none");
    const Tensor start = dense(start_in);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t location = data<int64_t>(start)[b];
      STD_TORCH_CHECK(0 <= location && location < n, "start: expected locations in [0, ", n, "), got ", location);
    }
    const Rule rule{Penalty::kMax, static_cast<Metric>(metric)};
    const bool cosine = rule.metric == Metric::kCosine;
    const Tensor lengths = cosine ? hypercolumn_norm(maps, grid) : hypercolumn_square(maps, grid);
    const Tensor picks = empty({batch, points}, ScalarType::Long);
    if (points == 0) return picks;
    over_images(batch, [&](int64_t b) {
      const A* mine = data<A>(lengths) + b * n;
      const Image<T> image(pyramid, b, cosine ? mine : nullptr);
      Sampler<T> sampler(image, rule, cosine ? nullptr : mine, cosine);
      typename Sampler<T>::Chains chains;
      sampler.add(chains, nullptr);
      int64_t* to = mutable_data<int64_t>(picks) + b * points;
      sampler.take(chains[0], to[0] = data<int64_t>(start)[b]);
      std::vector<int64_t> picked(1);
      for (int64_t k = 1; k < points; ++k) {
        sampler.advance(chains, picked);
        to[k] = picked[0];
      }
    });
    return picks;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("diverse_sampling", TORCH_BOX(&diverse_sampling));
  m.impl("farthest_points", TORCH_BOX(&farthest_points));
}

}  // namespace moe_kernels::diverse_sampling
