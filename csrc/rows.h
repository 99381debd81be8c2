// Rows of keys that are read by index: their dtypes, and loops over their D channels.
//
// Sums over channels are float32, float64 where anchors or keys are float64. A loop over channels
// belongs into a lambda given to `vectorised`, which has it compiled once for any processor and
// once for the wider vectors that nearly all have.

#pragma once

#include <optional>

#include "tensors.h"

#define PICO_FAST_INLINE __attribute__((always_inline))

namespace pico_fast {

#if defined(__x86_64__)
template <typename Body>
__attribute__((target("avx2,fma"))) void run_wide(const Body& body) {
  body();
}
#endif

// body: a lambda marked PICO_FAST_INLINE, without a result.
template <typename Body>
void vectorised(const Body& body) {
#if defined(__x86_64__)
  static const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide) return run_wide(body);
#endif
  body();
}

// Asks for a row before it is needed; rows picked by index are nowhere near one another.
template <typename T>
PICO_FAST_INLINE inline void prefetch(const T* row, int64_t D) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < D * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
}

// call(S{}, T{}): S what is summed in, which is the dtype of `rows`; T the dtype of keys.
template <typename F>
void with_dtypes(const Tensor& rows, const Tensor& keys, F&& call) {
  STD_TORCH_CHECK(keys.size(0) < INT32_MAX, "keys: expected fewer than 2^31");
  with_type<float, double>(
      rows.scalar_type(), "rows and weights: expected float32 or float64", [&](auto sum) {
        constexpr auto kExpected = "keys: expected float32, bfloat16, float16 or float64";
        with_type<float, BFloat16, Half, double>(keys.scalar_type(), kExpected, [&](auto key) {
          if constexpr (sizeof(key) <= sizeof(sum))
            call(sum, key);
          else
            STD_TORCH_CHECK(false, "keys of float64: expected rows or weights of float64");
        });
      });
}

// call(S{}): S the dtype of similarities.
template <typename F>
void with_precision(const Tensor& similarity, F&& call) {
  with_type<float, double>(similarity.scalar_type(), "similarity: expected float32 or float64", call);
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
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == n && tensor.size(1) == w &&
                      tensor.stride(1) == 1 && tensor.scalar_type() == CppTypeToScalarType<V>::value,
                  name, ": expected dense rows of another size or dtype");
  return {tensor.mutable_data_ptr<V>(), tensor.stride(0)};
}

// which [w] int64 or none, then one key for each of w columns: the keys [*, D] of a tile
inline const int64_t* checked_which(const Tensor& keys, const std::optional<Tensor>& which, int64_t w) {
  STD_TORCH_CHECK(keys.dim() == 2 && keys.is_contiguous(), "keys: expected dense [K, D]");
  STD_TORCH_CHECK(which || keys.size(0) == w, "keys: expected one for each column");
  if (!which) return nullptr;
  in_place<int64_t>(*which, {w}, "which");
  return checked_index(*which, 0, keys.size(0), "index", "keys");
}

}  // namespace pico_fast
