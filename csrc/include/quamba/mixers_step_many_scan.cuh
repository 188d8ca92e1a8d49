// mixers_step for many sequences: between the products, but for the recurrence: the convolution, W_x, W_dt.
#pragma once

#include "quamba/mixers_step_many.cuh"
#include "quamba/mixers_step_scan.cuh"

namespace quamba {

// Of one thread block, between the parts of a block of the stack.
struct ManyScratch {
  float2* items;   // (tokens, channels): dt, the gate
  int8_t *x, *d;   // operands of W_x and W_dt, with zeros where there are no sequences, channels or ranks
  float* bc;       // (tokens, 2 N)
  float* wide;     // (tokens, R + 2 N): before the norms of d, B and C
};

constexpr int kWindows = 2;  // of the convolution, that a worker asks for early

__device__ __forceinline__ void first_windows(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                              uint32_t (&window)[kWindows]) {
#pragma unroll
  for (int u = 0; u < kWindows; ++u) {
    const int i = threadIdx.x + u * kManyWorkers, m = share.over_channels.of(i), c = i - m * share.channels;
    window[u] = p.f.width == 4 && m < p.tokens
                    ? __ldcg(reinterpret_cast<const unsigned*>(numbers.block().conv_state + m * p.f.conv_batch) +
                             share.channel + c)
                    : 0;
  }
}

// x0 and z from their sums, the convolution, x, the gate.
template <int GROUPS>
__device__ __forceinline__ void convolve_many(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                              const uint32_t (&window)[kWindows], int* acc,
                                              const ManyScratch& scratch) {
  constexpr int kPitch = many_pitch(GROUPS);
  const int width = p.f.width;
  const float u_scale = numbers.one(kUScale);
  const int count = p.tokens * share.channels;
  // Some items of a worker at a time, step by step, for none has to wait for another one.
  const auto some = [&](auto at_a_time, int first, const uint32_t* before) {
    constexpr int kItems = decltype(at_a_time)::value;
    int m[kItems], c[kItems];
    const float* number[kItems];
    int8_t x0[kItems];
    float gate[kItems], sum[kItems];
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      const int i = min(first + u * kManyWorkers, count - 1);
      m[u] = share.over_channels.of(i), c[u] = i - m[u] * share.channels, number[u] = numbers.channel(c[u]);
    }
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      int *const x_at = acc + c[u] * kPitch + m[u], *const z_at = x_at + share.channels * kPitch;
      const float x_sum = static_cast<float>(*x_at), z_sum = static_cast<float>(*z_at);
      if (first + u * kManyWorkers < count) *x_at = *z_at = 0;
      const float* const n = number[u];
      x0[u] = byte_of(__fadd_rn(__fmul_rn(x_sum, __fmul_rn(u_scale, n[kInX])), n[kBiasX]), n[kScaleX]);
      const float z = __fadd_rn(__fmul_rn(z_sum, __fmul_rn(u_scale, n[kInZ])), n[kBiasZ]);
      gate[u] = silu(static_cast<float>(byte_of(z, n[kScaleZ])) * n[kScaleZ]);
    }
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      int8_t* const state =
          numbers.block().conv_state + m[u] * p.f.conv_batch + static_cast<int64_t>(share.channel + c[u]) * width;
      const int8_t* const taps = numbers.taps() + c[u] * width;
      const bool live = first + u * kManyWorkers < count;
      sum[u] = 0.0f;
      if (width == 4) {
        const uint32_t word = __byte_perm(before[u], static_cast<uint8_t>(x0[u]), 0x4321);
        if (live) __stcg(reinterpret_cast<unsigned*>(state), word);
        float values[4], weight[4];
        unpack_bytes(word, values);
        unpack_bytes(*reinterpret_cast<const uint32_t*>(taps), weight);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[u] = fmaf(weight[k], values[k], sum[u]);
      } else if (live) {
#pragma unroll 1
        for (int k = 0; k < width; ++k) {
          const int8_t value = k + 1 < width ? state[k + 1] : x0[u];
          state[k] = value;
          sum[u] = fmaf(static_cast<float>(taps[k]), static_cast<float>(value), sum[u]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      const float* const n = number[u];
      const float y = silu(fmaf(sum[u], n[kScaleX] * n[kConvScale], n[kConvBias]));
      const int8_t x = static_cast<int8_t>(round_to_byte(y * reciprocal_approx(n[kXScale])) & 0xff);
      if (first + u * kManyWorkers < count) {
        scratch.x[m[u] * p.s.x_pitch + c[u]] = x;
        scratch.items[m[u] * p.channels + c[u]].y = gate[u];
      }
    }
  };
  const int first = threadIdx.x;
  if (first + kManyWorkers < count) {
    some(std::integral_constant<int, kWindows>(), first, window);
  } else if (first < count) {
    some(std::integral_constant<int, 1>(), first, window);
  }
#pragma unroll 1
  for (int i = first + kWindows * kManyWorkers; i < count; i += kManyWorkers) {
    const int m = share.over_channels.of(i), c = i - m * share.channels;
    const uint32_t before =
        width == 4 ? __ldcg(reinterpret_cast<const unsigned*>(numbers.block().conv_state + m * p.f.conv_batch) +
                            share.channel + c)
                   : 0;
    some(std::integral_constant<int, 1>(), i, &before);
  }
}

// The sums of a tile of 16 rows of a weight in shared memory times eight sequences, K in steps of 32.
__device__ __forceinline__ void multiply_tile(const int* weight, int pitch, int row, int rows, const int* x, int steps,
                                              int (&sum)[4]) {
  const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
  const int *low = weight + min(row + g, rows - 1) * pitch + q, *high = weight + min(row + g + 8, rows - 1) * pitch + q;
#pragma unroll 5
  for (int k = 0; k < 8 * steps; k += 8) mma(sum, low[k], high[k], low[k + 4], high[k + 4], x[k], x[k + 4]);
}

// W_dt and softplus: dt to the items. Two warps multiply the same tile, and have half of its sums each: what comes
// behind them takes longer.
template <int GROUPS>
__device__ __forceinline__ void find_dt(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                        const ManyScratch& scratch) {
  const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3, channels = share.channels;
#pragma unroll 1
  for (int task = threadIdx.x / 32; task < divide_up(channels, 16) * GROUPS * 2; task += kManyWarps) {
    const int row = task / 2 / GROUPS * 16, f = task / 2 % GROUPS, half = task % 2, c = row + g + 8 * half;
    int sum[4] = {};
    multiply_tile(numbers.dt_weight(), p.f.rank / 4, row, channels,
                  reinterpret_cast<const int*>(scratch.d + (8 * f + g) * p.s.d_pitch) + q, divide_up(p.f.rank, 32),
                  sum);
    if (c >= channels) continue;
    const float* const number = numbers.channel(c);
    const float dt_scale = p.f.has_dt_scale ? number[kDtScale] : 1.0f, dt_bias = number[kDtBias];
    const float sum_scale = __fmul_rn(numbers.sum(0)[1], number[kDtWeightScale]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = 8 * f + 2 * q + i;
      float dt = __fmul_rn(static_cast<float>(half ? sum[2 + i] : sum[i]), sum_scale);
      if (p.f.has_dt_scale) dt = static_cast<float>(byte_of(dt, dt_scale));
      dt = softplus(fmaf(dt, dt_scale, dt_bias));
      if (m < p.tokens) scratch.items[m * p.channels + c].x = dt;
    }
  }
}

}  // namespace quamba
