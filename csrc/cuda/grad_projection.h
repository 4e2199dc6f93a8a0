// grad_projection on a GPU: everything that a thread computes. No CUDA stands here: tests run the same on a CPU, thread
// after thread. Specified in moe_kernels/ops/grad_projection.py.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/grad_projection.h"

namespace moe_kernels::grad_projection::cuda {

// A thread takes up to kUnroll vectors of kVector elements at a time.
inline constexpr int kThreads = 256, kVector = 4, kUnroll = 2;
// A launch can have 32,764 bytes of arguments (CUDA 12.1, sm_70): what its table may take, the rest left to scalars.
inline constexpr size_t kTableBytes = 32000;

// Elements of a block, from the list alone so that every GPU gives the same bits: enough blocks for any GPU of today,
// none so small that its start counts.
inline int64_t chunk_size(int64_t elements) {
  constexpr int64_t kBlocks = 132 * 16;
  constexpr int64_t kSmallest = kThreads * kVector * kUnroll, kLargest = 1 << 16;
  return std::clamp(chunks_of(chunks_of(elements, kBlocks), kSmallest) * kSmallest, kSmallest, kLargest);
}

enum class Dtype : uint8_t { kFloat, kDouble, kBFloat16, kHalf };

// The pointers of a tensor. Without a reference r = 0, without a first buffer SGD has no momentum.
enum Role { kGrad, kReference, kParam, kFirst, kSecond, kStep, kRoles };

// What moves with an operator; the argument of a launch has as many tensors of it as fit.
enum class Update { kMoments, kProject, kSgd, kAdamW };

constexpr int roles(Update update) { return update == Update::kAdamW ? 6 : update == Update::kSgd ? 4 : 3; }

struct Operand {
  void* pointer[kRoles] = {};
  int64_t numel = 0;
  int32_t segment = -1;
  Dtype dtype = Dtype::kFloat, reference_dtype = Dtype::kFloat;
};

template <Update kUpdate>
struct Table {
  static constexpr int kPointers = roles(kUpdate);
  static constexpr int kTensors =
      (kTableBytes - 24) / (kPointers * sizeof(void*) + sizeof(int64_t) + 2 * sizeof(int32_t) + 2 * sizeof(Dtype));
  int64_t chunk;
  int32_t tensors;
  int32_t first[kTensors + 1];  // chunks before each tensor, then all of them
  void* pointer[kPointers][kTensors];
  int64_t numel[kTensors];
  int32_t segment[kTensors];
  Dtype dtype[kTensors], reference_dtype[kTensors];

  MOE_HOST_DEVICE int32_t blocks() const { return first[tensors]; }
};

// A number that is known to the host, or stands on the device.
struct Scalar {
  double value = 0;
  const void* pointer = nullptr;
  Dtype dtype = Dtype::kFloat;
};

struct Settings {
  Rule rule = Rule::kNone;
  double parameter = 0;
  Scalar coefficient{1};
  bool anchored = false, reduce = true, maximize = false;
  const float *grad_scale = nullptr, *found_inf = nullptr;
  Scalar lr{};
  double momentum = 0, dampening = 0, weight_decay = 0, beta1 = 0, beta2 = 0, eps = 0;
  bool nesterov = false, first_step = false;

  MOE_HOST_DEVICE bool skipped() const { return found_inf != nullptr && *found_inf != 0; }
  MOE_HOST_DEVICE double scale() const { return grad_scale == nullptr ? 1 : *grad_scale; }
  // r is so many times what raw_reference gives.
  MOE_HOST_DEVICE double reference_factor() const { return anchored ? 2 : 1 / scale(); }
};

// Where phase 1 leaves its results: rows of a record, or of three moments.
struct Rows {
  double* data;
  int64_t columns;
};

// ---- Loads and stores

template <class S>
struct alignas(std::min(kVector * sizeof(S), size_t{16})) Vector {
  S element[kVector];
};

// Moves a vector at once, or the elements below count; others are 0.
template <bool kWhole, class A, class S>
MOE_HOST_DEVICE void load(const S* from, int64_t count, A (&to)[kVector]) {
  if constexpr (kWhole) {
    const Vector<S> vector = *reinterpret_cast<const Vector<S>*>(from);
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = static_cast<A>(vector.element[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = j < count ? static_cast<A>(from[j]) : A(0);
  }
}

template <bool kWhole, class A, class S>
MOE_HOST_DEVICE void store(const A (&from)[kVector], int64_t count, S* to) {
  if constexpr (kWhole) {
    Vector<S> vector;
#pragma unroll
    for (int j = 0; j < kVector; ++j) vector.element[j] = static_cast<S>(from[j]);
    *reinterpret_cast<Vector<S>*>(to) = vector;
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < count) to[j] = static_cast<S>(from[j]);
    }
  }
}

// Calls f with a pointer of the dtype.
template <class F>
MOE_HOST_DEVICE void typed(Dtype dtype, void* pointer, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(static_cast<float*>(pointer));
    case Dtype::kDouble:
      return f(static_cast<double*>(pointer));
    case Dtype::kBFloat16:
      return f(static_cast<torch::headeronly::BFloat16*>(pointer));
    case Dtype::kHalf:
      return f(static_cast<torch::headeronly::Half*>(pointer));
  }
}

MOE_HOST_DEVICE inline double value(const Scalar& scalar) {
  double result = scalar.value;
  if (scalar.pointer != nullptr) {
    typed(scalar.dtype, const_cast<void*>(scalar.pointer), [&](auto* p) { result = static_cast<double>(*p); });
  }
  return result;
}

// What a block works on: elements begin to end of a tensor.
struct Piece {
  int32_t tensor;
  int64_t begin, end;
  bool aligned;  // may every vector of every operand be moved at once
};

template <Update kUpdate>
MOE_HOST_DEVICE Piece piece(const Table<kUpdate>& table, int32_t block) {
  const auto tensor = static_cast<int32_t>(tensor_of(table.first, table.tensors, block));
  const int64_t begin = (block - table.first[tensor]) * table.chunk;
  const int64_t rest = table.numel[tensor] - begin;
  uintptr_t bits = 0;
#pragma unroll
  for (int role = 0; role < (kUpdate == Update::kAdamW ? kStep : table.kPointers); ++role) {
    bits |= reinterpret_cast<uintptr_t>(table.pointer[role][tensor]);
  }
  return {tensor, begin, begin + (rest < table.chunk ? rest : table.chunk), bits % 16 == 0};
}

// How a tensor is worked on: arithmetic in A on operands of storage S, or, void, of dtypes that the table says; then
// loads wait for one another, and float64 needs twice the registers.
template <class Arithmetic, class Storage>
struct Types {
  using A = Arithmetic;
  using S = Storage;
  static constexpr int kVectors = std::is_void_v<S> ? 1 : kUnroll;
  static constexpr int kStride = kThreads * kVector * kVectors;
};

// Calls f(Types) with those of a tensor.
template <class F>
MOE_HOST_DEVICE void by_types(Dtype dtype, Dtype reference_dtype, const F& f) {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  if (dtype == Dtype::kDouble || reference_dtype == Dtype::kDouble) return f(Types<double, void>{});
  if (dtype != reference_dtype) return f(Types<float, void>{});
  if (dtype == Dtype::kFloat) return f(Types<float, float>{});
  if (dtype == Dtype::kBFloat16) return f(Types<float, BFloat16>{});
  return f(Types<float, Half>{});
}

// What a thread has of an operand at a time.
template <class T, bool kWhole>
struct Registers {
  using A = typename T::A;
  A data[T::kVectors][kVector] = {};

  MOE_HOST_DEVICE void read(Dtype dtype, void* from, int64_t first, int64_t end) {
    at(dtype, from, [&](auto* p) {
#pragma unroll
      for (int u = 0; u < T::kVectors; ++u) {
        const int64_t i = first + u * kThreads * kVector;
        load<kWhole>(p + i, end - i, data[u]);
      }
    });
  }

  MOE_HOST_DEVICE void write(Dtype dtype, void* to, int64_t first, int64_t end) const {
    at(dtype, to, [&](auto* p) {
#pragma unroll
      for (int u = 0; u < T::kVectors; ++u) {
        const int64_t i = first + u * kThreads * kVector;
        store<kWhole>(data[u], end - i, p + i);
      }
    });
  }

  // Calls f(u, j) for every element.
  template <class F>
  static MOE_HOST_DEVICE void each(const F& f) {
#pragma unroll
    for (int u = 0; u < T::kVectors; ++u) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) f(u, j);
    }
  }

 private:
  template <class F>
  static MOE_HOST_DEVICE void at(Dtype dtype, void* pointer, const F& f) {
    if constexpr (std::is_void_v<typename T::S>) {
      typed(dtype, pointer, f);
    } else {
      f(static_cast<typename T::S*>(pointer));
    }
  }
};

// Calls f(index of the first vector, whether all vectors of the block are whole) for a thread's part of a piece. Which
// thread has which element does not depend on the addresses.
template <class T, class F>
MOE_HOST_DEVICE void each_step(const Piece& piece, int thread, const F& f) {
  int64_t begin = piece.begin;
  if (piece.aligned) {
    for (; begin + T::kStride <= piece.end; begin += T::kStride) f(begin + thread * kVector, std::true_type{});
  }
  for (; begin < piece.end; begin += T::kStride) f(begin + thread * kVector, std::false_type{});
}

// ---- Phase 1: the raw moments of a thread's elements, of g as it stands and of r by its factor

template <class T>
MOE_HOST_DEVICE Moments moments_of_thread(const Table<Update::kMoments>& table, const Piece& piece, bool anchored,
                                          int thread) {
  const int32_t t = piece.tensor;
  void *grad = table.pointer[kGrad][t], *reference = table.pointer[kReference][t], *param = table.pointer[kParam][t];
  const Dtype dtype = table.dtype[t];
  const bool pulled = reference != nullptr;
  Moments sum{0, 0, 0};
  each_step<T>(piece, thread, [&](int64_t i, auto whole) {
    Registers<T, decltype(whole)::value> g, r, w;
    g.read(dtype, grad, i, piece.end);
    if (pulled) r.read(table.reference_dtype[t], reference, i, piece.end);
    if (pulled && anchored) w.read(dtype, param, i, piece.end);
    g.each([&](int u, int j) {
      const double gradient = g.data[u][j], raw = anchored ? w.data[u][j] - r.data[u][j] : r.data[u][j];
      sum += {gradient * raw, gradient * gradient, raw * raw};
    });
  });
  return sum;
}

MOE_HOST_DEVICE inline Moments moments_of_thread(const Table<Update::kMoments>& table, const Settings& settings,
                                                 int32_t block, int thread) {
  Moments result{0, 0, 0};
  const Piece share = piece(table, block);
  by_types(table.dtype[share.tensor], table.reference_dtype[share.tensor],
           [&](auto types) { result = moments_of_thread<decltype(types)>(table, share, settings.anchored, thread); });
  return result;
}

// A thread's part of the partial moments [begin, end) of a segment.
MOE_HOST_DEVICE inline Moments partial_sum(const Moments* partials, int64_t begin, int64_t end, int thread) {
  Moments sum{0, 0, 0};
  for (int64_t i = begin + thread; i < end; i += kThreads) sum += partials[i];
  return sum;
}

// One thread: the moments of a segment and, where the rows are a record's, its counts and its weights, of which b has λ
// and the factor of r in it.
MOE_HOST_DEVICE inline void settle(const Settings& settings, const Rows& rows, Weights* weights_of, int64_t segment,
                                   const Moments& raw) {
  double* row = rows.data + segment * rows.columns;
  const bool counting = rows.columns == kColumns;
  if (counting && settings.skipped()) {
    row[kSkipped] += 1;
    return;
  }
  const double coefficient = value(settings.coefficient), factor = coefficient * settings.reference_factor();
  if (settings.reduce) {
    const Moments found = scaled(raw, (settings.maximize ? -1 : 1) / settings.scale(), factor);
    row[0] = found.dot, row[1] = found.loss, row[2] = found.regularizer;
  }
  if (!counting) return;
  row[kSteps] += 1;
  row[kConflicts] += row[0] < 0;
  const Weights chosen = weights(settings.rule, settings.parameter, {row[0], row[1], row[2]});
  weights_of[segment] = {chosen.a, chosen.b * factor};
}

// ---- Phase 2

// What the threads of a block share.
template <Update kUpdate, class A>
struct Shared {
  A a, b, scale;
  bool pulled, rescaled;
  std::conditional_t<kUpdate == Update::kSgd, Sgd<A>, AdamW<A>> step;
};

template <Update kUpdate, class A>
MOE_HOST_DEVICE Shared<kUpdate, A> share(const Table<kUpdate>& table, const Settings& s, const Weights* weights_of,
                                         int32_t tensor) {
  const int32_t segment = table.segment[tensor];
  const Weights w = segment < 0 ? Weights{1, 0} : weights_of[segment];
  Shared<kUpdate, A> result{};
  result.a = factor<A>(w.a), result.b = factor<A>(w.b);
  result.scale = static_cast<A>(s.scale());
  result.pulled = table.pointer[kReference][tensor] != nullptr && result.b != 0;
  result.rescaled = result.scale != 1;
  if constexpr (kUpdate == Update::kSgd) {
    result.step = sgd_step<A>(value(s.lr), s.momentum, s.dampening, s.weight_decay, s.nesterov, s.first_step);
  } else if constexpr (kUpdate == Update::kAdamW) {
    const double step = *static_cast<const float*>(table.pointer[kStep][tensor]);
    result.step = adamw_step<A>(value(s.lr), s.beta1, s.beta2, s.eps, s.weight_decay, step);
  }
  return result;
}

template <Update kUpdate, class T>
MOE_HOST_DEVICE void update_of_thread(const Table<kUpdate>& table, const Settings& settings,
                                      const Shared<kUpdate, typename T::A>& shared, const Piece& piece, int thread) {
  using A = typename T::A;
  constexpr bool kSteps = kUpdate != Update::kProject;
  const int32_t t = piece.tensor;
  const Dtype dtype = table.dtype[t];
  void *grad = table.pointer[kGrad][t], *reference = table.pointer[kReference][t], *param = table.pointer[kParam][t];
  void *first = nullptr, *second = nullptr;
  if constexpr (kSteps) first = table.pointer[kFirst][t];
  if constexpr (kUpdate == Update::kAdamW) second = table.pointer[kSecond][t];
  const bool anchored = settings.anchored, pulled = shared.pulled, buffered = first != nullptr;
  each_step<T>(piece, thread, [&](int64_t i, auto whole) {
    Registers<T, decltype(whole)::value> g, r, w, m, v;
    g.read(dtype, grad, i, piece.end);
    if (pulled) r.read(table.reference_dtype[t], reference, i, piece.end);
    if (kSteps || (pulled && anchored)) w.read(dtype, param, i, piece.end);
    if (buffered && !(kUpdate == Update::kSgd && settings.first_step)) m.read(dtype, first, i, piece.end);
    if constexpr (kUpdate == Update::kAdamW) v.read(dtype, second, i, piece.end);
    if (shared.rescaled) {
      g.each([&](int u, int j) { g.data[u][j] /= shared.scale; });
      g.write(dtype, grad, i, piece.end);
    }
    g.each([&](int u, int j) {
      A& weight = w.data[u][j];
      const A gradient = settings.maximize ? -g.data[u][j] : g.data[u][j];
      A d;
      if (!pulled) {
        d = direction<Reference::kNone>(shared.a, shared.b, gradient, weight, A(0));
      } else if (anchored) {
        d = direction<Reference::kAnchor>(shared.a, shared.b, gradient, weight, r.data[u][j]);
      } else {
        d = direction<Reference::kGiven>(shared.a, shared.b, gradient, weight, r.data[u][j]);
      }
      if constexpr (kUpdate == Update::kProject) {
        g.data[u][j] = d;
      } else if constexpr (kUpdate == Update::kAdamW) {
        adamw(shared.step, d, weight, m.data[u][j], v.data[u][j]);
      } else if (buffered) {
        sgd(shared.step, d, weight, m.data[u][j]);
      } else {
        sgd(shared.step, d, weight);
      }
    });
    if constexpr (kUpdate == Update::kProject) g.write(dtype, grad, i, piece.end);
    if constexpr (kSteps) w.write(dtype, param, i, piece.end);
    if (buffered) m.write(dtype, first, i, piece.end);
    if constexpr (kUpdate == Update::kAdamW) v.write(dtype, second, i, piece.end);
  });
}

}  // namespace moe_kernels::grad_projection::cuda
