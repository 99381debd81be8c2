// Selection on a CPU: the hardest keys of each anchor, or a draw from its hardest pool.
//
// n anchors of a block, K keys, their inner products [n, K] given. One task owns an anchor: it
// gathers the candidates of one side as (hardness, index), cuts the hardest by a partial
// selection, draws from them where asked to, and sorts what is left. The order (harder first, equal
// ones by lower index) is total, so the result depends on no algorithm and on no number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// A sample of one in so many candidates foretells the threshold of the pool.
constexpr int64_t kStride = 16;

// The hash of pico_fast/reference.py: lowbias32, folded word by word.
uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

uint32_t fold(uint32_t state, uint32_t word) { return lowbias32((state ^ word) + 0x9e3779b9u); }

template <typename T>
struct Candidate {
  T hardness;
  int32_t key;

  // harder first, equal ones by lower index
  bool operator<(const Candidate& other) const {
    return hardness > other.hardness || (hardness == other.hardness && key < other.key);
  }
};

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

template <typename T>
struct Scratch {
  std::vector<Candidate<T>> found, sample;
  std::vector<Lot> lots;
};

// Candidates of one anchor among which are its `wanted` hardest, and how many it has in all.
template <typename T>
int64_t gather(const T* similarity, const int64_t* labels, int64_t K, int64_t label, int64_t self,
               const Side& side, Scratch<T>& scratch) {
  const T sign = side.positive ? T(-1) : T(1);
  const auto fits = [&](int64_t k) {
    return labels[k] >= 0 && (labels[k] == label) == side.positive && k != self;
  };
  int64_t n = 0;
  for (int64_t k = 0; k < K; ++k) n += labels[k] >= 0 && (labels[k] == label) == side.positive;
  if (side.positive && self >= 0) --n;
  int64_t wanted = side.count;
  if (side.pool_fraction > 0)
    wanted = std::max<int64_t>(1, std::ceil(side.pool_fraction * static_cast<double>(n)));

  const auto take = [&](int64_t step, std::vector<Candidate<T>>& into, T least) {
    into.clear();
    for (int64_t k = 0; k < K; k += step) {
      const T hardness = sign * similarity[k];
      if (hardness >= least && fits(k)) into.push_back({hardness + T(0), static_cast<int32_t>(k)});
    }
  };
  const T lowest = -std::numeric_limits<T>::infinity();
  if (n > 64 * kStride && 3 * wanted < n) {
    // a guess with a margin; where it was too high all candidates are gathered after all
    take(kStride, scratch.sample, lowest);
    const double share = static_cast<double>(wanted) / static_cast<double>(n);
    const double expected = share * static_cast<double>(scratch.sample.size());
    const auto rank = static_cast<size_t>(expected + 4 * std::sqrt(expected) + 4);
    if (rank < scratch.sample.size()) {
      std::nth_element(scratch.sample.begin(), scratch.sample.begin() + rank, scratch.sample.end());
      take(1, scratch.found, scratch.sample[rank].hardness);
      if (static_cast<int64_t>(scratch.found.size()) >= wanted) return wanted;
    }
  }
  take(1, scratch.found, lowest);
  return std::min<int64_t>(wanted, scratch.found.size());
}

// Picks of one anchor on one side: out [count], -1 behind the last.
template <typename T>
void pick(const T* similarity, const int64_t* labels, int64_t K, int64_t label, int64_t row,
          int64_t self, const Side& side, Scratch<T>& scratch, int64_t* out) {
  std::fill(out, out + side.count, int64_t{-1});
  if (label < 0) return;
  auto& found = scratch.found;
  const int64_t pool = gather(similarity, labels, K, label, self, side, scratch);
  if (pool < static_cast<int64_t>(found.size()))
    std::nth_element(found.begin(), found.begin() + pool, found.end());
  found.resize(pool);
  if (pool > side.count) {
    const uint32_t state = fold(side.state, static_cast<uint32_t>(row));
    auto& lots = scratch.lots;
    lots.clear();
    for (int64_t i = 0; i < pool; ++i)
      lots.push_back({fold(state, static_cast<uint32_t>(found[i].key)), static_cast<int32_t>(i)});
    std::nth_element(lots.begin(), lots.begin() + side.count, lots.end());
    auto& drawn = scratch.sample;
    drawn.clear();
    for (int64_t i = 0; i < side.count; ++i) drawn.push_back(found[lots[i].place]);
    found.swap(drawn);
  }
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < found.size(); ++i) out[i] = found[i].key;
}

template <typename T>
void pick_rows(const Tensor& similarity, const Tensor& anchor_labels, const Tensor& key_labels,
               const Side& side, int64_t first_row, bool in_batch, Tensor& out) {
  const int64_t n = similarity.size(0), K = similarity.size(1);
  const auto* values = static_cast<const T*>(similarity.const_data_ptr());
  const auto* rows = static_cast<const int64_t*>(anchor_labels.const_data_ptr());
  const auto* labels = static_cast<const int64_t*>(key_labels.const_data_ptr());
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = first_row + i;
      pick(values + i * K, labels, K, rows[i], row, in_batch ? row : int64_t{-1}, side, scratch,
           to + i * side.count);
    }
  });
}

// similarity [n, K] float32 or float64, anchor_labels [n] and key_labels [K] int64, seed [] int64
// -> indices [n, count] int64, hardest first, -1 behind the last
Tensor pick_keys(const Tensor& similarity_, const Tensor& anchor_labels_, const Tensor& key_labels_,
                 bool positive, int64_t count, double pool_fraction, const Tensor& seed,
                 int64_t stream, int64_t first_row, bool in_batch) {
  STD_TORCH_CHECK(similarity_.dim() == 2 && anchor_labels_.numel() == similarity_.size(0) &&
                      key_labels_.numel() == similarity_.size(1) && seed.numel() == 1,
                  "similarity: expected [n, K] with labels [n] and [K] and one seed");
  STD_TORCH_CHECK(anchor_labels_.scalar_type() == ScalarType::Long &&
                      key_labels_.scalar_type() == ScalarType::Long &&
                      seed.scalar_type() == ScalarType::Long,
                  "labels and seed: expected int64");
  STD_TORCH_CHECK(similarity_.size(1) < INT32_MAX, "keys: expected fewer than 2^31");
  const Tensor similarity = torch::stable::contiguous(similarity_);
  const Tensor anchor_labels = torch::stable::contiguous(anchor_labels_);
  const Tensor key_labels = torch::stable::contiguous(key_labels_);
  const auto word = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const uint32_t state = fold(fold(0, static_cast<uint32_t>(word)), word >> 32);
  const Side side{positive, count, pool_fraction, fold(state, static_cast<uint32_t>(stream))};
  Tensor out = torch::stable::new_empty(key_labels, {similarity.size(0), count});
  if (similarity.scalar_type() == ScalarType::Double)
    pick_rows<double>(similarity, anchor_labels, key_labels, side, first_row, in_batch, out);
  else {
    STD_TORCH_CHECK(similarity.scalar_type() == ScalarType::Float,
                    "similarity: expected float32 or float64");
    pick_rows<float>(similarity, anchor_labels, key_labels, side, first_row, in_batch, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) { m.impl("pick_keys", TORCH_BOX(&pick_keys)); }
