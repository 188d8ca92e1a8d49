// causal_conv1d_step of int8 with four taps: a thread takes four neighbouring channels, whose states are four words, of
// a few sequences, for which it reads what belongs to the channels once.
#pragma once

#include "quamba/causal_conv1d.cuh"
#include "quamba/four.cuh"
#include "quamba/launch.cuh"

namespace quamba {

constexpr int kConvStepThreads = 128;
constexpr int kConvSequences = 2;  // of a thread, at most

// What belongs to four neighbouring channels, and their step: four taps, parameters and states aligned to four.
struct ConvColumns {
  float taps[4][4], factor[4], bias[4], out_scale[4];

  ConvColumns() = default;

  __device__ __forceinline__ ConvColumns(const AnyVector& weight, const Scale& weight_scale, const AnyVector& bias_of,
                                         const Scale& x_scale, const Scale& out_scale_of, int64_t c) {
    const FourBits tap_bits[4] = {{weight, 4 * c}, {weight, 4 * c + 4}, {weight, 4 * c + 8}, {weight, 4 * c + 12}};
    const FourBits bias_bits(bias_of, c);
    float weight_scales[4];
    four_scales(x_scale, c, factor);
    four_scales(weight_scale, c, weight_scales);
    four_scales(out_scale_of, c, out_scale);
    bias_bits.widen(bias_of.type, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tap_bits[i].widen(weight.type, taps[i]);
      factor[i] *= weight_scales[i];
    }
  }

  // The states, of four words, with the inputs x: the oldest, lowest, goes; x becomes the highest.
  static __device__ __forceinline__ uint4 shifted(const uint4& state, uint32_t x) {
    return make_uint4(__byte_perm(state.x, x, 0x4321), __byte_perm(state.y, x, 0x5321),
                      __byte_perm(state.z, x, 0x6321), __byte_perm(state.w, x, 0x7321));
  }

  __device__ __forceinline__ void apply(const uint4& state, float (&y)[4]) const {
    const uint32_t words[4] = {state.x, state.y, state.z, state.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float window[4], acc = 0.0f;
      unpack_bytes(words[i], window);
#pragma unroll
      for (int k = 0; k < 4; ++k) acc = fmaf(taps[i][k], window[k], acc);
      y[i] = silu(fmaf(acc, factor[i], bias[i]));
    }
  }

  __device__ __forceinline__ void store(const float (&y)[4], int8_t* out) const {
    uint32_t bytes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes[i] = round_to_byte(y[i] * reciprocal_approx(out_scale[i]));
    store_bytes<4, true>(out, 4, bytes);
  }
  template <typename Out>
  __device__ __forceinline__ void store(const float (&y)[4], Out* out) const {
    ConvStep<Out> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.value[i] = from_float<Out>(y[i]);
    *reinterpret_cast<ConvStep<Out>*>(out) = result;
  }
};

// A sequence's new state and result are exactly those of causal_conv1d_kernel.
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
  const ConvColumns columns(p.weight, p.weight_scale, p.bias, p.x_scale, p.out_scale, c);
#pragma unroll
  for (int s = 0; s < kConvSequences; ++s) {
    if (b0 + s >= p.batch) return;
    const uint4 next = ConvColumns::shifted(words[s], x[s]);
    *reinterpret_cast<uint4*>(state + s * p.state_batch) = next;
    float y[4];
    columns.apply(next, y);
    columns.store(y, static_cast<Out*>(p.out) + (b0 + s) * p.channels + c);
  }
}

}  // namespace quamba
