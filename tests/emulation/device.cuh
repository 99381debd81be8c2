// csrc/cuda/device.cuh without a GPU: a block's threads are fibers of one CPU thread.
//
// At every barrier each fiber of the block waits for all others, and which goes first is drawn
// anew: code that lacks a barrier gives wrong results here. Asynchronous copies land no sooner than
// they are waited for. Shared memory starts as garbage (NaN), and launches and copies refuse what a
// GPU refuses.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define PICO_FAST_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pico_fast_emulated, CPU, m)
#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx pico_fast::emulation::thread
#define blockIdx pico_fast::emulation::block

namespace pico_fast {

constexpr int kWarp = 32;

namespace emulation {

struct Index {
  unsigned x;
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
  std::vector<std::vector<Copy>> groups;  // closed, not yet landed
  std::vector<Copy> open;

  static constexpr size_t kStack = 1 << 16;
};

inline Index thread, block;
inline unsigned char* shared;
inline Fiber* running;
inline ucontext_t scheduler;
inline std::function<void()>* body;
inline int exchange[1024];  // what each thread of the block says in a warp's vote or shuffle

inline void barrier() {
  Fiber* const self = running;
  const Index at = thread;
  swapcontext(&self->context, &scheduler);
  thread = at, running = self;
}

inline void enter() {
  (*body)();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

// Every lane's value, seen by all; a second barrier keeps the next exchange apart.
template <typename F>
auto with_exchange(int value, F&& read) {
  exchange[thread.x] = value;
  barrier();
  const auto result = read(exchange + thread.x / kWarp * kWarp);
  barrier();
  return result;
}

}  // namespace emulation

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

// As little as the smallest of the supported GPUs has, or what the tests ask for.
inline int shared_limit(int) {
  const char* bytes = std::getenv("PICO_FAST_EMULATED_SHARED");
  return bytes ? std::atoi(bytes) : 101376;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int device, int64_t blocks, int threads, int bytes,
            Arguments... arguments) {
  using namespace emulation;
  STD_TORCH_CHECK(blocks <= INT32_MAX && threads <= 1024 && bytes <= shared_limit(device),
                  "a GPU refuses this launch");
  std::mt19937 random(1);
  std::function<void()> call = [=] { kernel(arguments...); };
  body = &call;
  std::vector<Fiber> fibers(threads);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  const size_t size = (bytes + 15) / 16 * 16 + 16;
  const std::unique_ptr<unsigned char, void (*)(void*)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(16, size)), std::free);
  shared = memory.get();
  for (block.x = 0; block.x < blocks; ++block.x) {
    std::memset(shared, 0xff, size);
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    for (bool alive = true; alive;) {
      alive = false;
      std::shuffle(order.begin(), order.end(), random);
      for (const int i : order) {
        if (fibers[i].done) continue;
        running = &fibers[i], thread.x = i, alive = true;
        swapcontext(&scheduler, &running->context);
      }
    }
    for (size_t i = bytes; i < size; ++i) {
      STD_TORCH_CHECK(shared[i] == 0xff, "written behind the end of shared memory");
    }
  }
}

inline void* shared_memory() { return emulation::shared; }

inline void copy_async(void* to, const void* from) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
                  "a misaligned copy");
  emulation::running->open.push_back({to, from});
}

inline void commit_copies() {
  emulation::running->groups.push_back(std::move(emulation::running->open));
  emulation::running->open.clear();
}

template <int kGroups>
void wait_copies() {
  auto& groups = emulation::running->groups;
  for (; groups.size() > kGroups; groups.erase(groups.begin())) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
  }
}

// what CUDA itself gives to device code

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}

template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return std::max<std::common_type_t<A, B>>(a, b);
}

inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() { emulation::barrier(); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulation::with_exchange(vote, [](const int* lane) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>(lane[i]) << i;
    return votes;
  });
}

inline int __shfl_sync(unsigned, int value, int from) {
  return emulation::with_exchange(value, [&](const int* lane) { return lane[from]; });
}

inline int __shfl_up_sync(unsigned, int value, int by) {
  const int self = static_cast<int>(emulation::thread.x) % kWarp;
  return emulation::with_exchange(value,
                                  [&](const int* lane) { return lane[std::max(self - by, self % by)]; });
}

}  // namespace pico_fast
