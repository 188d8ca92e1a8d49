// quantize: float to int8 with given scales. quantize_per_token: with each row's absmax / 127.
#pragma once

#include "quamba/reduce.cuh"
#include "quamba/types.cuh"

namespace quamba {

constexpr int kChunk = 8;  // elements a thread handles at a time
constexpr float kAlphaFloor = 1e-8f;

template <bool kVector>
__device__ __forceinline__ void quantize_chunk(const float* v, const float* scale, const float* reciprocal, int valid,
                                               int8_t* out) {
  uint32_t bytes[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) bytes[i] = round_to_byte(divide(v[i], scale[i], reciprocal[i]));
  store_bytes<kChunk, kVector>(out, valid, bytes);
}

// The scales of kChunk columns from `column` on.
__device__ __forceinline__ void load_scales(Scale scale, int64_t column, int valid, float* value, float* reciprocal) {
  if (scale.stride == 0) {
    const float s = scale.data[0], r = reciprocal_approx(s);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) value[i] = s, reciprocal[i] = r;
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      value[i] = i < valid ? scale.data[column + i] : 1.0f;
      reciprocal[i] = reciprocal_approx(value[i]);
    }
  }
}

// x (rows, columns) with strides; out contiguous. row_scale: the scale is one per row instead of per column.
template <typename T, bool kVector>
__global__ void __launch_bounds__(256)
    quantize_kernel(const T* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Scale scale,
                    bool row_scale, int8_t* out) {
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * chunks; i += step) {
    const int64_t row = i / chunks, column = (i - row * chunks) * kChunk;
    const int valid = static_cast<int>(columns - column < kChunk ? columns - column : kChunk);
    float v[kChunk], s[kChunk], r[kChunk];
    load<kChunk, kVector>(x + row * row_stride + column * column_stride, column_stride, valid, v);
    if (row_scale) {
      load_scales({scale.data + row, 0}, 0, valid, s, r);
    } else {
      load_scales(scale, column, valid, s, r);
    }
    quantize_chunk<kVector>(v, s, r, valid, out + row * columns + column);
  }
}

// One block a row.
template <typename T, bool kVector>
__global__ void __launch_bounds__(512)
    quantize_per_token_kernel(const T* x, int64_t row_stride, int64_t column_stride, int64_t columns, int8_t* out,
                              float* scales) {
  x += blockIdx.x * row_stride;
  out += blockIdx.x * columns;
  float v[kChunk];
  float largest = 0.0f;
  for (int64_t c = threadIdx.x * kChunk; c < columns; c += blockDim.x * kChunk) {
    const int valid = static_cast<int>(columns - c < kChunk ? columns - c : kChunk);
    load<kChunk, kVector>(x + c * column_stride, column_stride, valid, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) largest = fmaxf(largest, fabsf(v[i]));
  }
  const float scale = __fdiv_rn(fmaxf(block_reduce(largest, Max{}), kAlphaFloor), 127.0f);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  float s[kChunk], r[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) s[i] = scale, r[i] = reciprocal_approx(scale);
  for (int64_t c = threadIdx.x * kChunk; c < columns; c += blockDim.x * kChunk) {
    const int valid = static_cast<int>(columns - c < kChunk ? columns - c : kChunk);
    load<kChunk, kVector>(x + c * column_stride, column_stride, valid, v);
    quantize_chunk<kVector>(v, s, r, valid, out + c);
  }
}

}  // namespace quamba
