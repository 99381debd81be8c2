// The order of candidates: harder first, equal ones by lower number. It is total, so that a result
// depends on no algorithm and on no number of threads.

#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace pico_fast {

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// A candidate is one word, the bits of its hardness and a number.
template <typename T>
using Word = std::conditional_t<sizeof(T) == 8, unsigned __int128, uint64_t>;

// The bits of the lowest hardness that a candidate has: -inf is no candidate's.
template <typename T>
constexpr Bits<T> kLowest = ~(Bits<T>{1} << (sizeof(T) == 8 ? 52 : 23));

// Ascending bits are descending hardness. What is no number comes first, so that it shows; adding 0
// makes -0 and 0 equal.
template <typename T>
inline Bits<T> bits_of(T hardness) {
  constexpr auto kSign = Bits<T>{1} << (8 * sizeof(T) - 1);
  const T value = hardness + T(0);
  const auto bits = std::bit_cast<Bits<T>>(value);
  const Bits<T> ranked = bits & kSign ? bits : ~(bits | kSign);
  return ranked & -static_cast<Bits<T>>(value == value);
}

template <typename T>
inline T hardness_of(Word<T> word) {
  constexpr auto kSign = Bits<T>{1} << (8 * sizeof(T) - 1);
  const auto ranked = static_cast<Bits<T>>(word >> 32);
  if (ranked == 0) return std::numeric_limits<T>::quiet_NaN();
  return std::bit_cast<T>(ranked & kSign ? ranked : ~ranked ^ kSign);
}

}  // namespace pico_fast
