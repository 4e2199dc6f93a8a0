// Philox 4x32-10 (Salmon et al., SC 2011): noise and dropout as a pure function of seed and counter.
// Specified in moe_kernels/reference/philox.py; every backend draws the same words.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace moe_kernels {

struct Words {
  uint32_t word[4];
};

MOE_HOST_DEVICE inline Words philox(uint64_t seed, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    const uint32_t n2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c0 = n0, c1 = static_cast<uint32_t>(product1), c2 = n2, c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The middle of one of 2^23 equal intervals of (0, 1), exact in float.
MOE_HOST_DEVICE inline float uniform(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

MOE_HOST_DEVICE inline float normal(uint64_t seed, uint64_t counter) {
  const Words words = philox(seed, counter);
  const float radius = std::sqrt(-2.0f * std::log(uniform(words.word[0])));
  return radius * std::cos(6.2831853071795865f * uniform(words.word[1]));
}

}  // namespace moe_kernels
