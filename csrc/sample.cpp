// The sample: some keys of each class, one of each stretch of its keys, all turned by a drawn offset.

#include <optional>
#include <tuple>
#include <vector>

#include "draws.h"
#include "rows.h"

namespace pico_fast {
namespace {

// Of pico_fast/draws.py: what is drawn.
constexpr uint32_t kPositive = 5, kNegative = 6;

// Draws of one task; a task begins anywhere within a class.
constexpr int64_t kDraws = 8192;

// The keys of a class: its parts one after the other.
struct Parts {
  const int64_t* ranges;  // [G, 2] first position and length

  int64_t position(int64_t number) const {
    int64_t g = 0;
    for (; number >= ranges[2 * g + 1]; ++g) number -= ranges[2 * g + 1];
    return ranges[2 * g] + number;
  }
};

// Draws first to last of a class of n keys from which k are drawn.
void draw(const Parts& parts, int64_t n, int64_t k, uint32_t state, int64_t first, int64_t last,
          const int64_t* key_order, int64_t* out) {
  const int64_t turn = below(state, n), step = n / k, rest = n % k;
  // where stretch t begins: floor(t n / k), one after the other without a division
  int64_t begin = first * n / k, behind = first * n % k;
  for (int64_t t = first; t < last; ++t) {
    behind += rest;
    const int64_t length = step + (behind >= k);
    behind -= behind >= k ? k : 0;
    int64_t place = begin + below(fold(state, static_cast<uint32_t>(t)), length) + turn;
    place -= place >= n ? n : 0;
    const int64_t position = parts.position(place);
    *out++ = key_order ? key_order[position] : position;
    begin += length;
  }
}

// ranges [C, G, 2] int64, names [C] int64, key_order [W] int64 or none, seed [] int64
// -> the keys drawn [capacity] int64, class by class, -1 behind the last; their ranges [C, 1, 2]
std::tuple<Tensor, Tensor> sample_keys(const Tensor& ranges_, const Tensor& names_,
                                       const std::optional<Tensor>& key_order_, int64_t need, bool own,
                                       const Tensor& seed, int64_t capacity) {
  const Tensor ranges = contiguous(ranges_);
  const Tensor names = contiguous(names_);
  const Tensor key_order = contiguous(key_order_.value_or(names_));
  STD_TORCH_CHECK(ranges.dim() == 3, "expected ranges [C, G, 2]");
  const int64_t C = ranges.size(0), G = ranges.size(1);
  const int64_t* range = in_place<int64_t>(ranges, {C, G, 2}, "ranges");
  const int64_t* name = in_place<int64_t>(names, {C}, "names");
  const int64_t W = key_order.numel(), positions = key_order_ ? W : INT32_MAX;
  const int64_t* order = key_order_ ? in_place<int64_t>(key_order, {W}, "key_order") : nullptr;
  const uint32_t state = fold(fold_seed(seed), own ? kPositive : kNegative);
  STD_TORCH_CHECK(need >= 0 && need < INT32_MAX, "need: expected a count below 2^31");
  std::vector<int64_t> sizes(C), used;  // keys of each class; classes with draws
  int64_t others = 0, largest = 0, total = 0;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = range[2 * (c * G + g)], length = range[2 * (c * G + g) + 1];
      STD_TORCH_CHECK(
          length == 0 || (length > 0 && length < INT32_MAX && first >= 0 && first <= positions - length),
          "ranges: expected parts of the positions");
      sizes[c] += length;
    }
    STD_TORCH_CHECK(sizes[c] < INT32_MAX, "ranges: expected classes of fewer than 2^31 keys");
    others += std::min(sizes[c], largest);
    largest = std::max(sizes[c], largest);
  }
  Tensor new_ranges = new_empty(ranges, {C, 1, 2});
  int64_t* new_range = new_ranges.mutable_data_ptr<int64_t>();
  for (int64_t c = 0; c < C; ++c) {
    const int64_t share = own ? need : divide_up(sizes[c] * need, std::max<int64_t>(others, 1));
    const int64_t k = std::min(share, sizes[c]);
    new_range[2 * c] = total;
    new_range[2 * c + 1] = k;
    total += k;
    STD_TORCH_CHECK(total <= capacity, "capacity: expected room for all draws");
    if (k > 0) used.push_back(c);
  }
  STD_TORCH_CHECK(capacity >= 0, "capacity: expected a count");
  Tensor out = new_empty(ranges, {capacity});
  int64_t* to = out.mutable_data_ptr<int64_t>();
  std::fill(to + total, to + capacity, int64_t{-1});
  parallel_for(0, divide_up(total, kDraws), 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kDraws, total);
    const auto before = [&](int64_t t, int64_t c) { return t < new_range[2 * c]; };
    auto at = std::upper_bound(used.begin(), used.end(), begin * kDraws, before) - 1;
    for (int64_t slot = begin * kDraws; slot < last; ++at) {
      const int64_t c = *at, first = new_range[2 * c], k = new_range[2 * c + 1];
      const int64_t stop = std::min(last, first + k);
      const Parts parts{range + 2 * c * G};
      const uint32_t of_class = fold(state, static_cast<uint32_t>(name[c]));
      draw(parts, sizes[c], k, of_class, slot - first, stop - first, order, to + slot);
      slot = stop;
    }
  });
  return {out, new_ranges};
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) { m.impl("sample_keys", TORCH_BOX(&sample_keys)); }

}  // namespace
}  // namespace pico_fast
