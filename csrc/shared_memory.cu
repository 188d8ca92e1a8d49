// cudaFuncSetAttribute, as every unit of the library calls it (setup.py links with --wrap): a kernel's limit of dynamic
// shared memory, and the share of a multiprocessor's memory that it prefers, are raised, never lowered, and once raised
// not set again. CUTLASS sets it at every launch, and so does
// launch.cuh; each time is 2 to 3 microseconds of the driver's, about as much as the launch.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

extern "C" cudaError_t __real_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

extern "C" cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  struct Seen {
    const void* kernel;
    int device, most;
  };
  constexpr int kSeen = 64;
  static thread_local Seen seen[2][kSeen] = {};
  int device = 0;
  const bool limit = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if ((!limit && attribute != cudaFuncAttributePreferredSharedMemoryCarveout) || cudaGetDevice(&device) != cudaSuccess)
    return __real_cudaFuncSetAttribute(kernel, attribute, value);
  Seen& last = seen[limit][reinterpret_cast<uintptr_t>(kernel) / 16 % kSeen];
  if (last.kernel == kernel && last.device == device && value <= last.most) return cudaSuccess;

  static std::mutex mutex;
  static auto* const limits = new std::map<std::pair<const void*, int>, int>[2];
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = limits[limit][{kernel, device}];
  if (value > most) {
    const cudaError_t error = __real_cudaFuncSetAttribute(kernel, attribute, value);
    if (error != cudaSuccess) return error;
    most = value;
  }
  last = {kernel, device, most};
  return cudaSuccess;
}
