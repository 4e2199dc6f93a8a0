// Which launches grad_projection makes on a GPU, with which tables; tests make the same on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/grad_projection.h"

namespace moe_kernels::grad_projection::cuda {

// Calls launch(table, chunks before it) with tables that hold all operands but the empty ones, in order or backwards.
template <Update kUpdate, class F>
void for_each_table(const std::vector<Operand>& operands, int64_t chunk, bool backwards, const F& launch) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  std::vector<Table<kUpdate>> tables;
  std::vector<int64_t> before;
  int64_t chunks = 0;
  for (const Operand& operand : operands) {
    if (operand.numel == 0) continue;
    const int64_t more = chunks_of(operand.numel, chunk);
    if (tables.empty() || tables.back().tensors == Table<kUpdate>::kTensors ||
        tables.back().blocks() + more > kMaxBlocks) {
      tables.emplace_back();
      tables.back().chunk = chunk, tables.back().tensors = 0, tables.back().first[0] = 0;
      before.push_back(chunks);
    }
    Table<kUpdate>& table = tables.back();
    const int32_t i = table.tensors++;
    for (int role = 0; role < table.kPointers; ++role) table.pointer[role][i] = operand.pointer[role];
    table.numel[i] = operand.numel;
    table.segment[i] = operand.segment;
    table.dtype[i] = operand.dtype, table.reference_dtype[i] = operand.reference_dtype;
    table.first[i + 1] = static_cast<int32_t>(table.first[i] + more);
    chunks += more;
  }
  for (size_t n = 0; n < tables.size(); ++n) {
    const size_t i = backwards ? tables.size() - 1 - n : n;
    launch(tables[i], before[i]);
  }
}

// Segments whose partial moments one launch sums: those of segment first + i stand from begin[i] to begin[i + 1].
struct Ranges {
  static constexpr int kSegments = kTableBytes / sizeof(int32_t) - 4;
  int64_t first;
  int32_t segments;
  int32_t begin[kSegments + 1];
};

inline int64_t elements(const std::vector<Operand>& operands) {
  int64_t sum = 0;
  for (const Operand& operand : operands) sum += operand.numel;
  return sum;
}

// Phase 1 on a machine that has
//   Moments* partials(int64_t count)                             memory for that many
//   moments(table, settings, Moments* partials)                  partials[block] = the sum of moments_of_thread
//   settle(ranges, settings, rows, partials, Weights* weights)   settle() with the sum of partial_sum
template <class Machine>
void reduce(Machine& machine, std::vector<Operand> operands, const Settings& settings, const Rows& rows,
            int64_t segments, Weights* weights_of) {
  const int64_t chunk = chunk_size(elements(operands));
  std::vector<int64_t> chunks(segments + 1, 0);  // before a segment
  Moments* partials = nullptr;
  if (settings.reduce) {
    const auto alone = [](const Operand& operand) { return operand.segment < 0; };
    operands.erase(std::remove_if(operands.begin(), operands.end(), alone), operands.end());
    std::stable_sort(operands.begin(), operands.end(),
                     [](const Operand& one, const Operand& other) { return one.segment < other.segment; });
    for (const Operand& operand : operands) chunks[operand.segment + 1] += chunks_of(operand.numel, chunk);
    for (int64_t s = 0; s < segments; ++s) chunks[s + 1] += chunks[s];
    partials = machine.partials(chunks[segments]);
    for_each_table<Update::kMoments>(operands, chunk, false, [&](const auto& table, int64_t before) {
      machine.moments(table, settings, partials + before);
    });
  }
  Ranges ranges;
  for (ranges.first = 0; ranges.first < segments; ranges.first += ranges.segments) {
    ranges.segments = static_cast<int32_t>(std::min<int64_t>(segments - ranges.first, Ranges::kSegments));
    for (int32_t i = 0; i <= ranges.segments; ++i) ranges.begin[i] = static_cast<int32_t>(chunks[ranges.first + i]);
    machine.settle(ranges, settings, rows, partials, weights_of);
  }
}

// Both phases; the machine has also
//   Weights* weights(int64_t count)                   memory for that many
//   update<kUpdate>(table, settings, weights)         share and update_of_thread for every block, the last one first
template <Update kUpdate, class Machine>
void run(Machine& machine, std::vector<Operand> operands, const Settings& settings, const Rows& record,
         int64_t segments) {
  Weights* weights_of = machine.weights(segments);
  reduce(machine, operands, settings, record, segments, weights_of);
  const bool unpulled = settings.rule == Rule::kNone;
  for (Operand& operand : operands) {
    if (unpulled || operand.segment < 0) {
      operand.pointer[kReference] = nullptr;
      operand.reference_dtype = operand.dtype;
      if (kUpdate == Update::kProject) operand.numel = 0;  // g stays as it is
    }
  }
  for_each_table<kUpdate>(operands, chunk_size(elements(operands)), true, [&](const auto& table, int64_t) {
    machine.template update<kUpdate>(table, settings, weights_of);
  });
}

}  // namespace moe_kernels::grad_projection::cuda
