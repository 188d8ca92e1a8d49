// mixers_step: the Hadamard transform of one row of g, by the workers of a thread block, and its rounding.
#pragma once

#include "quamba/hadamard_quant.cuh"
#include "quamba/mixers_step_tags.cuh"

namespace quamba {

// The base matrix across the rows of the (base, power) matrix: a worker takes a column.
template <int BASE>
__device__ __forceinline__ void rotate_base(const unsigned long long* g, unsigned tag, int power, float* shared) {
  for (int column = threadIdx.x; column < power; column += kStackWorkers) {
    float v[BASE];
    bool there;
    // The last one first, alone: while it is not there, asking for the others would only burden the memory.
    do there = arrived(load_tagged(g + (BASE - 1) * power + column), tag, &v[BASE - 1]);
    while (!there);
    do {
      unsigned long long words[BASE - 1];
      const unsigned long long* from = g + column;
      asm volatile("" : "+l"(from));  // the addresses are not worth keeping for another turn
#pragma unroll
      for (int i = 0; i < BASE - 1; ++i, from += power) words[i] = load_tagged(from);
      there = true;
#pragma unroll
      for (int i = 0; i < BASE - 1; ++i) there &= arrived(words[i], tag, &v[i]);
    } while (!there);
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
__device__ __forceinline__ void rotate_row(const StackPlan& p, const unsigned long long* g, unsigned tag,
                                           float scale, float* shared, int8_t* out) {
  const int order = p.f.inner;
  switch (p.base) {
    case 12:
      rotate_base<12>(g, tag, p.power, shared);
      break;
    case 20:
      rotate_base<20>(g, tag, p.power, shared);
      break;
    default:
      for_tagged(g, order, tag, [&](int i, float4 v) {
        const int at = padded_index(4 * i);
        shared[at] = v.x, shared[at + 1] = v.y, shared[at + 2] = v.z, shared[at + 3] = v.w;
      });
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
