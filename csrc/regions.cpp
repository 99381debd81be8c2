// Region pooling on a CPU: the mean feature of every class in every image, and its gradient.
//
// A label outside [0, C) stands for row C, which is summed like the others and dropped at the end: no
// branch per pixel, no write out of bounds. One task owns a block of channels of one image and adds its
// pixels in their order: the bits of a sum depend neither on the layout nor on the number of threads.

#include "regions.h"

#include <memory>
#include <tuple>
#include <vector>

namespace pico_fast {
namespace {

// Planes that one task walks side by side: enough independent chains of additions to hide their
// latency, and no more than the ways of a first-level cache, because planes that are a power of two
// apart fall into the same set.
constexpr int64_t kPlanes = 8;

// The row [B, P] that each pixel is added to, and how many pixels each class has: counts [B, C].
std::vector<int32_t> rows_and_counts(const Tensor& labels, int64_t C, int64_t* counts) {
  const Tensor dense = contiguous(labels);
  const int64_t B = labels.size(0), P = labels.size(1) * labels.size(2);
  std::vector<int32_t> rows(B * P);
  constexpr auto kExpected = "labels: expected int64, int32 or uint8";
  with_type<int64_t, int32_t, uint8_t>(labels.scalar_type(), kExpected, [&](auto type) {
    using L = decltype(type);
    const L* label = dense.const_data_ptr<L>();
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> count(C + 1);
      for (int64_t b = begin; b < end; ++b) {
        std::fill(count.begin(), count.end(), 0);
        for (int64_t p = b * P; p < (b + 1) * P; ++p) {
          const int64_t value = label[p];
          rows[p] = static_cast<int32_t>(value >= 0 && value < C ? value : C);
          ++count[rows[p]];
        }
        if (counts) std::copy_n(count.begin(), C, counts + b * C);
      }
    });
  });
  return rows;
}

// Adds `count` pixels of up to kPlanes planes to sums [C + 1, kPlanes].
template <typename T>
void add_planes(const T* features, const int32_t* rows, int64_t count, int64_t P, int64_t planes,
                Sum<T>* __restrict sums) {
  const T* plane[kPlanes];
  // a short block reads its last plane again, into sums that nobody takes
  for (int64_t k = 0; k < kPlanes; ++k) plane[k] = features + std::min(k, planes - 1) * P;
  for (int64_t p = 0; p < count; ++p) {
    Sum<T>* sum = sums + rows[p] * kPlanes;
    for (int64_t k = 0; k < kPlanes; ++k) sum[k] += static_cast<Sum<T>>(plane[k][p]);
  }
}

// Adds `count` whole pixels to sums [C + 1, D].
template <typename T>
void add_pixels(const T* features, const int32_t* rows, int64_t count, int64_t D, Sum<T>* __restrict sums) {
  for (int64_t p = 0; p < count; ++p) {
    const T* pixel = features + p * D;
    Sum<T>* sum = sums + rows[p] * D;
    for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<Sum<T>>(pixel[d]);
  }
}

// Means [B, C, D] of features that lie in planes or in pixels.
template <typename T>
void pool(const T* features, const int32_t* rows, const int64_t* counts, int64_t B, int64_t P, int64_t D,
          int64_t C, bool pixels, Sum<T>* means) {
  // One task sums a stretch of pixels, so short that float32 loses little, so long that the sums
  // are few next to the pixels. The stretches' sums are then added in their order, in float64.
  const int64_t stretch = std::max<int64_t>(1024, 16 * C), stretches = divide_up(P, stretch);
  const int64_t width = pixels ? D : kPlanes, blocks = pixels ? 1 : divide_up(D, width);
  const int64_t size = (C + 1) * width;
  const std::unique_ptr<Sum<T>[]> sums(new Sum<T>[B * stretches * blocks * size]);

  parallel_each(B * stretches * blocks, 1, [&](int64_t task) {
    const int64_t block = task % blocks, b = task / blocks / stretches;
    const int64_t first = task / blocks % stretches * stretch;
    const int64_t count = std::min(stretch, P - first);
    const T* image = features + b * D * P;
    const int32_t* row = rows + b * P + first;
    Sum<T>* sum = sums.get() + task * size;
    std::fill_n(sum, size, Sum<T>{0});
    if (pixels) {
      add_pixels(image + first * D, row, count, D, sum);
    } else {
      const int64_t d = block * width;
      add_planes(image + d * P + first, row, count, P, std::min(width, D - d), sum);
    }
  });

  parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> totals(size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, d = task % blocks * width;
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t s = 0; s < stretches; ++s) {
        const Sum<T>* sum = sums.get() + ((b * stretches + s) * blocks + d / width) * size;
        for (int64_t i = 0; i < size; ++i) totals[i] += sum[i];
      }
      for (int64_t c = 0; c < C; ++c) {
        const double count = static_cast<double>(std::max<int64_t>(counts[b * C + c], 1));
        Sum<T>* mean = means + (b * C + c) * D + d;
        for (int64_t k = 0; k < std::min(width, D - d); ++k) {
          mean[k] = static_cast<Sum<T>>(totals[c * width + k] / count);
        }
      }
    }
  });
}

// features [B, D, H, W], labels [B, H, W] -> means [B, C, D] and counts [B, C]
std::tuple<Tensor, Tensor> region_pool(const Tensor& features, const Tensor& labels, int64_t C) {
  check_forward(features, labels, C);
  const int64_t B = features.size(0), D = features.size(1);
  const int64_t P = features.size(2) * features.size(3);
  const bool pixels = in_pixels(features);
  const Tensor dense = pixels ? features : contiguous(features);
  Tensor means = new_empty(features, {B, C, D}, sum_type(features.scalar_type()));
  Tensor counts = new_empty(features, {B, C}, ScalarType::Long);
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  const std::vector<int32_t> rows = rows_and_counts(labels, C, count);
  with_feature_type(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = dense.const_data_ptr<T>();
    Sum<T>* to = means.mutable_data_ptr<Sum<T>>();
    pool<T>(from, rows.data(), count, B, P, D, C, pixels, to);
  });
  return {means, counts};
}

// What a pixel of each row receives: [B, D, C + 1], or [B, C + 1, D] for pixels; zero in row C.
template <typename T>
std::vector<T> gradient_table(const Sum<T>* grad_means, const int64_t* counts, int64_t B, int64_t C,
                              int64_t D, bool pixels) {
  std::vector<T> table(B * (C + 1) * D);
  parallel_each(B * C, 16, [&](int64_t i) {
    const int64_t b = i / C, c = i % C;
    const Sum<T> count = static_cast<Sum<T>>(std::max<int64_t>(counts[i], 1));
    T* to = table.data() + b * (C + 1) * D + (pixels ? c * D : c);
    const int64_t stride = pixels ? 1 : C + 1;
    const Sum<T>* from = grad_means + i * D;
    for (int64_t d = 0; d < D; ++d) to[d * stride] = static_cast<T>(from[d] / count);
  });
  return table;
}

// grad_means [B, C, D], labels [B, H, W], counts [B, C] -> gradient of the features [B, D, H, W]
Tensor region_pool_backward(const Tensor& grad_means, const Tensor& labels, const Tensor& counts,
                            ScalarType dtype, bool pixels) {
  check_backward(grad_means, labels, counts, dtype);
  const int64_t B = grad_means.size(0), C = grad_means.size(1), D = grad_means.size(2);
  const int64_t H = labels.size(1), W = labels.size(2), P = H * W;
  const Tensor dense = contiguous(grad_means);
  const Tensor dense_counts = contiguous(counts);
  const int64_t* count = dense_counts.const_data_ptr<int64_t>();
  const std::vector<int32_t> rows = rows_and_counts(labels, C, nullptr);
  Tensor grad = torch::stable::empty({B, D, H, W}, dtype, std::nullopt, grad_means.device(), std::nullopt,
                                     pixels ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  with_feature_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Sum<T>* from = dense.const_data_ptr<Sum<T>>();
    const std::vector<T> table = gradient_table<T>(from, count, B, C, D, pixels);
    T* to = grad.mutable_data_ptr<T>();
    if (pixels) {
      parallel_each(B * P, 1024, [&](int64_t i) {
        std::copy_n(table.data() + (i / P * (C + 1) + rows[i]) * D, D, to + i * D);
      });
    } else {
      parallel_each(B * D, 1, [&](int64_t i) {
        const T* value = table.data() + i * (C + 1);
        const int32_t* row = rows.data() + i / D * P;
        for (int64_t p = 0; p < P; ++p) to[i * P + p] = value[row[p]];
      });
    }
  });
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) {
  m.impl("region_pool", TORCH_BOX(&region_pool));
  m.impl("region_pool_backward", TORCH_BOX(&region_pool_backward));
}

}  // namespace
}  // namespace pico_fast
