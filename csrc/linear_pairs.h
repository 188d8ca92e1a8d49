// The kernel of linear by pairs of thread blocks, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "linear_choice.h"

namespace quamba {

// Out: int8 without residual, or float32 with one in float32, where each block of a pair has half of K
// (kHalves, kQuads) or not (kPairs). No bias. K is a multiple of 16, more than kPairInner where it is halved; N of 32
// or, for float32, 16. Rows of x, of the weight and of the residual are aligned to 16 bytes, and so is p.out.
// `processors`: of the device.
template <typename Out>
cudaError_t linear_pairs(const LinearParams& p, LinearKernel kernel, int processors, cudaStream_t stream);

}  // namespace quamba
