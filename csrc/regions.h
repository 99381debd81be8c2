// Region pooling: what the CPU's and the GPU's implementation share.
//
// B images, D channels, P = H * W pixels, C classes. Features lie in planes (NCHW: [B, D, P]) or in
// pixels (channels_last: [B, P, D]).

#pragma once

#include <type_traits>

#include "tensors.h"

namespace pico_fast {

using torch::headeronly::MemoryFormat;

// What values of type T are summed in.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType sum_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

constexpr int64_t kMaxClasses = 65535;

template <typename F>
void with_feature_type(ScalarType type, F&& call) {
  constexpr auto kExpected = "features: expected float32, bfloat16, float16 or float64";
  with_type<float, BFloat16, Half, double>(type, kExpected, call);
}

// Whether x [B, D, H, W] lies pixel by pixel; the stride of a dimension of size 1 means nothing.
inline bool in_pixels(const Tensor& x) {
  if (x.is_contiguous()) return false;
  const int64_t order[] = {1, 3, 2, 0};
  int64_t stride = 1;
  for (int64_t dim : order) {
    if (x.size(dim) != 1 && x.stride(dim) != stride) return false;
    stride *= x.size(dim);
  }
  return true;
}

inline void check_forward(const Tensor& features, const Tensor& labels, int64_t C) {
  STD_TORCH_CHECK(features.dim() == 4 && labels.dim() == 3, "expected [B, D, H, W] and [B, H, W]");
  STD_TORCH_CHECK(labels.size(0) == features.size(0) && labels.size(1) == features.size(2) &&
                      labels.size(2) == features.size(3),
                  "labels: expected the features' batch, height and width");
  STD_TORCH_CHECK(labels.device() == features.device(), "labels: expected the features' device");
  STD_TORCH_CHECK(C > 0 && C <= kMaxClasses, "num_classes: expected 1 to 65535");
}

inline void check_backward(const Tensor& grad_means, const Tensor& labels, const Tensor& counts,
                           ScalarType dtype) {
  STD_TORCH_CHECK(grad_means.dim() == 3 && labels.dim() == 3 && counts.dim() == 2,
                  "expected [B, C, D], [B, H, W] and [B, C]");
  const int64_t B = grad_means.size(0), C = grad_means.size(1);
  STD_TORCH_CHECK(labels.size(0) == B && counts.size(0) == B && counts.size(1) == C,
                  "labels and counts: expected the batch and the classes of grad_means");
  STD_TORCH_CHECK(labels.device() == grad_means.device() && counts.device() == grad_means.device(),
                  "labels and counts: expected the device of grad_means");
  STD_TORCH_CHECK(grad_means.scalar_type() == sum_type(dtype),
                  "grad_means: expected float64 for float64 features, else float32");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long, "counts: expected int64");
  STD_TORCH_CHECK(C > 0 && C <= kMaxClasses, "num_classes: expected 1 to 65535");
}

}  // namespace pico_fast
