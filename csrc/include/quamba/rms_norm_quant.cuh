// rms_norm_quant: x / sqrt(mean(x^2) + eps) * weight, quantized. One block a row; the row is read twice, the second
// time from the cache.
#pragma once

#include "quamba/quantize.cuh"

namespace quamba {

template <typename T, bool kVector>
__global__ void __launch_bounds__(512)
    rms_norm_quant_kernel(const T* x, int64_t row_stride, int64_t column_stride, int64_t columns, AnyVector weight,
                          Scale scale, float eps, int8_t* out) {
  x += blockIdx.x * row_stride;
  out += blockIdx.x * columns;
  float v[kChunk];
  float squares = 0.0f;
  for (int64_t c = threadIdx.x * kChunk; c < columns; c += blockDim.x * kChunk) {
    const int valid = static_cast<int>(columns - c < kChunk ? columns - c : kChunk);
    load<kChunk, kVector>(x + c * column_stride, column_stride, valid, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares = fmaf(v[i], v[i], squares);
  }
  const float mean = block_reduce(squares, Sum{}) / static_cast<float>(columns);
  const float factor = rsqrtf(mean + eps);
  float s[kChunk], r[kChunk];
  for (int64_t c = threadIdx.x * kChunk; c < columns; c += blockDim.x * kChunk) {
    const int valid = static_cast<int>(columns - c < kChunk ? columns - c : kChunk);
    load<kChunk, kVector>(x + c * column_stride, column_stride, valid, v);
    load_scales(scale, c, valid, s, r);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      v[i] *= factor;
      if (weight && i < valid) v[i] *= weight[c + i];
    }
    quantize_chunk<kVector>(v, s, r, valid, out + c);
  }
}

}  // namespace quamba
