// mixers_step: between the products: the convolution, W_x, W_dt, the recurrence and the gate.
#pragma once

#include "quamba/mixers_step_product.cuh"

namespace quamba {

__device__ __forceinline__ int8_t byte_of(float v, float scale) {
  return static_cast<int8_t>(round_to_byte(divide(v, scale, reciprocal_approx(scale))) & 0xff);
}

// Of one thread block, between the parts of a block of the stack.
struct StackScratch {
  int8_t* x;    // (tokens, channels), for W_x and the scan
  float* z;     // (tokens, channels), SiLU's argument
  int8_t* d;    // (tokens, R)
  float* bc;    // (tokens, R + 2 N): d, B and C before and after their norms; of d nothing is left
};

// The convolution's state of a worker's first channel, asked for before it is needed.
__device__ __forceinline__ uint32_t first_window(const StackPlan& p, const StackShare& share,
                                                 const StackNumbers& numbers) {
  if (p.f.width != 4 || threadIdx.x >= p.tokens * share.channels) return 0;
  const int m = threadIdx.x / share.channels, c = threadIdx.x - m * share.channels;
  return __ldcg(reinterpret_cast<const unsigned*>(numbers.block().conv_state + m * p.f.conv_batch) + share.channel + c);
}

// x0 and z from their sums, the convolution, x.
template <int GROUPS>
__device__ __forceinline__ void convolve(const StackPlan& p, const StackShare& share,
                                         const StackNumbers& numbers, uint32_t first_state, int* acc,
                                         const StackScratch& scratch) {
  const int width = p.f.width;
  const StackBlock& b = numbers.block();
  const int8_t* const taps = numbers.all<int8_t>(kTaps);
  for (int i = threadIdx.x; i < p.tokens * share.channels; i += kStackWorkers) {
    const int m = i / share.channels, c = i - m * share.channels;
    int8_t* const state =
        b.conv_state + m * p.f.conv_batch + static_cast<int64_t>(share.channel + c) * width;
    const uint32_t before =
        i == threadIdx.x || width != 4 ? first_state : __ldcg(reinterpret_cast<const unsigned*>(state));
    const int x_sum = take(acc + c * 8 * GROUPS + m), z_sum = take(acc + (share.channels + c) * 8 * GROUPS + m);
    const float x0_wide = __fadd_rn(__fmul_rn(static_cast<float>(x_sum), numbers.in(false, c)), numbers.bias(false, c));
    const float z_wide = __fadd_rn(__fmul_rn(static_cast<float>(z_sum), numbers.in(true, c)), numbers.bias(true, c));
    const int8_t x0 = byte_of(x0_wide, numbers.scale(false, c));
    scratch.z[m * p.channels + c] = static_cast<float>(byte_of(z_wide, numbers.scale(true, c))) * numbers.scale(true, c);
    float sum = 0.0f;
    if (width == 4) {
      const uint32_t word = __byte_perm(before, static_cast<uint8_t>(x0), 0x4321);
      *reinterpret_cast<uint32_t*>(state) = word;
      float window[4], weight[4];
      unpack_bytes(word, window);
      unpack_bytes(reinterpret_cast<const uint32_t*>(taps)[c], weight);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum = fmaf(weight[k], window[k], sum);
    } else {
      for (int k = 0; k < width; ++k) {
        const int8_t value = k + 1 < width ? state[k + 1] : x0;
        state[k] = value;
        sum = fmaf(static_cast<float>(taps[c * width + k]), static_cast<float>(value), sum);
      }
    }
    const float y = silu(fmaf(sum, numbers.conv(c), numbers.conv_bias(c)));
    scratch.x[m * p.channels + c] =
        static_cast<int8_t>(round_to_byte(y * reciprocal_approx(numbers.x(c))) & 0xff);
  }
}

// The thread block's columns of W_x, added to the sums of all.
__device__ __forceinline__ void add_products(const StackPlan& p, int l, const StackShare& share,
                                             const int* x_weight, const StackScratch& scratch) {
  const int sums = p.f.rank + 2 * p.f.states, words = share.channels / 4, pitch = p.s.x_weight_pitch;
  const int* const x = reinterpret_cast<const int*>(scratch.x);
  for (int i = threadIdx.x; i < sums * p.tokens; i += kStackWorkers) {
    const int m = i / sums, r = i - m * sums;
    int sum = 0;
#pragma unroll 4
    for (int w = 0; w < words; ++w) sum = __dp4a(x_weight[r * pitch + w], x[m * (p.channels / 4) + w], sum);
    add_counted(p.dbc + (static_cast<int64_t>(l) * p.tokens + m) * sums + r, sum);
  }
}

// d, B and C from the sums of W_x: in every thread block, for all of its channels need them.
__device__ __forceinline__ void split_sums(const StackPlan& p, int l, const StackNumbers& numbers,
                                           const StackScratch& scratch) {
  const int rank = p.f.rank, size = p.f.states, sums = rank + 2 * size;
  const unsigned long long* const from = p.dbc + static_cast<int64_t>(l) * p.tokens * sums;
  const auto put = [&](int m, int r, float v) {
    const float scale = numbers.one(kDbcScale, r);
    const int8_t byte = byte_of(v, scale);
    if (r < rank) {
      scratch.d[m * rank + r] = byte;
    } else {
      scratch.bc[m * sums + r] = static_cast<float>(byte) * scale;
    }
  };
  constexpr int kBatch = 4;
  const int count = p.tokens * sums;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * kStackWorkers) {
    int sum[kBatch];
    bool there;
    do {
      unsigned long long words[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (i0 + u * kStackWorkers < count) words[u] = load_tagged(from + i0 + u * kStackWorkers);
      there = true;
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (i0 + u * kStackWorkers < count) there &= complete(words[u], p.grid, &sum[u]);
    } while (!there);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kStackWorkers;
      if (i >= count) continue;
      const int m = i / sums, r = i - m * sums;
      const float v = __fmul_rn(static_cast<float>(sum[u]), numbers.x_sum(r));
      if (p.f.norm_dbc) {
        scratch.bc[i] = v;
      } else {
        put(m, r, v);
      }
    }
  }
  team_sync();
  if (!p.f.norm_dbc) return;
  const int lane = threadIdx.x & 31;
  for (int task = threadIdx.x / 32; task < 3 * p.tokens; task += kStackWorkers / 32) {
    const int m = task / 3, part = task % 3;
    const int begin = part == 0 ? 0 : rank + (part - 1) * size, end = part == 0 ? rank : begin + size;
    float squares = 0.0f;
    for (int r = begin + lane; r < end; r += 32) squares = fmaf(scratch.bc[m * sums + r], scratch.bc[m * sums + r], squares);
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float factor = rsqrtf(squares / static_cast<float>(end - begin) + numbers.block().dbc_eps);
    for (int r = begin + lane; r < end; r += 32) {
      float v = scratch.bc[m * sums + r] * factor;
      if (p.f.has_norms) v *= numbers.dbc_norm(r);
      put(m, r, v);
    }
  }
  team_sync();
}

// The first states of a lane for channel `i` of all sequences' channels; zero where there is none.
__device__ __forceinline__ float4 state_piece(const StackPlan& p, const StackShare& share,
                                              const StackNumbers& numbers, int i) {
  const int n = 4 * (threadIdx.x & 3);
  if (i >= p.tokens * share.channels || n >= p.f.states) return make_float4(0, 0, 0, 0);
  const int m = i / share.channels, c = i - m * share.channels;
  const float* const state = numbers.block().ssm_state + m * p.f.ssm_batch;
  return __ldcg(reinterpret_cast<const float4*>(state + static_cast<int64_t>(share.channel + c) * p.f.states + n));
}

// W_dt, softplus, the recurrence and the gate; four lanes a channel.
__device__ __forceinline__ void scan(const StackPlan& p, int l, const StackShare& share,
                                     const StackNumbers& numbers, float4 ahead, const StackScratch& scratch) {
  const int size = p.f.states, rank = p.f.rank, sums = rank + 2 * size;
  const StackBlock& b = numbers.block();
  const float* const A = numbers.all<float>(kA);
  const int* const dt_weight = numbers.all<int>(kDtWeight);
  const int words = rank / 4, j = threadIdx.x & 3;
  for (int i0 = 0; i0 < p.tokens * share.channels; i0 += kStackWorkers / 4) {
    const int i = i0 + threadIdx.x / 4;
    const bool live = i < p.tokens * share.channels;
    const int m = live ? i / share.channels : 0, c = live ? i - m * share.channels : 0;
    float* const state = b.ssm_state + m * p.f.ssm_batch + static_cast<int64_t>(share.channel + c) * size;
    float4 h = ahead;
    ahead = state_piece(p, share, numbers, i + kStackWorkers / 4);
    const int* const d = reinterpret_cast<const int*>(scratch.d + m * rank);
    int sum = 0;
#pragma unroll 4
    for (int w = j; w < words; w += 4) sum = __dp4a(dt_weight[c * words + w], d[w], sum);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float dt = __fmul_rn(static_cast<float>(sum), numbers.dt_weight_scale(c));
    const float dt_scale = p.f.has_dt_scale ? numbers.dt(c) : 1.0f;
    if (p.f.has_dt_scale) dt = static_cast<float>(byte_of(dt, dt_scale));
    dt = softplus(fmaf(dt, dt_scale, numbers.one(kDtBias, c)));
    const float x = static_cast<float>(scratch.x[m * p.channels + c]) * numbers.scan_x(c), dtx = dt * x;
    float y = 0.0f;
    for (int n = 4 * j; n < size; n += 16) {
      if (n >= 16) h = __ldcg(reinterpret_cast<const float4*>(state + n));
      const float4 a = *reinterpret_cast<const float4*>(A + c * size + n);
      const float* const B = scratch.bc + m * sums + rank + n;
      const float* const C = B + size;
      h.x = fmaf(exp2_approx(dt * (a.x * kLog2E)), h.x, dtx * B[0]);
      h.y = fmaf(exp2_approx(dt * (a.y * kLog2E)), h.y, dtx * B[1]);
      h.z = fmaf(exp2_approx(dt * (a.z * kLog2E)), h.z, dtx * B[2]);
      h.w = fmaf(exp2_approx(dt * (a.w * kLog2E)), h.w, dtx * B[3]);
      if (live) *reinterpret_cast<float4*>(state + n) = h;
      y = fmaf(h.x, C[0], fmaf(h.y, C[1], fmaf(h.z, C[2], fmaf(h.w, C[3], y))));
    }
    y += __shfl_xor_sync(0xffffffffu, y, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    if (!live || j != 0) continue;
    y = fmaf(numbers.one(kSkip, c), x, y);
    y *= silu(scratch.z[m * p.channels + c]);
    const int64_t at = static_cast<int64_t>(m) * p.f.inner + share.channel + c;
    if (p.f.rotate) {
      store_tagged(p.g + at, y, l + 1);
    } else {
      p.bytes[at] = byte_of(y, numbers.one(kGScale));
    }
  }
}

}  // namespace quamba
