// Products of few anchors and keys on a CPU: keys are read where they lie, in their own dtype.

#include <bit>
#include <cstring>
#include <optional>

#include "rows.h"

namespace pico_fast {
namespace {

// Rows that are asked for ahead of the one in hand.
constexpr int64_t kAhead = 4;
// Rows and keys whose products are in hand at once, and columns of a tile that one task multiplies.
constexpr int64_t kRows = 2, kKeys = 4, kColumns = 64;

// Channels of a key in two halves that meet in pairs: the even and the odd ones of bfloat16, which a word
// of 32 bits holds without a conversion; else the first and the last. An odd one stays behind.
template <typename S, typename T>
struct Halves {
  static constexpr bool kWords = std::is_same_v<S, float> && std::is_same_v<T, BFloat16>;

  static PICO_FAST_INLINE void load(const T* key, int64_t half, int64_t d, S& one, S& other) {
    if constexpr (kWords) {
      uint32_t word;
      std::memcpy(&word, key + 2 * d, sizeof(word));
      one = std::bit_cast<S>(word << 16);
      other = std::bit_cast<S>(word & 0xffff0000u);
    } else {
      one = static_cast<S>(key[d]);
      other = static_cast<S>(key[half + d]);
    }
  }

  // A row [D] in the order of the halves.
  static void arrange(const S* row, int64_t D, S* to) {
    for (int64_t d = 0; d < D; ++d) to[kWords && d < D / 2 * 2 ? d / 2 + d % 2 * (D / 2) : d] = row[d];
  }
};

// Inner products of arranged rows with the keys first to last of those that `which` names. Those of
// two rows and four keys are in hand at once: the additions of one wait for one another, those of
// eight do not. Behind the last comes the last again: a product is the same sum in any company.
template <typename S, typename T>
void multiply(const S* rows, int64_t n, const T* keys, const int64_t* which, int64_t D, int64_t first,
              int64_t last, const Rows<S>& products) {
  const auto key_at = [&](int64_t j) { return keys + (which ? which[j] : j) * D; };
  const int64_t half = D / 2;
  vectorised([&]() PICO_FAST_INLINE {
    for (int64_t j = first; j < last; j += kKeys) {
      const T* key[kKeys];
      for (int64_t k = 0; k < kKeys; ++k) {
        key[k] = key_at(std::min(j + k, last - 1));
        if (j + k + kAhead < last) prefetch(key_at(j + k + kAhead), D);
      }
      for (int64_t i = 0; i < n; i += kRows) {
        const S* row[kRows] = {rows + i * D, rows + std::min(i + 1, n - 1) * D};
        S a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
        for (int64_t d = 0; d < half; ++d) {
          const S p = row[0][d], q = row[0][half + d], r = row[1][d], s = row[1][half + d];
          S one, other;
          Halves<S, T>::load(key[0], half, d, one, other);
          a0 += p * one, b0 += r * one;
          a0 += q * other, b0 += s * other;
          Halves<S, T>::load(key[1], half, d, one, other);
          a1 += p * one, b1 += r * one;
          a1 += q * other, b1 += s * other;
          Halves<S, T>::load(key[2], half, d, one, other);
          a2 += p * one, b2 += r * one;
          a2 += q * other, b2 += s * other;
          Halves<S, T>::load(key[3], half, d, one, other);
          a3 += p * one, b3 += r * one;
          a3 += q * other, b3 += s * other;
        }
        const S sums[kRows][kKeys] = {{a0, a1, a2, a3}, {b0, b1, b2, b3}};
        for (int64_t r = 0; r < std::min(kRows, n - i); ++r)
          for (int64_t k = 0; k < std::min(kKeys, last - j); ++k) {
            const S rest = D % 2 ? row[r][D - 1] * static_cast<S>(key[k][D - 1]) : S{0};
            products[i + r][j + k] = sums[r][k] + rest;
          }
      }
    }
  });
}

// rows [n, D] float32 or float64, keys [K, D], which [w] int64 or none: all -> in place their inner
// products [n, w]. Reads keys as they lie: for so few rows that a copy would cost more
void multiply_few(const Tensor& rows_, const Tensor& keys, const std::optional<Tensor>& which_,
                  const Tensor& products_) {
  STD_TORCH_CHECK(rows_.dim() == 2 && products_.dim() == 2, "expected rows [n, D], products [n, w]");
  const int64_t n = rows_.size(0), D = rows_.size(1), w = products_.size(1);
  const int64_t* which = checked_which(keys, which_, w);
  STD_TORCH_CHECK(keys.size(1) == D, "keys: expected as many channels as rows");
  const Tensor arranged = new_empty(rows_, {n, D});
  with_dtypes(rows_, keys, [&](auto sum, auto key) {
    using S = decltype(sum);
    using T = decltype(key);
    const S* rows = in_place<S>(rows_, {n, D}, "rows");
    auto* to = arranged.mutable_data_ptr<S>();
    for (int64_t i = 0; i < n; ++i) Halves<S, T>::arrange(rows + i * D, D, to + i * D);
    const auto products = rows_in_place<S>(products_, n, w, "products");
    const auto* all = keys.const_data_ptr<T>();
    parallel_for(0, divide_up(w, kColumns), 1, [&](int64_t begin, int64_t end) {
      multiply(to, n, all, which, D, begin * kColumns, std::min(end * kColumns, w), products);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(pico_fast, CPU, m) { m.impl("multiply_few", TORCH_BOX(&multiply_few)); }

}  // namespace
}  // namespace pico_fast
