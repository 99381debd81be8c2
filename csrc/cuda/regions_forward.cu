// Region pooling on a GPU, forward: the mean feature of every class in every image.
//
//   pool_kernel    a warp owns 32 channels of a stretch of one image, a lane one of them, with a sum of
//                  its own for every class, in a bank of shared memory that no other lane touches. Tiles
//                  of pixels stream in behind it. A lane adds its pixels in their order.
//   means_kernel   a thread owns one mean and adds the stretches in their order.
//
// No two threads add to one sum: there are no atomics on floats, the same input gives the same
// bits, in planes and in pixels alike. A label outside [0, C) finds no sum.

#include "regions.cuh"

namespace pico_fast {
namespace {

// How features lie in memory. Planes are skewed if not all of them start at a multiple of 16 bytes.
enum class Order { planes, skewed_planes, pixels };

// Some pixels of 32 channels: a row of each channel (planes) or of each pixel (pixels).
template <typename T>
struct Tile {
  static constexpr int kVectors = 8;
  static constexpr int kPixels = kVectors * Vector<T>::kSize;
  // an odd number of vectors from row to row: lanes that read down a column meet in no bank; the
  // one more vector takes the end of a skewed plane's row
  Vector<T> plane[kWarp][kVectors + 1];

  __device__ T* pixels() { return plane[0]->value; }  // [kPixels, 32]
  __device__ const T* pixels() const { return plane[0]->value; }
};

// Shared memory of a warp, without its sums.
template <typename T>
struct Desk {
  // the most by which a skewed plane's first pixel can miss its place
  static constexpr int kSkew = Vector<T>::kSize;
  // tiles: one is summed while the others arrive
  static constexpr int kStages = 3;

  Tile<T> tiles[kStages];
  // where the sums of each pixel of a tile lie; with each skewed row come some pixels of its
  // neighbours, which here go where nobody looks
  alignas(16) int places[kSkew + Tile<T>::kPixels + kSkew];
};

// The multiple of 16 bytes at or below `at`.
template <typename T>
__device__ const T* align_down(const T* at) {
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(at) & ~uintptr_t{15});
}

// Starts the copy of a tile of planes, whose values from the `inside`-th on lie outside the image.
template <typename T>
__device__ void fetch_planes(Tile<T>& tile, const T* planes, int channels, int64_t P, int64_t inside) {
  constexpr int kVectors = Tile<T>::kVectors, kRows = kWarp / kVectors;
  const int row = threadIdx.x / kVectors, v = threadIdx.x % kVectors;
  if (v * Vector<T>::kSize >= inside) return;
  const T* from = planes + row * P + v * Vector<T>::kSize;
#pragma unroll
  for (int i = 0; i < kWarp; i += kRows, from += kRows * P) {
    if (row + i < channels) copy_async(tile.plane[row + i] + v, from);
  }
}

// The same of skewed planes, in whole vectors, the first of which starts before the tile.
template <typename T>
__device__ void fetch_skewed_planes(Tile<T>& tile, const T* planes, const T* end, int channels, int64_t P) {
  constexpr int kVectors = Tile<T>::kVectors + 1;
  for (int i = threadIdx.x; i < channels * kVectors; i += kWarp) {
    const int row = i / kVectors, v = i % kVectors;
    const T* from = align_down(planes + row * P) + v * Vector<T>::kSize;
    T* to = tile.plane[row][v].value;
    if (from + Vector<T>::kSize <= end) {
      copy_async(to, from);
    } else {  // the tensor ends within this vector
      for (int k = 0; from + k < end; ++k) to[k] = from[k];
    }
  }
}

// Starts the copy of a tile of pixels.
template <typename T>
__device__ void fetch_pixels(Tile<T>& tile, const T* __restrict__ from, int channels, int64_t D,
                             int pixels) {
  constexpr int kSize = Vector<T>::kSize;
  T* const to = tile.pixels();
  if (D % kSize == 0) {
    const int per_pixel = channels / kSize;
    for (int i = threadIdx.x; i < pixels * per_pixel; i += kWarp) {
      const int p = i / per_pixel, v = i % per_pixel * kSize;
      copy_async(to + p * kWarp + v, from + p * D + v);
    }
  } else if (threadIdx.x < channels) {
#pragma unroll 8
    for (int p = 0; p < pixels; ++p) to[p * kWarp + threadIdx.x] = from[p * D + threadIdx.x];
  }
}

// A lane's sums. That of the class at hand stays in a register until another class comes.
template <typename S>
struct Sums {
  S* at;      // sums of this lane, kWarp apart
  int place;  // of the class at hand
  S sum;

  // Adds a value to the class at hand.
  __device__ void add(S value) { sum += value; }

  // Adds N values to the sums at N places, in their order. The places are read at once and equal
  // ones handed on in registers: one trip to shared memory instead of N.
  template <int N>
  __device__ void add(const int* places, const S (&values)[N]) {
    at[place] = sum;
    S several[N];
#pragma unroll
    for (int i = 0; i < N; ++i) several[i] = at[places[i]];
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int j = 0; j < i; ++j) several[i] = places[j] == places[i] ? several[j] : several[i];
      several[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) at[places[i]] = several[i];
    place = places[N - 1];
    sum = several[N - 1];
  }
};

// Adds a lane's channel of a tile to the lane's sums; its row starts `skew` values before the tile.
// Bit p of `changes` says that pixel p has another place than the one before it.
template <typename T, Order kOrder>
__device__ void add_tile(const Tile<T>& tile, const int* places, uint64_t changes, int skew,
                         Sums<Sum<T>>& sums) {
  constexpr bool kSkewed = kOrder == Order::skewed_planes;
  constexpr int kSize = Vector<T>::kSize, kGroup = kSize < 4 ? kSize : 4;
  constexpr int kVectors = Tile<T>::kVectors + kSkewed;
  constexpr uint64_t kAll = (uint64_t{1} << kSize) - 1;
  for (int v = 0; v < kVectors; ++v) {
    const int p = v * kSize - (kSkewed ? skew : 0);
    Sum<T> values[kSize];
    if constexpr (kOrder == Order::pixels) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = tile.pixels()[(p + i) * kWarp + threadIdx.x];
    } else {
      const Vector<T> packed = tile.plane[threadIdx.x][v];
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = packed.value[i];
    }
    const bool inside = !kSkewed || (p >= 0 && p + kSize <= Tile<T>::kPixels);
    if (inside && (changes >> p & kAll) == 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums.add(values[i]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; i += kGroup) {
      Sum<T> group[kGroup];
      int place[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) group[j] = values[i + j], place[j] = places[p + i + j];
      sums.add(place, group);
    }
  }
}

// partial [B, stretches, C, D]: the sum of each class in each stretch; sizes [B, stretches, C]: its pixels
template <typename T, Order kOrder>
__global__ void __launch_bounds__(kWarp)
    pool_kernel(const T* __restrict__ features, const int64_t* __restrict__ labels,
                Sum<T>* __restrict__ partial, int* __restrict__ sizes, Sizes n) {
  constexpr int kPixels = Tile<T>::kPixels, kStages = Desk<T>::kStages, kSkew = Desk<T>::kSkew;
  constexpr int kLabels = (kPixels + kWarp - 1) / kWarp;  // of a tile, that one lane reads
  constexpr unsigned kEveryLane = 0xffffffff;
  static_assert(kPixels <= 64, "changes has a bit for each pixel of a tile");
  Desk<T>& desk = *static_cast<Desk<T>*>(shared_memory());
  const int lane = threadIdx.x;

  int64_t block = blockIdx.x;
  const int64_t first = block % n.groups * kWarp;
  block /= n.groups;
  const int64_t low = block % n.ranges * n.classes;
  block /= n.ranges;
  const int64_t start = block % n.stretches * n.stretch, b = block / n.stretches;
  const int channels = min(static_cast<int64_t>(kWarp), n.D - first);
  const int classes = min(n.classes, n.C - low);
  const int pixels = min(n.stretch, n.P - start), count = (pixels + kPixels - 1) / kPixels;
  const int nowhere = classes * kWarp;  // where the pixels of no class of this range go
  const T* const end = features + n.B * n.D * n.P;
  features += b * n.D * n.P;
  features += kOrder == Order::pixels ? start * n.D + first : first * n.P + start;
  labels += b * n.P + start;
  const T* const plane = features + lane * n.P;
  const int skew = plane - align_down(plane);

  Sum<T>* const all = reinterpret_cast<Sum<T>*>(&desk + 1);              // [classes + 1, 32]
  int* const histogram = reinterpret_cast<int*>(all + nowhere + kWarp);  // [classes + 1]
  int* const places = desk.places + kSkew;
  Sums<Sum<T>> sums{all + lane, nowhere, 0};
  for (int c = 0; c <= classes; ++c) sums.at[c * kWarp] = 0;
  for (int c = lane; c <= classes; c += kWarp) histogram[c] = 0;
  if (lane < kSkew) places[lane - kSkew] = places[kPixels + lane] = nowhere;

  const auto fetch = [&](int t) {
    if (t < count) {
      Tile<T>& tile = desk.tiles[t % kStages];
      const int64_t pixel = static_cast<int64_t>(t) * kPixels;
      if constexpr (kOrder == Order::pixels) {
        fetch_pixels(tile, features + pixel * n.D, channels, n.D,
                     min(static_cast<int64_t>(kPixels), pixels - pixel));
      } else if constexpr (kOrder == Order::skewed_planes) {
        fetch_skewed_planes(tile, features + pixel, end, channels, n.P);
      } else {
        fetch_planes(tile, features + pixel, channels, n.P, pixels - pixel);
      }
    }
    commit_copies();
  };
  // the row among this range's sums of this lane's i-th pixel of a tile
  const auto row_of = [&](int t, int i) {
    const int p = i * kWarp + lane, pixel = t * kPixels + p;
    if (p >= kPixels || pixel >= pixels) return classes;
    const int row = class_of(labels[pixel], n.C) - static_cast<int>(low);
    return row >= 0 && row < classes ? row : classes;
  };

  // labels are read two tiles ahead, like the pixels
  int rows[kStages][kLabels];
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    fetch(t);
#pragma unroll
    for (int i = 0; i < kLabels; ++i) rows[t][i] = row_of(t, i);
  }
  int last = nowhere;  // place of the pixel before this tile
  for (int t = 0; t < count; ++t) {
    wait_copies<kStages - 2>();
    __syncwarp();  // this tile is here, and every lane is done with the one before
    fetch(t + kStages - 1);
    uint64_t changes = kOrder == Order::skewed_planes ? 1 : 0;
#pragma unroll
    for (int i = 0; i < kLabels; ++i) {
      rows[kStages - 1][i] = row_of(t + kStages - 1, i);
      const int place = rows[0][i] * kWarp;
      if (i * kWarp + lane < kPixels) {
        places[i * kWarp + lane] = place;
        if (first == 0) atomicAdd(histogram + rows[0][i], 1);
      }
      int before = __shfl_up_sync(kEveryLane, place, 1);
      if (lane == 0) before = last;
      changes |= uint64_t{__ballot_sync(kEveryLane, place != before)} << (i * kWarp);
      last = __shfl_sync(kEveryLane, place, (kPixels - 1) % kWarp);
#pragma unroll
      for (int s = 0; s < kStages - 1; ++s) rows[s][i] = rows[s + 1][i];
    }
    __syncwarp();
    add_tile<T, kOrder>(desk.tiles[t % kStages], places, changes, skew, sums);
  }
  sums.at[sums.place] = sums.sum;

  if (first == 0) {
    __syncwarp();
    for (int c = lane; c < classes; c += kWarp) sizes[block * n.C + low + c] = histogram[c];
  }
  if (lane >= channels) return;
  partial += (block * n.C + low) * n.D + first + lane;
  for (int c = 0; c < classes; ++c) partial[c * n.D] = sums.at[c * kWarp];
}

// means [B, C, D] and counts [B, C] from partial [B, stretches, C, D] and sizes [B, stretches, C];
// a thread for each mean, at least one for each count
template <typename S>
__global__ void means_kernel(const S* __restrict__ partial, const int* __restrict__ sizes,
                             S* __restrict__ means, int64_t* __restrict__ counts, Sizes n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t width = max(n.D, int64_t{1}), region = i / width, d = i % width;
  if (region >= n.B * n.C) return;
  const int64_t b = region / n.C, c = region % n.C;
  double total = 0;
  int64_t count = 0;
#pragma unroll 8
  for (int64_t s = b * n.stretches; s < (b + 1) * n.stretches; ++s) {
    if (d < n.D) total += partial[(s * n.C + c) * n.D + d];
    count += sizes[s * n.C + c];
  }
  if (d < n.D) means[i] = static_cast<S>(total / static_cast<double>(max(count, int64_t{1})));
  if (d == 0) counts[region] = count;
}

template <typename T, Order kOrder>
void pool(const Tensor& features, const Tensor& labels, Tensor& means, Tensor& counts, Sizes n) {
  const int device = features.get_device_index();
  const int desk = sizeof(Desk<T>), per_class = kWarp * sizeof(Sum<T>) + sizeof(int);
  n.ranges = divide_up(n.C, (shared_limit(device) - desk) / per_class - 1);
  n.classes = divide_up(n.C, n.ranges);
  n.ranges = divide_up(n.C, n.classes);
  Tensor partial = new_empty(means, {n.B, n.stretches, n.C, n.D});
  Tensor sizes = new_empty(features, {n.B, n.stretches, n.C}, ScalarType::Int);
  Sum<T>* const sums = partial.mutable_data_ptr<Sum<T>>();
  int* const size = sizes.mutable_data_ptr<int>();
  launch(pool_kernel<T, kOrder>, device, n.B * n.stretches * n.ranges * n.groups, kWarp,
         desk + (n.classes + 1) * per_class, features.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(),
         sums, size, n);
  launch(means_kernel<Sum<T>>, device, divide_up(n.B * n.C * std::max<int64_t>(n.D, 1), kThreads), kThreads,
         0, sums, size, means.mutable_data_ptr<Sum<T>>(), counts.mutable_data_ptr<int64_t>(), n);
}

// features [B, D, H, W], labels [B, H, W] -> means [B, C, D] and counts [B, C]
std::tuple<Tensor, Tensor> region_pool(const Tensor& features, const Tensor& labels, int64_t C) {
  check_forward(features, labels, C);
  const DeviceGuard guard(features.get_device_index());
  const ScalarType type = features.scalar_type();
  Sizes n{};
  n.B = features.size(0), n.D = features.size(1), n.C = C;
  n.P = features.size(2) * features.size(3);
  Tensor means = new_empty(features, {n.B, C, n.D}, sum_type(type));
  Tensor counts = new_empty(features, {n.B, C}, ScalarType::Long);

  const bool pixels = in_pixels(features);
  Tensor dense = pixels ? features : contiguous(features);
  // a view may start anywhere, the kernel reads 16 bytes at a time
  if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16) dense = torch::stable::clone(dense);
  n.groups = std::max<int64_t>(divide_up(n.D, kWarp), 1);
  // a stretch is short enough to keep float32 accurate and to fill the GPU, long enough that its
  // sums are few next to its pixels; it is whole tiles of every type, and all of an image are alike
  const int64_t fair = std::clamp<int64_t>(n.B * n.groups * n.P / 4096, 1024, 4096);
  const int64_t parts = divide_up(n.P, std::max(fair, 16 * C));
  n.stretch = std::max<int64_t>(divide_up(divide_up(n.P, std::max<int64_t>(parts, 1)), 64) * 64, 64);
  n.stretches = divide_up(n.P, n.stretch);
  with_feature_type(type, [&](auto value) {
    using T = decltype(value);
    const auto run = pixels                      ? pool<T, Order::pixels>
                     : n.P * sizeof(T) % 16 != 0 ? pool<T, Order::skewed_planes>
                                                 : pool<T, Order::planes>;
    run(dense, dense_labels(labels), means, counts, n);
  });
  return {means, counts};
}

}  // namespace
}  // namespace pico_fast

PICO_FAST_GPU_LIBRARY(m) { m.impl("region_pool", TORCH_BOX(&pico_fast::region_pool)); }
