// What every op needs: tensors of PyTorch, checks of what they hold, and tasks that run side by side.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace pico_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::CppTypeToScalarType;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::parallel_for;
using torch::stable::Tensor;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// task(i) for each i in [0, n), at least `grain` of them on one thread
template <typename F>
void parallel_each(int64_t n, int64_t grain, const F& task) {
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// call(V{}): V the one of the given types that `type` names.
template <typename... V, typename F>
void with_type(ScalarType type, const char* expected, F&& call) {
  const bool known = ((type == CppTypeToScalarType<V>::value && (call(V{}), true)) || ...);
  STD_TORCH_CHECK(known, expected);
}

// What an op is to write in place, or reads as it lies: of these sizes, dense, and of values V.
template <typename V>
V* in_place(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(found.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), found.begin()) &&
                      tensor.is_contiguous() && tensor.scalar_type() == CppTypeToScalarType<V>::value,
                  name, ": expected a dense tensor of another size or dtype");
  return tensor.mutable_data_ptr<V>();
}

// index: dense int64 from `least` on and below n, the number of what `named` says
inline const int64_t* checked_index(const Tensor& index, int64_t least, int64_t n, const char* name,
                                    const char* named) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, name, ": expected int64");
  const int64_t* at = index.const_data_ptr<int64_t>();
  const bool inside = std::all_of(at, at + index.numel(), [=](int64_t i) { return i >= least && i < n; });
  STD_TORCH_CHECK(inside, name, ": expected indices of ", named);
  return at;
}

}  // namespace pico_fast
