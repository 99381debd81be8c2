// What is drawn: the hash of pico_fast/reference.py.

#pragma once

#include "tensors.h"

namespace pico_fast {

// lowbias32, folded word by word.
inline uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

inline uint32_t fold(uint32_t state, uint32_t word) { return lowbias32((state ^ word) + 0x9e3779b9u); }

// The state of a hash after its seed, an int64 tensor of one value.
inline uint32_t fold_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed: expected one int64");
  const auto word = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  return fold(fold(0, static_cast<uint32_t>(word)), static_cast<uint32_t>(word >> 32));
}

// Uniform integer in [0, n) and uniform float in [0, 1) from a word.
inline int64_t below(uint32_t word, int64_t n) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(n)) >> 32);
}
inline float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace pico_fast
