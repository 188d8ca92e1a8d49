// causal_conv1d_step of int8 with four taps: a thread takes four neighbouring channels, whose states are four words, of
// a few sequences, for which it reads what belongs to the channels once.
#pragma once

#include "quamba/causal_conv1d.cuh"
#include "quamba/four.cuh"
#include "quamba/launch.cuh"

namespace quamba {

constexpr int kConvStepThreads = 128;
constexpr int kConvSequences = 2;  // of a thread, at most

// Four taps; all channels, parameters and states aligned to four. A sequence's new state and result are exactly those
// of causal_conv1d_kernel.
template <typename Out>
__global__ void __launch_bounds__(kConvStepThreads) causal_conv1d_step_kernel(const ConvParams p) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kConvStepThreads + threadIdx.x) * kConvChannels;
  const int64_t b0 = static_cast<int64_t>(blockIdx.y) * kConvSequences;
  let_next_start();
  if (c >= p.channels) return;
  if (b0 == 0) {
    prefetch(static_cast<const char*>(p.weight.data) + 4 * c * size_of(p.weight.type));
    if (p.bias) prefetch(static_cast<const char*>(p.bias.data) + c * size_of(p.bias.type));
    if (p.x_scale) prefetch(p.x_scale.data + c * p.x_scale.stride);
    if (p.weight_scale) prefetch(p.weight_scale.data + c * p.weight_scale.stride);
    if (p.out_scale) prefetch(p.out_scale.data + c * p.out_scale.stride);
  }
  wait_for_previous();

  int8_t* const state = static_cast<int8_t*>(p.state) + b0 * p.state_batch + 4 * c;
  uint4 words[kConvSequences];
  uint32_t x[kConvSequences];
#pragma unroll
  for (int s = 0; s < kConvSequences; ++s) {
    const int64_t from = b0 + s < p.batch ? s : 0;
    words[s] = *reinterpret_cast<const uint4*>(state + from * p.state_batch);
    x[s] = *reinterpret_cast<const uint32_t*>(static_cast<const int8_t*>(p.x) + (b0 + from) * p.x_batch + c);
  }
  const AnyVector& w = p.weight;
  const FourBits tap_bits[4] = {{w, 4 * c}, {w, 4 * c + 4}, {w, 4 * c + 8}, {w, 4 * c + 12}};
  const FourBits bias_bits(p.bias, c);
  float x_scale[4], weight_scale[4], out_scale[4], bias[4], taps[4][4];
  four_scales(p.x_scale, c, x_scale);
  four_scales(p.weight_scale, c, weight_scale);
  four_scales(p.out_scale, c, out_scale);
  bias_bits.widen(p.bias.type, bias);
#pragma unroll
  for (int i = 0; i < 4; ++i) tap_bits[i].widen(p.weight.type, taps[i]);

#pragma unroll
  for (int s = 0; s < kConvSequences; ++s) {
    if (b0 + s >= p.batch) return;
    // The oldest, lowest, goes; x becomes the highest.
    const uint32_t next[4] = {__byte_perm(words[s].x, x[s], 0x4321), __byte_perm(words[s].y, x[s], 0x5321),
                              __byte_perm(words[s].z, x[s], 0x6321), __byte_perm(words[s].w, x[s], 0x7321)};
    *reinterpret_cast<uint4*>(state + s * p.state_batch) = make_uint4(next[0], next[1], next[2], next[3]);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float window[4], acc = 0.0f;
      unpack_bytes(next[i], window);
#pragma unroll
      for (int k = 0; k < 4; ++k) acc = fmaf(taps[i][k], window[k], acc);
      y[i] = silu(fmaf(acc, x_scale[i] * weight_scale[i], bias[i]));
    }
    Out* const out = static_cast<Out*>(p.out) + (b0 + s) * p.channels + c;
    if constexpr (sizeof(Out) == 1) {
      uint32_t bytes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bytes[i] = round_to_byte(y[i] * reciprocal_approx(out_scale[i]));
      store_bytes<4, true>(out, 4, bytes);
    } else {
      ConvStep<Out> result;
#pragma unroll
      for (int i = 0; i < 4; ++i) result.value[i] = from_float<Out>(y[i]);
      *reinterpret_cast<ConvStep<Out>*>(out) = result;
    }
  }
}

}  // namespace quamba
