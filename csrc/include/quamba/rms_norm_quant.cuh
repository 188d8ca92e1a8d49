// rms_norm_quant: x / sqrt(mean(x^2) + eps) * weight, quantized. One block a row. A thread keeps its first piece of the
// row in registers; what is longer than all threads' pieces is read a second time, from the cache.
#pragma once

#include "quamba/launch.cuh"
#include "quamba/quantize.cuh"

namespace quamba {

template <typename T, bool kVector>
__global__ void __launch_bounds__(512)
    rms_norm_quant_kernel(const T* x, int64_t row_stride, int64_t column_stride, int64_t columns, AnyVector weight,
                          Scale scale, float eps, int8_t* out) {
  x += blockIdx.x * row_stride;
  out += blockIdx.x * columns;
  const int64_t begin = threadIdx.x * kChunk, step = blockDim.x * kChunk;
  const auto valid_at = [&](int64_t c) { return static_cast<int>(columns - c < kChunk ? columns - c : kChunk); };
  let_next_start();
  if (blockIdx.x == 0 && begin < columns) {
    if (weight) prefetch(static_cast<const char*>(weight.data) + begin * size_of(weight.type));
    prefetch(scale.data + begin * scale.stride);
  }
  wait_for_previous();

  float v[kChunk], s[kChunk], r[kChunk];
  uint32_t bits[kChunk];
  const auto weights_at = [&](int64_t c, int valid) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) bits[i] = weight && i < valid ? load_bits(weight, c + i) : 0;
    load_scales(scale, c, valid, s, r);
  };
  const auto finish = [&](int64_t c, int valid, float factor) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      v[i] *= factor;
      if (weight) v[i] *= from_bits(bits[i], weight.type);
    }
    quantize_chunk<kVector>(v, s, r, valid, out + c);
  };

  float squares = 0.0f;
  for (int64_t c = begin + step; c < columns; c += step) {
    load<kChunk, kVector>(x + c * column_stride, column_stride, valid_at(c), v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares = fmaf(v[i], v[i], squares);
  }
  const int valid = valid_at(begin);
  if (begin < columns) {
    load<kChunk, kVector>(x + begin * column_stride, column_stride, valid, v);
    weights_at(begin, valid);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares = fmaf(v[i], v[i], squares);
  }
  const float factor = rsqrtf(block_reduce(squares, Sum{}) / static_cast<float>(columns) + eps);
  if (begin < columns) finish(begin, valid, factor);
  for (int64_t c = begin + step; c < columns; c += step) {
    const int rest = valid_at(c);
    load<kChunk, kVector>(x + c * column_stride, column_stride, rest, v);
    weights_at(c, rest);
    finish(c, rest, factor);
  }
}

}  // namespace quamba
