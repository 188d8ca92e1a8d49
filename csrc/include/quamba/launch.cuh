// Launching a kernel while the one before it in the stream still runs.
//
// A kernel that is launched so has to call wait_for_previous() in every block before it reads or writes what another
// kernel may have written or may still read. Until then it can set itself up and bring constants near.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quamba {

// Until all memory operations of the kernels before are done and seen. A kernel launched otherwise passes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel in the stream may be set up, where it was launched by launch_early, once every block has come here.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings bytes (a multiple of 16, at an address that is one, too) into the second-level cache. That is where all
// writes meet, so it is allowed before wait_for_previous().
__device__ __forceinline__ void prefetch(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// For Hopper and later.
template <typename... Params, typename... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace quamba
