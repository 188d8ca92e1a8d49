// One width of the kernel of mixers_step; compiled once for each in setup.py.
#include "mixers_step_kernel.h"

#include "quamba/mixers_step_kernel.cuh"

namespace quamba {

template <int GROUPS>
cudaError_t launch_mixers_step(const StackParams& p, cudaStream_t stream) {
  const auto kernel = mixers_step_kernel<GROUPS>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.plan.s.total);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.plan.grid), config.blockDim = dim3(kStackThreads);
  config.dynamicSmemBytes = p.plan.s.total, config.stream = stream;
  // The thread blocks wait for each other: all of them have to be there at a time.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template cudaError_t launch_mixers_step<QUAMBA_GROUPS>(const StackParams&, cudaStream_t);

}  // namespace quamba
