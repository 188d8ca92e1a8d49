// The kernel of linear for short rows by strips, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// As linear_short, but N is a multiple of 64, and p.out is aligned to 16 bytes.
cudaError_t linear_strips(const LinearParams& p, int processors, cudaStream_t stream);

}  // namespace quamba
