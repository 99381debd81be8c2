// Synthesis on a CPU: the log-sum over an anchor's mixed negatives and their softmax mean.
//
// One task owns an anchor. A mix lives in registers while its norm and its inner product are summed; what
// it adds to the mean is a weight on each of its two parts, and the parts are summed once.

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "draws.h"
#include "rows.h"

namespace pico_fast {
namespace {

// Of pico_fast/reference.py: what is drawn, and when a mix is too short to have a direction.
enum Stream : uint32_t { kFirst = 7, kSecond, kShare, kWithAnchor, kAnchorShare };
constexpr double kShortestMix = 1e-2;
constexpr double kShortestNorm = 1e-12;  // what torch.nn.functional.normalize divides by at least

constexpr int64_t kAnchor = -1;  // the place of the anchor among the parts
constexpr int64_t kAhead = 4;

// share * row of place `first` + (1 - share) * row of place `second` of the pool
template <typename S>
struct Mix {
  int64_t first, second;
  S share;
  S norm = 0, product = 0;  // of the mixed row; a product of -inf: left out
};

// The mixes of an anchor whose pool has `size` keys.
template <typename S>
void draw(uint32_t seed, uint32_t row, int64_t negative_negative, int64_t negative_anchor, int64_t size,
          std::vector<Mix<S>>& mixes) {
  const auto state = [&](Stream stream) { return fold(fold(seed, stream), row); };
  mixes.clear();
  const uint32_t one = state(kFirst), other = state(kSecond), share = state(kShare);
  for (uint32_t m = 0; size >= 2 && m < negative_negative; ++m) {
    const int64_t first = below(fold(one, m), size);
    int64_t second = below(fold(other, m), size - 1);
    second += second >= first;
    mixes.push_back({first, second, static_cast<S>(uniform(fold(share, m)))});
  }
  const uint32_t with = state(kWithAnchor), anchor_share = state(kAnchorShare);
  for (uint32_t m = 0; size >= 1 && m < negative_anchor; ++m) {
    const S part = static_cast<S>(uniform(fold(anchor_share, m)) * 0.5f);
    mixes.push_back({kAnchor, below(fold(with, m), size), part});
  }
}

// x and y are of different types where one of them is the anchor.
template <typename S, typename X, typename Y>
PICO_FAST_INLINE inline void measure(const X* x, const Y* y, const S* anchor, int64_t D, Mix<S>& mix) {
  const S share = mix.share, rest = 1 - mix.share;
  S xx = 0, yy = 0, mm = 0, product = 0;
#pragma omp simd reduction(+ : xx, yy, mm, product)
  for (int64_t d = 0; d < D; ++d) {
    const S a = static_cast<S>(x[d]), b = static_cast<S>(y[d]);
    const S mixed = share * a + rest * b;
    xx += a * a;
    yy += b * b;
    mm += mixed * mixed;
    product += mixed * anchor[d];
  }
  mix.norm = std::max(std::sqrt(mm), static_cast<S>(kShortestNorm));
  mix.product = product / mix.norm;
  const S longer = std::sqrt(std::max(xx, yy));
  if (!(std::sqrt(mm) > std::max(static_cast<S>(kShortestMix) * longer, static_cast<S>(kShortestNorm))))
    mix.product = -std::numeric_limits<S>::infinity();
}

// mean [D] of one anchor, which is 0 before; returns its log-sum. `weight`: room for its pool's
template <typename S, typename T>
S mix_one(const S* anchor, int64_t D, double temperature, const std::vector<const T*>& pool,
          std::vector<Mix<S>>& mixes, std::vector<S>& weight, S* mean) {
  const auto n = static_cast<int64_t>(mixes.size());
  const auto ask = [&](int64_t place) {
    if (place != kAnchor) prefetch(pool[place], D);
  };
  vectorised([&]() PICO_FAST_INLINE {
    for (int64_t m = 0; m < n; ++m) {
      if (m + kAhead < n) {
        ask(mixes[m + kAhead].first);
        ask(mixes[m + kAhead].second);
      }
      auto& mix = mixes[m];
      if (mix.first == kAnchor)
        measure(anchor, pool[mix.second], anchor, D, mix);
      else
        measure(pool[mix.first], pool[mix.second], anchor, D, mix);
    }
  });
  double top = -std::numeric_limits<double>::infinity(), total = 0;
  for (const auto& mix : mixes) top = std::max(top, mix.product / temperature);
  if (std::isinf(top)) return static_cast<S>(top);
  for (const auto& mix : mixes) total += std::exp(mix.product / temperature - top);
  const double lse = top + std::log(total);

  S of_anchor = 0;
  weight.assign(pool.size(), 0);
  for (const auto& mix : mixes) {
    const S p = static_cast<S>(std::exp(mix.product / temperature - lse)) / mix.norm;
    (mix.first == kAnchor ? of_anchor : weight[mix.first]) += p * mix.share;
    weight[mix.second] += p * (1 - mix.share);
  }
  vectorised([&]() PICO_FAST_INLINE {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) mean[d] = of_anchor * anchor[d];
    for (size_t j = 0; j < pool.size(); ++j) {
      const S w = weight[j];
      const T* row = pool[j];
      if (w == 0) continue;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) mean[d] += w * static_cast<S>(row[d]);
    }
  });
  return static_cast<S>(lse);
}

// anchors [A, D], keys [K, D], pool_index [A, pool] int64 into keys, -1 for none, row [A] int64:
// the number of an anchor in its draws, seed [] int64 -> log-sum of exp(product / temperature) over
// an anchor's mixes [A], softmax mean [A, D]
std::tuple<Tensor, Tensor> mix_negatives(const Tensor& anchors_, const Tensor& keys_,
                                         const Tensor& pool_index_, const Tensor& row_,
                                         int64_t negative_negative, int64_t negative_anchor,
                                         double temperature, const Tensor& seed) {
  const Tensor keys = contiguous(keys_);
  const Tensor pool_index = contiguous(pool_index_);
  const Tensor numbers = contiguous(row_);
  const bool precise =
      anchors_.scalar_type() == ScalarType::Double || keys.scalar_type() == ScalarType::Double;
  const auto type = precise ? ScalarType::Double : ScalarType::Float;
  const Tensor anchors = contiguous(torch::stable::to(anchors_, type));
  STD_TORCH_CHECK(anchors.dim() == 2 && keys.dim() == 2 && pool_index.dim() == 2 &&
                      anchors.size(1) == keys.size(1) && anchors.size(0) == pool_index.size(0),
                  "expected anchors [A, D], keys [K, D] and pool_index [A, pool]");
  const int64_t A = anchors.size(0), D = anchors.size(1), width = pool_index.size(1);
  STD_TORCH_CHECK(negative_negative >= 0 && negative_negative <= UINT32_MAX && negative_anchor >= 0 &&
                      negative_anchor <= UINT32_MAX,
                  "mixes: expected 0 to 2^32 - 1");
  const int64_t* number = in_place<int64_t>(numbers, {A}, "row");
  const int64_t* picked = checked_index(pool_index, -1, keys.size(0), "index", "keys, or -1");
  const uint32_t state = fold_seed(seed);
  Tensor lse = new_empty(anchors, {A});
  Tensor mean = torch::stable::new_zeros(anchors, {A, D});
  with_dtypes(anchors, keys, [&](auto sum, auto key) {
    using S = decltype(sum);
    using T = decltype(key);
    const auto* row = anchors.const_data_ptr<S>();
    const auto* all = keys.const_data_ptr<T>();
    auto* lses = lse.mutable_data_ptr<S>();
    auto* means = mean.mutable_data_ptr<S>();
    parallel_for(0, A, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> index;
      std::vector<const T*> pool;
      std::vector<Mix<S>> mixes;
      std::vector<S> weight;
      for (int64_t i = begin; i < end; ++i) {
        // in the order of the keys, as the reference draws them
        index.assign(picked + i * width, picked + (i + 1) * width);
        std::erase(index, -1);
        std::sort(index.begin(), index.end());
        pool.clear();
        for (const int64_t k : index) pool.push_back(all + k * D);
        const auto size = static_cast<int64_t>(index.size());
        const auto of = static_cast<uint32_t>(number[i]);
        draw(state, of, negative_negative, negative_anchor, size, mixes);
        lses[i] = mix_one(row + i * D, D, temperature, pool, mixes, weight, means + i * D);
      }
    });
  });
  return {lse, mean};
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) { m.impl("mix_negatives", TORCH_BOX(&mix_negatives)); }

}  // namespace
}  // namespace pico_fast
