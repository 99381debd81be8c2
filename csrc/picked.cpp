// Keys that were picked for each anchor, on a CPU: their inner products and order, and their sums
// by weight. One task owns an anchor and reads the rows one by one: no copy of the picked rows is
// made.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "rows.h"

namespace pico_fast {
namespace {

using torch::stable::parallel_for;

// Rows that are asked for ahead of the one in hand.
constexpr int64_t kAhead = 4;

template <typename S>
struct Picked {
  S hardness, product;
  int64_t key;

  // harder first, equal ones by lower index
  bool operator<(const Picked& other) const {
    return hardness > other.hardness || (hardness == other.hardness && key < other.key);
  }
};

// The inner products of one anchor with its picks, in the picks' order.
template <typename S, typename T>
void multiply(const S* row, const T* keys, int64_t D, std::vector<Picked<S>>& picks) {
  const auto n = static_cast<int64_t>(picks.size());
  vectorised([&]() PICO_FAST_INLINE {
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n) prefetch(keys + picks[i + kAhead].key * D, D);
      const T* key = keys + picks[i].key * D;
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; ++d) sum += row[d] * static_cast<S>(key[d]);
      picks[i].product = sum;
    }
  });
}

// rows [n, D] float32 or float64, keys [K, D], index [n, k] int64, all different in a row, -1 for
// none
// -> the same indices, hardest first (positive: least similar first), -1 behind the last, and their
// inner products, 0 behind the last
std::tuple<Tensor, Tensor> rank_keys(const Tensor& rows_, const Tensor& keys_, const Tensor& index_,
                                     bool positive) {
  const Tensor rows = torch::stable::contiguous(rows_), keys = torch::stable::contiguous(keys_);
  const Tensor index = torch::stable::contiguous(index_);
  STD_TORCH_CHECK(rows.dim() == 2 && keys.dim() == 2 && index.dim() == 2 &&
                      rows.size(1) == keys.size(1) && rows.size(0) == index.size(0),
                  "expected rows [n, D], keys [K, D] and index [n, k]");
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
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      std::vector<Picked<S>> picks;
      for (int64_t i = begin; i < end; ++i) {
        picks.clear();
        for (int64_t j = i * k; j < (i + 1) * k; ++j)
          if (from[j] >= 0) picks.push_back({0, 0, from[j]});
        multiply(row + i * D, all, D, picks);
        for (auto& pick : picks) {
          pick.hardness = positive ? -pick.product : pick.product;
          // sorting wants an order: what is no number comes first
          if (std::isnan(pick.product)) pick.hardness = std::numeric_limits<S>::infinity();
        }
        std::sort(picks.begin(), picks.end());
        std::fill(to + i * k, to + (i + 1) * k, int64_t{-1});
        std::fill(product + i * k, product + (i + 1) * k, S{0});
        for (size_t j = 0; j < picks.size(); ++j) {
          to[i * k + j] = picks[j].key;
          product[i * k + j] = picks[j].product;
        }
      }
    });
  });
  return {order, products};
}

// keys [K, D], index [n, k] int64, -1 for none, weight [n, k] float32 or float64 -> [n, D]; a key
// of weight 0 is not read: it may hold anything
Tensor weighted_rows(const Tensor& keys_, const Tensor& index_, const Tensor& weight_) {
  const Tensor keys = torch::stable::contiguous(keys_);
  const Tensor index = torch::stable::contiguous(index_);
  const Tensor weight = torch::stable::contiguous(weight_);
  STD_TORCH_CHECK(keys.dim() == 2 && index.dim() == 2 && weight.dim() == 2 &&
                      weight.size(0) == index.size(0) && weight.size(1) == index.size(1),
                  "expected keys [K, D], index [n, k] and weight [n, k]");
  const int64_t n = index.size(0), k = index.size(1), D = keys.size(1);
  const int64_t* from = checked_index(index, keys.size(0));
  Tensor out = torch::stable::new_zeros(weight, {n, D});
  with_dtypes(weight, keys, [&](auto sum, auto key) {
    using S = decltype(sum);
    using T = decltype(key);
    const auto* weights = static_cast<const S*>(weight.const_data_ptr());
    const auto* all = static_cast<const T*>(keys.const_data_ptr());
    auto* sums = static_cast<S*>(out.mutable_data_ptr());
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      std::vector<std::pair<S, const T*>> terms;
      for (int64_t i = begin; i < end; ++i) {
        terms.clear();
        for (int64_t j = i * k; j < (i + 1) * k; ++j)
          if (from[j] >= 0 && weights[j] != 0) terms.emplace_back(weights[j], all + from[j] * D);
        const auto count = static_cast<int64_t>(terms.size());
        S* to = sums + i * D;
        vectorised([&]() PICO_FAST_INLINE {
          for (int64_t j = 0; j < count; ++j) {
            if (j + kAhead < count) prefetch(terms[j + kAhead].second, D);
            const S w = terms[j].first;
            const T* row = terms[j].second;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) to[d] += w * static_cast<S>(row[d]);
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
