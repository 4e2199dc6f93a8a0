// grad_projection: two phases over chunks of a list of tensors; specified in moe_kernels/ops/grad_projection.py.
//
// A thread has a range of chunks, and goes through it backwards in the second phase: what it read last is still in its
// caches. Where every tensor is a segment of its own, a thread does both phases of a small one at once. 16-bit storage
// is converted run by run. No result depends on the number of threads.

#include "common/grad_projection.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "common.h"
#include "isa.h"

#define MOE_FOR_EACH_ISA "isa/grad_projection.h"

namespace moe_kernels::grad_projection {
namespace {

#include "for_each_isa.h"

constexpr int64_t kChunk = 16384;     // elements
constexpr int64_t kStaged = 1024;     // elements that are converted at once
constexpr int64_t kCached = 1 << 20;  // elements of a segment whose second phase finds it in the shared cache
constexpr int64_t kSharesEach = 4;    // segments a thread should have at least, where it does whole ones

struct Operand {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  int64_t size() const { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }
};

struct Item {
  int64_t numel, segment;
  Operand g, w, reference, first_state, second_state;
  const float* step = nullptr;
};

struct Chunk {
  int64_t item, begin, end;
};

// What a call is told about its gradients and references.
struct Terms {
  Reference reference;
  double sign;   // of g: -1 to maximize
  double scale;  // that g, and r where it is given, are divided by
  double raw_factor() const { return reference == Reference::kAnchor ? 2 : 1 / scale; }
};

using Tensors = std::vector<Tensor>;

Operand operand(const Tensor& tensor, const char* name, int64_t numel) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, ": expected float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements, got ", tensor.numel());
  return {tensor.mutable_data_ptr(), dtype};
}

// Fills one operand of the first items from a list. Where `like` is given, there is one for each item, or none at all
// if that may be, and it has the dtype of that operand.
void add(std::vector<Item>& items, const Tensors& tensors, const char* name, Operand Item::* to,
         Operand Item::* like = nullptr, bool optional = false) {
  if (optional && tensors.empty()) return;
  STD_TORCH_CHECK(like ? tensors.size() == items.size() : tensors.size() <= items.size(), name, ": expected ",
                  like ? "" : "at most ", items.size(), " tensors, got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    items[i].*to = operand(tensors[i], name, items[i].numel);
    STD_TORCH_CHECK(!like || (items[i].*to).dtype == (items[i].*like).dtype, name, ": expected ",
                    torch::headeronly::toString((items[i].*like).dtype), " as the others of tensor ", i, ", got ",
                    torch::headeronly::toString((items[i].*to).dtype));
  }
}

std::vector<Item> items_of(const Tensors& grads, const std::vector<int64_t>& segments, int64_t rows) {
  STD_TORCH_CHECK(segments.empty() || segments.size() == grads.size(), "segments: expected ", grads.size(), ", got ",
                  segments.size());
  std::vector<Item> items(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    items[i].numel = grads[i].numel();
    items[i].segment = segments.empty() ? static_cast<int64_t>(i) : segments[i];
    STD_TORCH_CHECK(-1 <= items[i].segment && items[i].segment < rows, "segments: expected rows of the record, -1 to ",
                    rows - 1, ", got ", items[i].segment);
    items[i].g = operand(grads[i], "grads", items[i].numel);
  }
  return items;
}

double number(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  double value = 0;
  by_dtype(name, tensor.scalar_type(), [&](auto zero) { value = static_cast<double>(*data<decltype(zero)>(tensor)); });
  return value;
}

double number_or(const std::optional<Tensor>& tensor, const char* name, double otherwise) {
  return tensor ? number(*tensor, name) : otherwise;
}

// A run of an operand as A: where it lies, or converted, and back with store().
template <class A>
class Run {
 public:
  Run(const Operand& operand, int64_t begin, int64_t n, bool load = true) : operand_(operand), begin_(begin), n_(n) {
    if (!operand.data) return;
    by_dtype("", operand.dtype, [&](auto zero) {
      using T = decltype(zero);
      T* from = static_cast<T*>(operand.data) + begin;
      if constexpr (std::is_same_v<T, A>) {
        data_ = from;
      } else {
        data_ = staged_;
        if (load) MOE_BY_ISA(convert_run, from, staged_, n);
      }
    });
  }

  A* data() const { return data_; }

  void store() const {
    if (data_ != staged_) return;
    by_dtype("", operand_.dtype, [&](auto zero) {
      using T = decltype(zero);
      MOE_BY_ISA(convert_run, staged_, static_cast<T*>(operand_.data) + begin_, n_);
    });
  }

 private:
  const Operand operand_;
  int64_t begin_, n_;
  A* data_ = nullptr;
  alignas(64) A staged_[kStaged];
};

template <class A>
bool stands(const Operand& operand) {
  return !operand.data || operand.dtype == scalar_type<A>;
}

// Calls f(begin, n) for the runs of a chunk: one where every operand stands in A.
template <class A, class F>
void by_run(const Item& item, const Chunk& chunk, const F& f) {
  const bool direct = stands<A>(item.g) && stands<A>(item.w) && stands<A>(item.reference) &&
                      stands<A>(item.first_state) && stands<A>(item.second_state);
  const int64_t step = direct ? chunk.end - chunk.begin : kStaged;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += step) f(begin, std::min(step, chunk.end - begin));
}

// Calls f with a zero of the type of the arithmetic, and with what kind of reference the item has.
template <class F>
void by_kind(const Item& item, Reference reference, const F& f) {
  const auto with = [&](auto zero) {
    if (!item.reference.data) reference = Reference::kNone;
    switch (reference) {
      case Reference::kNone:
        return f(zero, std::integral_constant<Reference, Reference::kNone>{});
      case Reference::kGiven:
        return f(zero, std::integral_constant<Reference, Reference::kGiven>{});
      case Reference::kAnchor:
        return f(zero, std::integral_constant<Reference, Reference::kAnchor>{});
    }
  };
  item.g.dtype == ScalarType::Double ? with(double{}) : with(float{});
}

Moments chunk_moments(const Item& item, const Chunk& chunk, const Terms& terms) {
  Moments sum{};
  by_kind(item, terms.reference, [&](auto zero, auto kind) {
    using A = decltype(zero);
    constexpr Reference kReference = decltype(kind)::value;
    by_run<A>(item, chunk, [&](int64_t begin, int64_t n) {
      const Run<A> g(item.g, begin, n), reference(item.reference, begin, n);
      const Run<A> w(kReference == Reference::kAnchor ? item.w : Operand{}, begin, n);
      MOE_BY_ISA(add_moments<kReference>, g.data(), w.data(), reference.data(), n, sum);
    });
  });
  return scaled(sum, terms.sign / terms.scale, terms.raw_factor());
}

// The record and how it becomes weights.
struct Projection {
  double* record;
  int64_t rows;
  double coefficient;
  Rule rule;
  double parameter;

  double* row(int64_t segment) const { return record + segment * kColumns; }

  // The weights of a segment as factors of the stored g and of the raw reference.
  struct Factors {
    double a, b;
  };
  Factors factors(int64_t segment, const Terms& terms) const {
    if (segment < 0) return {terms.sign, 0};
    const double* m = row(segment);
    const Weights w = weights(rule, parameter, {m[0], m[1], m[2]});
    return {w.a * terms.sign, w.b * coefficient * terms.raw_factor()};
  }

  void count_step() const {
    for (int64_t segment = 0; segment < rows; ++segment) {
      row(segment)[kSteps] += 1;
      row(segment)[kConflicts] += row(segment)[0] < 0;
    }
  }
};
using Factors = Projection::Factors;

// Phase 2 of a chunk: calls f(kind, item, run of g, begin, n, a, b) for its runs, with g unscaled where it has to be.
template <class F>
void by_update(const Item& item, const Chunk& chunk, const Terms& terms, const Factors& factors, const F& f) {
  by_kind(item, factors.b == 0 ? Reference::kNone : terms.reference, [&](auto zero, auto kind) {
    using A = decltype(zero);
    by_run<A>(item, chunk, [&](int64_t begin, int64_t n) {
      const Run<A> g(item.g, begin, n);
      if (terms.scale != 1) {
        MOE_BY_ISA(unscale, g.data(), static_cast<A>(terms.scale), n);
        g.store();
      }
      f(kind, item, g, begin, n, factor<A>(factors.a), factor<A>(factors.b));
    });
  });
}

// The items of every segment in their order, then those of none.
struct Segments {
  Segments(const std::vector<Item>& all, int64_t rows) : first(rows + 3), numel(rows + 1), items(all.size()) {
    const auto list = [rows](const Item& item) { return item.segment < 0 ? rows : item.segment; };
    for (const Item& item : all) ++first[list(item) + 2], numel[list(item)] += item.numel;
    std::partial_sum(first.begin(), first.end(), first.begin());
    for (size_t i = 0; i < all.size(); ++i) items[first[list(all[i]) + 1]++] = static_cast<int64_t>(i);
  }
  const int64_t* begin(int64_t segment) const { return items.data() + first[segment]; }
  const int64_t* end(int64_t segment) const { return items.data() + first[segment + 1]; }

  std::vector<int64_t> first, numel, items;
};

// Both phases over the chunks of a list.
class Phases {
 public:
  Phases(std::vector<Item> items, const Terms& terms) : terms_(terms), items_(std::move(items)), first_(1) {
    for (size_t i = 0; i < items_.size(); ++i) {
      for (int64_t begin = 0; begin < items_[i].numel; begin += kChunk) {
        chunks_.push_back({static_cast<int64_t>(i), begin, std::min(begin + kChunk, items_[i].numel)});
      }
      first_.push_back(static_cast<int64_t>(chunks_.size()));
    }
    partial_.resize(chunks_.size());
  }

  // Phase 1: the moments of every item, unweighted.
  std::vector<Moments> moments() {
    over(0, chunks_.size(), false, [&](int64_t c) { measure(c); });
    std::vector<Moments> result(items_.size());
    for (size_t i = 0; i < items_.size(); ++i) result[i] = moments_of(i);
    return result;
  }

  // Both phases, or the second with what stands in the record. update is called as by_update says.
  template <class Update>
  void run(const Projection& projection, bool reduce, const Update& update) {
    const auto finish = [&](int64_t c) {
      const Item& item = items_[chunks_[c].item];
      by_update(item, chunks_[c], terms_, projection.factors(item.segment, terms_), update);
    };
    if (reduce && projection.rows > 1) {
      apart(projection, finish);
    } else {
      if (reduce && projection.rows == 1) {
        const Segments segments(items_, 1);
        over_items(segments.begin(0), segments.end(0), false, [&](int64_t c) { measure(c); });
        sum(projection, segments, 0);
      }
      over(0, chunks_.size(), true, finish);
    }
    projection.count_step();
  }

 private:
  // Segment by segment: small ones are shared out whole, the largest first; all threads share one that is too large.
  template <class Finish>
  void apart(const Projection& projection, const Finish& finish) {
    const Segments segments(items_, projection.rows);
    const auto measured = [&](int64_t c) { measure(c); };
    const int64_t total = std::accumulate(segments.numel.begin(), segments.numel.end(), int64_t{0});
    const int64_t largest = std::min(kCached, std::max(kChunk, total / (kSharesEach * threads())));
    std::vector<int64_t> whole;
    for (int64_t segment = 0; segment < projection.rows; ++segment) {
      if (segments.numel[segment] <= largest) {
        whole.push_back(segment);
        continue;
      }
      over_items(segments.begin(segment), segments.end(segment), false, measured);
      sum(projection, segments, segment);
      over_items(segments.begin(segment), segments.end(segment), true, finish);
    }
    std::stable_sort(whole.begin(), whole.end(),
                     [&](int64_t a, int64_t b) { return segments.numel[a] > segments.numel[b]; });
    std::atomic<size_t> next{0};
    on_every_thread([&](int64_t) {
      for (size_t k = next++, after = next++; k < whole.size(); k = after, after = next++) {
        const int64_t *begin = segments.begin(whole[k]), *end = segments.end(whole[k]);
        for (const int64_t* i = begin; i < end; ++i) {
          for (int64_t c = first_[*i]; c < first_[*i + 1]; ++c) measure(c);
        }
        sum(projection, segments, whole[k]);
        if (after < whole.size() && segments.numel[whole[after]] > 0)
          fetch(first_[*segments.begin(whole[after])], true);
        for (const int64_t* i = end; i-- > begin;) {
          for (int64_t c = first_[*i + 1]; c-- > first_[*i];) finish(c);
        }
      }
    });
    over_items(segments.begin(projection.rows), segments.end(projection.rows), true, finish);  // what is left alone
  }

  // Asks for the beginning of a chunk while the one before it is at work: the processor itself looks ahead within a
  // tensor only. The second phase reads the states too.
  void fetch(int64_t c, bool second) const {
    constexpr int64_t line = 64, most = 1024;
    const Chunk& chunk = chunks_[c];
    const Item& item = items_[chunk.item];
    const auto operand = [&](const Operand& operand) {
      if (!operand.data) return;
      const int64_t size = operand.size();
      const char* from = static_cast<const char*>(operand.data) + chunk.begin * size;
      const int64_t bytes = std::min(most, (chunk.end - chunk.begin) * size);
      for (int64_t byte = 0; byte < bytes; byte += line) __builtin_prefetch(from + byte);
    };
    operand(item.g), operand(item.w), operand(item.reference);
    if (second) operand(item.first_state), operand(item.second_state);
  }

  void measure(int64_t c) { partial_[c] = chunk_moments(items_[chunks_[c].item], chunks_[c], terms_); }

  Moments moments_of(int64_t item) const {
    Moments sum{};
    for (int64_t c = first_[item]; c < first_[item + 1]; ++c) sum += partial_[c];
    return sum;
  }

  // The moments of a segment, r weighted, into its row.
  void sum(const Projection& projection, const Segments& segments, int64_t segment) const {
    Moments total{};
    for (const int64_t* i = segments.begin(segment); i < segments.end(segment); ++i) {
      total += scaled(moments_of(*i), 1, projection.coefficient);
    }
    double* row = projection.row(segment);
    row[0] = total.dot, row[1] = total.loss, row[2] = total.regularizer;
  }

  // Calls f for the chunks [begin, end): every thread has a range of about as many elements, backwards if asked.
  template <class F>
  void over(int64_t begin, int64_t end, bool backwards, const F& f) const {
    std::vector<int64_t> elements(end - begin + 1, 0);
    for (int64_t c = begin; c < end; ++c) {
      elements[c - begin + 1] = elements[c - begin] + chunks_[c].end - chunks_[c].begin;
    }
    const int64_t total = elements.back(), parts = total <= kChunk ? 1 : threads();
    const auto bound = [&](int64_t part) {
      return begin + (std::lower_bound(elements.begin(), elements.end(), total * part / parts) - elements.begin());
    };
    const auto part = [&](int64_t p) {
      const int64_t low = bound(p), high = bound(p + 1);
      const auto chunk = [&](int64_t c) { return backwards ? low + high - 1 - c : c; };
      for (int64_t c = low; c < high; ++c) {
        if (c + 1 < high) fetch(chunk(c + 1), backwards);
        f(chunk(c));
      }
    };
    if (parts == 1) return part(0);
    on_every_thread(part);
  }

  template <class F>
  void over_items(const int64_t* begin, const int64_t* end, bool backwards, const F& f) const {
    while (begin < end) {  // neighbours at once
      const int64_t* next = begin + 1;
      while (next < end && *next == next[-1] + 1) ++next;
      over(first_[*begin], first_[next[-1] + 1], backwards, f);
      begin = next;
    }
  }

  const Terms terms_;
  const std::vector<Item> items_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_;  // chunk of every item
  std::vector<Moments> partial_;
};

Projection projection_of(const Tensor& record, const Tensor& coefficient, int64_t rule, double parameter) {
  STD_TORCH_CHECK(record.scalar_type() == ScalarType::Double && record.dim() == 2 && record.size(1) == kColumns &&
                      record.is_contiguous(),
                  "record: expected a contiguous float64 tensor of shape (S, ", kColumns, ")");
  STD_TORCH_CHECK(0 <= rule && rule < kRules, "rule: expected 0 to ", kRules - 1, ", got ", rule);
  return {mutable_data<double>(record), record.size(0), number(coefficient, "coefficient"), static_cast<Rule>(rule),
          parameter};
}

// Whether a scaler found a gradient that is not finite; then the step is only counted.
bool skipped(const Projection& projection, const std::optional<Tensor>& found_inf) {
  if (number_or(found_inf, "found_inf", 0) == 0) return false;
  for (int64_t segment = 0; segment < projection.rows; ++segment) projection.row(segment)[kSkipped] += 1;
  return true;
}

Tensor grad_projection_moments(const Tensors& grads, const Tensors& references, const Tensors& params, bool maximize,
                               std::optional<Tensor> grad_scale) {
  const Terms terms{params.empty() ? Reference::kGiven : Reference::kAnchor, maximize ? -1.0 : 1.0,
                    number_or(grad_scale, "grad_scale", 1)};
  std::vector<Item> items = items_of(grads, {}, grads.size());
  add(items, references, "references", &Item::reference);
  add(items, params, "params", &Item::w, &Item::g, true);
  const Tensor result = empty({static_cast<int64_t>(grads.size()), 3}, ScalarType::Double);
  double* row = mutable_data<double>(result);
  for (const Moments& m : Phases(std::move(items), terms).moments()) {
    *row++ = m.dot, *row++ = m.loss, *row++ = m.regularizer;
  }
  return result;
}

void grad_projection(const Tensors& grads, const Tensors& references, const Tensors& params, Tensor record,
                     const std::vector<int64_t>& segments, Tensor coefficient, int64_t rule, double parameter,
                     bool reduce) {
  const Terms terms{params.empty() ? Reference::kGiven : Reference::kAnchor, 1, 1};
  std::vector<Item> items = items_of(grads, segments, record.size(0));
  add(items, references, "references", &Item::reference);
  add(items, params, "params", &Item::w, &Item::g, true);
  const auto update = [](auto kind, const Item& item, auto& g, int64_t begin, int64_t n, auto a, auto b) {
    using A = decltype(a);
    constexpr Reference kReference = decltype(kind)::value;
    const Run<A> reference(item.reference, begin, n);
    const Run<A> w(kReference == Reference::kAnchor ? item.w : Operand{}, begin, n);
    MOE_BY_ISA(combine<kReference>, a, b, g.data(), w.data(), reference.data(), n);
    g.store();
  };
  Phases(std::move(items), terms).run(projection_of(record, coefficient, rule, parameter), reduce, update);
}

void grad_projection_sgd(const Tensors& params, const Tensors& grads, const Tensors& references,
                         const Tensors& momentum_buffers, Tensor record, const std::vector<int64_t>& segments,
                         bool anchored, Tensor coefficient, int64_t rule, double parameter, bool reduce, Tensor lr,
                         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                         bool first_step, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const Projection projection = projection_of(record, coefficient, rule, parameter);
  if (skipped(projection, found_inf)) return;
  const Terms terms{anchored ? Reference::kAnchor : Reference::kGiven, maximize ? -1.0 : 1.0,
                    number_or(grad_scale, "grad_scale", 1)};
  std::vector<Item> items = items_of(grads, segments, record.size(0));
  add(items, params, "params", &Item::w, &Item::g);
  add(items, references, "references", &Item::reference);
  add(items, momentum_buffers, "momentum_buffers", &Item::first_state, &Item::g, momentum == 0);
  const double rate = number(lr, "lr");
  const auto update = [&](auto kind, const Item& item, auto& g, int64_t begin, int64_t n, auto a, auto b) {
    using A = decltype(a);
    constexpr Reference kReference = decltype(kind)::value;
    const auto step = sgd_step<A>(rate, momentum, dampening, weight_decay, nesterov, first_step);
    const Run<A> reference(kReference == Reference::kNone ? Operand{} : item.reference, begin, n);
    const Run<A> w(item.w, begin, n), buffer(item.first_state, begin, n, !first_step);
    MOE_BY_ISA(sgd_run<kReference>, step, first_step, a, b, g.data(), w.data(), reference.data(), buffer.data(), n);
    w.store();
    buffer.store();
  };
  Phases(std::move(items), terms).run(projection, reduce, update);
}

void grad_projection_adamw(const Tensors& params, const Tensors& grads, const Tensors& references,
                           const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps, Tensor record,
                           const std::vector<int64_t>& segments, bool anchored, Tensor coefficient, int64_t rule,
                           double parameter, bool reduce, Tensor lr, double beta1, double beta2, double eps,
                           double weight_decay, bool maximize, std::optional<Tensor> grad_scale,
                           std::optional<Tensor> found_inf) {
  const Projection projection = projection_of(record, coefficient, rule, parameter);
  if (skipped(projection, found_inf)) return;
  const Terms terms{anchored ? Reference::kAnchor : Reference::kGiven, maximize ? -1.0 : 1.0,
                    number_or(grad_scale, "grad_scale", 1)};
  std::vector<Item> items = items_of(grads, segments, record.size(0));
  add(items, params, "params", &Item::w, &Item::g);
  add(items, references, "references", &Item::reference);
  add(items, exp_avgs, "exp_avgs", &Item::first_state, &Item::g);
  add(items, exp_avg_sqs, "exp_avg_sqs", &Item::second_state, &Item::g);
  STD_TORCH_CHECK(steps.size() == items.size(), "steps: expected ", items.size(), " tensors, got ", steps.size());
  for (size_t i = 0; i < items.size(); ++i) {
    STD_TORCH_CHECK(steps[i].scalar_type() == ScalarType::Float && steps[i].numel() == 1,
                    "steps: expected float32 tensors of one element");
    items[i].step = data<float>(steps[i]);
  }
  const double rate = number(lr, "lr");
  const auto update = [&](auto kind, const Item& item, auto& g, int64_t begin, int64_t n, auto a, auto b) {
    using A = decltype(a);
    constexpr Reference kReference = decltype(kind)::value;
    const auto step = adamw_step<A>(rate, beta1, beta2, eps, weight_decay, *item.step);
    const Run<A> reference(kReference == Reference::kNone ? Operand{} : item.reference, begin, n);
    const Run<A> w(item.w, begin, n), average(item.first_state, begin, n), square(item.second_state, begin, n);
    MOE_BY_ISA(adamw_run<kReference>, step, a, b, g.data(), w.data(), reference.data(), average.data(), square.data(),
               n);
    w.store();
    average.store();
    square.store();
  };
  Phases(std::move(items), terms).run(projection, reduce, update);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("grad_projection_moments", TORCH_BOX(&grad_projection_moments));
  m.impl("grad_projection", TORCH_BOX(&grad_projection));
  m.impl("grad_projection_sgd", TORCH_BOX(&grad_projection_sgd));
  m.impl("grad_projection_adamw", TORCH_BOX(&grad_projection_adamw));
}

}  // namespace moe_kernels::grad_projection
