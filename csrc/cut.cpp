// Cuts on a CPU: of a whole row of similarities the hardest share below a ceiling stays, exact.

#include <cmath>
#include <optional>
#include <vector>

#include "order.h"
#include "rows.h"

namespace pico_fast {
namespace {

// Values of a row that foretell where the wanted ones end; candidates that are left to a selection; and
// columns that are looked at together.
constexpr int64_t kSample = 64, kFew = 128, kGroup = 64;

// Bits of hardness of a row, and how many of them are candidates'; what the ceiling leaves out is none.
template <typename T>
PICO_FAST_INLINE inline Bits<T> rank(const T* row, int64_t w, T sign, T ceiling, Bits<T>* bits) {
  Bits<T> found = 0;
#pragma omp simd reduction(+ : found)
  for (int64_t j = 0; j < w; ++j) {
    const T s = row[j];
    const Bits<T> ranked = bits_of(sign * s) | -static_cast<Bits<T>>(s >= ceiling);
    bits[j] = ranked;
    found += ranked <= kLowest<T>;
  }
  return found;
}

// How many of the bits [w] lie below a bound.
template <typename B>
PICO_FAST_INLINE inline B count(const B* bits, int64_t w, B bound) {
  B found = 0;
#pragma omp simd reduction(+ : found)
  for (int64_t j = 0; j < w; ++j) found += bits[j] < bound;
  return found;
}

// Whether any of the bits [n] lies from `low` on and below `high`.
template <typename B>
PICO_FAST_INLINE inline B between(const B* bits, int64_t n, B low, B high) {
  B some = 0;
#pragma omp simd reduction(| : some)
  for (int64_t j = 0; j < n; ++j) some |= (bits[j] >= low) & (bits[j] < high);
  return some;
}

// Excludes what comes behind the word of `bound` and `number`.
template <typename T>
PICO_FAST_INLINE inline void exclude(T* row, const Bits<T>* bits, int64_t w, Bits<T> bound, Bits<T> number,
                                     T excluded) {
#pragma omp simd
  for (int64_t j = 0; j < w; ++j) {
    const bool behind = (bits[j] > bound) | ((bits[j] == bound) & (static_cast<Bits<T>>(j) > number));
    row[j] = behind ? excluded : row[j];
  }
}

// What rows need while they are cut, one after the other.
template <typename T>
struct Scratch {
  std::vector<Bits<T>> bits;
  std::vector<Word<T>> words;

  explicit Scratch(int64_t w) : bits(w), words(w + 1) {}

  int64_t count_below(Bits<T> bound) const {
    Bits<T> n = 0;
    vectorised([&]() PICO_FAST_INLINE { n = count(bits.data(), bits.size(), bound); });
    return n;
  }

  // The word of the candidate of a rank from 1 on; `candidates` is how many there are.
  Word<T> at_rank(int64_t wanted, int64_t candidates) {
    const auto w = static_cast<int64_t>(bits.size());
    Bits<T> sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = bits[i * w / kSample];
    std::sort(sample, sample + kSample);
    const double expected = static_cast<double>(wanted) * kSample / static_cast<double>(w);
    const double spread = 2 * std::sqrt(expected) + 1;
    const auto guess = [&](double rank) {
      return sample[static_cast<int64_t>(std::clamp<double>(rank, 0, kSample - 1))];
    };
    const Bits<T> guesses[] = {guess(expected - spread), guess(expected + spread)};
    // fewer than wanted are below `low`, at least as many below `high`
    Bits<T> low = 0, high = kLowest<T> + 1;
    int64_t n_low = 0, n_high = candidates;
    for (int probe = 0; n_high - n_low > kFew && high - low > 1; ++probe) {
      Bits<T> bound = low + (high - low) / 2;
      if (probe < 2 && guesses[probe] > low && guesses[probe] < high) bound = guesses[probe];
      const int64_t n = count_below(bound);
      (n < wanted ? low : high) = bound;
      (n < wanted ? n_low : n_high) = n;
    }
    Word<T>* to = words.data();
    for (int64_t first = 0; first < w; first += kGroup) {
      const int64_t stop = std::min(first + kGroup, w);
      Bits<T> some = 0;
      vectorised([&]() PICO_FAST_INLINE { some = between(bits.data() + first, stop - first, low, high); });
      for (int64_t j = first; some != 0 && j < stop; ++j) {
        *to = static_cast<Word<T>>(bits[j]) << 32 | static_cast<uint32_t>(j);
        to += (bits[j] >= low) & (bits[j] < high);
      }
    }
    Word<T>* last = words.data() + (wanted - n_low - 1);
    std::nth_element(words.data(), last, to);
    return *last;
  }
};

// Cuts a row [w]; returns how many candidates lie below the ceiling, which is nan where there is none.
template <typename T>
int64_t cut_row(T* row, T sign, T ceiling, int64_t count, double fraction, Scratch<T>& scratch) {
  const auto w = static_cast<int64_t>(scratch.bits.size());
  Bits<T>* bits = scratch.bits.data();
  Bits<T> found = 0;
  vectorised([&]() PICO_FAST_INLINE { found = rank(row, w, sign, ceiling, bits); });
  const auto below = static_cast<int64_t>(found);
  const auto share = static_cast<int64_t>(std::ceil(static_cast<double>(below) * fraction));
  const int64_t wanted = std::min(count, share);
  // without one that is left out, only those above the ceiling are
  const Word<T> last = wanted < below ? scratch.at_rank(wanted, below) : ~Word<T>{0};
  const Bits<T> bound = std::min(static_cast<Bits<T>>(last >> 32), kLowest<T>);
  const auto number = static_cast<uint32_t>(last);
  const T excluded = -sign * std::numeric_limits<T>::infinity();
  vectorised([&]() PICO_FAST_INLINE { exclude<T>(row, bits, w, bound, number, excluded); });
  return below;
}

// similarity [n, w] of whole rows, in place: those that do not count become of hardness -inf.
// ceiling [n] or none; of the m below it the min(count, ceil(fraction m)) hardest count, equal ones
// by lower column. below [n] int64 is m
void cut_rows(const Tensor& similarity, const std::optional<Tensor>& ceiling_, int64_t count,
              double fraction, bool own, const Tensor& below_) {
  STD_TORCH_CHECK(similarity.dim() == 2 && similarity.size(1) < INT32_MAX,
                  "similarity: expected [n, w], w below 2^31");
  STD_TORCH_CHECK(count >= 1, "count: expected at least 1");
  STD_TORCH_CHECK(fraction > 0 && fraction <= 1, "fraction: expected a share above 0, at most 1");
  const int64_t n = similarity.size(0), w = similarity.size(1);
  auto* below = in_place<int64_t>(below_, {n}, "below");
  with_precision(similarity, [&](auto precision) {
    using T = decltype(precision);
    const auto rows = rows_in_place<T>(similarity, n, w, "similarity");
    const T* ceiling = ceiling_ ? in_place<T>(*ceiling_, {n}, "ceiling") : nullptr;
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(w);
      for (int64_t i = begin; i < end; ++i) {
        const T top = ceiling ? ceiling[i] : std::numeric_limits<T>::quiet_NaN();
        below[i] = cut_row<T>(rows[i], own ? -1 : 1, top, count, fraction, scratch);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) { m.impl("cut_rows", TORCH_BOX(&cut_rows)); }

}  // namespace
}  // namespace pico_fast
