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
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) / 4;
  const int j = threadIdx.x & 3;
  const bool live = index < p.channels;
  const int64_t c = live ? index : 0;
  const float* A = p.A + c * p.a_channel;
  float* state = p.state + b * p.state_batch + c * p.state_channel;
  // Everything is asked for before the first wait.
  float4 a{}, h{};
  if (kVector && 4 * j < p.states) {
    a = *reinterpret_cast<const float4*>(A + 4 * j);
    h = *reinterpret_cast<const float4*>(state + 4 * j);
  }
  const auto bits = [&](const Sequence& s) { return load_bits({s.data, s.type}, b * s.batch + c * s.channel); };
  const uint32_t x_bits = bits(p.x), dt_bits = bits(p.dt), z_bits = p.z.data ? bits(p.z) : 0;
  const uint32_t bias_bits = load_bits(p.dt_bias, c), skip_bits = load_bits(p.D, c);
  const float xs = p.x.scale.or_one(c), ds = p.dt.scale.or_one(c), zs = p.z.scale.or_one(c);
  const float os = p.out_scale.or_one(c);
  for (int n = threadIdx.x; n < p.states; n += kStepThreads) {
    bs[n] = element(p.B, b, n);
    cs[n] = element(p.C, b, n);
  }
  __syncthreads();
  const float x = from_bits(x_bits, p.x.type) * xs, skip = from_bits(skip_bits, p.D.type);
  const float dt = softplus(fmaf(from_bits(dt_bits, p.dt.type), ds, from_bits(bias_bits, p.dt_bias.type)));
  const float dtx = dt * x;
  float y = 0.0f;
  for (int n0 = 4 * j; n0 < p.states; n0 += 16) {
    if constexpr (kVector) {
      if (n0 >= 16) {
        a = *reinterpret_cast<const float4*>(A + n0);
        h = *reinterpret_cast<const float4*>(state + n0);
      }
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
        const float value = fmaf(decay, state[n * p.state_state], dtx * bs[n]);
        if (live) state[n * p.state_state] = value;
        y = fmaf(value, cs[n], y);
      }
    }
  }
  y += __shfl_xor_sync(0xffffffffu, y, 1);
  y += __shfl_xor_sync(0xffffffffu, y, 2);
  if (!live || j != 0) return;
  y = fmaf(skip, x, y);
  if (p.z.data) y *= silu(from_bits(z_bits, p.z.type) * zs);
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
