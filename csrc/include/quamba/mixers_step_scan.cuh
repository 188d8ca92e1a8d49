// mixers_step: between the products: the convolution, W_x, W_dt, the recurrence and the gate.
#pragma once

#include "quamba/mixers_step_known.cuh"
#include "quamba/mixers_step_shape.cuh"

namespace quamba {

__device__ __forceinline__ int8_t byte_of(float v, float scale, float inverse) {
  return static_cast<int8_t>(round_to_byte(divide(v, scale, inverse)) & 0xff);
}

__device__ __forceinline__ int8_t byte_of(float v, float scale) { return byte_of(v, scale, reciprocal_approx(scale)); }

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
  const int m = share.over_channels.of(threadIdx.x), c = threadIdx.x - m * share.channels;
  return __ldcg(reinterpret_cast<const unsigned*>(numbers.block().conv_state + m * p.f.conv_batch) + share.channel + c);
}

// What the convolution needs of a channel beside the sums: a worker reads its first channel's before it waits for them.
struct StackInput {
  float x_factor, x_bias, x_scale, x_inverse, z_factor, z_bias, z_scale, z_inverse, taps_factor, taps_bias, out_inverse;
  uint32_t taps;  // where K is 4
};

__device__ __forceinline__ StackInput input_of(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                               int i) {
  if (i >= p.tokens * share.channels) return {};
  const int m = share.over_channels.of(i), c = i - m * share.channels;
  const float* const number = numbers.channel(c);
  const float u_scale = numbers.one(kUScale);
  return {__fmul_rn(u_scale, number[kInX]),
          number[kBiasX],
          number[kScaleX],
          reciprocal_approx(number[kScaleX]),
          __fmul_rn(u_scale, number[kInZ]),
          number[kBiasZ],
          number[kScaleZ],
          reciprocal_approx(number[kScaleZ]),
          number[kScaleX] * number[kConvScale],
          number[kConvBias],
          reciprocal_approx(number[kXScale]),
          p.f.width == 4 ? reinterpret_cast<const uint32_t*>(numbers.taps())[c] : 0};
}

// x0 and z from their sums, the convolution, x.
template <typename Shape>
__device__ __forceinline__ void convolve(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                         uint32_t first_state, StackInput in, int* acc, const StackScratch& scratch) {
  const int width = p.f.width;
  const int8_t* const taps = numbers.taps();
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens * share.channels; i += kStackWorkers) {
    const int m = share.over_channels.of(i), c = i - m * share.channels;
    int x_sum, z_sum = 0;  // where the shape is known, z waits for the sums of W_x to be under way
    if constexpr (Shape::kKnown) {
      x_sum = sum_known<typename Shape::In>(acc, c);
    } else {
      x_sum = take(acc + c * kAccPitch + m), z_sum = take(acc + (share.channels + c) * kAccPitch + m);
    }
    int8_t* const state =
        numbers.block().conv_state + m * p.f.conv_batch + static_cast<int64_t>(share.channel + c) * width;
    uint32_t before = first_state;
    if (i != threadIdx.x) {
      in = input_of(p, share, numbers, i);
      if (width == 4) before = __ldcg(reinterpret_cast<const unsigned*>(state));
    }
    const float x0_wide = __fadd_rn(__fmul_rn(static_cast<float>(x_sum), in.x_factor), in.x_bias);
    const int8_t x0 = byte_of(x0_wide, in.x_scale, in.x_inverse);
    if constexpr (!Shape::kKnown) {
      const float z_wide = __fadd_rn(__fmul_rn(static_cast<float>(z_sum), in.z_factor), in.z_bias);
      scratch.z[m * p.channels + c] = static_cast<float>(byte_of(z_wide, in.z_scale, in.z_inverse)) * in.z_scale;
    }
    float sum = 0.0f;
    if (width == 4) {
      const uint32_t word = __byte_perm(before, static_cast<uint8_t>(x0), 0x4321);
      __stcg(reinterpret_cast<unsigned*>(state), word);
      float window[4], weight[4];
      unpack_bytes(word, window);
      unpack_bytes(in.taps, weight);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum = fmaf(weight[k], window[k], sum);
    } else {
#pragma unroll 1
      for (int k = 0; k < width; ++k) {
        const int8_t value = k + 1 < width ? state[k + 1] : x0;
        state[k] = value;
        sum = fmaf(static_cast<float>(taps[c * width + k]), static_cast<float>(value), sum);
      }
    }
    const float y = silu(fmaf(sum, in.taps_factor, in.taps_bias));
    scratch.x[m * p.channels + c] = static_cast<int8_t>(round_to_byte(y * in.out_inverse) & 0xff);
    if (p.tokens * share.channels <= kStackWorkers) break;  // where these are constants, there is no loop
  }
}

// The thread block's columns of W_x, added to the sums of all.
__device__ __forceinline__ void add_products(const StackPlan& p, int l, const StackShare& share,
                                             const StackNumbers& numbers, const StackScratch& scratch) {
  const int sums = p.over_sums.by, words = share.channels / 4, pitch = p.s.x_weight_pitch;
  unsigned long long* const to = p.dbc + static_cast<int64_t>(l) * kSumSpread * p.tokens * sums;
#pragma unroll 1
  for (int i = threadIdx.x; i < sums * p.tokens; i += kStackWorkers) {
    const int m = p.over_sums.of(i);
    const int* const weight = numbers.x_weight() + (i - m * sums) * pitch;
    const int* const x = reinterpret_cast<const int*>(scratch.x + m * p.channels);
    int sum = 0;
#pragma unroll 3
    for (int w = 0; w < words; ++w) sum = __dp4a(weight[w], x[w], sum);
    add_counted(to + sum_place(i), sum);
    if (sums * p.tokens <= kStackWorkers) break;
  }
}

// d, B and C from the sums of W_x: in every thread block, for all of its channels need them.
// BATCH: of sums that a worker waits for.
template <int BATCH>
__device__ __forceinline__ void split_sums(const StackPlan& p, int l, const StackNumbers& numbers,
                                           const StackScratch& scratch) {
  const int rank = p.f.rank, size = p.f.states, sums = p.over_sums.by, count = p.tokens * sums;
  const unsigned long long* const from = p.dbc + static_cast<int64_t>(l) * kSumSpread * p.tokens * sums;
  const auto put = [&](int m, int r, float v, float scale, float inverse) {
    const int8_t byte = byte_of(v, scale, inverse);
    if (r < rank) {
      scratch.d[m * rank + r] = byte;
    } else {
      scratch.bc[m * sums + r] = static_cast<float>(byte) * scale;
    }
  };
  const float x_scale = numbers.one(kXInScale);
  constexpr int kBatch = BATCH;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * kStackWorkers) {
    int place[kBatch] = {}, row[kBatch] = {};
    float factor[kBatch] = {}, scale[kBatch] = {}, inverse[kBatch] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (const int i = i0 + u * kStackWorkers; i < count) {
        place[u] = p.over_sums.of(i), row[u] = i - place[u] * sums;
        const float* const number = numbers.sum(row[u]);
        factor[u] = __fmul_rn(x_scale, number[0]), scale[u] = number[1], inverse[u] = reciprocal_approx(number[1]);
      }
    unsigned long long words[kBatch] = {};
    unsigned missing = (1u << min(kBatch, divide_up(count - i0, kStackWorkers))) - 1;
#pragma unroll 1
    do {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (missing >> u & 1) words[u] = load_counted(from + sum_place(i0) + u * sum_place(kStackWorkers));
      unsigned found = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) found |= complete(words[u], p.grid) ? 1u << u : 0;
      missing &= ~found;
    } while (missing != 0);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (i0 + u * kStackWorkers >= count) break;
      const float v = __fmul_rn(static_cast<float>(sum_of(words[u], p.grid)), factor[u]);
      if (p.f.norm_dbc) {
        scratch.bc[i0 + u * kStackWorkers] = v;
      } else {
        put(place[u], row[u], v, scale[u], inverse[u]);
      }
    }
    if (count <= kBatch * kStackWorkers) break;
  }
  team_sync();
  if (!p.f.norm_dbc) return;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int task = threadIdx.x / 32; task < 3 * p.tokens; task += kStackWorkers / 32) {
    const int m = task / 3, part = task % 3;
    const int begin = part == 0 ? 0 : rank + (part - 1) * size, end = part == 0 ? rank : begin + size;
    float squares = 0.0f;
#pragma unroll 1
    for (int r = begin + lane; r < end; r += 32) {
      const float v = scratch.bc[m * sums + r];
      squares = fmaf(v, v, squares);
    }
    squares = warp_sum(squares);
    const float size_wide = static_cast<float>(end - begin);
    const float factor = rsqrtf(divide(squares, size_wide, reciprocal_approx(size_wide)) + numbers.block().dbc_eps);
#pragma unroll 1
    for (int r = begin + lane; r < end; r += 32) {
      float v = scratch.bc[m * sums + r] * factor;
      if (p.f.has_norms) v *= numbers.sum(r)[2];
      put(m, r, v, numbers.sum(r)[1], reciprocal_approx(numbers.sum(r)[1]));
    }
  }
  team_sync();
}

// The first states of a lane for channel `i` of all sequences' channels; zero where there is none.
__device__ __forceinline__ float4 state_piece(const StackPlan& p, const StackShare& share,
                                              const StackNumbers& numbers, int i) {
  const int n = 4 * (threadIdx.x & 3);
  if (i >= p.tokens * share.channels || n >= p.f.states) return make_float4(0, 0, 0, 0);
  const int m = share.over_channels.of(i), c = i - m * share.channels;
  const float* const state = numbers.block().ssm_state + m * p.f.ssm_batch;
  return __ldcg(reinterpret_cast<const float4*>(state + static_cast<int64_t>(share.channel + c) * p.f.states + n));
}

// W_dt, softplus, the recurrence and the gate; four lanes a channel. What does not depend on the sums of W_x comes
// before the wait for them.
template <int BASE, typename Shape>
__device__ __forceinline__ void scan(const StackPlan& p, int l, const StackShare& share, const StackNumbers& numbers,
                                     const int* acc, const StackScratch& scratch) {
  const int size = p.f.states, rank = p.f.rank, sums = p.over_sums.by;
  const int words = rank / 4, j = threadIdx.x & 3, channels = p.tokens * share.channels;
  float4 ahead = state_piece(p, share, numbers, threadIdx.x / 4);
#pragma unroll 1
  for (int i0 = 0; i0 < channels; i0 += kStackWorkers / 4) {
    const int i = i0 + threadIdx.x / 4;
    const bool live = i < channels;
    const int m = live ? share.over_channels.of(i) : 0, c = live ? i - m * share.channels : 0;
    float* const state =
        numbers.block().ssm_state + m * p.f.ssm_batch + static_cast<int64_t>(share.channel + c) * size;
    const float* const A = numbers.A() + c * size;
    const float* const number = numbers.channel(c);
    // As the exponent needs it.
    const auto decay = [&](int n) {
      const float4 a = *reinterpret_cast<const float4*>(A + n);
      return make_float4(a.x * kLog2E, a.y * kLog2E, a.z * kLog2E, a.w * kLog2E);
    };
    float4 h = ahead, a = decay(4 * j < size ? 4 * j : 0);
    if (i0 + kStackWorkers / 4 < channels) ahead = state_piece(p, share, numbers, i + kStackWorkers / 4);
    const float x = static_cast<float>(scratch.x[m * p.channels + c]) * number[kScanScale];
    float z;
    if constexpr (Shape::kKnown) {
      const float wide = static_cast<float>(sum_known<typename Shape::In>(acc, share.channels + c));
      z = static_cast<float>(byte_of(
              __fadd_rn(__fmul_rn(wide, __fmul_rn(numbers.one(kUScale), number[kInZ])), number[kBiasZ]),
              number[kScaleZ])) *
          number[kScaleZ];
    } else {
      z = scratch.z[m * p.channels + c];
    }
    const float gate = silu(z);
    const float dt_scale = p.f.has_dt_scale ? number[kDtScale] : 1.0f, dt_bias = number[kDtBias];
    const float sum_scale = __fmul_rn(numbers.sum(0)[1], number[kDtWeightScale]), skip = number[kSkip];
    const int* const d = reinterpret_cast<const int*>(scratch.d + m * rank);
    const int* const dt_weight = numbers.dt_weight() + c * words;
    // The first of the lane's weights, all of them in the models with this base matrix.
    constexpr int kAhead = BASE == 12 ? 3 : 10;
    int first_weights[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) first_weights[u] = j + 4 * u < words ? dt_weight[j + 4 * u] : 0;
    const int64_t at = static_cast<int64_t>(m) * p.f.inner + share.channel + c;
    unsigned* const to = p.g + turn(l, p.tokens * p.f.inner) + at;
    if (i0 == 0) split_sums<Shape::kSumBatch>(p, l, numbers, scratch);

    int even = 0, odd = 0;
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (j + 4 * u < words) (u % 2 ? odd : even) = __dp4a(first_weights[u], d[j + 4 * u], u % 2 ? odd : even);
#pragma unroll 1
    for (int w = j + 4 * kAhead; w < words; w += 4) even = __dp4a(dt_weight[w], d[w], even);
    int sum = even + odd;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float dt = __fmul_rn(static_cast<float>(sum), sum_scale);
    if (p.f.has_dt_scale) dt = static_cast<float>(byte_of(dt, dt_scale));
    dt = softplus(fmaf(dt, dt_scale, dt_bias));
    const float dtx = dt * x;
    float y = 0.0f;
#pragma unroll 1
    for (int n0 = 0; n0 < size; n0 += 16) {
      const int n = n0 + 4 * j;
      if (n >= size) continue;
      if (n0 > 0) {
        h = __ldcg(reinterpret_cast<const float4*>(state + n));
        a = decay(n);
      }
      const float* const bc = scratch.bc + m * sums + rank + n;
      const float4 B = *reinterpret_cast<const float4*>(bc), C = *reinterpret_cast<const float4*>(bc + size);
      h.x = fmaf(exp2_approx(dt * a.x), h.x, dtx * B.x);
      h.y = fmaf(exp2_approx(dt * a.y), h.y, dtx * B.y);
      h.z = fmaf(exp2_approx(dt * a.z), h.z, dtx * B.z);
      h.w = fmaf(exp2_approx(dt * a.w), h.w, dtx * B.w);
      if (live) __stcg(reinterpret_cast<float4*>(state + n), h);
      y = fmaf(h.x, C.x, fmaf(h.y, C.y, fmaf(h.z, C.z, fmaf(h.w, C.w, y))));
    }
    y += __shfl_xor_sync(0xffffffffu, y, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    y = fmaf(skip, x, y) * gate;
    if (live && j == 0) {
      if constexpr (BASE > 0) {
        publish(to, y);
      } else {
        p.bytes[at] = byte_of(y, numbers.one(kGScale));
      }
    }
  }
}

}  // namespace quamba
