// selective_scan_step: one token of the recurrence. Four lanes a channel, the state read and written once.
#pragma once

#include "quamba/selective_scan.cuh"

namespace quamba {

__device__ __forceinline__ float element(const Sequence& s, int64_t b, int64_t c) {
  return AnyVector{s.data, s.type}[b * s.batch + c * s.channel] * s.scale.or_one(c);
}

__global__ void __launch_bounds__(128) selective_scan_step_kernel(const ScanParams p) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 4;
  const int j = threadIdx.x & 3;
  const bool live = index < p.batch * p.channels;
  const int64_t b = live ? index / p.channels : 0, c = live ? index % p.channels : 0;
  const float x = element(p.x, b, c), dt = softplus(element(p.dt, b, c) + p.dt_bias[c]), dtx = dt * x;
  const float* A = p.A + c * p.a_channel;
  float* state = p.state + b * p.state_batch + c * p.state_channel;
  float y = 0.0f;
  for (int n0 = 4 * j; n0 < p.states; n0 += 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = n0 + i;
      if (n >= p.states) break;
      const float decay = exp2_approx(dt * (A[n * p.a_state] * kLog2E));
      const float h = fmaf(decay, state[n * p.state_state], dtx * element(p.B, b, n));
      if (live) state[n * p.state_state] = h;
      y = fmaf(h, element(p.C, b, n), y);
    }
  }
  y += __shfl_xor_sync(0xffffffffu, y, 1);
  y += __shfl_xor_sync(0xffffffffu, y, 2);
  if (!live || j != 0) return;
  y = fmaf(p.D[c], x, y);
  if (p.z.data) y *= silu(element(p.z, b, c));
  const float os = p.out_scale.or_one(c);
  switch (p.out_type) {
    case Type::kInt8:
      return Store<int8_t>::one(static_cast<int8_t*>(p.out) + index, y, os, __frcp_rn(os));
    case Type::kHalf:
      return Store<__half>::one(static_cast<__half*>(p.out) + index, y, os, 1.0f);
    case Type::kBFloat16:
      return Store<__nv_bfloat16>::one(static_cast<__nv_bfloat16*>(p.out) + index, y, os, 1.0f);
    default:
      return Store<float>::one(static_cast<float*>(p.out) + index, y, os, 1.0f);
  }
}

}  // namespace quamba
