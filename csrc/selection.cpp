// Selection on a CPU: the hardest keys of each anchor, or a draw from its hardest pool.
//
// n anchors of a block, K keys, their inner products [n, K] given. One task owns an anchor: it
// gathers the candidates of one side as (hardness, index), cuts the hardest by a partial
// selection, draws from them where asked to, and sorts what is left. The order (harder first, equal
// ones by lower index) is total, so the result depends on no algorithm and on no number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "draws.h"
#include "order.h"
#include "rows.h"

namespace pico_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// A sample of about so many candidates foretells the threshold of the pool.
constexpr int64_t kSample = 8192;

struct Lot {
  uint32_t hash;
  int32_t place;

  bool operator<(const Lot& other) const { return hash < other.hash; }
};

// What is asked of one side of all anchors.
struct Side {
  bool positive;
  int64_t count;
  double pool_fraction;  // 0: no draw, the hardest `count`
  uint32_t state;        // hash of seed and stream
};

// The keys, by the classes that occur among the anchors.
struct Keys {
  int64_t count, used;           // K, and how many are no empty slots
  const int64_t* number;         // [K] what a key is called in the draws; null: its index
  std::vector<int64_t> classes;  // ascending
  std::vector<int32_t> place;    // [K] place in classes, one behind the last, or -1 for empty slots
  std::vector<int64_t> first;    // members of classes[c]: first[c] to first[c + 1]
  std::vector<int32_t> members;  // ascending within a class

  Keys(const int64_t* labels, int64_t K, const int64_t* number, const int64_t* rows, int64_t n)
      : count(K), used(0), number(number), place(K) {
    for (int64_t i = 0; i < n; ++i)
      if (rows[i] >= 0) classes.push_back(rows[i]);
    std::sort(classes.begin(), classes.end());
    classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
    first.assign(classes.size() + 1, 0);
    // neighbours are mostly of one class: a bank lies class by class
    int64_t label = -1;
    int32_t found = -1;
    for (int64_t k = 0; k < K; ++k) {
      if (labels[k] != label) {
        label = labels[k];
        found = label < 0 ? -1 : place_of(label);
      }
      place[k] = found;
      used += found >= 0;
      if (is_member(found)) ++first[found + 1];
    }
    for (size_t c = 0; c < classes.size(); ++c) first[c + 1] += first[c];
    members.resize(first.back());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t k = 0; k < K; ++k)
      if (is_member(place[k])) members[next[place[k]]++] = static_cast<int32_t>(k);
  }

  bool is_member(int32_t c) const { return c >= 0 && c < static_cast<int32_t>(classes.size()); }

  int32_t place_of(int64_t label) const {
    const auto at = std::lower_bound(classes.begin(), classes.end(), label);
    return static_cast<int32_t>(at != classes.end() && *at == label ? at - classes.begin()
                                                                    : classes.size());
  }

  int64_t number_of(int64_t k) const { return number ? number[k] : k; }
};

template <typename T>
struct Scratch {
  std::vector<Candidate<T>> found, sample;
  std::vector<Lot> lots;
  Ordering<T> ordering;
};

// Every `step`-th negative that is at least so hard. One store per key and no branch: which keys
// are hard cannot be foretold.
template <typename T>
void take(const T* similarity, const Keys& keys, int32_t own, int64_t step, T least,
          std::vector<Candidate<T>>& into) {
  into.resize(keys.count / step + 2);
  Candidate<T>* to = into.data();
  for (int64_t k = 0; k < keys.count; k += step) {
    const T hardness = similarity[k] + T(0);
    *to = {hardness, static_cast<int32_t>(k)};
    to += (hardness >= least) & (keys.place[k] >= 0) & (keys.place[k] != own);
  }
  into.resize(to - into.data());
}

// Candidates of one anchor among which are its hardest, and how many of these are wanted.
template <typename T>
int64_t gather(const T* similarity, const Keys& keys, int32_t own, int64_t self, const Side& side,
               Scratch<T>& scratch) {
  const int64_t own_first = keys.first[own], own_last = keys.first[own + 1];
  const T lowest = -std::numeric_limits<T>::infinity();
  int64_t n = keys.used - (own_last - own_first);
  if (side.positive) {
    n = 0;
    scratch.found.clear();
    for (int64_t i = own_first; i < own_last; ++i) {
      const int32_t k = keys.members[i];
      if (keys.number_of(k) == self) continue;
      ++n;
      const T hardness = T(0) - similarity[k];
      if (hardness >= lowest) scratch.found.push_back({hardness, k});
    }
  }
  int64_t wanted = side.count;
  if (side.pool_fraction > 0)
    wanted = std::max<int64_t>(1, std::ceil(side.pool_fraction * static_cast<double>(n)));
  if (side.positive) return std::min<int64_t>(wanted, scratch.found.size());

  if (n > 1024 && 3 * wanted < n) {
    // a guess with a margin; where it was too high all candidates are gathered after all. The step
    // is odd: a bank's classes often come in powers of two
    const int64_t step = (std::clamp<int64_t>(n / kSample, 8, 64)) | 1;
    take(similarity, keys, own, step, lowest, scratch.sample);
    const double share = static_cast<double>(wanted) / static_cast<double>(n);
    const double expected = share * static_cast<double>(scratch.sample.size());
    const auto rank = static_cast<size_t>(expected + 4 * std::sqrt(expected) + 4);
    if (rank < scratch.sample.size()) {
      std::nth_element(scratch.sample.begin(), scratch.sample.begin() + rank, scratch.sample.end());
      take(similarity, keys, own, 1, scratch.sample[rank].hardness, scratch.found);
      if (static_cast<int64_t>(scratch.found.size()) >= wanted) return wanted;
    }
  }
  take(similarity, keys, own, 1, lowest, scratch.found);
  return std::min<int64_t>(wanted, scratch.found.size());
}

// Picks of one anchor on one side: out [count], -1 behind the last.
template <typename T>
void pick(const T* similarity, const Keys& keys, int64_t label, int64_t row, int64_t self,
          const Side& side, Scratch<T>& scratch, int64_t* out) {
  std::fill(out, out + side.count, int64_t{-1});
  if (label < 0) return;
  auto& found = scratch.found;
  const int64_t pool = gather(similarity, keys, keys.place_of(label), self, side, scratch);
  if (pool < static_cast<int64_t>(found.size()))
    std::nth_element(found.begin(), found.begin() + pool, found.end());
  found.resize(pool);
  if (pool > side.count) {
    const uint32_t state = fold(side.state, static_cast<uint32_t>(row));
    auto& lots = scratch.lots;
    lots.clear();
    for (int64_t i = 0; i < pool; ++i) {
      const auto number = static_cast<uint32_t>(keys.number_of(found[i].key));
      lots.push_back({fold(state, number), static_cast<int32_t>(i)});
    }
    std::nth_element(lots.begin(), lots.begin() + side.count, lots.end());
    auto& drawn = scratch.sample;
    drawn.clear();
    for (int64_t i = 0; i < side.count; ++i) drawn.push_back(found[lots[i].place]);
    found.swap(drawn);
  }
  scratch.ordering.sort(found);
  for (size_t i = 0; i < found.size(); ++i) out[i] = found[i].key;
}

template <typename T>
void pick_rows(const Tensor& similarity, const int64_t* labels, const Keys& keys, const Side& side,
               int64_t first_row, bool in_batch, int64_t* out) {
  const auto* values = static_cast<const T*>(similarity.const_data_ptr());
  parallel_for(0, similarity.size(0), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = first_row + i, self = in_batch ? row : int64_t{-1};
      pick(values + i * keys.count, keys, labels[i], row, self, side, scratch,
           out + i * side.count);
    }
  });
}

const int64_t* as_int64(const Tensor& dense) {
  STD_TORCH_CHECK(dense.scalar_type() == ScalarType::Long, "labels and indices: expected int64");
  return static_cast<const int64_t*>(dense.const_data_ptr());
}

// similarity [n, K] float32 or float64, anchor_labels [n] and key_labels [K] int64, seed [] int64,
// key_index [K] int64 -> indices [n, count] int64 into K, hardest first, -1 behind the last
Tensor pick_keys(const Tensor& similarity_, const Tensor& anchor_labels_, const Tensor& key_labels_,
                 bool positive, int64_t count, double pool_fraction, const Tensor& seed,
                 int64_t stream, int64_t first_row, bool in_batch,
                 const std::optional<Tensor>& key_index_) {
  STD_TORCH_CHECK(similarity_.dim() == 2 && anchor_labels_.numel() == similarity_.size(0) &&
                      key_labels_.numel() == similarity_.size(1),
                  "similarity: expected [n, K] with labels [n] and [K]");
  STD_TORCH_CHECK(similarity_.size(0) < INT32_MAX && similarity_.size(1) < INT32_MAX,
                  "anchors and keys: expected fewer than 2^31");
  STD_TORCH_CHECK(pool_fraction >= 0 && pool_fraction <= 1, "pool_fraction: expected 0 to 1");
  STD_TORCH_CHECK(first_row >= 0 && first_row <= INT64_MAX - similarity_.size(0),
                  "first_row: expected a row of an int64 number");
  const Tensor similarity = torch::stable::contiguous(similarity_);
  const Tensor anchor_labels = torch::stable::contiguous(anchor_labels_);
  const Tensor key_labels = torch::stable::contiguous(key_labels_);
  const Tensor key_index = torch::stable::contiguous(key_index_.value_or(key_labels));
  STD_TORCH_CHECK(key_index.numel() == key_labels.numel(), "key_index: expected one of each key");
  const int64_t* rows = as_int64(anchor_labels);
  const int64_t* number = key_index_ ? as_int64(key_index) : nullptr;
  const int64_t n = similarity.size(0);
  const Keys keys(as_int64(key_labels), key_labels.numel(), number, rows, n);
  const uint32_t state = fold(fold_seed(seed), static_cast<uint32_t>(stream));
  const Side side{positive, count, pool_fraction, state};
  Tensor out = torch::stable::new_empty(key_labels, {n, count});
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  if (similarity.scalar_type() == ScalarType::Double)
    pick_rows<double>(similarity, rows, keys, side, first_row, in_batch, to);
  else {
    STD_TORCH_CHECK(similarity.scalar_type() == ScalarType::Float,
                    "similarity: expected float32 or float64");
    pick_rows<float>(similarity, rows, keys, side, first_row, in_batch, to);
  }
  return out;
}

// The Feistel network of the reference on [0, a * b), a and b at most 2^16. A quotient of numbers
// below 2^32 is exact in double, and unlike one of integers it is made for several at once.
PICO_FAST_INLINE inline uint32_t feistel(uint32_t x, uint32_t a, uint32_t b, uint32_t state) {
  auto left = static_cast<uint32_t>(static_cast<double>(x) / static_cast<double>(b));
  uint32_t right = x - left * b;
  for (uint32_t turn = 0; turn < 6; turn += 2) {
    left += below(fold(state, (turn << 16) + right), a);
    left -= left >= a ? a : 0;
    right += below(fold(state, ((turn + 1) << 16) + left), b);
    right -= right >= b ? b : 0;
  }
  return left * b + right;
}

// rank [n, k] int64 in [0, n), n [n, 1] int64 in [1, 2^31), seed [] int64, row [n, 1] int64 -> the
// keyed permutation of [0, n) at every rank [n, k]
Tensor permute_ranks(const Tensor& rank_, const Tensor& n_, const Tensor& seed, int64_t stream,
                     const Tensor& row_) {
  const Tensor rank = torch::stable::contiguous(rank_), n = torch::stable::contiguous(n_);
  const Tensor row = torch::stable::contiguous(row_);
  STD_TORCH_CHECK(rank.dim() == 2 && n.numel() == rank.size(0) && row.numel() == rank.size(0),
                  "expected rank [n, k] with n and row [n, 1]");
  const int64_t rows = rank.size(0), k = rank.size(1);
  const int64_t *from = as_int64(rank), *size = as_int64(n), *number = as_int64(row);
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(size[i] >= 1 && size[i] < INT32_MAX, "n: expected 1 to 2^31 - 2");
    // a walk that begins outside may never come in
    const bool inside = std::all_of(from + i * k, from + (i + 1) * k,
                                    [&](int64_t x) { return x >= 0 && x < size[i]; });
    STD_TORCH_CHECK(inside, "rank: expected numbers below n");
  }
  const uint32_t state = fold(fold_seed(seed), static_cast<uint32_t>(stream));
  Tensor out = torch::stable::new_empty(rank, {rows, k});
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = fold(state, static_cast<uint32_t>(number[i]));
      const auto a = static_cast<uint32_t>(std::ceil(std::sqrt(static_cast<double>(size[i]))));
      const auto b = static_cast<uint32_t>((size[i] + a - 1) / a);
      vectorised([&]() PICO_FAST_INLINE {
#pragma omp simd
        for (int64_t j = i * k; j < (i + 1) * k; ++j)
          to[j] = feistel(static_cast<uint32_t>(from[j]), a, b, key);
        for (int64_t j = i * k; j < (i + 1) * k; ++j)
          while (to[j] >= size[i]) to[j] = feistel(static_cast<uint32_t>(to[j]), a, b, key);
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace pico_fast

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) {
  m.impl("pick_keys", TORCH_BOX(&pico_fast::pick_keys));
  m.impl("permute_ranks", TORCH_BOX(&pico_fast::permute_ranks));
}
