// rms_norm_quant: x / sqrt(mean(x^2) + eps) * weight, quantized. One block a row. A thread keeps its first piece of the
// row in registers; what is longer than all threads' pieces is read a second time, from the cache. Of many rows, a
// thread has two pieces, everything comes in vectors, and a block goes through rows.
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

constexpr int kNormPieces = 2, kNormThreads = 512;

// Threads of a multiprocessor, of a row's elements of so many bytes, that there are registers for.
constexpr int norm_resident(int size) { return size == 2 ? 800 : 704; }

// Eight neighbours as they are in memory, for their conversion not to wait next to the load.
template <typename T>
struct NormPiece {
  static_assert(kChunk == 8, "a piece is as many vectors as half an element has bytes");
  uint4 words[sizeof(T) / 2] = {};

  __device__ __forceinline__ void read(const T* at) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(at)[i];
  }

  __device__ __forceinline__ void convert(float (&v)[kChunk]) const {
    T elements[kChunk];
    memcpy(elements, words, sizeof(elements));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = to_float(elements[i]);
  }
};

// The weights of eight columns, or ones.
__device__ __forceinline__ void load_norm_weights(const AnyVector& weight, int column, float (&v)[kChunk]) {
  if (!weight) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = 1.0f;
    return;
  }
  switch (weight.type) {
    case Type::kInt8:
      return load<kChunk, true>(static_cast<const int8_t*>(weight.data) + column, 1, kChunk, v);
    case Type::kHalf:
      return load<kChunk, true>(static_cast<const __half*>(weight.data) + column, 1, kChunk, v);
    case Type::kBFloat16:
      return load<kChunk, true>(static_cast<const __nv_bfloat16*>(weight.data) + column, 1, kChunk, v);
    default:
      return load<kChunk, true>(static_cast<const float*>(weight.data) + column, 1, kChunk, v);
  }
}

// Blocks go through rows, each of which they have in registers: at most kNormPieces * kNormThreads pieces. The next row
// is on its way while one is computed. x and the weight are aligned to 16 bytes, and the columns are a multiple of
// kChunk. inverse: 1 / columns.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_quant_rows_kernel(const T* x, int64_t row_stride, int64_t rows, int columns, float inverse,
                               AnyVector weight, Scale scale, float eps, int8_t* out) {
  const int step = static_cast<int>(blockDim.x) * kChunk, begin = static_cast<int>(threadIdx.x) * kChunk;
  let_next_start();
  if (blockIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i) {
      const int c = begin + i * step;
      if (c < columns && weight) prefetch(static_cast<const char*>(weight.data) + c * size_of(weight.type));
      if (c < columns) prefetch(scale.data + c * scale.stride);
    }
  }
  wait_for_previous();

  NormPiece<T> next[kNormPieces];
  const auto read = [&](int64_t row) {
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i)
      if (begin + i * step < columns) next[i].read(x + row * row_stride + begin + i * step);
  };
  read(blockIdx.x);
  float weights[kNormPieces][kChunk];
#pragma unroll
  for (int i = 0; i < kNormPieces; ++i)  // pieces past the end stand for the first one
    load_norm_weights(weight, begin + i * step < columns ? begin + i * step : 0, weights[i]);
  float s[kChunk], r[kChunk];
  if (scale.stride == 0) load_scales(scale, 0, kChunk, s, r);
  int odd = 0;
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, odd ^= 1) {
    float v[kNormPieces][kChunk];
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i) next[i].convert(v[i]);
    if (row + gridDim.x < rows) read(row + gridDim.x);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i)
#pragma unroll
      for (int k = 0; k < kChunk; ++k) squares = fmaf(v[i][k], v[i][k], squares);
    const float factor = rsqrtf(fmaf(block_reduce(squares, Sum{}, odd), inverse, eps));
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i) {
      const int c = begin + i * step;
      if (c >= columns) continue;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) v[i][k] = v[i][k] * factor * weights[i][k];
      if (scale.stride) load_scales(scale, c, kChunk, s, r);
      quantize_chunk<true>(v[i], s, r, kChunk, out + row * columns + c);
    }
  }
}

}  // namespace quamba
