// causal_conv1d: depthwise causal convolution, bias, SiLU, quantization; channel-last. A thread slides along a piece
// of the sequence with the last inputs of its channels in registers.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

constexpr int kConvChannels = 4;  // a thread's channels: one word of int8
constexpr int kConvSteps = 16;    // a thread's time steps

struct ConvParams {
  int64_t batch, length, channels;
  int width;
  const void* x;
  int64_t x_batch, x_time, x_channel;  // strides
  Scale x_scale;
  AnyVector weight;  // (D, K), contiguous
  Scale weight_scale;
  AnyVector bias;
  Scale out_scale;
  const uint8_t* mask;
  int64_t mask_batch, mask_time;
  void* state;  // (B, D, K) of x's type
  int64_t state_batch, state_channel, state_time;
  void* out;  // (B, L, D), contiguous
};

// The input at time t < 0 from the state: its newest entry, K - 1, is time -1.
template <typename T>
__device__ __forceinline__ T state_at(const ConvParams& p, int64_t b, int64_t c, int64_t t) {
  return static_cast<const T*>(p.state)[b * p.state_batch + c * p.state_channel + (p.width + t) * p.state_time];
}

// kWidth >= p.width: narrower kernels have leading taps of zero. Zero-weight taps read zeros, never memory.
template <typename T, typename Out, int kWidth, bool kVector>
__global__ void __launch_bounds__(128) causal_conv1d_kernel(const ConvParams p) {
  const int64_t c0 = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kConvChannels;
  if (c0 >= p.channels) return;
  const int64_t b = blockIdx.z, begin = static_cast<int64_t>(blockIdx.y) * kConvSteps;
  const int64_t end = begin + kConvSteps < p.length ? begin + kConvSteps : p.length;
  const int valid = static_cast<int>(p.channels - c0 < kConvChannels ? p.channels - c0 : kConvChannels);
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch + c0 * p.x_channel;
  const uint8_t* mask = p.mask ? p.mask + b * p.mask_batch : nullptr;

  float weight[kWidth][kConvChannels], xs[kConvChannels], ws[kConvChannels], bias[kConvChannels];
  float os[kConvChannels], reciprocal[kConvChannels];
  const int shift = kWidth - p.width;
#pragma unroll
  for (int i = 0; i < kConvChannels; ++i) {
    const int64_t c = c0 + (i < valid ? i : 0);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[k][i] = k >= shift ? p.weight[c * p.width + k - shift] : 0.0f;
    xs[i] = p.x_scale.or_one(c);
    ws[i] = p.weight_scale.or_one(c);
    bias[i] = p.bias ? p.bias[c] : 0.0f;
    os[i] = p.out_scale.or_one(c);
    reciprocal[i] = __frcp_rn(os[i]);
  }

  float window[kWidth][kConvChannels];
#pragma unroll
  for (int k = 1; k < kWidth; ++k) {
    const int64_t t = begin - kWidth + k;
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) window[k][i] = 0.0f;
    if (k < shift + 1) continue;
    if (t >= 0) {
      if (!mask || mask[t * p.mask_time]) load<kConvChannels, kVector>(x + t * p.x_time, p.x_channel, valid, window[k]);
    } else if (p.state) {
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i)
        if (i < valid) window[k][i] = to_float(state_at<T>(p, b, c0 + i, t));
    }
  }
  // Only the first piece reads the state, so it may overwrite it without asking the others.
  if (p.state && begin == 0) {
    T* state = static_cast<T*>(p.state) + b * p.state_batch + c0 * p.state_channel;
    for (int k = 0; k < p.width; ++k) {
      const int64_t t = p.length - p.width + k;
      for (int i = 0; i < valid; ++i) {
        T value = T(0.0f);
        if (t < 0) {
          value = state_at<T>(p, b, c0 + i, t);
        } else if (!mask || mask[t * p.mask_time]) {
          value = x[t * p.x_time + i * p.x_channel];
        }
        state[i * p.state_channel + k * p.state_time] = value;
      }
    }
  }

  Out* out = static_cast<Out*>(p.out) + (b * p.length + begin) * p.channels + c0;
  for (int64_t t = begin; t < end; ++t, out += p.channels) {
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k)
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i) window[k][i] = window[k + 1][i];
    const bool keep = !mask || mask[t * p.mask_time];
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) window[kWidth - 1][i] = 0.0f;
    if (keep) load<kConvChannels, kVector>(x + t * p.x_time, p.x_channel, valid, window[kWidth - 1]);
    float y[kConvChannels];
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) {
      float acc = 0.0f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) acc = fmaf(weight[k][i], window[k][i], acc);
      y[i] = keep ? silu(acc * xs[i] * ws[i] + bias[i]) : 0.0f;
    }
    if constexpr (sizeof(Out) == 1) {
      uint32_t bytes[kConvChannels];
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i) bytes[i] = round_to_byte(divide(y[i], os[i], reciprocal[i]));
      store_bytes<kConvChannels, kVector>(out, valid, bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i)
        if (i < valid) out[i] = from_float<Out>(y[i]);
    }
  }
}

}  // namespace quamba
