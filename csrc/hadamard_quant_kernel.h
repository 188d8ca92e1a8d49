// The transform's instantiations, one translation unit a base order, as the dispatcher sees them.
#pragma once

#include <cuda_runtime.h>

#include "quamba/hadamard_quant.cuh"

namespace quamba {

constexpr int kAnyBase = 0;  // the kernel for base orders that have none of their own

// Transforms `rows` rows of type x_type; the result is int8 where quantize is true, else of x_type.
template <int BASE>
cudaError_t launch_hadamard(const HadamardParams& p, int64_t rows, Type x_type, bool quantize, cudaStream_t stream);

}  // namespace quamba
