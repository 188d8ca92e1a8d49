// rms_norm_quant: x / sqrt(mean(x^2) + eps) * weight, quantized. One block a row. A thread keeps its first piece of the
// row in registers; what is longer than all threads' pieces is read a second time, from the cache. Of many rows, whose
// instructions are what takes time, a thread has two pieces, and everything comes in vectors.
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

// The weights of a thread's pieces, as they are in memory, and one decision about their type for all of them. Pieces
// past the end stand for the first one.
struct NormWeights {
  uint4 bits[kNormPieces][2];

  __device__ __forceinline__ NormWeights(const AnyVector& weight, int begin, int step, int columns) {
    const auto each = [&](auto&& of_piece) {
#pragma unroll
      for (int i = 0; i < kNormPieces; ++i) of_piece(bits[i], (begin + i * step < columns ? begin + i * step : 0) / 8);
    };
    const uint4* const fours = static_cast<const uint4*>(weight.data);
    if (!weight) return;
    if (weight.type == Type::kFloat) {
      each([&](uint4(&to)[2], int i) { to[0] = fours[2 * i], to[1] = fours[2 * i + 1]; });
    } else if (weight.type == Type::kInt8) {
      const uint2* const twos = static_cast<const uint2*>(weight.data);
      each([&](uint4(&to)[2], int i) { to[0] = make_uint4(twos[i].x, twos[i].y, 0, 0); });
    } else {
      each([&](uint4(&to)[2], int i) { to[0] = fours[i]; });
    }
  }

  template <Type kType>
  __device__ __forceinline__ void multiply_as(float (&v)[kNormPieces][kChunk]) const {
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i) {
      const uint32_t words[8] = {bits[i][0].x, bits[i][0].y, bits[i][0].z, bits[i][0].w,
                                 bits[i][1].x, bits[i][1].y, bits[i][1].z, bits[i][1].w};
      constexpr int kPerWord = 4 / size_of(kType), kBits = 8 * size_of(kType);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const uint32_t word = words[k / kPerWord] >> kBits * (k % kPerWord);
        v[i][k] *= from_bits(kBits == 32 ? word : word & ((1u << kBits % 32) - 1), kType);
      }
    }
  }

  __device__ __forceinline__ void multiply(const AnyVector& weight, float (&v)[kNormPieces][kChunk]) const {
    if (!weight) return;
    switch (weight.type) {
      case Type::kInt8:
        return multiply_as<Type::kInt8>(v);
      case Type::kHalf:
        return multiply_as<Type::kHalf>(v);
      case Type::kBFloat16:
        return multiply_as<Type::kBFloat16>(v);
      default:
        return multiply_as<Type::kFloat>(v);
    }
  }
};

// A row a block, all of it in registers: at most kNormPieces * kNormThreads pieces. x and the weight are aligned to 16
// bytes, and the columns are a multiple of kChunk. inverse: 1 / columns.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_quant_rows_kernel(const T* x, int64_t row_stride, int columns, float inverse, AnyVector weight,
                               Scale scale, float eps, int8_t* out) {
  static_assert(kChunk == 8, "a piece is two vectors of four");
  const int step = static_cast<int>(blockDim.x) * kChunk, begin = static_cast<int>(threadIdx.x) * kChunk;
  x += blockIdx.x * row_stride + begin;
  out += static_cast<int64_t>(blockIdx.x) * columns + begin;
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

  float v[kNormPieces][kChunk] = {};
#pragma unroll
  for (int i = 0; i < kNormPieces; ++i)
    if (begin + i * step < columns) load<kChunk, true>(x + i * step, 1, kChunk, v[i]);
  const NormWeights weights(weight, begin, step, columns);
  float s[kChunk], r[kChunk];
  if (scale.stride == 0) load_scales(scale, 0, kChunk, s, r);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormPieces; ++i)
#pragma unroll
    for (int k = 0; k < kChunk; ++k) squares = fmaf(v[i][k], v[i][k], squares);
  const float factor = rsqrtf(fmaf(block_reduce(squares, Sum{}), inverse, eps));
#pragma unroll
  for (int i = 0; i < kNormPieces; ++i)
#pragma unroll
    for (int k = 0; k < kChunk; ++k) v[i][k] *= factor;
  weights.multiply(weight, v);
#pragma unroll
  for (int i = 0; i < kNormPieces; ++i) {
    const int c = begin + i * step;
    if (c >= columns) return;
    if (scale.stride) load_scales(scale, c, kChunk, s, r);
    quantize_chunk<true>(v[i], s, r, kChunk, out + i * step);
  }
}

}  // namespace quamba
