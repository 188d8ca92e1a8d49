// The kernel of linear for short rows by strips, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// As linear_short, but N is a multiple of 64, p.out is aligned to 16 bytes, and rows of x and of the weight do not
// overlap.
cudaError_t linear_strips(const LinearParams& p, int processors, cudaStream_t stream);

}  // namespace quamba
