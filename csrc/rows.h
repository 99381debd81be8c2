// Rows of keys that are read by index: their dtypes, and loops over their D channels.
//
// Sums over channels are float32, float64 where anchors or keys are float64. A loop over channels
// belongs into a lambda given to `vectorised`, which has it compiled once for any processor and
// once for the wider vectors that nearly all have.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#if defined(__GNUC__)
#define PICO_FAST_INLINE __attribute__((always_inline))
#else
#define PICO_FAST_INLINE
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define PICO_FAST_WIDE __attribute__((target("avx2,fma")))
#endif

namespace pico_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef PICO_FAST_WIDE
template <typename Body>
PICO_FAST_WIDE void run_wide(const Body& body) {
  body();
}

// body: a lambda marked PICO_FAST_INLINE, without a result.
template <typename Body>
void vectorised(const Body& body) {
  static const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide)
    run_wide(body);
  else
    body();
}
#else
template <typename Body>
void vectorised(const Body& body) {
  body();
}
#endif

// Asks for a row before it is needed; rows picked by index are nowhere near one another.
template <typename T>
PICO_FAST_INLINE inline void prefetch(const T* row, int64_t D) {
#if defined(__GNUC__)
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < D * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
#endif
}

// call(S{}, T{}): S what is summed in, which is the dtype of `rows`; T the dtype of keys.
template <typename F>
void with_dtypes(const Tensor& rows, const Tensor& keys, F&& call) {
  const bool precise = rows.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(precise || rows.scalar_type() == ScalarType::Float,
                  "rows and weights: expected float32 or float64");
  const auto with = [&](auto key) {
    if (precise)
      call(double{}, key);
    else
      call(float{}, key);
  };
  switch (keys.scalar_type()) {
    case ScalarType::Float:
      return with(float{});
    case ScalarType::BFloat16:
      return with(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return with(torch::headeronly::Half{});
    case ScalarType::Double:
      STD_TORCH_CHECK(precise, "keys of float64: expected rows or weights of float64");
      return call(double{}, double{});
    default:
      STD_TORCH_CHECK(false, "keys: expected float32, bfloat16, float16 or float64");
  }
}

// index: dense int64 of keys, or -1 where `least` allows it
inline const int64_t* checked_index(const Tensor& index, int64_t K, int64_t least = -1) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index: expected int64");
  STD_TORCH_CHECK(K < INT32_MAX, "keys: expected fewer than 2^31");
  const auto* at = static_cast<const int64_t*>(index.const_data_ptr());
  const bool inside = std::all_of(at, at + index.numel(), [=](int64_t k) { return k >= least && k < K; });
  STD_TORCH_CHECK(inside, "index: expected indices of keys, or -1");
  return at;
}

// call(S{}): S the dtype of similarities.
template <typename F>
void with_precision(const Tensor& similarity, F&& call) {
  if (similarity.scalar_type() == ScalarType::Double) return call(double{});
  STD_TORCH_CHECK(similarity.scalar_type() == ScalarType::Float, "similarity: expected float32 or float64");
  call(float{});
}

// What an op is to write in place, or reads as it lies: of these sizes, dense, and of values V.
template <typename V>
V* in_place(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  constexpr auto dtype = std::is_same_v<V, double>  ? ScalarType::Double
                         : std::is_same_v<V, float> ? ScalarType::Float
                                                    : ScalarType::Long;
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(found.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), found.begin()) &&
                      tensor.is_contiguous() && tensor.scalar_type() == dtype,
                  name, ": expected a dense tensor of another size or dtype");
  return static_cast<V*>(tensor.mutable_data_ptr());
}

// Rows of similarities, each dense.
template <typename V>
struct Rows {
  V* first;
  int64_t stride;

  PICO_FAST_INLINE V* operator[](int64_t i) const { return first + i * stride; }
};

template <typename V>
Rows<V> rows_in_place(const Tensor& tensor, int64_t n, int64_t w, const char* name) {
  constexpr auto dtype = std::is_same_v<V, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == n && tensor.size(1) == w &&
                      tensor.stride(1) == 1 && tensor.scalar_type() == dtype,
                  name, ": expected dense rows of another size or dtype");
  return {static_cast<V*>(tensor.mutable_data_ptr()), tensor.stride(0)};
}

// which [w] int64 or none, then one key for each of w columns: the keys [*, D] of a tile
inline const int64_t* checked_which(const Tensor& keys, const std::optional<Tensor>& which, int64_t w) {
  STD_TORCH_CHECK(keys.dim() == 2 && keys.is_contiguous(), "keys: expected dense [K, D]");
  STD_TORCH_CHECK(which || keys.size(0) == w, "keys: expected one for each column");
  if (!which) return nullptr;
  in_place<int64_t>(*which, {w}, "which");
  return checked_index(*which, keys.size(0), 0);
}

}  // namespace pico_fast
