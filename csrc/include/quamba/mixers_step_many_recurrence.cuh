// mixers_step for many sequences: the recurrence and the gate. Four lanes have a channel, of some sequences four of its
// states at a time: what belongs to the channel alone they have once.
#pragma once

#include "quamba/mixers_step_many_scan.cuh"

namespace quamba {

// Fours of states that a worker asks for early, by groups of sequences: all, for forty channels.
template <int GROUPS>
constexpr int kStates = GROUPS == 1 ? 3 : 6;

// What of a thread block's channels and sequences is a worker's: every step-th sequence of a channel from `first` on.
struct ManyItems {
  int channel, first, step;

  __device__ ManyItems(const StackPlan& p, const StackShare& share) {
    const int lane = threadIdx.x / 4;
    step = max(1, share.at_once), first = share.over_channels.of(lane), channel = lane - first * share.channels;
    if (share.at_once == 0) first = 0, channel = lane;
    if (first >= step || channel >= share.channels) first = p.tokens;
  }
};

__device__ __forceinline__ float* state_of(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                           int m, int c) {
  return numbers.block().ssm_state + m * p.f.ssm_batch + static_cast<int64_t>(share.channel + c) * p.f.states;
}

// The states of a worker's channels, asked for before they are needed.
template <int GROUPS>
__device__ __forceinline__ void first_states(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                             float4 (&states)[kStates<GROUPS>]) {
  const ManyItems items(p, share);
  const int n = 4 * (threadIdx.x & 3);
  const float* const from = state_of(p, share, numbers, items.first, items.channel) + n;
  const int64_t step = items.step * p.f.ssm_batch;
#pragma unroll
  for (int u = 0; u < kStates<GROUPS>; ++u) {
    states[u] = make_float4(0, 0, 0, 0);
    if (items.first + u * items.step < p.tokens && n < p.f.states)
      states[u] = __ldcg(reinterpret_cast<const float4*>(from + u * step));
  }
}

// A step of four states, and what they add to y.
__device__ __forceinline__ float step_states(float4& h, float4 a, float dt, float dtx, const float* bc, int size,
                                             float y) {
  const float4 B = *reinterpret_cast<const float4*>(bc), C = *reinterpret_cast<const float4*>(bc + size);
  h.x = fmaf(exp2_approx(dt * a.x), h.x, dtx * B.x);
  h.y = fmaf(exp2_approx(dt * a.y), h.y, dtx * B.y);
  h.z = fmaf(exp2_approx(dt * a.z), h.z, dtx * B.z);
  h.w = fmaf(exp2_approx(dt * a.w), h.w, dtx * B.w);
  return fmaf(h.x, C.x, fmaf(h.y, C.y, fmaf(h.z, C.z, fmaf(h.w, C.w, y))));
}

template <int BASE, int GROUPS>
__device__ __forceinline__ void recur(const StackPlan& p, int l, const StackShare& share, const StackNumbers& numbers,
                                      float4 (&states)[kStates<GROUPS>], const ManyScratch& scratch) {
  const ManyItems items(p, share);
  const int size = p.f.states, j = threadIdx.x & 3, tokens = p.tokens, inner = p.f.inner;
  const float g_scale = numbers.one(kGScale);
  const auto scaled = [&](int c, int n) {
    const float4 a = *reinterpret_cast<const float4*>(numbers.A() + c * size + n);
    return make_float4(a.x * kLog2E, a.y * kLog2E, a.z * kLog2E, a.w * kLog2E);
  };
  const auto give = [&](int m, int c, float y) {
    const int column = share.channel + c;
    if constexpr (BASE > 0) {
      publish(p.g + turn(l, tokens * inner) + m * inner + column, y);
    } else {
      const int at = turn(l, many_bytes(GROUPS, inner)) + many_place(GROUPS, m, column);
      reinterpret_cast<uint8_t*>(p.g_words)[at] = byte_of(y, g_scale) ^ kThere >> 8 * (at & 3);
    }
  };
  const int c = min(items.channel, share.channels - 1), n0 = 4 * j < size ? 4 * j : 0;
  const float skip = numbers.channel(c)[kSkip], x_scale = numbers.channel(c)[kScanScale];
  float* const state = state_of(p, share, numbers, 0, c) + n0;
  const float4 a = scaled(c, n0);
  // Some at a time, step by step, for none has to wait for another one.
  constexpr int kAtOnce = 3;
  static_assert(kStates<GROUPS> % kAtOnce == 0, "");
#pragma unroll
  for (int u0 = 0; u0 < kStates<GROUPS>; u0 += kAtOnce) {
    if (size > 16 || u0 * items.step >= tokens) break;
    float y[kAtOnce], x[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int m = items.first + (u0 + u) * items.step, safe = min(m, tokens - 1);
      const float dt = scratch.items[safe * p.channels + c].x;
      x[u] = static_cast<float>(scratch.x[safe * p.s.x_pitch + c]) * x_scale;
      y[u] = step_states(states[u0 + u], a, dt, dt * x[u], scratch.bc + safe * 2 * size + n0, size, 0.0f);
      if (4 * j >= size) y[u] = 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int m = items.first + (u0 + u) * items.step;
      if (4 * j < size && m < tokens)
        __stcg(reinterpret_cast<float4*>(state + m * p.f.ssm_batch), states[u0 + u]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) y[u] += __shfl_xor_sync(0xffffffffu, y[u], 1);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) y[u] += __shfl_xor_sync(0xffffffffu, y[u], 2);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int m = items.first + (u0 + u) * items.step;
      const float gate = scratch.items[min(m, tokens - 1) * p.channels + c].y;
      if (j == 0 && m < tokens) give(m, c, fmaf(skip, x[u], y[u]) * gate);
    }
  }
  // What is beyond those that were asked for early: more sequences, more channels, or more than sixteen states.
  const int rest = size > 16 ? 0 : kStates<GROUPS> * items.step;
#pragma unroll 1
  for (int more = items.channel; more - static_cast<int>(threadIdx.x & 31) / 4 < share.channels;
       more += kManyWorkers / 4) {
    const int begin = more == items.channel ? rest : 0, channel = min(more, share.channels - 1);
#pragma unroll 1
    for (int m0 = begin; m0 < tokens; m0 += items.step) {
      const int m = more < share.channels ? m0 + items.first : tokens, safe = min(m, tokens - 1);
      const float2 item = scratch.items[safe * p.channels + channel];
      const float x =
          static_cast<float>(scratch.x[safe * p.s.x_pitch + channel]) * numbers.channel(channel)[kScanScale];
      float y = 0.0f;
#pragma unroll 1
      for (int n = 4 * j; n < size; n += 16) {
        float* const at = state_of(p, share, numbers, safe, channel) + n;
        float4 h = __ldcg(reinterpret_cast<const float4*>(at));
        y = step_states(h, scaled(channel, n), item.x, item.x * x, scratch.bc + safe * 2 * size + n, size, y);
        if (m < tokens) __stcg(reinterpret_cast<float4*>(at), h);
      }
      y += __shfl_xor_sync(0xffffffffu, y, 1);
      y += __shfl_xor_sync(0xffffffffu, y, 2);
      if (j == 0 && m < tokens) give(m, channel, fmaf(numbers.channel(channel)[kSkip], x, y) * item.y);
    }
    if (share.at_once > 0) break;
  }
}

}  // namespace quamba
