// Gathering drawn pixels on a CPU: rows of D channels out of a feature map.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace pico_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Channels that one task takes of every pixel: their planes' cache lines are used for as many
// pixels as lie in them, and the values go out side by side.
constexpr int64_t kChannels = 16;

// features [B, D, H, W] of any strides, pixel [n] int64 into B * H * W -> rows [n, D]; V is a plain
// integer as wide as a feature: nothing is computed with
template <typename V>
void gather(const Tensor& features, const int64_t* pixel, int64_t n, V* rows) {
  const V* from = static_cast<const V*>(features.const_data_ptr());
  const int64_t D = features.size(1), H = features.size(2), W = features.size(3);
  const int64_t image = features.stride(0), plane = features.stride(1);
  const int64_t row = features.stride(2), column = features.stride(3);
  const int64_t groups = (D + kChannels - 1) / kChannels;
  // tasks of neighbouring numbers share a group: its planes stay in the cache of one thread
  constexpr int64_t kPixels = 1024;
  const int64_t stretches = (n + kPixels - 1) / kPixels;
  torch::stable::parallel_for(0, groups * stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / stretches * kChannels, channels = std::min(kChannels, D - first);
      const int64_t start = task % stretches * kPixels, stop = std::min(start + kPixels, n);
      for (int64_t i = start; i < stop; ++i) {
        const int64_t b = pixel[i] / (H * W), y = pixel[i] / W % H, x = pixel[i] % W;
        const V* at = from + b * image + y * row + x * column + first * plane;
        V* to = rows + i * D + first;
        for (int64_t k = 0; k < channels; ++k) to[k] = at[k * plane];
      }
    }
  });
}

// features [B, D, H, W], pixel [n] int64 in [0, B * H * W) -> [n, D]
Tensor gather_pixels(const Tensor& features, const Tensor& pixel) {
  STD_TORCH_CHECK(features.dim() == 4 && pixel.dim() == 1, "expected [B, D, H, W] and [n]");
  STD_TORCH_CHECK(pixel.scalar_type() == ScalarType::Long, "pixel: expected int64");
  const int64_t n = pixel.size(0);
  const int64_t pixels = features.size(0) * features.size(2) * features.size(3);
  const Tensor dense = torch::stable::contiguous(pixel);
  const int64_t* at = static_cast<const int64_t*>(dense.const_data_ptr());
  const bool inside = std::all_of(at, at + n, [=](int64_t p) { return p >= 0 && p < pixels; });
  STD_TORCH_CHECK(inside, "pixel: expected indices of pixels of features");
  Tensor rows = torch::stable::new_empty(features, {n, features.size(1)});
  void* to = rows.mutable_data_ptr();
  switch (features.element_size()) {
    case 2:
      gather(features, at, n, static_cast<int16_t*>(to));
      break;
    case 4:
      gather(features, at, n, static_cast<int32_t*>(to));
      break;
    case 8:
      gather(features, at, n, static_cast<int64_t*>(to));
      break;
    default:
      STD_TORCH_CHECK(false, "features: expected values of 2, 4 or 8 bytes");
  }
  return rows;
}

}  // namespace
}  // namespace pico_fast

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) {
  m.impl("gather_pixels", TORCH_BOX(&pico_fast::gather_pixels));
}
