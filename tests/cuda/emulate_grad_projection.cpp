// The launches of csrc/cuda/grad_projection_launches.h on a CPU: every block and thread in turn, scratch memory full of
// NaN.
#include <limits>
#include <memory>
#include <vector>

#include "cuda/grad_projection_launches.h"

using namespace moe_kernels::grad_projection;
using namespace moe_kernels::grad_projection::cuda;

namespace {

class Emulator {
 public:
  explicit Emulator(bool backwards) : backwards_(backwards) {}

  int64_t launches = 0;

  Moments* partials(int64_t count) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    partials_.assign(count, {nan, nan, nan});
    return partials_.data();
  }

  Weights* weights(int64_t count) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    weights_.assign(count, {nan, nan});
    return weights_.data();
  }

  void moments(const Table<Update::kMoments>& table, const Settings& settings, Moments* partials) {
    ++launches;
    if (settings.skipped()) return;
    each(table.blocks(), [&](int64_t block) {
      Moments sum{0, 0, 0};
      for (int thread = 0; thread < kThreads; ++thread) {
        sum += moments_of_thread(table, settings, static_cast<int32_t>(block), thread);
      }
      partials[block] = sum;
    });
  }

  void settle(const Ranges& ranges, const Settings& settings, const Rows& rows, const Moments* partials,
              Weights* weights_of) {
    ++launches;
    each(ranges.segments, [&](int64_t block) {
      Moments sum{0, 0, 0};
      if (settings.reduce && !settings.skipped()) {
        for (int thread = 0; thread < kThreads; ++thread) {
          sum += partial_sum(partials, ranges.begin[block], ranges.begin[block + 1], thread);
        }
      }
      cuda::settle(settings, rows, weights_of, ranges.first + block, sum);
    });
  }

  template <Update kUpdate>
  void update(const Table<kUpdate>& table, const Settings& settings, const Weights* weights_of) {
    ++launches;
    if (settings.skipped()) return;
    each(table.blocks(), [&](int64_t block) {
      const Piece part = piece(table, static_cast<int32_t>(block));
      by_types(table.dtype[part.tensor], table.reference_dtype[part.tensor], [&](auto types) {
        using T = decltype(types);
        const auto shared = share<kUpdate, typename T::A>(table, settings, weights_of, part.tensor);
        each(kThreads, [&](int64_t thread) {
          update_of_thread<kUpdate, T>(table, settings, shared, part, static_cast<int>(thread));
        });
      });
    });
  }

 private:
  // Blocks and threads know nothing of one another, so any order will do.
  template <class F>
  void each(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(backwards_ ? n - 1 - i : i);
  }

  const bool backwards_;
  std::vector<Moments> partials_;
  std::vector<Weights> weights_;
};

}  // namespace

// operands: as many as tensors; of each kRoles addresses, numel, segment, dtype and the reference's dtype.
// numbers: parameter, coefficient, lr, momentum, dampening, weight_decay, beta1, beta2, eps.
// flags: anchored, reduce, maximize, nesterov, first_step, and whether to run all backwards.
// rows: (segments, columns), a record or, without an update, three moments. Returns the number of launches.
extern "C" int64_t emulate(int64_t update, int64_t tensors, const int64_t* operands, int64_t rule,
                           const double* numbers, const bool* flags, const float* grad_scale, const float* found_inf,
                           double* rows, int64_t segments, int64_t columns) {
  std::vector<Operand> list(tensors);
  for (Operand& operand : list) {
    for (int role = 0; role < kRoles; ++role) operand.pointer[role] = reinterpret_cast<void*>(*operands++);
    operand.numel = *operands++;
    operand.segment = static_cast<int32_t>(*operands++);
    operand.dtype = static_cast<Dtype>(*operands++);
    operand.reference_dtype = static_cast<Dtype>(*operands++);
  }
  Settings s;
  s.rule = static_cast<Rule>(rule);
  s.parameter = numbers[0], s.coefficient = {numbers[1]}, s.lr = {numbers[2]};
  s.momentum = numbers[3], s.dampening = numbers[4], s.weight_decay = numbers[5];
  s.beta1 = numbers[6], s.beta2 = numbers[7], s.eps = numbers[8];
  s.anchored = flags[0], s.reduce = flags[1], s.maximize = flags[2], s.nesterov = flags[3], s.first_step = flags[4];
  s.grad_scale = grad_scale, s.found_inf = found_inf;
  Emulator emulator(flags[5]);
  const Rows to{rows, columns};
  switch (static_cast<Update>(update)) {
    case Update::kMoments:
      reduce(emulator, list, s, to, segments, nullptr);
      break;
    case Update::kProject:
      run<Update::kProject>(emulator, list, s, to, segments);
      break;
    case Update::kSgd:
      run<Update::kSgd>(emulator, list, s, to, segments);
      break;
    case Update::kAdamW:
      run<Update::kAdamW>(emulator, list, s, to, segments);
      break;
  }
  return emulator.launches;
}

extern "C" int64_t tensors_of_a_launch(int64_t update) {
  const int of[] = {Table<Update::kMoments>::kTensors, Table<Update::kProject>::kTensors, Table<Update::kSgd>::kTensors,
                    Table<Update::kAdamW>::kTensors};
  return of[update];
}

extern "C" int64_t elements_of_a_block(int64_t elements) { return chunk_size(elements); }

extern "C" int64_t segments_of_a_launch() { return Ranges::kSegments; }

// Where a block of the middle one of three tensors works, the first or the last; returns the elements of a block.
extern "C" int64_t piece_of(int64_t numel, bool last, int64_t* tensor, int64_t* begin, int64_t* end) {
  std::vector<Operand> operands(3);
  operands[0].numel = 1, operands[1].numel = numel, operands[2].numel = 1;
  const int64_t chunk = chunk_size(elements(operands));
  for_each_table<Update::kProject>(operands, chunk, false, [&](const auto& table, int64_t) {
    const Piece found = piece(table, last ? table.first[2] - 1 : table.first[1]);
    *tensor = found.tensor, *begin = found.begin, *end = found.end;
  });
  return chunk;
}
