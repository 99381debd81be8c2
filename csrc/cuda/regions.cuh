// Region pooling on a GPU: what its forward and its backward share.

#pragma once

#include <tuple>

#include "../regions.h"
#include "device.cuh"

namespace pico_fast {

constexpr int kThreads = 256;

// What one access of 16 bytes moves.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// The class of a label, or C for a pixel that is left out.
__device__ inline int class_of(int64_t label, int64_t C) {
  return static_cast<int>(label >= 0 && label < C ? label : C);
}

// The work, and how it is cut into blocks.
struct Sizes {
  int64_t B, D, P, C;
  int64_t stretch, stretches;  // pixels of a block, and how many such stretches an image has
  int64_t groups;              // of channels, one to a block
  int64_t classes, ranges;     // classes that a block has room for, and how many such ranges there are
};

// Labels [B, P] as the kernels read them.
inline Tensor dense_labels(const Tensor& labels) {
  const Tensor dense = contiguous(labels);
  return labels.scalar_type() == ScalarType::Long ? dense : torch::stable::to(dense, ScalarType::Long);
}

}  // namespace pico_fast
