// causal_conv1d of int8 with four int8 taps: a channel's four inputs are the bytes of one word, and its sum one
// instruction. Four steps of four channels are turned from words of neighbouring channels into words of neighbouring
// steps. The special-function unit is what limits it: two of its operations a result. A thread goes through rounds of
// eight steps, and asks for the next round's inputs before it computes one.
#pragma once

#include <type_traits>

#include "quamba/causal_conv1d.cuh"
#include "quamba/launch.cuh"
#include "quamba/round.cuh"

namespace quamba {

constexpr int kConvDotThreads = 128, kConvDotSteps = 8;
constexpr int kConvDotBlocks = 6;  // of a multiprocessor, that registers are kept free for

// (step, channel) bytes to (channel, step) bytes, and back.
__device__ __forceinline__ void transpose_bytes(uint32_t (&v)[4]) {
  const uint32_t low01 = __byte_perm(v[0], v[1], 0x5140), low23 = __byte_perm(v[2], v[3], 0x5140);
  const uint32_t high01 = __byte_perm(v[0], v[1], 0x7362), high23 = __byte_perm(v[2], v[3], 0x7362);
  v[0] = __byte_perm(low01, low23, 0x5410), v[1] = __byte_perm(low01, low23, 0x7632);
  v[2] = __byte_perm(high01, high23, 0x5410), v[3] = __byte_perm(high01, high23, 0x7632);
}

// Bytes STEP + 1 to STEP + 4 of two words: the inputs of step STEP, of four, and of the three before it.
template <int STEP>
__device__ __forceinline__ int window_at(uint32_t before, uint32_t now) {
  return static_cast<int>(STEP == 3 ? now : __byte_perm(before, now, 0x4321 + 0x1111 * STEP));
}

// The parameters of four channels.
struct ConvDotChannels {
  uint32_t taps[4];
  float factor[4], bias[4], result[4];

  __device__ __forceinline__ ConvDotChannels(const ConvParams& p, int64_t c0) {
    const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const int8_t*>(p.weight.data) + 4 * c0);
    uint4 bias_bits{};
    if (p.bias) bias_bits = load_quad_bits(p.bias, c0);
    const float4 x_scale = four(p.x_scale, c0), weight_scale = four(p.weight_scale, c0), out = four(p.out_scale, c0);
    taps[0] = words.x, taps[1] = words.y, taps[2] = words.z, taps[3] = words.w;
    from_quad_bits(bias_bits, p.bias.type, bias);
    factor[0] = x_scale.x * weight_scale.x, factor[1] = x_scale.y * weight_scale.y;
    factor[2] = x_scale.z * weight_scale.z, factor[3] = x_scale.w * weight_scale.w;
    result[0] = reciprocal_approx(out.x), result[1] = reciprocal_approx(out.y);
    result[2] = reciprocal_approx(out.z), result[3] = reciprocal_approx(out.w);
  }

  // SiLU of channel i, to the bit what the step gives; the result's scale is still to be divided by.
  __device__ __forceinline__ float unscaled(int window, int i) const {
    // The sum is counted from 1.5 * 2^23, so that its bits are those of a float.
    const int sum = __dp4a(window, static_cast<int>(taps[i]), 0x4b400000);
    return silu(fmaf(__int_as_float(sum) - 12582912.0f, factor[i], bias[i]));
  }
};

// Four channels' states, as words of four steps.
struct ConvDotState {
  int8_t* first;
  int64_t channel, time;
  bool in_words;

  __device__ __forceinline__ ConvDotState(const ConvParams& p, int64_t b, int64_t c0)
      : first(static_cast<int8_t*>(p.state) + b * p.state_batch + c0 * p.state_channel),
        channel(p.state_channel),
        time(p.state_time),
        in_words(p.state_words) {}

  __device__ __forceinline__ void read(uint32_t (&words)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int8_t* const at = first + i * channel;
      if (in_words) {
        words[i] = *reinterpret_cast<const uint32_t*>(at);
      } else {
        words[i] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) words[i] |= static_cast<uint32_t>(static_cast<uint8_t>(at[k * time])) << 8 * k;
      }
    }
  }

  __device__ __forceinline__ void write(const uint32_t (&words)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int8_t* const at = first + i * channel;
      if (in_words) {
        *reinterpret_cast<uint32_t*>(at) = words[i];
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) at[k * time] = static_cast<int8_t>(words[i] >> 8 * k & 0xff);
      }
    }
  }
};

// What p.quads says holds, the taps are int8 and aligned to 16 bytes, and x can be read in words.
// blockIdx.y: `rounds` rounds of steps.
template <typename Out, bool kMasked>
__global__ void __launch_bounds__(kConvDotThreads, kConvDotBlocks)
    causal_conv1d_dot_kernel(const ConvParams p, int rounds) {
  const int64_t from_all = (static_cast<int64_t>(blockIdx.x) * kConvDotThreads + threadIdx.x) * kConvChannels;
  const int64_t b = blockIdx.z;
  let_next_start();
  // With a mask a warp stays together, for each lane looks at a step's: channels past the end stand for the last ones.
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (from_all - (kMasked ? lane * kConvChannels : 0) >= p.channels) return;
  const bool mine = !kMasked || from_all < p.channels;
  const int64_t c0 = mine ? from_all : p.channels - kConvChannels;
  if (blockIdx.y == 0 && blockIdx.z == 0) {
    prefetch(static_cast<const char*>(p.weight.data) + 4 * c0);
    if (p.bias) prefetch(static_cast<const char*>(p.bias.data) + c0 * size_of(p.bias.type));
    if (p.x_scale) prefetch(p.x_scale.data + c0 * p.x_scale.stride);
    if (p.weight_scale) prefetch(p.weight_scale.data + c0 * p.weight_scale.stride);
    if (p.out_scale) prefetch(p.out_scale.data + c0 * p.out_scale.stride);
  }
  wait_for_previous();

  const int length = static_cast<int>(p.length), begin = static_cast<int>(blockIdx.y) * rounds * kConvDotSteps;
  const int end = length - begin < rounds * kConvDotSteps ? length : begin + rounds * kConvDotSteps;
  const int8_t* const x = static_cast<const int8_t*>(p.x) + b * p.x_batch + c0;
  const uint8_t* const mask = p.mask + (kMasked ? b * p.mask_batch : 0);
  // Of the steps from t on, one a lane, `count` of them: which are kept. The bytes are asked for beside x, not before.
  const auto look = [&](int t, int count) {
    t += lane;
    return kMasked && lane < count && t >= 0 && t < length ? mask[t * p.mask_time] : static_cast<uint8_t>(1);
  };
  const auto kept_of = [&](uint8_t looked) { return kMasked ? __ballot_sync(0xffffffffu, looked != 0) : 0xffffffffu; };
  const auto load = [&](int t) {
    return t >= 0 && t < length ? *reinterpret_cast<const uint32_t*>(x + t * p.x_time) : 0;
  };
  const auto load_round = [&](int t, uint32_t (&to)[kConvDotSteps]) {
    if (t + kConvDotSteps <= length) {
      const int8_t* const from = x + t * p.x_time;
#pragma unroll
      for (int k = 0; k < kConvDotSteps; ++k) to[k] = *reinterpret_cast<const uint32_t*>(from + k * p.x_time);
    } else {
#pragma unroll
      for (int k = 0; k < kConvDotSteps; ++k) to[k] = load(t + k);
    }
  };
  uint32_t before[4], inputs[kConvDotSteps];  // the four steps before a round, by channels; the round
  const uint8_t first_look = look(begin - 4, 4 + kConvDotSteps);
  // Only the first piece reads the state, so it may overwrite it without asking the others.
  const bool owner = begin == 0 && p.state != nullptr;
  if (owner) {
    const ConvDotState state(p, b, c0);
    const int tail = length < 4 ? 0 : length - 4;
    const uint8_t tail_look = look(tail, 4);
    state.read(before);
    uint32_t last[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) last[k] = load(tail + k);
    const uint32_t kept = kept_of(tail_look);
#pragma unroll
    for (int k = 0; k < 4; ++k) last[k] = kept >> k & 1 ? last[k] : 0;
    transpose_bytes(last);
    if (length < 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) last[i] = __funnelshift_r(before[i], last[i], 8 * length);
    }
    if (mine) state.write(last);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) before[k] = load(begin + k - 4);
  }
  load_round(begin, inputs);
  const ConvDotChannels channels(p, c0);
  uint32_t kept = kept_of(first_look);
  if (!owner) {
#pragma unroll
    for (int k = 0; k < 4; ++k) before[k] = kept >> k & 1 ? before[k] : 0;
    transpose_bytes(before);
  }
  kept >>= 4;

  Out* out = static_cast<Out*>(p.out) + (b * p.length + begin) * p.channels + c0;
#pragma unroll 1
  for (int t0 = begin; t0 < end; t0 += kConvDotSteps) {
    uint32_t next[kConvDotSteps] = {};
    const uint8_t next_look = look(t0 + kConvDotSteps, kConvDotSteps);
    if (t0 + kConvDotSteps < end) load_round(t0 + kConvDotSteps, next);
    if (kMasked && (kept & 0xff) != 0xff) {
#pragma unroll
      for (int k = 0; k < kConvDotSteps; ++k) inputs[k] = kept >> k & 1 ? inputs[k] : 0;
    }
#pragma unroll
    for (int half = 0; half < kConvDotSteps; half += 4) {
      uint32_t now[4] = {inputs[half], inputs[half + 1], inputs[half + 2], inputs[half + 3]};
      transpose_bytes(now);
      const auto step = [&](auto which) {
        constexpr int kStep = decltype(which)::value;
        const int t = t0 + half + kStep;
        float y[kConvChannels];
#pragma unroll
        for (int i = 0; i < kConvChannels; ++i) y[i] = channels.unscaled(window_at<kStep>(before[i], now[i]), i);
        const bool inside = t < length && mine, keep = !kMasked || (kept >> (half + kStep) & 1);
        if constexpr (sizeof(Out) == 1) {
          uint32_t bytes[kConvChannels];
#pragma unroll
          for (int i = 0; i < kConvChannels; ++i) bytes[i] = round_product(y[i], channels.result[i]);
          const uint32_t word = pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]);
          if (inside) *reinterpret_cast<uint32_t*>(out) = keep ? word : 0;
        } else {
          ConvStep<Out> values;
#pragma unroll
          for (int i = 0; i < kConvChannels; ++i)
            values.value[i] = from_float<Out>(keep ? y[i] * channels.result[i] : 0.0f);
          if (inside) *reinterpret_cast<ConvStep<Out>*>(out) = values;
        }
        out += p.channels;
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
#pragma unroll
      for (int i = 0; i < 4; ++i) before[i] = now[i];
    }
    kept = kept_of(next_look);
#pragma unroll
    for (int k = 0; k < kConvDotSteps; ++k) inputs[k] = next[k];
  }
}

}  // namespace quamba
