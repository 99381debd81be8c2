// The order of picks: harder first, equal ones by lower index. It is total, so that a result
// depends on no algorithm and on no number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace pico_fast {

template <typename T>
struct Candidate {
  T hardness;
  int32_t key;

  bool operator<(const Candidate& other) const {
    return hardness > other.hardness || (hardness == other.hardness && key < other.key);
  }
};

// Sorts candidates by digits of a byte, which takes half the time of comparisons; keeps its memory.
template <typename T>
class Ordering {
 public:
  // What is no number comes first.
  void sort(std::vector<Candidate<T>>& candidates) {
    const size_t n = candidates.size();
    entries_.resize(n);
    other_.resize(n);
    std::memset(counts_, 0, sizeof(counts_));
    for (size_t i = 0; i < n; ++i) {
      entries_[i] = {word_of(candidates[i].hardness), candidates[i].key};
      for (int digit = 0; digit < kDigits; ++digit)
        ++counts_[digit][entries_[i].word >> (8 * digit) & 255];
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      uint32_t* count = counts_[digit];
      if (n == 0 || count[entries_[0].word >> (8 * digit) & 255] == n) continue;
      uint32_t before = 0;
      for (int value = 0; value < 256; ++value) before += std::exchange(count[value], before);
      for (const Entry& entry : entries_) other_[count[entry.word >> (8 * digit) & 255]++] = entry;
      entries_.swap(other_);
    }
    for (size_t first = 0, last; first < n; first = last) {
      for (last = first + 1; last < n && entries_[last].word == entries_[first].word;) ++last;
      if (last - first > 1)
        std::sort(entries_.begin() + first, entries_.begin() + last,
                  [](const Entry& a, const Entry& b) { return a.key < b.key; });
    }
    for (size_t i = 0; i < n; ++i) candidates[i] = {hardness_of(entries_[i].word), entries_[i].key};
  }

 private:
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static constexpr int kDigits = sizeof(T);
  static constexpr Word kSign = Word{1} << (8 * sizeof(T) - 1);

  struct Entry {
    Word word;
    int32_t key;
  };

  // Ascending words are descending numbers; adding 0 makes -0 and 0 equal.
  static Word word_of(T hardness) {
    if (std::isnan(hardness)) return 0;
    const T value = hardness + T(0);
    Word bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits & kSign ? bits : ~(bits | kSign);
  }

  static T hardness_of(Word word) {
    if (word == 0) return std::numeric_limits<T>::quiet_NaN();
    const Word bits = word & kSign ? word : ~word ^ kSign;
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  std::vector<Entry> entries_, other_;
  uint32_t counts_[kDigits][256];
};

}  // namespace pico_fast
