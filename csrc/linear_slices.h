// The kernel of linear by slices of K, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/linear.cuh"

namespace quamba {

// How K and the rows of x are dealt out: slices of K, each of a block of a cluster, and a cluster's rows of x.
struct SliceWay {
  int slices = 0, rows = 0;
};

// Whether there is such a way, for that K: 2 or 4 slices of 128 bytes of K at least, 8 to 96 rows, by eights.
bool is_slice_way(const SliceWay& way, int64_t inner);

// For Hopper; any result type, no bias, no residual. Rows of x and of the weight are aligned to 16 bytes, K is a
// multiple of 16 and more than 128, N of 4, and p.out is aligned to 16 bytes. `processors`: of the device. By the
// cheapest way where none is given.
cudaError_t linear_slices(const LinearParams& p, SliceWay way, int processors, cudaStream_t stream);

}  // namespace quamba
