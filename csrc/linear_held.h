// The kernel of linear that holds its weights before x is there, as the chain of a block's kernels sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear_held_tail.cuh"

namespace quamba {

// On Hopper, up to 64 rows. Rows of x and of the weight are aligned to 16 bytes and do not overlap, K is a multiple of
// 16.
// What belongs to columns and the weight is read before the kernel before has ended.
// A float result, x with one scale or one a row, N a multiple of eight; vectors and residual aligned to two.
cudaError_t linear_held(const LinearParams& p, cudaStream_t stream);

// The same with the convolution's step behind it; states are read early, too. N a multiple of 16, x has one scale.
cudaError_t linear_held(const LinearParams& p, const HeldConv& tail, cudaStream_t stream);

// For few columns: K in eight parts. An int8 result, x with one scale, N a multiple of 16.
cudaError_t linear_parts(const LinearParams& p, cudaStream_t stream);

}  // namespace quamba
