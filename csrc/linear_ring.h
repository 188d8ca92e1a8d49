// The ring kernel of linear, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// For Hopper; any result type, and a residual of any type. Rows of x and of the weight are aligned to 16 bytes, K is a
// multiple of 16, and p.out is aligned to 16 bytes. `processors`: of the device.
cudaError_t linear_ring(const LinearParams& p, int processors, cudaStream_t stream);

}  // namespace quamba
