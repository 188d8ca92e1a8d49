// mixers_step for many sequences: between the products.
#pragma once

#include "quamba/mixers_step_many.cuh"
#include "quamba/mixers_step_scan.cuh"

namespace quamba {

// Of one thread block, between the parts of a block of the stack.
struct ManyScratch {
  float4* items;   // (tokens, channels): dt, x, the gate
  int8_t *x, *d;   // operands of W_x and W_dt, with zeros where there are no sequences, channels or ranks
  float* bc;       // (tokens, 2 N)
  float* wide;     // (tokens, R + 2 N): before the norms of d, B and C
};

constexpr int kWindows = 2;  // of the convolution, that a worker asks for early

__device__ __forceinline__ void first_windows(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                              uint32_t (&window)[kWindows]) {
#pragma unroll
  for (int u = 0; u < kWindows; ++u) {
    const int i = threadIdx.x + u * kManyWorkers, m = share.over_channels.of(i), c = i - m * share.channels;
    window[u] = p.f.width == 4 && m < p.tokens
                    ? __ldcg(reinterpret_cast<const unsigned*>(numbers.block().conv_state + m * p.f.conv_batch) +
                             share.channel + c)
                    : 0;
  }
}

// x0 and z from their sums, the convolution, x, the gate.
template <int GROUPS>
__device__ __forceinline__ void convolve_many(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                              const uint32_t (&window)[kWindows], int* acc,
                                              const ManyScratch& scratch) {
  constexpr int kPitch = many_pitch(GROUPS);
  const int width = p.f.width;
  const float u_scale = numbers.one(kUScale);
  const auto one = [&](int i, uint32_t before) {
    const int m = share.over_channels.of(i), c = i - m * share.channels;
    const float* const number = numbers.channel(c);
    const int x_sum = take(acc + c * kPitch + sum_column(m));
    const int z_sum = take(acc + (share.channels + c) * kPitch + sum_column(m));
    const float x0_wide = __fadd_rn(__fmul_rn(static_cast<float>(x_sum), __fmul_rn(u_scale, number[kInX])),
                                    number[kBiasX]);
    const float z_wide = __fadd_rn(__fmul_rn(static_cast<float>(z_sum), __fmul_rn(u_scale, number[kInZ])),
                                   number[kBiasZ]);
    const int8_t x0 = byte_of(x0_wide, number[kScaleX]);
    const float gate = silu(static_cast<float>(byte_of(z_wide, number[kScaleZ])) * number[kScaleZ]);
    int8_t* const state =
        numbers.block().conv_state + m * p.f.conv_batch + static_cast<int64_t>(share.channel + c) * width;
    const int8_t* const taps = numbers.taps() + c * width;
    float sum = 0.0f;
    if (width == 4) {
      const uint32_t word = __byte_perm(before, static_cast<uint8_t>(x0), 0x4321);
      __stcg(reinterpret_cast<unsigned*>(state), word);
      float values[4], weight[4];
      unpack_bytes(word, values);
      unpack_bytes(*reinterpret_cast<const uint32_t*>(taps), weight);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum = fmaf(weight[k], values[k], sum);
    } else {
#pragma unroll 1
      for (int k = 0; k < width; ++k) {
        const int8_t value = k + 1 < width ? state[k + 1] : x0;
        state[k] = value;
        sum = fmaf(static_cast<float>(taps[k]), static_cast<float>(value), sum);
      }
    }
    const float y = silu(fmaf(sum, number[kScaleX] * number[kConvScale], number[kConvBias]));
    const int8_t x = static_cast<int8_t>(round_to_byte(y * reciprocal_approx(number[kXScale])) & 0xff);
    scratch.x[m * p.s.x_pitch + c] = x;
    scratch.items[m * p.channels + c] =
        make_float4(0.0f, static_cast<float>(x) * number[kScanScale], gate, 0.0f);
  };
  const int count = p.tokens * share.channels;
  if (threadIdx.x < count) one(threadIdx.x, window[0]);
  if (threadIdx.x + kManyWorkers < count) one(threadIdx.x + kManyWorkers, window[1]);
#pragma unroll 1
  for (int i = threadIdx.x + kWindows * kManyWorkers; i < count; i += kManyWorkers) {
    const int m = share.over_channels.of(i), c = i - m * share.channels;
    one(i, width == 4 ? __ldcg(reinterpret_cast<const unsigned*>(numbers.block().conv_state + m * p.f.conv_batch) +
                               share.channel + c)
                      : 0);
  }
}

// A sum over thread blocks, of two sequences at a time: the upper 8 bits count them, and each sequence has 28 bits, in
// which what they added is shifted to be positive. Good for D up to 8192.
constexpr int kPairBits = 28;
constexpr int kPairShift = 128 * 127;  // a channel; the least product of two int8 of which one is a weight

// Words of a launch's sums: of each block of the stack (R + 2 N, tokens / 2).
__device__ __forceinline__ unsigned long long* pairs_of(const StackPlan& p, int l, int groups) {
  return p.dbc + static_cast<int64_t>(l) * p.over_sums.by * 4 * groups;
}

// The sums of a tile of 16 rows of a weight in shared memory times eight sequences, K in steps of 32.
__device__ __forceinline__ void multiply_tile(const int* weight, int pitch, int row, int rows, const int* x, int steps,
                                              int (&sum)[4]) {
  const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
  const int *low = weight + min(row + g, rows - 1) * pitch + q, *high = weight + min(row + g + 8, rows - 1) * pitch + q;
#pragma unroll 5
  for (int k = 0; k < 8 * steps; k += 8) mma(sum, low[k], high[k], low[k + 4], high[k + 4], x[k], x[k + 4]);
}

// The thread block's columns of W_x, added to the sums of all.
template <int GROUPS>
__device__ __forceinline__ void add_pairs(const StackPlan& p, int l, const StackShare& share,
                                          const StackNumbers& numbers, const ManyScratch& scratch) {
  const int sums = p.over_sums.by, g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
  const int shift = kPairShift * share.channels;
  unsigned long long* const to = pairs_of(p, l, GROUPS);
#pragma unroll 1
  for (int task = threadIdx.x / 32; task < divide_up(sums, 16) * GROUPS; task += kManyWarps) {
    const int row = task / GROUPS * 16, f = task % GROUPS;
    int sum[4] = {};
    multiply_tile(numbers.x_weight(), p.s.x_weight_pitch, row, sums,
                  reinterpret_cast<const int*>(scratch.x + (8 * f + g) * p.s.x_pitch) + q,
                  divide_up(share.channels, 32), sum);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (row + g + 8 * k < sums && 8 * f + 2 * q < p.tokens)
        atomicAdd(to + (row + g + 8 * k) * 4 * GROUPS + 4 * f + q,
                  (1ULL << 2 * kPairBits) +
                      (static_cast<unsigned long long>(sum[2 * k + 1] + shift) << kPairBits) +
                      static_cast<unsigned long long>(sum[2 * k] + shift));
  }
}

// d, B and C from the sums of W_x: in every thread block, for all of its channels need them.
template <int GROUPS>
__device__ __forceinline__ void split_pairs(const StackPlan& p, int l, const StackNumbers& numbers,
                                            const ManyScratch& scratch) {
  const int rank = p.f.rank, size = p.f.states, sums = p.over_sums.by, tokens = p.tokens;
  const unsigned long long* const from = pairs_of(p, l, GROUPS);
  const auto put = [&](int m, int r, float v, float scale, float inverse) {
    const int8_t byte = byte_of(v, scale, inverse);
    if (r < rank) {
      scratch.d[m * p.s.d_pitch + r] = byte;
    } else {
      scratch.bc[m * 2 * size + r - rank] = static_cast<float>(byte) * scale;
    }
  };
  const float x_scale = numbers.one(kXInScale);
  const int shift = kPairShift * p.f.inner, count = sums * 4 * GROUPS;
  constexpr int kBatch = 3;
  constexpr int kMask = (1 << kPairBits) - 1;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * kManyWorkers) {
    unsigned long long words[kBatch] = {};
    unsigned missing = 0;
    const int pair = i0 % (4 * GROUPS), row = i0 / (4 * GROUPS), next = kManyWorkers / (4 * GROUPS);
    if (2 * pair < tokens) missing = (1u << min(kBatch, divide_up(count - i0, kManyWorkers))) - 1;
    const unsigned wanted = missing;
#pragma unroll 1
    while (missing != 0) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (missing >> u & 1) words[u] = load_counted(from + i0 + u * kManyWorkers);
      unsigned found = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) found |= static_cast<int>(words[u] >> 2 * kPairBits) == p.grid ? 1u << u : 0;
      missing &= ~found;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (!(wanted >> u & 1)) continue;
      const int r = row + u * next;
      const float* const number = numbers.sum(r);
      const float factor = __fmul_rn(x_scale, number[0]), scale = number[1], inverse = reciprocal_approx(scale);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int m = 2 * pair + k;
        const int sum = static_cast<int>(words[u] >> k * kPairBits & kMask) - shift;
        const float v = __fmul_rn(static_cast<float>(sum), factor);
        if (m >= tokens) continue;
        if (p.f.norm_dbc) {
          scratch.wide[m * sums + r] = v;
        } else {
          put(m, r, v, scale, inverse);
        }
      }
    }
  }
  many_sync();
  if (!p.f.norm_dbc) return;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int task = threadIdx.x / 32; task < 3 * tokens; task += kManyWarps) {
    const int m = task / 3, part = task % 3;
    const int begin = part == 0 ? 0 : rank + (part - 1) * size, end = part == 0 ? rank : begin + size;
    const float* const row = scratch.wide + m * sums;
    float squares = 0.0f;
#pragma unroll 1
    for (int r = begin + lane; r < end; r += 32) squares = fmaf(row[r], row[r], squares);
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float size_wide = static_cast<float>(end - begin);
    const float factor = rsqrtf(divide(squares, size_wide, reciprocal_approx(size_wide)) + numbers.block().dbc_eps);
#pragma unroll 1
    for (int r = begin + lane; r < end; r += 32) {
      const float* const number = numbers.sum(r);
      float v = row[r] * factor;
      if (p.f.has_norms) v *= number[2];
      put(m, r, v, number[1], reciprocal_approx(number[1]));
    }
  }
  many_sync();
}

// W_dt and softplus: dt to the items.
template <int GROUPS>
__device__ __forceinline__ void find_dt(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                        const ManyScratch& scratch) {
  const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3, channels = share.channels;
#pragma unroll 1
  for (int task = threadIdx.x / 32; task < divide_up(channels, 16) * GROUPS; task += kManyWarps) {
    const int row = task / GROUPS * 16, f = task % GROUPS;
    int sum[4] = {};
    multiply_tile(numbers.dt_weight(), p.f.rank / 4, row, channels,
                  reinterpret_cast<const int*>(scratch.d + (8 * f + g) * p.s.d_pitch) + q, divide_up(p.f.rank, 32),
                  sum);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int c = row + g + 8 * k;
      if (c >= channels) continue;
      const float* const number = numbers.channel(c);
      const float dt_scale = p.f.has_dt_scale ? number[kDtScale] : 1.0f, dt_bias = number[kDtBias];
      const float sum_scale = __fmul_rn(numbers.sum(0)[1], number[kDtWeightScale]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = 8 * f + 2 * q + i;
        float dt = __fmul_rn(static_cast<float>(sum[2 * k + i]), sum_scale);
        if (p.f.has_dt_scale) dt = static_cast<float>(byte_of(dt, dt_scale));
        dt = softplus(fmaf(dt, dt_scale, dt_bias));
        if (m < p.tokens) scratch.items[m * p.channels + c].x = dt;
      }
    }
  }
}

// In one store: of an assignment the compiler makes four of four bytes.
__device__ __forceinline__ void store_state(float* to, float4 v) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

constexpr int kStates = 5;  // fours of them that a worker asks for early

// The states of a worker's channels, asked for before they are needed.
__device__ __forceinline__ void first_states(const StackPlan& p, const StackShare& share, const StackNumbers& numbers,
                                             float4 (&states)[kStates]) {
  const int n = 4 * (threadIdx.x & 3);
#pragma unroll
  for (int u = 0; u < kStates; ++u) {
    const int i = threadIdx.x / 4 + u * (kManyWorkers / 4), m = share.over_channels.of(i), c = i - m * share.channels;
    states[u] = make_float4(0, 0, 0, 0);
    if (m < p.tokens && n < p.f.states)
      states[u] = __ldcg(reinterpret_cast<const float4*>(
          numbers.block().ssm_state + m * p.f.ssm_batch + static_cast<int64_t>(share.channel + c) * p.f.states + n));
  }
}

// The recurrence and the gate; four lanes a channel.
template <int BASE>
__device__ __forceinline__ void recur(const StackPlan& p, int l, const StackShare& share, const StackNumbers& numbers,
                                      const float4 (&states)[kStates], const ManyScratch& scratch) {
  const int size = p.f.states, j = threadIdx.x & 3, count = p.tokens * share.channels;
  const auto one = [&](int i, const float4* ahead) {
    const bool live = i < count;
    const int m = live ? share.over_channels.of(i) : 0, c = live ? i - m * share.channels : 0;
    const float4 item = scratch.items[m * p.channels + c];
    const float dt = item.x, x = item.y, dtx = dt * x;
    float* const state =
        numbers.block().ssm_state + m * p.f.ssm_batch + static_cast<int64_t>(share.channel + c) * size;
    const float *const A = numbers.A() + c * size, *const bc = scratch.bc + m * 2 * size;
    float y = 0.0f;
#pragma unroll 1
    for (int n = 4 * j; n < size; n += 16) {
      float4 h = ahead != nullptr && n < 16 ? *ahead : __ldcg(reinterpret_cast<const float4*>(state + n));
      const float4 a = *reinterpret_cast<const float4*>(A + n);
      const float4 B = *reinterpret_cast<const float4*>(bc + n), C = *reinterpret_cast<const float4*>(bc + size + n);
      h.x = fmaf(exp2_approx(dt * (a.x * kLog2E)), h.x, dtx * B.x);
      h.y = fmaf(exp2_approx(dt * (a.y * kLog2E)), h.y, dtx * B.y);
      h.z = fmaf(exp2_approx(dt * (a.z * kLog2E)), h.z, dtx * B.z);
      h.w = fmaf(exp2_approx(dt * (a.w * kLog2E)), h.w, dtx * B.w);
      if (live) store_state(state + n, h);
      y = fmaf(h.x, C.x, fmaf(h.y, C.y, fmaf(h.z, C.z, fmaf(h.w, C.w, y))));
    }
    y += __shfl_xor_sync(0xffffffffu, y, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    y = fmaf(numbers.channel(c)[kSkip], x, y) * item.z;
    if (live && j == 0) {
      const int64_t at = static_cast<int64_t>(m) * p.f.inner + share.channel + c;
      if constexpr (BASE > 0) {
        publish(p.g + turn(l, p.tokens * p.f.inner) + at, y);
      } else {
        p.bytes[at] = byte_of(y, numbers.one(kGScale));
      }
    }
  };
#pragma unroll
  for (int u = 0; u < kStates; ++u)
    if (u * (kManyWorkers / 4) < count) one(u * (kManyWorkers / 4) + threadIdx.x / 4, &states[u]);
#pragma unroll 1
  for (int i0 = kStates * (kManyWorkers / 4); i0 < count; i0 += kManyWorkers / 4) one(i0 + threadIdx.x / 4, nullptr);
}

}  // namespace quamba
