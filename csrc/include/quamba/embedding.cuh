// embedding: int8 rows looked up and dequantized. One block a token.
#pragma once

#include <cassert>

#include "quamba/launch.cuh"
#include "quamba/types.cuh"

namespace quamba {

template <typename T, typename Id>
__global__ void __launch_bounds__(256)
    embedding_kernel(const Id* ids, const int8_t* weight, int64_t row_stride, int64_t entries, int64_t columns,
                     Scale scale, Scale column_scale, T* out) {
  let_next_start();
  wait_for_previous();
  const int64_t id = ids[blockIdx.x];
  assert(id >= 0 && id < entries && "embedding: id out of range");
  const int8_t* row = weight + id * row_stride;
  out += blockIdx.x * columns;
  const float s = scale[id];
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    out[c] = from_float<T>(to_float(row[c]) * s * column_scale.or_one(c));
  }
}

}  // namespace quamba
