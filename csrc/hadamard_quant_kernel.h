// The transform's instantiations, one translation unit a base order, as the dispatcher sees them.
#pragma once

#include <cuda_runtime.h>

#include "quamba/hadamard_quant.cuh"

namespace quamba {

constexpr int kAnyBase = 0;  // the kernel for base orders that have none of their own

// Whether hadamard_quant_rows.cuh is compiled for base * 2^log_power.
constexpr bool has_rows_kernel(int base, int log_power) {
  return base == 1 ? log_power >= 11 && log_power <= 13 : (base == 12 || base == 20) && log_power == 8;
}

// Transforms `rows` rows of type x_type; the result is int8 where quantize is true, else of x_type. many: by the
// kernel for many rows.
template <int BASE>
cudaError_t launch_hadamard(const HadamardParams& p, int64_t rows, Type x_type, bool quantize, bool many,
                            int processors, cudaStream_t stream);

}  // namespace quamba
