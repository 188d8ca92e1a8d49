// mixers_step: the Hadamard transform of one row of g, by the workers of a thread block, and its rounding.
#pragma once

#include "quamba/hadamard_quant.cuh"
#include "quamba/mixers_step_warps.cuh"

namespace quamba {

__device__ __forceinline__ void team_sync();

// The base matrix across the rows of the (base, power) matrix: a worker takes a column.
template <int BASE>
__device__ __forceinline__ void rotate_base(const float* g, int power, float* shared) {
  for (int column = threadIdx.x; column < power; column += kStackWorkers) {
    float v[BASE];
#pragma unroll
    for (int i = 0; i < BASE; ++i) v[i] = __ldcg(g + i * power + column);
    base_rows<BASE, 0>(v, shared, column, power);
  }
}

// LOG_RADIX butterfly stages at strides 2^log_stride and up, in place.
template <int LOG_RADIX>
__device__ __forceinline__ void rotate_middle(float* shared, int order, int log_stride) {
  constexpr int kRadix = 1 << LOG_RADIX;
  for (int u = threadIdx.x; u < order >> LOG_RADIX; u += kStackWorkers) {
    const int low = u & ((1 << log_stride) - 1), first = ((u >> log_stride) << (log_stride + LOG_RADIX)) + low;
    float v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = shared[padded_index(first + (i << log_stride))];
    butterflies<LOG_RADIX>(v);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) shared[padded_index(first + (i << log_stride))] = v[i];
  }
  team_sync();
}

// The last four stages, and the bytes.
__device__ __forceinline__ void rotate_last(const float* shared, int order, float factor, float scale, int8_t* out) {
  const float reciprocal = reciprocal_approx(scale);
  for (int u = threadIdx.x; u < order / 16; u += kStackWorkers) {
    float v[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = shared[padded_index(16 * u + i)];
    butterflies<4>(v);
    uint32_t bytes[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) bytes[i] = round_to_byte(divide(v[i] * factor, scale, reciprocal));
    store_bytes<16, true>(out + 16 * u, 16, bytes);
  }
}

// D is power * base with power a multiple of 16. `out` is aligned to 16 bytes.
__device__ __forceinline__ void rotate_row(const StackParams& p, const float* g, float scale, float* shared,
                                           int8_t* out) {
  const int order = p.f.inner;
  switch (p.base) {
    case 12:
      rotate_base<12>(g, p.power, shared);
      break;
    case 20:
      rotate_base<20>(g, p.power, shared);
      break;
    case 28:
      rotate_base<28>(g, p.power, shared);
      break;
    default:
      for (int i = threadIdx.x; i < order / 4; i += kStackWorkers) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(g) + i);
        const int at = padded_index(4 * i);
        shared[at] = v.x, shared[at + 1] = v.y, shared[at + 2] = v.z, shared[at + 3] = v.w;
      }
  }
  team_sync();
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
  team_sync();
}

}  // namespace quamba
