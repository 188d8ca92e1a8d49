// Launching a kernel while the one before it in the stream still runs.
//
// A kernel that is launched so has to call wait_for_previous() in every block before it reads or writes anything in
// memory, weights too: those may be as new as the stream's last but one kernel. Until then it can set itself up and
// prefetch() into the second-level cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace quamba {

// Until all memory operations of the kernels before are done and seen. A kernel launched otherwise passes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel in the stream may be set up, where it is one of launch(), once every block has come here. It waits
// for this one's end, so that this is for the beginning of a kernel.
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

// The same for whatever is near one address.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Whether this block is among those that the device takes at first, so many a multiprocessor: a later one has nothing
// to wait for, and its own loads are as early as a prefetch.
__device__ __forceinline__ bool in_first_wave(unsigned per_multiprocessor) {
  unsigned multiprocessors;
  asm("mov.u32 %0, %%nsmid;" : "=r"(multiprocessors));
  return blockIdx.y * gridDim.x + blockIdx.x < multiprocessors * per_multiprocessor;
}

// Whether launch() lets a kernel start early on the current device: only where the code that runs there is that for
// compute capability 9.0, which waits. Newer devices run the code of an older one, which does not.
// QUAMBA_LAUNCH_EARLY=0 turns it off, to see what it gives.
inline bool launches_early() {
#ifdef QUAMBA_SM90
  static const char* const wanted = std::getenv("QUAMBA_LAUNCH_EARLY");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  return false;
#endif
}

struct Launch {
  dim3 grid;
  int threads;
  int shared;  // bytes
  cudaStream_t stream;
  int cluster = 1;  // blocks in a row of the grid that share their memory; more than one on Hopper alone
};

// Starts a kernel that calls wait_for_previous(): early where the device can, else as any other. A kernel that was
// started so completes after the one before it, and thereby after all before that.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& how, Args... args) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (launches_early()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  if (how.shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid, config.blockDim = dim3(how.threads), config.stream = how.stream;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared);
  config.attrs = attributes, config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace quamba
