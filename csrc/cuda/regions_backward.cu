// Region pooling on a GPU, backward: every pixel receives its class's share of the gradient.
//
//   planes_kernel  a block owns some planes of a stretch of pixels and a table of what a pixel of
//                  each class receives there; a thread looks up its pixels and writes their values.
//   pixels_kernel  the same for channels_last: neighbouring threads write neighbouring channels.
//
// Every value is written once, by one thread: nothing for a pixel whose label is outside [0, C).

#include "regions.cuh"

namespace pico_fast {
namespace {

// What a pixel of each class of a range receives in `kChannels` channels, `kPitch` apart, and
// behind the last class nothing, for pixels left out: table [classes + 1, kPitch].
template <int kChannels, int kPitch, typename T>
__device__ void fill_table(T* table, const Sum<T>* __restrict__ grad_means,
                           const int64_t* __restrict__ counts, int64_t b, int64_t low, int64_t first,
                           int classes, const Sizes& n) {
  for (int i = threadIdx.x; i < (classes + 1) * kChannels; i += kThreads) {
    const int c = i / kChannels, k = i % kChannels;
    Sum<T> share = 0;
    if (c < classes && first + k < n.D) {
      const int64_t region = b * n.C + low + c;
      share = grad_means[region * n.D + first + k] / static_cast<Sum<T>>(max(counts[region], int64_t{1}));
    }
    table[c * kPitch + k] = static_cast<T>(share);
  }
  __syncthreads();
}

// Row of a pixel of this label in a range's table, or -1 if another range writes that pixel.
__device__ int row_of_pixel(int64_t label, int64_t low, int classes, int64_t C) {
  const int c = class_of(label, C);
  if (c == C) return low == 0 ? classes : -1;
  return c >= low && c < low + classes ? c - static_cast<int>(low) : -1;
}

// grad [B, D, P]
template <typename T>
struct InPlanes {
  // 32 bytes of channels: the labels, read again for each such group, stay a quarter of the traffic
  static constexpr int kVectors = 2, kChannels = kVectors * Vector<T>::kSize;
  // an odd number of vectors from class to class: pixels of different classes meet in few banks
  static constexpr int kPitch = kChannels + Vector<T>::kSize;
  static constexpr int64_t kPixels = 4096;
};

// grad_means [B, C, D], labels [B, P], counts [B, C] -> grad [B, D, P]
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    planes_kernel(const Sum<T>* __restrict__ grad_means, const int64_t* __restrict__ labels,
                  const int64_t* __restrict__ counts, T* __restrict__ grad, Sizes n) {
  using Shape = InPlanes<T>;
  constexpr int kSize = Vector<T>::kSize;
  T* const table = static_cast<T*>(shared_memory());
  int64_t block = blockIdx.x;
  const int64_t start = block % n.stretches * n.stretch, end = min(start + n.stretch, n.P);
  block /= n.stretches;
  const int64_t low = block % n.ranges * n.classes;
  block /= n.ranges;
  const int64_t first = block % n.groups * Shape::kChannels, b = block / n.groups;
  const int classes = min(n.classes, n.C - low);
  const int planes = min(static_cast<int64_t>(Shape::kChannels), n.D - first);
  fill_table<Shape::kChannels, Shape::kPitch>(table, grad_means, counts, b, low, first, classes, n);
  grad += (b * n.D + first) * n.P;
#pragma unroll 2
  for (int64_t p = start + threadIdx.x; p < end; p += kThreads) {
    const int row = row_of_pixel(labels[b * n.P + p], low, classes, n.C);
    if (row < 0) continue;
#pragma unroll
    for (int v = 0; v < Shape::kVectors; ++v) {
      const Vector<T> share = reinterpret_cast<const Vector<T>*>(table + row * Shape::kPitch)[v];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (v * kSize + k < planes) grad[(v * kSize + k) * n.P + p] = share.value[k];
      }
    }
  }
}

// grad [B, P, D]
template <typename T>
struct InPixels {
  // 128 bytes of channels: one line of memory
  static constexpr int kChannels = 128 / sizeof(T), kPitch = kChannels;
  static constexpr int64_t kPixels = 1024;
};

// grad_means [B, C, D], labels [B, P], counts [B, C] -> grad [B, P, D], written in units V
template <typename T, typename V>
__global__ void __launch_bounds__(kThreads, 4)
    pixels_kernel(const Sum<T>* __restrict__ grad_means, const int64_t* __restrict__ labels,
                  const int64_t* __restrict__ counts, T* __restrict__ grad, Sizes n) {
  using Shape = InPixels<T>;
  constexpr int kWidth = sizeof(V) / sizeof(T), kUnits = Shape::kChannels / kWidth;
  T* const table = static_cast<T*>(shared_memory());
  int64_t block = blockIdx.x;
  const int64_t first = block % n.groups * Shape::kChannels;
  block /= n.groups;
  const int64_t low = block % n.ranges * n.classes;
  block /= n.ranges;
  const int64_t start = block % n.stretches * n.stretch, b = block / n.stretches;
  const int64_t end = min(start + n.stretch, n.P);
  const int classes = min(n.classes, n.C - low);
  fill_table<Shape::kChannels, Shape::kPitch>(table, grad_means, counts, b, low, first, classes, n);
  const int unit = threadIdx.x % kUnits;
  if (first + unit * kWidth >= n.D) return;
  grad += b * n.P * n.D + first;
#pragma unroll 4
  for (int64_t p = start + threadIdx.x / kUnits; p < end; p += kThreads / kUnits) {
    const int row = row_of_pixel(labels[b * n.P + p], low, classes, n.C);
    if (row < 0) continue;
    reinterpret_cast<V*>(grad + p * n.D)[unit] =
        reinterpret_cast<const V*>(table + row * Shape::kPitch)[unit];
  }
}

template <typename T, typename Shape, typename Kernel>
void spread(Kernel kernel, const Tensor& grad_means, const Tensor& labels, const Tensor& counts,
            Tensor& grad, Sizes n) {
  const int device = grad.get_device_index(), per_class = Shape::kPitch * sizeof(T);
  n.groups = divide_up(n.D, Shape::kChannels);
  n.ranges = divide_up(n.C, shared_limit(device) / per_class - 1);
  n.classes = divide_up(n.C, n.ranges);
  n.ranges = divide_up(n.C, n.classes);
  // many pixels next to the classes of the table
  n.stretch = std::max<int64_t>(Shape::kPixels, divide_up(8 * n.classes, kThreads) * kThreads);
  n.stretches = divide_up(n.P, n.stretch);
  launch(kernel, device, n.B * n.stretches * n.ranges * n.groups, kThreads, (n.classes + 1) * per_class,
         grad_means.const_data_ptr<Sum<T>>(), labels.const_data_ptr<int64_t>(),
         counts.const_data_ptr<int64_t>(), grad.mutable_data_ptr<T>(), n);
}

// grad_means [B, C, D], labels [B, H, W], counts [B, C] -> gradient of the features [B, D, H, W]
Tensor region_pool_backward(const Tensor& grad_means, const Tensor& labels, const Tensor& counts,
                            ScalarType dtype, bool pixels) {
  check_backward(grad_means, labels, counts, dtype);
  const DeviceGuard guard(grad_means.get_device_index());
  Sizes n{};
  n.B = grad_means.size(0), n.C = grad_means.size(1), n.D = grad_means.size(2);
  n.P = labels.size(1) * labels.size(2);
  Tensor grad = torch::stable::empty({n.B, n.D, labels.size(1), labels.size(2)}, dtype, std::nullopt,
                                     grad_means.device(), std::nullopt,
                                     pixels ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const Tensor dense_means = contiguous(grad_means);
  const Tensor dense = dense_labels(labels);
  const Tensor dense_counts = contiguous(counts);
  with_feature_type(dtype, [&](auto value) {
    using T = decltype(value);
    const auto run = [&](auto kernel, auto shape) {
      spread<T, decltype(shape)>(kernel, dense_means, dense, dense_counts, grad, n);
    };
    if (!pixels) {
      run(planes_kernel<T>, InPlanes<T>{});
    } else if (n.D % Vector<T>::kSize == 0) {
      run(pixels_kernel<T, Vector<T>>, InPixels<T>{});
    } else {
      run(pixels_kernel<T, T>, InPixels<T>{});
    }
  });
  return grad;
}

}  // namespace
}  // namespace pico_fast

PICO_FAST_GPU_LIBRARY(m) { m.impl("region_pool_backward", TORCH_BOX(&pico_fast::region_pool_backward)); }
