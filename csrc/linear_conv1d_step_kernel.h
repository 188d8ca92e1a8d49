// The kernel of linear_conv1d_step, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear_conv1d_step.cuh"

namespace quamba {

// For Hopper; as linear_ring, with an int8 result that `tail` takes. `processors`: of the device.
cudaError_t launch_linear_conv1d_step(const LinearParams& p, const RingConv& tail, int processors, cudaStream_t stream);

}  // namespace quamba
