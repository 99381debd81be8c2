// Keys that were picked for each anchor, on a CPU: their inner products and order, and their sums
// by weight. A task owns a block of anchors and takes all their picks tile by tile of the keys, so
// that a key is read from memory once for the block and not once for each pick; no copy of the
// picked rows is made. An anchor's terms come in the same order whatever the block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "order.h"
#include "rows.h"

namespace pico_fast {
namespace {

using torch::stable::parallel_for;

// Rows that are asked for ahead of the one in hand.
constexpr int64_t kAhead = 4;
// Inner products in hand at once: the additions of one wait for one another, those of four do not.
constexpr int64_t kProducts = 4;
// Anchors of a block at most, and bytes of a tile of keys: both stay in a second-level cache.
constexpr int64_t kAnchors = 256, kTileBytes = 1 << 19;

struct Pick {
  int32_t anchor, key;
  int64_t slot;
};

// Picks [first * k, last * k) of an index [n, k] that `wanted` says are there, by tile of keys and
// within a tile in their order.
template <typename F>
std::vector<Pick> by_tile(const int64_t* index, int64_t first, int64_t last, int64_t k, int64_t K,
                          int64_t row_bytes, F&& wanted) {
  // rows of no channels are of no bytes
  const int64_t tile = std::max<int64_t>(1, kTileBytes / std::max<int64_t>(1, row_bytes));
  std::vector<int64_t> start(K / tile + 2);
  for (int64_t slot = first * k; slot < last * k; ++slot)
    if (wanted(slot)) ++start[index[slot] / tile + 1];
  for (size_t t = 1; t < start.size(); ++t) start[t] += start[t - 1];
  std::vector<Pick> picks(start.back());
  for (int64_t i = first; i < last; ++i)
    for (int64_t slot = i * k; slot < (i + 1) * k; ++slot)
      if (wanted(slot)) {
        const auto key = static_cast<int32_t>(index[slot]);
        picks[start[key / tile]++] = {static_cast<int32_t>(i), key, slot};
      }
  return picks;
}

int64_t block_of(int64_t n) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  return std::clamp<int64_t>((n + threads - 1) / threads, 1, kAnchors);
}

// The inner products of anchors with their picks, each into its slot.
template <typename S, typename T>
void multiply(const S* rows, const T* keys, int64_t D, const std::vector<Pick>& picks,
              S* products) {
  const auto n = static_cast<int64_t>(picks.size());
  vectorised([&]() PICO_FAST_INLINE {
    for (int64_t i = 0; i < n; i += kProducts) {
      const S* row[kProducts];
      const T* key[kProducts];
      for (int64_t j = 0; j < kProducts; ++j) {
        // behind the last comes the last again: a product is the same sum in any company
        const Pick& pick = picks[std::min(i + j, n - 1)];
        row[j] = rows + pick.anchor * D;
        key[j] = keys + pick.key * D;
        if (i + j + kAhead < n) prefetch(keys + picks[i + j + kAhead].key * D, D);
      }
      S a = 0, b = 0, c = 0, e = 0;
#pragma omp simd reduction(+ : a, b, c, e)
      for (int64_t d = 0; d < D; ++d) {
        a += row[0][d] * static_cast<S>(key[0][d]);
        b += row[1][d] * static_cast<S>(key[1][d]);
        c += row[2][d] * static_cast<S>(key[2][d]);
        e += row[3][d] * static_cast<S>(key[3][d]);
      }
      const S sums[kProducts] = {a, b, c, e};
      for (int64_t j = 0; j < std::min(kProducts, n - i); ++j)
        products[picks[i + j].slot] = sums[j];
    }
  });
}

// rows [n, D] float32 or float64, keys [K, D], index [n, k] int64, all different in a row, -1 for
// none
// -> the same indices, hardest first (positive: least similar first), -1 behind the last, and their
// inner products, 0 behind the last
std::tuple<Tensor, Tensor> rank_keys(const Tensor& rows_, const Tensor& keys_, const Tensor& index_,
                                     bool positive) {
  STD_TORCH_CHECK(rows_.dim() == 2 && keys_.dim() == 2 && index_.dim() == 2 &&
                      rows_.size(1) == keys_.size(1) && rows_.size(0) == index_.size(0),
                  "expected rows [n, D], keys [K, D] and index [n, k]");
  STD_TORCH_CHECK(index_.size(0) < INT32_MAX, "index: expected fewer than 2^31 rows");
  const Tensor rows = torch::stable::contiguous(rows_), keys = torch::stable::contiguous(keys_);
  const Tensor index = torch::stable::contiguous(index_);
  const int64_t n = index.size(0), k = index.size(1), D = rows.size(1);
  const int64_t* from = checked_index(index, keys.size(0));
  Tensor order = torch::stable::new_empty(index, {n, k});
  Tensor products = torch::stable::new_empty(rows, {n, k});
  auto* to = static_cast<int64_t*>(order.mutable_data_ptr());
  with_dtypes(rows, keys, [&](auto sum, auto key) {
    using S = decltype(sum);
    using T = decltype(key);
    const auto* row = static_cast<const S*>(rows.const_data_ptr());
    const auto* all = static_cast<const T*>(keys.const_data_ptr());
    auto* product = static_cast<S*>(products.mutable_data_ptr());
    const int64_t K = keys.size(0), block = block_of(n);
    parallel_for(0, (n + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      std::vector<Candidate<S>> picks;
      Ordering<S> ordering;
      for (int64_t i = begin * block; i < std::min(end * block, n); ++i) {
        if (i % block == 0) {
          const auto used = [&](int64_t slot) { return from[slot] >= 0; };
          const int64_t last = std::min(i + block, n);
          multiply(row, all, D, by_tile(from, i, last, k, K, D * sizeof(T), used), product);
        }
        picks.clear();
        for (int64_t j = i * k; j < (i + 1) * k; ++j) {
          if (from[j] < 0) continue;
          picks.push_back({positive ? -product[j] : product[j], static_cast<int32_t>(from[j])});
        }
        ordering.sort(picks);
        std::fill(to + i * k, to + (i + 1) * k, int64_t{-1});
        std::fill(product + i * k, product + (i + 1) * k, S{0});
        for (size_t j = 0; j < picks.size(); ++j) {
          to[i * k + j] = picks[j].key;
          product[i * k + j] = positive ? -picks[j].hardness : picks[j].hardness;
        }
      }
    });
  });
  return {order, products};
}

// keys [K, D], index [n, k] int64, -1 for none, weight [n, k] float32 or float64 -> [n, D]; a key
// of weight 0 is not read: it may hold anything
Tensor weighted_rows(const Tensor& keys_, const Tensor& index_, const Tensor& weight_) {
  STD_TORCH_CHECK(keys_.dim() == 2 && index_.dim() == 2 && weight_.dim() == 2 &&
                      weight_.size(0) == index_.size(0) && weight_.size(1) == index_.size(1),
                  "expected keys [K, D], index [n, k] and weight [n, k]");
  STD_TORCH_CHECK(index_.size(0) < INT32_MAX, "index: expected fewer than 2^31 rows");
  const Tensor keys = torch::stable::contiguous(keys_);
  const Tensor index = torch::stable::contiguous(index_);
  const Tensor weight = torch::stable::contiguous(weight_);
  const int64_t n = index.size(0), k = index.size(1), D = keys.size(1);
  const int64_t* from = checked_index(index, keys.size(0));
  Tensor out = torch::stable::new_zeros(weight, {n, D});
  with_dtypes(weight, keys, [&](auto sum, auto key) {
    using S = decltype(sum);
    using T = decltype(key);
    const auto* weights = static_cast<const S*>(weight.const_data_ptr());
    const auto* all = static_cast<const T*>(keys.const_data_ptr());
    auto* sums = static_cast<S*>(out.mutable_data_ptr());
    const int64_t K = keys.size(0), block = block_of(n);
    parallel_for(0, (n + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * block; first < std::min(end * block, n); first += block) {
        const auto used = [&](int64_t slot) { return from[slot] >= 0 && weights[slot] != 0; };
        const int64_t last = std::min(first + block, n);
        const auto picks = by_tile(from, first, last, k, K, D * sizeof(T), used);
        const auto count = static_cast<int64_t>(picks.size());
        vectorised([&]() PICO_FAST_INLINE {
          for (int64_t j = 0; j < count; ++j) {
            if (j + kAhead < count) prefetch(all + picks[j + kAhead].key * D, D);
            const S w = weights[picks[j].slot];
            const T* term = all + picks[j].key * D;
            S* to = sums + picks[j].anchor * D;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) to[d] += w * static_cast<S>(term[d]);
          }
        });
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace pico_fast

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) {
  m.impl("rank_keys", TORCH_BOX(&pico_fast::rank_keys));
  m.impl("weighted_rows", TORCH_BOX(&pico_fast::weighted_rows));
}
