// The kernel of linear for short rows, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// int8 results without bias and residual, K a multiple of 16 up to 256, N one of 8. Rows of x and of the weight are
// aligned to 16 bytes, their strides below 2^31, and p.out is aligned to 8 bytes. `processors`: of the device.
cudaError_t linear_short(const LinearParams& p, int processors, cudaStream_t stream);

}  // namespace quamba
