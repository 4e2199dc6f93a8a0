// How diverse_sampling and farthest_points are laid out on a GPU: what a launch is told; tests look at the same on a
// CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/diverse_sampling.h"

namespace moe_kernels::diverse_sampling::cuda {

// (B, height, width, channels) without gaps, at an address for vectors, which its channels fill.
struct Map {
  const void* data;
  int64_t height, width, channels;
};

// Writes the maps into the problem, whose grid stands there; returns what is wrong, or "".
template <class S>
std::string lay_out(Problem& problem, const std::vector<Map>& maps) {
  constexpr int64_t kLargest = INT32_MAX;
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step * step; };
  int64_t products = 0;
  problem.pieces = problem.segments = 0;
  for (const Map& map : maps) {
    const int64_t parts = (map.channels + kSlots - 1) / kSlots;
    const int64_t size = parts == 0 ? 1 : up((map.channels + parts - 1) / parts, kStep<S>);
    for (int64_t first = 0; first < map.channels; first += size) {
      if (problem.pieces == kPieces) {
        return "maps: expected at most " + std::to_string(kPieces) + ", of more than " + std::to_string(kSlots) +
               " channels as several, got " + std::to_string(maps.size());
      }
      Piece& p = problem.piece[problem.pieces];
      p.data = static_cast<const S*>(map.data) + first;
      p.stride = map.channels;
      p.height = static_cast<int32_t>(map.height), p.width = static_cast<int32_t>(map.width);
      p.channels = static_cast<int32_t>(std::min(size, map.channels - first));
      p.first_product = static_cast<int32_t>(products);
      products += map.height * map.width;
      if (products > kLargest) return "maps: expected at most 2147483647 pixels of an image";
      const auto slots = static_cast<int32_t>(up(p.channels, kStep<S>));
      if (problem.segments == 0 || problem.segment[problem.segments - 1].slots + slots > kSlots) {
        problem.segment[problem.segments++] = {problem.pieces, problem.pieces, 0, 0};
      }
      Segment& segment = problem.segment[problem.segments - 1];
      p.first_slot = segment.slots, p.first_task = segment.tasks;
      p.tasks = (p.pixels() + kRows - 1) / kRows;
      segment.slots += slots, segment.tasks += p.tasks;
      segment.end = ++problem.pieces;
    }
  }
  problem.products = static_cast<int32_t>(products);
  problem.scratch_stride = (Scratch::floats(problem) + 3) / 4 * 4;
  return "";
}

// Bytes of shared memory.
inline int64_t shared_bytes(const Problem& problem) {
  int32_t slots = 0;
  for (int32_t s = 0; s < problem.segments; ++s) slots = std::max(slots, problem.segment[s].slots);
  return int64_t{slots} * std::clamp(problem.classes, 1, kColumns) * static_cast<int64_t>(sizeof(float));
}

// Bytes of the features of an image.
inline int64_t image_bytes(const Problem& problem, int64_t element) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < problem.pieces; ++i) {
    bytes += int64_t{problem.piece[i].pixels()} * problem.piece[i].channels * element;
  }
  return bytes;
}

struct Device {
  int64_t cache;                   // bytes of the L2
  double cache_rate, memory_rate;  // bytes a second
  int64_t blocks;                  // that run at the same time
};

struct Launch {
  int64_t groups, blocks;  // of a group
};

// A group waits at its barriers in every step, for kWait by estimate, and other groups read on meanwhile. More images
// at once hide more of it, until their features no longer stay in the cache; then memory is what everybody waits for.
inline Launch launch_of(const Device& device, int64_t images, int64_t bytes) {
  constexpr double kWait = 5e-6;
  constexpr int64_t kBlockBytes = 1 << 15, kStreaming = 8;
  bytes = std::max<int64_t>(bytes, 1);
  const auto limit = [&](int64_t n) { return std::clamp<int64_t>(n, 1, std::min(images, device.blocks)); };
  const auto time = [&](int64_t groups) {
    const bool stays = groups * bytes <= device.cache;
    return kWait / static_cast<double>(groups) +
           static_cast<double>(bytes) / (stays ? device.cache_rate : device.memory_rate);
  };
  const int64_t cached = limit(device.cache / bytes), streamed = limit(device.blocks / kStreaming);
  const int64_t most = time(cached) <= time(streamed) ? cached : streamed;
  const int64_t rounds = (images + most - 1) / most, groups = (images + rounds - 1) / rounds;
  return {groups, std::clamp<int64_t>(device.blocks / groups, 1, (bytes + kBlockBytes - 1) / kBlockBytes)};
}

}  // namespace moe_kernels::diverse_sampling::cuda
