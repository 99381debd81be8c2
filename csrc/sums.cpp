// Tiles of similarities on a CPU: what the pairs that count add up to.
//
// A tile is [n, w], a row of similarities to neighbouring positions for each anchor. A pair that
// does not count has hardness -inf: similarity -inf among negatives, +inf among positives.

#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "order.h"
#include "rows.h"

namespace pico_fast {
namespace {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Keys that rows go through together, in bytes: they stay in a second-level cache.
constexpr int64_t kKeyBytes = 1 << 18;

// Keys that are asked for ahead of those in hand.
constexpr int64_t kAhead = 12;

// The pairs of a row, in a stretch of its columns, that count.
template <typename S>
struct Counted {
  std::vector<int32_t> column;
  std::vector<S> value;  // similarities, then weights
  int64_t n = 0;

  explicit Counted(int64_t stretch) : column(stretch + 1), value(stretch + 1) {}

  void list(const S* row, int64_t first, int64_t last, S excluded) {
    const auto bits = std::bit_cast<Bits<S>>(excluded);
    int32_t* to = column.data();
    // one store for each column and no branch: which ones count cannot be foretold
    for (int64_t j = first; j < last; ++j) {
      *to = static_cast<int32_t>(j);
      to += std::bit_cast<Bits<S>>(row[j]) != bits;
    }
    n = to - column.data();
    for (int64_t k = 0; k < n; ++k) value[k] = row[column[k]];
  }
};

// The keys of a tile's columns, as they lie.
template <typename T>
struct Keys {
  const T* rows;
  const int64_t* which;  // [w] or null: one for each column
  int64_t D;

  PICO_FAST_INLINE const T* at(int64_t column) const { return rows + (which ? which[column] : column) * D; }

  // Adds the keys by weight to `sum` [D], four at once: each time it is read and written anew.
  template <typename S>
  PICO_FAST_INLINE void add(const Counted<S>& counted, S* sum) const {
    const int64_t n = counted.n;
    for (int64_t k = 0; k < n; k += 4) {
      const T* key[4];
      S weight[4];
      for (int64_t i = 0; i < 4; ++i) {
        // behind the last comes the last again, with no weight
        key[i] = at(counted.column[std::min(k + i, n - 1)]);
        weight[i] = k + i < n ? counted.value[k + i] : S{0};
        if (k + i + kAhead < n) prefetch(at(counted.column[k + i + kAhead]), D);
      }
      const T *a = key[0], *b = key[1], *c = key[2], *e = key[3];
      const S p = weight[0], q = weight[1], r = weight[2], s = weight[3];
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        S so_far = sum[d] + p * static_cast<S>(a[d]);
        so_far += q * static_cast<S>(b[d]);
        so_far += r * static_cast<S>(c[d]);
        sum[d] = so_far + s * static_cast<S>(e[d]);
      }
    }
  }
};

// weigh(i, counted) for each row, stretch by stretch of the columns, with the similarities of those
// that count: makes weights of them, by which keys are added to sums [n, D], unless it is null
template <typename S, typename T, typename Weigh>
void add_tile(const Rows<S>& similarity, int64_t n, int64_t w, S excluded, const Keys<T>& keys, S* sums,
              Weigh&& weigh) {
  const int64_t row_bytes = keys.D * static_cast<int64_t>(sizeof(T));
  const int64_t stretch = std::max<int64_t>(64, kKeyBytes / std::max<int64_t>(1, row_bytes));
  parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    Counted<S> counted(std::min(stretch, w));
    for (int64_t first = 0; first < w; first += stretch)
      for (int64_t i = begin; i < end; ++i) {
        counted.list(similarity[i], first, std::min(first + stretch, w), excluded);
        weigh(i, std::span(counted.value.data(), counted.n));
        if (sums) vectorised([&]() PICO_FAST_INLINE { keys.add(counted, sums + i * keys.D); });
      }
  });
}

// call(S{}, keys): what a tile [n, w] has to do with its keys [*, D], `which` [w] int64 or none: all
template <typename F>
void with_keys(const Tensor& similarity, const Tensor& keys, const std::optional<Tensor>& which, F&& call) {
  STD_TORCH_CHECK(similarity.dim() == 2 && similarity.size(1) < INT32_MAX,
                  "similarity: expected [n, w], w below 2^31");
  const int64_t* columns = checked_which(keys, which, similarity.size(1));
  with_dtypes(similarity, keys, [&](auto sum, auto key) {
    using T = decltype(key);
    call(sum, Keys<T>{keys.const_data_ptr<T>(), columns, keys.size(1)});
  });
}

// Of negatives: top, total and away [n] go on, the largest s, the sums of weights exp((s - top) /
// temperature) and of s; and mean [n, D] or none, the sum of keys by weight
void add_negatives(const Tensor& similarity, const Tensor& keys_, const std::optional<Tensor>& which,
                   double temperature, const Tensor& top_, const Tensor& total_, const Tensor& away_,
                   const std::optional<Tensor>& mean_) {
  with_keys(similarity, keys_, which, [&](auto sum, const auto& keys) {
    using S = decltype(sum);
    const int64_t n = similarity.size(0), w = similarity.size(1), D = keys.D;
    const auto rows = rows_in_place<S>(similarity, n, w, "similarity");
    S *top = in_place<S>(top_, {n}, "top"), *total = in_place<S>(total_, {n}, "total");
    S* away = in_place<S>(away_, {n}, "away");
    S* mean = mean_ ? in_place<S>(*mean_, {n, D}, "mean") : nullptr;
    const S scale = static_cast<S>(1 / temperature);
    add_tile(rows, n, w, -kInfinity<S>, keys, mean, [=](int64_t i, std::span<S> values) {
      S highest = top[i];
      for (const S s : values) highest = std::max(highest, s);
      if (highest > top[i]) {
        const S fade = std::exp((top[i] - highest) * scale);
        total[i] *= fade;
        for (int64_t d = i * D; mean && d < (i + 1) * D; ++d) mean[d] *= fade;
        top[i] = highest;
      }
      double weights = 0, similar = 0;
      for (S& s : values) {
        similar += s;
        s = std::exp((s - highest) * scale);
        weights += s;
      }
      total[i] += static_cast<S>(weights);
      away[i] += static_cast<S>(similar);
    });
  });
}

// Of positives, lse [n] given: loss, weight and similar [n] go on, the sums of softplus(lse - s /
// temperature), of weights sigmoid(lse - s / temperature) and of s; and pull [n, D] or none, the
// sum of keys by weight
void add_positives(const Tensor& similarity, const Tensor& keys_, const std::optional<Tensor>& which,
                   const Tensor& lse_, double temperature, const Tensor& loss_, const Tensor& weight_,
                   const Tensor& similar_, const std::optional<Tensor>& pull_) {
  with_keys(similarity, keys_, which, [&](auto sum, const auto& keys) {
    using S = decltype(sum);
    const int64_t n = similarity.size(0), w = similarity.size(1);
    const auto rows = rows_in_place<S>(similarity, n, w, "similarity");
    const S* lse = in_place<S>(lse_, {n}, "lse");
    S *loss = in_place<S>(loss_, {n}, "loss"), *weight = in_place<S>(weight_, {n}, "weight");
    S* similar = in_place<S>(similar_, {n}, "similar");
    S* pull = pull_ ? in_place<S>(*pull_, {n, keys.D}, "pull") : nullptr;
    const S scale = static_cast<S>(1 / temperature);
    add_tile(rows, n, w, kInfinity<S>, keys, pull, [=](int64_t i, std::span<S> values) {
      double losses = 0, weights = 0, similarities = 0;
      for (S& s : values) {
        const S above = lse[i] - s * scale, small = std::exp(-std::abs(above));
        losses += std::max(above, S{0}) + std::log1p(small);
        similarities += s;
        s = (above >= 0 ? 1 : small) / (1 + small);
        weights += s;
      }
      loss[i] += static_cast<S>(losses);
      weight[i] += static_cast<S>(weights);
      similar[i] += static_cast<S>(similarities);
    });
  });
}

// keys [K, D], index [n, k] int64, -1 for none, weight [n, k] float32 or float64 -> [n, D]; a key
// of weight 0 is not read: it may hold anything
Tensor weighted_rows(const Tensor& keys_, const Tensor& index_, const Tensor& weight_) {
  STD_TORCH_CHECK(keys_.dim() == 2 && index_.dim() == 2 && weight_.dim() == 2 &&
                      weight_.size(0) == index_.size(0) && weight_.size(1) == index_.size(1),
                  "expected keys [K, D], index [n, k] and weight [n, k]");
  const Tensor keys = contiguous(keys_);
  const Tensor index = contiguous(index_);
  const Tensor weight = contiguous(weight_);
  const int64_t n = index.size(0), k = index.size(1), D = keys.size(1);
  const int64_t* from = checked_index(index, -1, keys.size(0), "index", "keys, or -1");
  Tensor out = torch::stable::new_zeros(weight, {n, D});
  with_dtypes(weight, keys, [&](auto sum, auto key) {
    using S = decltype(sum);
    using T = decltype(key);
    const auto* weights = weight.const_data_ptr<S>();
    const Keys<T> all{keys.const_data_ptr<T>(), nullptr, D};
    auto* sums = out.mutable_data_ptr<S>();
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      Counted<S> picked(k);
      for (int64_t i = begin; i < end; ++i) {
        picked.n = 0;
        for (int64_t slot = i * k; slot < (i + 1) * k; ++slot) {
          picked.column[picked.n] = static_cast<int32_t>(from[slot]);
          picked.value[picked.n] = weights[slot];
          picked.n += from[slot] >= 0 && weights[slot] != 0;
        }
        vectorised([&]() PICO_FAST_INLINE { all.add(picked, sums + i * D); });
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) {
  m.impl("add_negatives", TORCH_BOX(&add_negatives));
  m.impl("weighted_rows", TORCH_BOX(&weighted_rows));
  m.impl("add_positives", TORCH_BOX(&add_positives));
}

}  // namespace
}  // namespace pico_fast
