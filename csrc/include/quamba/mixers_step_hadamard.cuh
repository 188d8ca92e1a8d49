// mixers_step: the Hadamard transform of one row of g, by the workers of a thread block, and its rounding. The same
// additions in the same order as in hadamard_quant.cuh, but for the base matrix its signs are numbers in shared memory
// and its rows a loop: straight-line code of that length takes longer to fetch than to run, where it runs once between
// others.
#pragma once

#include "quamba/mixers_step_tags.cuh"

namespace quamba {

// The base matrix, row by row; before the workers start, by all threads.
template <int BASE, int ROW = 0>
__device__ __forceinline__ void write_signs(float* signs) {
  if constexpr (ROW < BASE) {
    constexpr uint64_t kBits = base_row(BASE, ROW);
    if (threadIdx.x < BASE) signs[ROW * BASE + threadIdx.x] = kBits >> threadIdx.x & 1 ? -1.0f : 1.0f;
    write_signs<BASE, ROW + 1>(signs);
  }
}

// The base matrix across the rows of the (base, power) matrix, in place. The worker of a column has it in registers;
// where there are more workers than columns, several have the same one and compute some of its rows each.
template <int BASE>
__device__ __forceinline__ void rotate_base(const float* signs, int log_power, float* shared) {
  const int power = 1 << log_power, parts = max(1, kStackWorkers >> log_power), pitch = padded_index(power);
  const int part = parts > 1 ? threadIdx.x >> log_power : 0;
#pragma unroll 1
  for (int column = threadIdx.x - part * power; column < power; column += kStackWorkers) {
    float* const at = shared + padded_index(column);
    float v[BASE];
#pragma unroll
    for (int i = 0; i < BASE; ++i) v[i] = at[i * pitch];
    if (parts > 1) team_sync();
#pragma unroll 1
    for (int row = part; row < BASE; row += 2 * parts) {
      // Two rows, and two sums for each, so that additions need not wait for each other.
      const int second = min(row + parts, BASE - 1);
      float even[2] = {}, odd[2] = {};
#pragma unroll
      for (int i = 0; i < BASE; i += 4)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float4 s = reinterpret_cast<const float4*>(signs + (k ? second : row) * BASE)[i / 4];
          even[k] = fmaf(s.x, v[i], even[k]), odd[k] = fmaf(s.y, v[i + 1], odd[k]);
          even[k] = fmaf(s.z, v[i + 2], even[k]), odd[k] = fmaf(s.w, v[i + 3], odd[k]);
        }
      at[row * pitch] = even[0] + odd[0];
      if (row + parts < BASE) at[second * pitch] = even[1] + odd[1];
    }
  }
  team_sync();
}

// LOG_RADIX butterfly stages at strides 2^log_stride and up, in place.
template <int LOG_RADIX>
__device__ __forceinline__ void rotate_middle(float* shared, int order, int log_stride) {
  constexpr int kRadix = 1 << LOG_RADIX;
  // From one of a worker's numbers to the next, in padded_index: the stride is a multiple of sixteen.
  const int step = padded_index(1 << log_stride);
#pragma unroll 1
  for (int u = threadIdx.x; u < order >> LOG_RADIX; u += kStackWorkers) {
    const int low = u & ((1 << log_stride) - 1), first = ((u >> log_stride) << (log_stride + LOG_RADIX)) + low;
    float* const at = shared + padded_index(first);
    float v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = at[i * step];
    butterflies<LOG_RADIX>(v);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) at[i * step] = v[i];
  }
  team_sync();
}

// The last four stages, and the bytes. A worker has eight numbers, its neighbour the other eight of sixteen.
__device__ __forceinline__ void rotate_last(const float* shared, int order, float factor, float scale, int8_t* out) {
  const float reciprocal = reciprocal_approx(scale), sign = threadIdx.x & 1 ? -1.0f : 1.0f;
#pragma unroll 1
  for (int u0 = threadIdx.x & ~31; u0 < order / 8; u0 += kStackWorkers) {
    const int u = u0 + (threadIdx.x & 31);
    const bool live = u < order / 8;
    const float* const at = shared + (live ? padded_index(8 * u) : 0);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = at[i];
    butterflies<3>(v);
    uint32_t bytes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float turned = fmaf(sign, v[i], __shfl_xor_sync(0xffffffffu, v[i], 1));
      bytes[i] = round_to_byte(divide(turned * factor, scale, reciprocal));
    }
    if (live) store_bytes<8, true>(out + 8 * u, 8, bytes);
  }
}

// A row of g that fetch_tagged left in `shared`. D is power * base with power a multiple of 16; `out` is aligned to 16
// bytes.
template <int BASE>
__device__ __forceinline__ void rotate_row(const StackPlan& p, const float* signs, float scale, float* shared,
                                           int8_t* out) {
  const int order = p.f.inner;
  team_sync();
  if constexpr (BASE > 1) rotate_base<BASE>(signs, p.log_power, shared);
#pragma unroll 1
  for (int done = p.log_power; done > 4;) {
    const int stages = (done - 4) % 4 ? (done - 4) % 4 : 4;
    done -= stages;
    switch (stages) {
      case 1:
        rotate_middle<1>(shared, order, done);
        break;
      case 2:
        rotate_middle<2>(shared, order, done);
        break;
      case 3:
        rotate_middle<3>(shared, order, done);
        break;
      default:
        rotate_middle<4>(shared, order, done);
    }
  }
  rotate_last(shared, order, p.factor, scale, out);
}

}  // namespace quamba
