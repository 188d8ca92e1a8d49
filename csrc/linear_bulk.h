// The bulk kernel of linear, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// For Hopper; as linear_ring, and rows of x and of the weight do not overlap. `processors`: of the device.
cudaError_t linear_bulk(const LinearParams& p, int processors, cudaStream_t stream);

}  // namespace quamba
