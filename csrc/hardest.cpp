// The hardest candidates of each row, while their similarities come tile by tile.
//
// A row keeps candidates as words (see order.h) until their room is full, then the `count` hardest
// of them, the softest of which bounds what is worth keeping from there on. The order is total: the
// result depends neither on the tiles nor on the number of threads.

#include <optional>

#include "order.h"
#include "rows.h"

namespace pico_fast {
namespace {

// Columns that are looked at together: often none of them is hard enough.
constexpr int64_t kGroup = 32;
// Of candidates a few foretell which are the hardest.
constexpr int64_t kSample = 128;

// What is known of a row: [3] int64, all 0 before its first tile.
struct Tally {
  int64_t filled;    // candidates kept
  int64_t seen;      // candidates there were
  int64_t softness;  // complement of the bits of the least hardness that is worth keeping
};

template <typename T>
struct Row {
  Word<T>* kept;  // [room]
  int64_t room, count, filled, seen;
  Bits<T> least;

  // Leaves the `count` hardest, and perhaps some more.
  void prune() {
    Word<T> sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = kept[i * filled / kSample];
    const int64_t rank = kSample * count / filled + kSample / 20;
    if (rank < kSample) {
      std::nth_element(sample, sample + rank, sample + kSample);
      const Word<T> last = sample[rank];
      const auto harder = [=](Word<T> word) { return word <= last; };
      if (std::count_if(kept, kept + filled, harder) >= count) {
        int64_t left = 0;
        for (int64_t i = 0; i < filled; ++i) {
          const Word<T> word = kept[i];
          kept[left] = word;
          left += harder(word);
        }
        filled = left;
        least = static_cast<Bits<T>>(last >> 32);
      }
    }
    if (filled - count <= (room - count) / 2) return;
    std::nth_element(kept, kept + count - 1, kept + filled);
    filled = count;
    least = static_cast<Bits<T>>(kept[count - 1] >> 32);
  }

  PICO_FAST_INLINE void look(const T* similarity, T sign, T ceiling, const int64_t* name, int64_t number,
                             int64_t w) {
    Bits<T> bits[kGroup];
    for (int64_t first = 0; first < w; first += kGroup) {
      const int64_t n = std::min(kGroup, w - first);
      int candidates = 0, hard = 0;
#pragma omp simd reduction(+ : candidates, hard)
      for (int64_t j = 0; j < n; ++j) {
        const T s = similarity[first + j];
        bits[j] = bits_of(sign * s) | -static_cast<Bits<T>>(s >= ceiling);
        candidates += bits[j] <= kLowest<T>;
        hard += bits[j] <= least;
      }
      seen += candidates;
      if (hard == 0) continue;
      // a store goes one behind the last
      if (filled + hard >= room) prune();
      // one store for each column and no branch: which columns are hard cannot be foretold
      Word<T>* to = kept + filled;
      for (int64_t j = 0; j < n; ++j) {
        const auto called = static_cast<uint32_t>(name ? name[first + j] : number + first + j);
        *to = static_cast<Word<T>>(bits[j]) << 32 | called;
        to += bits[j] <= least;
      }
      filled = to - kept;
    }
  }
};

template <typename T>
int64_t room_of(const Tensor& kept, int64_t count) {
  const int64_t room = kept.size(1) * 8 / static_cast<int64_t>(sizeof(Word<T>));
  STD_TORCH_CHECK(count >= 1 && count < room - 2 * kGroup, "kept: expected room for more");
  return room;
}

void check_filled(const Tally* tallies, int64_t n, int64_t room) {
  const bool inside =
      std::all_of(tallies, tallies + n, [=](const Tally& t) { return t.filled >= 0 && t.filled < room; });
  STD_TORCH_CHECK(inside, "tally: expected no more than there is room for");
}

// similarity [n, w], of excluded pairs of hardness -inf; name [w] int64 or none: column `first` + j;
// ceiling [n] or none; kept [n, room] int64 (of float64 [n, 2 room]) and tally [n, 3] int64 go on
void keep_hardest(const Tensor& similarity, const std::optional<Tensor>& name_, int64_t first,
                  const std::optional<Tensor>& ceiling_, bool own, int64_t count, const Tensor& kept,
                  const Tensor& tally) {
  STD_TORCH_CHECK(similarity.dim() == 2 && kept.dim() == 2, "expected [n, w] and kept [n, room]");
  const int64_t n = similarity.size(0), w = similarity.size(1);
  STD_TORCH_CHECK(first >= 0 && first < INT32_MAX - w, "columns: expected fewer than 2^31");
  const int64_t* name = name_ ? in_place<int64_t>(*name_, {w}, "name") : nullptr;
  auto* tallies = reinterpret_cast<Tally*>(in_place<int64_t>(tally, {n, 3}, "tally"));
  with_precision(similarity, [&](auto precision) {
    using T = decltype(precision);
    const auto from = rows_in_place<T>(similarity, n, w, "similarity");
    const T* ceiling = ceiling_ ? in_place<T>(*ceiling_, {n}, "ceiling") : nullptr;
    const int64_t room = room_of<T>(kept, count), width = kept.size(1);
    auto* words = in_place<int64_t>(kept, {n, width}, "kept");
    check_filled(tallies, n, room);
    const T sign = own ? -1 : 1;
    parallel_each(n, 1, [&](int64_t i) {
      Tally& told = tallies[i];
      auto* at = reinterpret_cast<Word<T>*>(words + i * width);
      const auto least = std::min(~static_cast<Bits<T>>(told.softness), kLowest<T>);
      Row<T> row{at, room, count, told.filled, told.seen, least};
      const T top = ceiling ? ceiling[i] : std::numeric_limits<T>::quiet_NaN();
      vectorised([&]() PICO_FAST_INLINE { row.look(from[i], sign, top, name, first, w); });
      told = {row.filled, row.seen, static_cast<int64_t>(~row.least)};
    });
  });
}

// kept and tally as above -> in place the numbers [n, count] int64, hardest first, -1 behind the
// last, and their similarities [n, count], 0 behind the last
void list_kept(const Tensor& kept, const Tensor& tally, bool own, const Tensor& index,
               const Tensor& similarity) {
  STD_TORCH_CHECK(kept.dim() == 2 && index.dim() == 2, "expected kept [n, room], index [n, count]");
  const int64_t n = kept.size(0), width = kept.size(1), count = index.size(1);
  const auto* tallies = reinterpret_cast<Tally*>(in_place<int64_t>(tally, {n, 3}, "tally"));
  auto* numbers = in_place<int64_t>(index, {n, count}, "index");
  auto* words = in_place<int64_t>(kept, {n, width}, "kept");
  with_precision(similarity, [&](auto precision) {
    using T = decltype(precision);
    auto* values = in_place<T>(similarity, {n, count}, "similarity");
    check_filled(tallies, n, room_of<T>(kept, 1));
    parallel_each(n, 1, [&](int64_t i) {
      auto* row = reinterpret_cast<Word<T>*>(words + i * width);
      const int64_t filled = tallies[i].filled;
      const int64_t last = std::min(filled, count);
      if (last > 0 && last < filled) std::nth_element(row, row + last - 1, row + filled);
      std::sort(row, row + last);
      for (int64_t j = 0; j < count; ++j) {
        const T hardness = j < last ? hardness_of<T>(row[j]) : T(0);
        numbers[i * count + j] = j < last ? int64_t{static_cast<uint32_t>(row[j])} : -1;
        values[i * count + j] = own ? T(0) - hardness : hardness;
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) {
  m.impl("keep_hardest", TORCH_BOX(&keep_hardest));
  m.impl("list_kept", TORCH_BOX(&list_kept));
}

}  // namespace
}  // namespace pico_fast
