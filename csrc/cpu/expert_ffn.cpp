// expert_ffn and its gradient; specified in moe_kernels/ops/expert_ffn.py.
//
// Here is what happens when: blocks of rows of all experts, which the threads take one after the other, so that skewed
// loads keep them all busy. The arithmetic of a block is in isa/expert_ffn.h. Every number is computed by one task in
// one order, so no result depends on the number of threads.

#include "expert_ffn.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "memory.h"

#define MOE_FOR_EACH_ISA "isa/expert_ffn.h"

namespace moe_kernels {
namespace {

#include "for_each_isa.h"

// Rows of a block: few enough that its tokens, hidden features and outputs stay in a core's second cache, and many
// enough that reading all weights for it does not show.
constexpr int64_t kBlockRows = 3 * kSumRows;
// Rows of a unit, in which the backward goes from the gradient of the output to those of the weights.
constexpr int64_t kUnitRows = 3 * kBlockRows;
// Rows of a unit for which packing its weights does not pay.
constexpr int64_t kFewRows = 96;

// Every expert's rows in pieces of nearly the same size, none larger than `size`, whole panels if possible.
std::vector<Rows> pieces(const Plan& plan, int64_t size, int64_t multiple) {
  std::vector<Rows> all;
  for (int64_t e = 0; e < plan.num_experts; ++e) {
    const int64_t rows = plan.offset[e + 1] - plan.offset[e], count = (rows + size - 1) / size;
    int64_t first = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t share = (rows - first + count - i - 1) / (count - i);
      const int64_t taken = std::min(rows - first, std::min(size, (share + multiple - 1) / multiple * multiple));
      if (taken > 0) all.push_back({e, plan.offset[e] + first, taken});
      first += taken;
    }
  }
  return all;
}

// Rows of a block, such that there are some blocks for every thread.
int64_t block_rows(const Plan& plan) {
  return std::clamp<int64_t>(plan.kept / (4 * threads()) / kSumRows * kSumRows, kSumRows, kBlockRows);
}

// y[t] = Σ_j rows[position(t, j)] over the kept assignments, in the order of j.
template <class S>
void combine_rows(const Plan& plan, const accumulate_t<S>* rows, int64_t dim, S* y) {
  using A = accumulate_t<S>;
  torch::stable::parallel_for(0, plan.tokens, grain(dim * plan.top_k), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(dim);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), A{0});
      for (int64_t j = 0; j < plan.top_k; ++j) {
        const int64_t row = plan.position[t * plan.top_k + j];
        if (row >= plan.kept) continue;
        for (int64_t c = 0; c < dim; ++c) sum[c] += rows[row * dim + c];
      }
      convert(sum.data(), y + t * dim, dim);
    }
  });
}

// Zeros for the tokens whose only assignment was dropped.
template <class S>
void clear_dropped(const Plan& plan, int64_t dim, S* y) {
  for (int64_t row = plan.kept; row < plan.assignments; ++row) std::fill_n(y + plan.token(row) * dim, dim, S(0.f));
}

template <class S>
std::tuple<Tensor, Tensor> forward(const Ffn<S>& ffn, const Tensor& x, bool save) {
  using A = accumulate_t<S>;
  const Plan& plan = ffn.plan;
  const Tensor y = empty({plan.tokens, ffn.dim}, x.scalar_type());
  const Tensor saved = take_tensor({save ? plan.assignments : 0, ffn.hidden}, x.scalar_type());
  const Scratch<A> outputs(plan.top_k == 1 ? 0 : plan.assignments * ffn.dim);
  const int64_t block = block_rows(plan), size = MOE_BY_ISA(forward_space<A>, block, ffn.dim, ffn.hidden);
  const Scratch<A> memory(threads() * size);
  S* const z = save ? mutable_data<S>(saved) : nullptr;

  const std::vector<Rows> blocks = pieces(plan, block, kSumRows);
  std::atomic<size_t> next{0};
  on_every_thread([&](int64_t thread) {
    A* const own = memory.data() + thread * size;
    for (size_t i = next++; i < blocks.size(); i = next++) {
      MOE_BY_ISA(forward_rows, ffn, blocks[i], block, own, z, outputs.data(), mutable_data<S>(y));
    }
  });

  if (save) std::fill(z + plan.kept * ffn.hidden, z + plan.assignments * ffn.hidden, S(0.f));
  if (plan.top_k == 1) {
    clear_dropped(plan, ffn.dim, mutable_data<S>(y));
  } else {
    combine_rows(plan, outputs.data(), ffn.dim, mutable_data<S>(y));
  }
  return {y, saved};
}

// The backward's tasks, in the order in which they are taken. A unit's rows come before the weights' gradients of the
// unit before it, so that a thread that finishes early finds work that waits for nobody. A task waits only for tasks
// that stand before it, so any number of threads gets through; and none may throw, or the others would wait for ever.
struct Task {
  enum Stage { kPack, kRows, kWeights } stage;
  int64_t unit, index;
};

// How many tasks of each stage of a unit are still to be done.
struct Progress {
  std::atomic<int64_t> left[3];

  void wait(Task::Stage stage) const {
    while (left[stage].load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }
};

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Ffn<S>& ffn, const Tensor& grad,
                                                                    const Tensor& x, const Tensor& w1, const Tensor& b1,
                                                                    const Tensor& w2, const Tensor& b2,
                                                                    const Tensor& gates, const Tensor& saved) {
  using A = accumulate_t<S>;
  const Plan& plan = ffn.plan;
  const int64_t dim = ffn.dim, hidden = ffn.hidden;
  const Gradient<S> grad_w1(w1), grad_b1(b1), grad_w2(w2), grad_b2(b2);
  const Tensor grad_gates = torch::stable::new_zeros(gates, gates.sizes());
  const Tensor grad_x = empty({plan.tokens, dim}, x.scalar_type());
  const Scratch<A> grad_rows(plan.top_k == 1 ? 0 : plan.assignments * dim);
  std::vector<double> bias_sums(hidden + dim);
  const bool have_z = saved.size(0) > 0;
  const Backward<S> call{ffn,
                         data<S>(grad),
                         have_z ? data<S>(saved) : nullptr,
                         mutable_data<S>(grad_x),
                         grad_rows.data(),
                         mutable_data<A>(grad_gates),
                         grad_w1,
                         grad_b1,
                         grad_w2,
                         grad_b2,
                         bias_sums.data()};
  const int64_t block = block_rows(plan);
  const Sizes sizes = MOE_BY_ISA(backward_sizes<A>, kUnitRows, block, dim, hidden, !have_z);

  // Two units are under way at once: one whose rows are worked on, and one whose weights' gradients are.
  constexpr int64_t kSlots = 2;
  const std::vector<Rows> parts = pieces(plan, kUnitRows, kBlockRows);
  const int64_t sum_space = (kUnitRows + kSumRows - 1) / kSumRows * (hidden + dim);
  const int64_t slots = std::min<int64_t>(kSlots, parts.size());
  const int64_t of_operands = slots * sizes.operands(), of_weights = slots * (sizes.w1 + sizes.w2);
  const Scratch<A> scratch(of_operands + of_weights + threads() * sizes.space);
  A *const operands = scratch.data(), *const weights = operands + of_operands, *const memory = weights + of_weights;
  std::vector<double> sums(slots * sum_space);
  const bool readable =
      ffn.w1.wide && ffn.w2.wide && MOE_BY_ISA(whole_vectors<A>, dim) && MOE_BY_ISA(whole_vectors<A>, hidden);
  const auto in_place = [&](const Rows& rows) { return readable && rows.count <= kFewRows; };
  std::vector<Unit<A>> units;
  for (size_t u = 0; u < parts.size(); ++u) {
    const bool begins = u == 0 || parts[u - 1].expert != parts[u].expert;
    const bool ends = u + 1 == parts.size() || parts[u + 1].expert != parts[u].expert;
    A* own = operands + u % kSlots * sizes.operands();
    A* pack = weights + u % kSlots * (sizes.w1 + sizes.w2);
    Unit<A> unit{parts[u],
                 begins,
                 ends,
                 {pack, hidden, 0},
                 {pack + sizes.w1, dim, 0},
                 pack,
                 pack + sizes.w1,
                 own,
                 own + sizes.dz,
                 own + sizes.dz + sizes.dy,
                 own + sizes.dz + sizes.dy + sizes.a,
                 sums.data() + u % kSlots * sum_space};
    if (in_place(parts[u])) {
      const int64_t at = parts[u].expert * dim * hidden;
      unit.w1 = {static_cast<const A*>(ffn.w1.data) + at, hidden, dim};
      unit.w2 = {static_cast<const A*>(ffn.w2.data) + at, dim, hidden};
    }
    units.push_back(unit);
  }

  const int64_t num_units = units.size();
  const auto blocks_of = [&](int64_t u) { return (units[u].rows.count + block - 1) / block; };
  const auto packs_of = [&](int64_t u) { return u < num_units && in_place(parts[u]) ? 0 : sizes.packs; };
  std::vector<Task> tasks;
  std::vector<Progress> progress(num_units);
  const auto add = [&](int64_t u, Task::Stage stage, int64_t count) {
    if (u < 0 || u >= num_units) return;
    progress[u].left[stage] = count;
    for (int64_t i = 0; i < count; ++i) tasks.push_back({stage, u, i});
  };
  for (int64_t u = 0; u <= num_units; ++u) {
    if (u == 0) add(0, Task::kPack, packs_of(0));
    if (u < num_units) add(u, Task::kRows, blocks_of(u));
    add(u + 1, Task::kPack, packs_of(u + 1));
    add(u - 1, Task::kWeights, sizes.weight_tasks);
  }

  std::atomic<size_t> next{0};
  on_every_thread([&](int64_t thread) noexcept {
    A* const own = memory + thread * sizes.space;
    for (size_t i = next++; i < tasks.size(); i = next++) {
      const Task& task = tasks[i];
      const int64_t u = task.unit;
      const Unit<A>& unit = units[u];
      switch (task.stage) {
        case Task::kPack:
          if (u >= kSlots) progress[u - kSlots].wait(Task::kRows);
          MOE_BY_ISA(pack_weights, call, unit, task.index);
          break;
        case Task::kRows: {
          if (u >= kSlots) progress[u - kSlots].wait(Task::kWeights);
          progress[u].wait(Task::kPack);
          const int64_t first = task.index * block, count = std::min(block, unit.rows.count - first);
          MOE_BY_ISA(backward_rows, call, unit, first, count, block, own);
          break;
        }
        case Task::kWeights:
          progress[u].wait(Task::kRows);
          if (u > 0) progress[u - 1].wait(Task::kWeights);
          MOE_BY_ISA(weight_gradients, call, unit, task.index);
          break;
      }
      progress[u].left[task.stage].fetch_sub(1, std::memory_order_release);
    }
  });

  for (int64_t e = 0; e < plan.num_experts; ++e) {
    if (plan.offset[e] < plan.offset[e + 1]) continue;
    for (const auto* gradient : {&grad_w1, &grad_b1, &grad_w2, &grad_b2}) gradient->clear(e);
  }
  if (plan.top_k == 1) {
    clear_dropped(plan, dim, mutable_data<S>(grad_x));
  } else {
    combine_rows(plan, grad_rows.data(), dim, mutable_data<S>(grad_x));
  }
  return {grad_x, grad_w1.tensor, grad_b1.tensor, grad_w2.tensor, grad_b2.tensor, grad_gates};
}

void check_sizes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool right = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; right && i < sizes.size(); ++i) right = tensor.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(right, name, ": the shape does not fit those of x, w1 and the plan");
}

template <class S>
Ffn<S> make_ffn(const Plan& plan, const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                const Tensor& b2, const Tensor& gates, const std::optional<Tensor>& seed, const std::string& activation,
                double dropout_p) {
  using A = accumulate_t<S>;
  STD_TORCH_CHECK(x.dim() == 2 && w1.dim() == 3, "expected x (T, d) and w1 (E, h, d)");
  const int64_t dim = x.size(1), hidden = w1.size(1);
  check_sizes("x", x, {plan.tokens, dim});
  check_sizes("w1", w1, {plan.num_experts, hidden, dim});
  check_sizes("b1", b1, {plan.num_experts, hidden});
  check_sizes("w2", w2, {plan.num_experts, dim, hidden});
  check_sizes("b2", b2, {plan.num_experts, dim});
  check_sizes("gates", gates, {plan.tokens, plan.top_k});
  for (const Tensor* parameter : {&w1, &b1, &w2, &b2}) {
    STD_TORCH_CHECK(parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == scalar_type<A>,
                    "weights: expected the dtype of x or float32, got ",
                    torch::headeronly::toString(parameter->scalar_type()));
  }
  STD_TORCH_CHECK(gates.scalar_type() == scalar_type<A>, "gates: expected the dtype of the arithmetic, got ",
                  torch::headeronly::toString(gates.scalar_type()));
  return {plan,
          Dropout(seed, dropout_p),
          activation_by_name(activation),
          x.size(1),
          w1.size(1),
          data<S>(x),
          Parameter<S>(w1),
          Parameter<S>(b1),
          Parameter<S>(w2),
          Parameter<S>(b2),
          data<A>(gates)};
}

std::tuple<Tensor, Tensor> expert_ffn(Tensor x_in, Tensor w1_in, Tensor b1_in, Tensor w2_in, Tensor b2_in,
                                      Tensor gates_in, Tensor order, Tensor offsets, Tensor inverse,
                                      std::optional<Tensor> seed, std::string activation, double dropout_p,
                                      bool save_preactivation) {
  const Tensor x = dense(x_in), w1 = dense(w1_in), b1 = dense(b1_in), w2 = dense(w2_in), b2 = dense(b2_in);
  const Tensor gates = dense(gates_in);
  const Plan plan(order, offsets, inverse);
  return by_dtype("x", x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    return forward<S>(make_ffn<S>(plan, x, w1, b1, w2, b2, gates, seed, activation, dropout_p), x, save_preactivation);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    Tensor grad_in, Tensor x_in, Tensor w1_in, Tensor b1_in, Tensor w2_in, Tensor b2_in, Tensor gates_in,
    Tensor preactivation, Tensor order, Tensor offsets, Tensor inverse, std::optional<Tensor> seed,
    std::string activation, double dropout_p) {
  const Tensor x = dense(x_in), w1 = dense(w1_in), b1 = dense(b1_in), w2 = dense(w2_in), b2 = dense(b2_in);
  const Tensor gates = dense(gates_in), grad = dense(grad_in), saved = dense(preactivation);
  const Plan plan(order, offsets, inverse);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && saved.scalar_type() == x.scalar_type(),
                  "grad and preactivation: expected the dtype of x");
  check_sizes("grad", grad, {x.size(0), x.size(1)});
  STD_TORCH_CHECK(
      saved.dim() == 2 && (saved.size(0) == 0 || saved.size(0) == plan.assignments) && saved.size(1) == w1.size(1),
      "preactivation: expected one row for each assignment, or none");
  return by_dtype("x", x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    return backward<S>(make_ffn<S>(plan, x, w1, b1, w2, b2, gates, seed, activation, dropout_p), grad, x, w1, b1, w2,
                       b2, gates, saved);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_ffn", TORCH_BOX(&expert_ffn));
  m.impl("expert_ffn_backward", TORCH_BOX(&expert_ffn_backward));
}

}  // namespace moe_kernels
