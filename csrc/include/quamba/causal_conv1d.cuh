// causal_conv1d: depthwise causal convolution, bias, SiLU, quantization; channel-last. A thread slides along a piece
// of the sequence, for a few neighbouring channels.
#pragma once

#include "quamba/launch.cuh"
#include "quamba/types.cuh"

namespace quamba {

constexpr int kConvChannels = 4;  // a thread's channels: one word of int8

// A thread's time steps: few where the code is for the rare case, and large enough as it is.
template <typename T, int kWidth, bool kVector>
constexpr int conv_steps() {
  return kVector && kWidth <= 4 ? 16 / static_cast<int>(sizeof(T)) : kWidth;
}

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
  bool quads;  // four taps, and every vector aligned to four elements
  const uint8_t* mask;
  int64_t mask_batch, mask_time;
  void* state;  // (B, D, K) of x's type
  int64_t state_batch, state_channel, state_time;
  bool state_words;  // int8, four a channel, neighbours at an aligned address
  void* out;  // (B, L, D), contiguous
};

// Four neighbouring elements of an AnyVector in one load, and in two steps, as load_bits and from_bits: i is a multiple
// of 4, and the vector aligned to four elements.
__device__ __forceinline__ uint4 load_quad_bits(const AnyVector& v, int64_t i) {
  switch (v.type) {
    case Type::kInt8:
      return make_uint4(reinterpret_cast<const uint32_t*>(v.data)[i / 4], 0, 0, 0);
    case Type::kFloat:
      return reinterpret_cast<const uint4*>(v.data)[i / 4];
    default: {
      const uint2 pair = reinterpret_cast<const uint2*>(v.data)[i / 4];
      return make_uint4(pair.x, pair.y, 0, 0);
    }
  }
}

__device__ __forceinline__ void from_quad_bits(const uint4& bits, Type type, float (&out)[4]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t half = words[k / 2] >> (k % 2 * 16), byte = words[0] >> (8 * k);
    out[k] = from_bits(type == Type::kInt8 ? byte & 0xffu : type == Type::kFloat ? words[k] : half & 0xffffu, type);
  }
}

// The scales of four neighbouring indices, a multiple of 4 the first; aligned to four.
__device__ __forceinline__ float4 four(const Scale& s, int64_t i) {
  if (s.data != nullptr && s.stride != 0) return reinterpret_cast<const float4*>(s.data)[i / 4];
  const float one = s.or_one(0);
  return make_float4(one, one, one, one);
}

// The input at time t < 0 from the state: its newest entry, K - 1, is time -1.
template <typename T>
__device__ __forceinline__ T state_at(const ConvParams& p, int64_t b, int64_t c, int64_t t) {
  return static_cast<const T*>(p.state)[b * p.state_batch + c * p.state_channel + (p.width + t) * p.state_time];
}

// The state of up to four channels from c0 on after all steps. x: their first inputs; kept(t): whether step t counts.
// All loads come before the first store, which would make each wait for the one before.
template <typename T, int kWidth, typename Kept>
__device__ __forceinline__ void update_state(const ConvParams& p, int64_t b, int64_t c0, int valid, const T* x,
                                             Kept&& kept) {
  T value[kWidth][kConvChannels];
  const int shift = kWidth - p.width;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int64_t t = p.length - kWidth + k;
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) {
      value[k][i] = T(0.0f);
      if (k < shift || i >= valid) continue;
      if (t < 0) {
        value[k][i] = state_at<T>(p, b, c0 + i, t);
      } else if (kept(t)) {
        value[k][i] = x[t * p.x_time + i * p.x_channel];
      }
    }
  }
  T* const state = static_cast<T*>(p.state) + b * p.state_batch + c0 * p.state_channel;
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i)
      if (k >= shift && i < valid) state[i * p.state_channel + (k - shift) * p.state_time] = value[k][i];
}

// One time step of a thread's channels, as it is in memory.
template <typename T>
struct alignas(kConvChannels * sizeof(T)) ConvStep {
  T value[kConvChannels];
};

template <typename T>
__device__ __forceinline__ void widen_step(const ConvStep<T>& step, float* out) {
  if constexpr (sizeof(T) == 1) {
    unpack_bytes(reinterpret_cast<const uint32_t&>(step), out);
  } else {
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) out[i] = to_float(step.value[i]);
  }
}

// kWidth >= p.width: narrower kernels leave out the first taps. kVector: a step's channels are aligned neighbours.
// All inputs of a thread are loaded before the first is used; wider types get shorter pieces, to fit in registers.
template <typename T, typename Out, int kWidth, bool kVector>
__global__ void __launch_bounds__(128, sizeof(T) == 1 ? 4 : 1) causal_conv1d_kernel(const ConvParams p) {
  constexpr int kSteps = conv_steps<T, kWidth, kVector>(), kHistory = kWidth - 1;
  static_assert(kSteps >= kHistory, "only the first piece may reach back into the state, which it overwrites");
  const int64_t c0 = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kConvChannels;
  let_next_start();
  if (c0 >= p.channels) return;
  wait_for_previous();
  const int64_t b = blockIdx.z, begin = static_cast<int64_t>(blockIdx.y) * kSteps;
  const int valid = static_cast<int>(p.channels - c0 < kConvChannels ? p.channels - c0 : kConvChannels);
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch + c0 * p.x_channel;
  const uint8_t* mask = p.mask ? p.mask + b * p.mask_batch : nullptr;
  const auto kept = [&](int64_t t) { return mask == nullptr || mask[t * p.mask_time] != 0; };

  ConvStep<T> steps[kSteps + kHistory];
#pragma unroll
  for (int k = 0; k < kSteps + kHistory; ++k) {
    const int64_t t = begin + k - kHistory;
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) steps[k].value[i] = T(0.0f);
    if (t >= 0 && t < p.length) {
      if constexpr (kVector) {
        if (kept(t)) steps[k] = *reinterpret_cast<const ConvStep<T>*>(x + t * p.x_time);
      } else {
#pragma unroll
        for (int i = 0; i < kConvChannels; ++i)
          if (i < valid && kept(t)) steps[k].value[i] = x[t * p.x_time + i * p.x_channel];
      }
    } else if (t < 0 && t >= -p.width && p.state) {
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i)
        if (i < valid) steps[k].value[i] = state_at<T>(p, b, c0 + i, t);
    }
  }

  float weight[kWidth][kConvChannels], factor[kConvChannels], bias[kConvChannels], reciprocal[kConvChannels];
  const int shift = kWidth - p.width;
  if (kVector && kWidth == 4 && p.quads) {
    // A channel's taps are a quad, and so are the channels' scales: few loads, the slow part of a short piece.
    uint4 bits[kConvChannels], bias_bits{};
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) bits[i] = load_quad_bits(p.weight, 4 * (c0 + i));
    if (p.bias) bias_bits = load_quad_bits(p.bias, c0);
    const float4 x_scale = four(p.x_scale, c0), weight_scale = four(p.weight_scale, c0), out = four(p.out_scale, c0);
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) {
      float taps[4];
      from_quad_bits(bits[i], p.weight.type, taps);
#pragma unroll
      for (int k = 0; k < 4; ++k) weight[k % kWidth][i] = taps[k];
    }
    from_quad_bits(bias_bits, p.bias.type, bias);
    factor[0] = x_scale.x * weight_scale.x, factor[1] = x_scale.y * weight_scale.y;
    factor[2] = x_scale.z * weight_scale.z, factor[3] = x_scale.w * weight_scale.w;
    reciprocal[0] = reciprocal_approx(out.x), reciprocal[1] = reciprocal_approx(out.y);
    reciprocal[2] = reciprocal_approx(out.z), reciprocal[3] = reciprocal_approx(out.w);
  } else {
    uint32_t bits[kWidth + 1][kConvChannels] = {};
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) {
      const int64_t c = c0 + (i < valid ? i : 0);
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (k >= shift) bits[k][i] = load_bits(p.weight, c * p.width + k - shift);
      if (p.bias) bits[kWidth][i] = load_bits(p.bias, c);
      factor[i] = p.x_scale.or_one(c);
      reciprocal[i] = p.out_scale.or_one(c);
    }
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) {
      const int64_t c = c0 + (i < valid ? i : 0);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) weight[k][i] = from_bits(bits[k][i], p.weight.type);
      bias[i] = from_bits(bits[kWidth][i], p.bias.type);
      factor[i] *= p.weight_scale.or_one(c);
      reciprocal[i] = reciprocal_approx(reciprocal[i]);
    }
  }

  // Only the first piece reads the state, so it may overwrite it without asking the others.
  if (p.state && begin == 0) update_state<T, kWidth>(p, b, c0, valid, x, kept);

  float window[kWidth][kConvChannels];
#pragma unroll
  for (int k = 0; k < kHistory; ++k) widen_step(steps[k], window[k + 1]);
  Out* out = static_cast<Out*>(p.out) + (b * p.length + begin) * p.channels + c0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step, out += p.channels) {
    const int64_t t = begin + step;
    if (t >= p.length) return;
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k)
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i) window[k][i] = window[k + 1][i];
    widen_step(steps[kHistory + step], window[kWidth - 1]);
    const bool keep = kept(t);
    float y[kConvChannels];
#pragma unroll
    for (int i = 0; i < kConvChannels; ++i) {
      float acc = 0.0f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (k >= shift) acc = fmaf(weight[k][i], window[k][i], acc);
      y[i] = select(keep, silu(fmaf(acc, factor[i], bias[i])), 0.0f);
    }
    if constexpr (sizeof(Out) == 1) {
      uint32_t bytes[kConvChannels];
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i) bytes[i] = round_to_byte(y[i] * reciprocal[i]);
      store_bytes<kConvChannels, kVector>(out, valid, bytes);
    } else if constexpr (kVector) {
      ConvStep<Out> result;
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i) result.value[i] = from_float<Out>(y[i]);
      *reinterpret_cast<ConvStep<Out>*>(out) = result;
    } else {
#pragma unroll
      for (int i = 0; i < kConvChannels; ++i)
        if (i < valid) out[i] = from_float<Out>(y[i]);
    }
  }
}

}  // namespace quamba
