// embedding: int8 rows looked up and dequantized. One block a token. What a thread loads behind the id does not wait for
// anything else: of few tokens the time is that of memory, once for the id and once for the row.
#pragma once

#include <cassert>

#include "quamba/launch.cuh"
#include "quamba/types.cuh"

namespace quamba {

constexpr int kEmbeddingColumns = 8, kEmbeddingThreads = 512;  // of a thread at a time; at most, of a block

// kVector: rows of the table and of the result, and the column scale, begin at multiples of kEmbeddingColumns elements.
template <typename T, typename Id, bool kVector>
__global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_kernel(const Id* ids, const int8_t* weight, int64_t row_stride, int64_t entries, int64_t columns,
                     Scale scale, Scale column_scale, T* out) {
  constexpr int kColumns = kEmbeddingColumns;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kColumns, step = static_cast<int64_t>(blockDim.x) * kColumns;
  let_next_start();
  if (column_scale && blockIdx.x == 0 && first < columns) prefetch(column_scale.data + first * column_scale.stride);
  wait_for_previous();
  const int64_t id = ids[blockIdx.x];
  assert(id >= 0 && id < entries && "embedding: id out of range");
  const int8_t* const row = weight + id * row_stride;
  out += blockIdx.x * columns;
  const float s = scale[id];
  for (int64_t c = first; c < columns; c += step) {
    const int valid = static_cast<int>(columns - c < kColumns ? columns - c : kColumns);
    float v[kColumns], k[kColumns];
    load<kColumns, kVector>(row + c, 1, valid, v);
    if (column_scale.stride) {
      load<kColumns, kVector>(column_scale.data + c, 1, valid, k);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) k[i] = column_scale.or_one(0);
    }
    alignas(16) T result[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) result[i] = from_float<T>(v[i] * s * k[i]);
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(result) / sizeof(uint4)); ++i)
        reinterpret_cast<uint4*>(out + c)[i] = reinterpret_cast<const uint4*>(result)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (i < valid) out[c + i] = result[i];
    }
  }
}

}  // namespace quamba
