// selective_scan_step: one token of the recurrence. Four lanes a channel, the state read and written once.
#pragma once

#include "quamba/selective_scan.cuh"

namespace quamba {

constexpr int kStepThreads = 128;

__device__ __forceinline__ float element(const Sequence& s, int64_t b, int64_t c) {
  return AnyVector{s.data, s.type}[b * s.batch + c * s.channel] * s.scale.or_one(c);
}

// kVector: N is a multiple of 4, and the states of a channel, and its row of A, are contiguous and aligned.
template <bool kVector>
__global__ void __launch_bounds__(kStepThreads) selective_scan_step_kernel(const ScanParams p) {
  extern __shared__ __align__(16) float shared[];
  float* bs = shared;
  float* cs = shared + (p.states + 3) / 4 * 4;
  const int64_t b = blockIdx.y;
  for (int n = threadIdx.x; n < p.states; n += kStepThreads) {
    bs[n] = element(p.B, b, n);
    cs[n] = element(p.C, b, n);
  }
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) / 4;
  const int j = threadIdx.x & 3;
  const bool live = index < p.channels;
  const int64_t c = live ? index : 0;
  const float x = element(p.x, b, c), dt = softplus(element(p.dt, b, c) + p.dt_bias[c]), dtx = dt * x;
  const float* A = p.A + c * p.a_channel;
  float* state = p.state + b * p.state_batch + c * p.state_channel;
  __syncthreads();
  float y = 0.0f;
  for (int n0 = 4 * j; n0 < p.states; n0 += 16) {
    if constexpr (kVector) {
      const float4 a = *reinterpret_cast<const float4*>(A + n0);
      float4 h = *reinterpret_cast<const float4*>(state + n0);
      const float4 b4 = *reinterpret_cast<const float4*>(bs + n0), c4 = *reinterpret_cast<const float4*>(cs + n0);
      h.x = fmaf(exp2_approx(dt * (a.x * kLog2E)), h.x, dtx * b4.x);
      h.y = fmaf(exp2_approx(dt * (a.y * kLog2E)), h.y, dtx * b4.y);
      h.z = fmaf(exp2_approx(dt * (a.z * kLog2E)), h.z, dtx * b4.z);
      h.w = fmaf(exp2_approx(dt * (a.w * kLog2E)), h.w, dtx * b4.w);
      if (live) *reinterpret_cast<float4*>(state + n0) = h;
      y = fmaf(h.x, c4.x, fmaf(h.y, c4.y, fmaf(h.z, c4.z, fmaf(h.w, c4.w, y))));
    } else {
      for (int n = n0; n < n0 + 4 && n < p.states; ++n) {
        const float decay = exp2_approx(dt * (A[n * p.a_state] * kLog2E));
        const float h = fmaf(decay, state[n * p.state_state], dtx * bs[n]);
        if (live) state[n * p.state_state] = h;
        y = fmaf(h, cs[n], y);
      }
    }
  }
  y += __shfl_xor_sync(0xffffffffu, y, 1);
  y += __shfl_xor_sync(0xffffffffu, y, 2);
  if (!live || j != 0) return;
  y = fmaf(p.D[c], x, y);
  if (p.z.data) y *= silu(element(p.z, b, c));
  const float os = p.out_scale.or_one(c);
  const int64_t at = b * p.channels + c;
  switch (p.out_type) {
    case Type::kInt8:
      return Store<int8_t>::one(static_cast<int8_t*>(p.out) + at, y, os, reciprocal_approx(os));
    case Type::kHalf:
      return Store<__half>::one(static_cast<__half*>(p.out) + at, y, os, 1.0f);
    case Type::kBFloat16:
      return Store<__nv_bfloat16>::one(static_cast<__nv_bfloat16*>(p.out) + at, y, os, 1.0f);
    default:
      return Store<float>::one(static_cast<float*>(p.out) + at, y, os, 1.0f);
  }
}

}  // namespace quamba
