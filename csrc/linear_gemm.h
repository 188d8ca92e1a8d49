// The matrix kernels of linear, one translation unit each, as the dispatcher sees them.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// Rows and columns of the result that a thread block computes at a time; the dispatcher picks by the shape.
enum class Tile { k128x256, k128x192, k128x128, k64x64, k64x80, k128x160, k256x192, k128x80, k128x96 };

// x (M, K) and weight (N, K) with K a multiple of 16, rows aligned to 16 bytes; N such that rows of the result are,
// too. bias is float32. residual has the type of the result, which then is not int8.
// Writes the bytes of workspace needed to *bytes when workspace is null and *bytes is not enough.
template <typename Out, bool kResidual, Tile kTile>
cudaError_t linear_sm90(const LinearParams& p, void* workspace, size_t* bytes, cudaStream_t stream);

// Any result type, and a residual of any type.
cudaError_t linear_sm80(const LinearParams& p, cudaStream_t stream);

}  // namespace quamba
