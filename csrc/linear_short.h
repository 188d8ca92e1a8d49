// The kernel of linear for short rows, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "quamba/linear.cuh"

namespace quamba {

// int8 results without bias and residual, K a multiple of 16 up to 256, N one of 8. Rows of x and of the weight are
// aligned to 16 bytes, their strides below 2^31, and p.out is aligned to 8 bytes. `processors`: of the device.
cudaError_t linear_short(const LinearParams& p, int processors, cudaStream_t stream);

// f(steps), a constant: of 32 of K, so many as the kernels for short rows are compiled for.
template <typename F>
cudaError_t with_short_steps(int64_t inner, F&& f) {
  if (inner <= 64) return f(std::integral_constant<int, 2>{});
  if (inner <= 96) return f(std::integral_constant<int, 3>{});
  if (inner <= 128) return f(std::integral_constant<int, 4>{});
  if (inner <= 160) return f(std::integral_constant<int, 5>{});
  return f(std::integral_constant<int, 8>{});
}

}  // namespace quamba
