// Gathering drawn pixels on a CPU: rows of D channels out of a feature map.

#include "tensors.h"

namespace pico_fast {
namespace {

// Channels that one task takes of every pixel: their planes' cache lines are used for as many
// pixels as lie in them, and the values go out side by side.
constexpr int64_t kChannels = 16;

// features [B, D, H, W] of any strides, pixel [n] int64 into B * H * W -> rows [n, D]; V is a plain
// integer as wide as a feature: nothing is computed with
template <typename V>
void gather(const Tensor& features, const int64_t* pixel, int64_t n, Tensor& rows) {
  const V* from = static_cast<const V*>(features.const_data_ptr());
  V* out = static_cast<V*>(rows.mutable_data_ptr());
  const int64_t D = features.size(1), H = features.size(2), W = features.size(3);
  const int64_t image = features.stride(0), plane = features.stride(1);
  const int64_t row = features.stride(2), column = features.stride(3);
  // tasks of neighbouring numbers share a group: its planes stay in the cache of one thread
  constexpr int64_t kPixels = 1024;
  const int64_t stretches = divide_up(n, kPixels);
  parallel_each(divide_up(D, kChannels) * stretches, 1, [&](int64_t task) {
    const int64_t first = task / stretches * kChannels, channels = std::min(kChannels, D - first);
    const int64_t start = task % stretches * kPixels, stop = std::min(start + kPixels, n);
    for (int64_t i = start; i < stop; ++i) {
      const int64_t b = pixel[i] / (H * W), y = pixel[i] / W % H, x = pixel[i] % W;
      const V* at = from + b * image + y * row + x * column + first * plane;
      V* to = out + i * D + first;
      for (int64_t k = 0; k < channels; ++k) to[k] = at[k * plane];
    }
  });
}

// features [B, D, H, W], pixel [n] int64 in [0, B * H * W) -> [n, D]
Tensor gather_pixels(const Tensor& features, const Tensor& pixel) {
  STD_TORCH_CHECK(features.dim() == 4 && pixel.dim() == 1, "expected [B, D, H, W] and [n]");
  const int64_t n = pixel.size(0);
  const int64_t pixels = features.size(0) * features.size(2) * features.size(3);
  const Tensor dense = contiguous(pixel);
  const int64_t* at = checked_index(dense, 0, pixels, "pixel", "pixels of features");
  const int64_t bytes = features.element_size();
  STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "features: expected values of 2, 4 or 8 bytes");
  Tensor rows = new_empty(features, {n, features.size(1)});
  const auto run = bytes == 2 ? gather<int16_t> : bytes == 4 ? gather<int32_t> : gather<int64_t>;
  run(features, at, n, rows);
  return rows;
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) { m.impl("gather_pixels", TORCH_BOX(&gather_pixels)); }

}  // namespace
}  // namespace pico_fast
