// The GPU as kernels see it: launching, shared memory, asynchronous copies, the current stream.
//
// Everything that only a GPU can do stands here. tests/emulation holds a file of the same name that
// does it with ordinary threads of control, so that the kernels also run where there is no GPU.

#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#define PICO_FAST_CUDA_CHECK(call)                                                \
  do {                                                                            \
    const cudaError_t status = (call);                                            \
    STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status)); \
  } while (0)

// Registers what follows as the ops' GPU implementations.
#define PICO_FAST_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pico_fast, CUDA, m)

namespace pico_fast {

using torch::stable::accelerator::DeviceGuard;

constexpr int kWarp = 32;

// PyTorch's current stream. The library that knows it is found in the process, not linked: there is
// none in a CPU build of PyTorch, which has to load this extension as well.
inline cudaStream_t current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter, "this PyTorch has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The most bytes of shared memory that a block can ask for.
inline int shared_limit(int device) {
  int bytes = 0;
  PICO_FAST_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Runs a kernel on the current stream of the current device; no blocks, no launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int device, int64_t blocks, int threads, int shared,
            Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "too large for one launch: ", blocks, " blocks");
  if (shared > 48 * 1024) {  // more than this only on request
    PICO_FAST_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  }
  // as many blocks side by side as there is shared memory for
  PICO_FAST_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                            cudaSharedmemCarveoutMaxShared));
  kernel<<<blocks, threads, shared, current_stream(device)>>>(arguments...);
  PICO_FAST_CUDA_CHECK(cudaGetLastError());
}

// The block's shared memory.
__device__ inline void* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16. The rest of the 256
// bytes around them is fetched as far as the L2 cache: the next copies of this row will want it.
__device__ inline void copy_async(void* to, const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

// Closes a group of copies of this thread.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace pico_fast
