// selective_scan_step: one token of the recurrence. Four lanes a channel, the state read and written once.
//
// A thread takes four sequences where there are several: their states are under way together, what belongs to the
// channel is read once for them, and each of the channel's lanes prepares and finishes one of them.
//
// selective_scan_dt_step: the same with dt = W_dt d, a dot product that the channel's lanes share.
//
// Many sequences of 16 states are for selective_scan_step_bulk.cuh, on Hopper.
#pragma once

#include "quamba/copy.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear_dot.cuh"
#include "quamba/selective_scan.cuh"

namespace quamba {

constexpr int kStepThreads = 128;
constexpr int kStepChannels = kStepThreads / 4;  // of a block
constexpr int kStepBlocks = 6;  // of a multiprocessor: all the registers
constexpr int kStepPieces = 3;  // of 16 bytes of W_dt that a lane asks for early: all, up to a rank of 192

// What a thread copies early: states of its sequences, A, and pieces of W_dt, 16 bytes each.
constexpr int step_slots(int sequences, bool product) { return sequences + 1 + (product ? kStepPieces : 0); }

// What takes the place of dt: y = x W^T as in linear, of one row of x a sequence and one row of W a channel.
struct DtProduct {
  int rank = 0;  // R
  const int8_t* d = nullptr;  // (B, R)
  int64_t d_batch = 0;
  const int8_t* weight = nullptr;  // (D, R)
  int64_t weight_row = 0;
  Scale d_scale, weight_scale;

  __host__ __device__ int pieces() const { return (rank + 15) / 16; }
};

__device__ __forceinline__ float element(const Sequence& s, int64_t b, int64_t c) {
  return AnyVector{s.data, s.type}[b * s.batch + c * s.channel] * s.scale.or_one(c);
}

// In one store: of an assignment the compiler makes four of four bytes each, which the second-level cache takes as
// four.
// For what is not read again.
__device__ __forceinline__ void store_four(float* p, const float4& v) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w));
}

// The sums over a channel's four lanes: that of sequence j in lane j.
template <typename T>
__device__ __forceinline__ T sum_of_lanes(const T (&y)[4], int j) {
  const bool odd = j & 1, high = j & 2;
  const T low_sum = (odd ? y[1] : y[0]) + __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 1);
  const T high_sum = (odd ? y[3] : y[2]) + __shfl_xor_sync(0xffffffffu, odd ? y[2] : y[3], 1);
  return (high ? high_sum : low_sum) + __shfl_xor_sync(0xffffffffu, high ? low_sum : high_sum, 2);
}

// In every lane.
template <typename T>
__device__ __forceinline__ T sum_of_lanes(const T (&y)[1], int) {
  const T sum = y[0] + __shfl_xor_sync(0xffffffffu, y[0], 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

// kVector: N is a multiple of 4, and the states of a channel, and its row of A, are contiguous and aligned; so are,
// where there is a product, the rows of d and W_dt, of a multiple of 16. kProduct: dt comes from it, not from p.dt.
template <int SEQUENCES, bool kVector, bool kProduct>
__global__ void __launch_bounds__(kStepThreads, kVector ? kStepBlocks : 4)
    selective_scan_step_kernel(const ScanParams p, const DtProduct product) {
  static_assert(SEQUENCES == 1 || SEQUENCES == 4, "one sequence, or one for each of a channel's lanes");
  extern __shared__ __align__(16) float shared[];
  const int width = (p.states + 3) / 4 * 4;
  float* const bs = shared;  // (SEQUENCES, width)
  float* const cs = shared + SEQUENCES * width;
  int4* const slots = reinterpret_cast<int4*>(cs + SEQUENCES * width);  // (step_slots, kStepThreads), where kVector
  int4* const ds = slots + (kVector ? step_slots(SEQUENCES, kProduct) * kStepThreads : 0);  // (SEQUENCES, pieces)
  const int64_t b0 = static_cast<int64_t>(blockIdx.y) * SEQUENCES;
  const int count = p.batch - b0 < SEQUENCES ? static_cast<int>(p.batch - b0) : SEQUENCES;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStepChannels + threadIdx.x / 4;
  const int j = threadIdx.x & 3, own = SEQUENCES == 1 ? 0 : j;
  const bool live = index < p.channels;
  const int64_t c = live ? index : 0, b = b0 + (own < count ? own : 0);
  const float* const A = p.A + c * p.a_channel;
  float* const state = p.state + b0 * p.state_batch + c * p.state_channel;
  const int8_t* const weight = product.weight + c * product.weight_row;
  const int pieces = kProduct ? product.pieces() : 0;
  let_next_start();
  if (b0 == 0 && live && j == 0) {
    prefetch(A);
    prefetch(static_cast<const char*>(p.dt_bias.data) + c * size_of(p.dt_bias.type));
    prefetch(static_cast<const char*>(p.D.data) + c * size_of(p.D.type));
    if (p.x.scale) prefetch(p.x.scale.data + c * p.x.scale.stride);
    if (p.dt.scale) prefetch(p.dt.scale.data + c * p.dt.scale.stride);
    if (p.z.scale) prefetch(p.z.scale.data + c * p.z.scale.stride);
    if (p.out_scale) prefetch(p.out_scale.data + c * p.out_scale.stride);
  }
  if (kProduct && b0 == 0 && live && 64 * j < product.rank) prefetch(weight + 64 * j);
  // The block's states are neighbours: what memory has time for while the kernel before leaves it alone.
  if (kVector && threadIdx.x < count && p.state_channel == p.states && in_first_wave(kStepBlocks)) {
    const int64_t c0 = static_cast<int64_t>(blockIdx.x) * kStepChannels, rest = p.channels - c0;
    prefetch(p.state + (b0 + threadIdx.x) * p.state_batch + c0 * p.states,
             static_cast<uint32_t>((rest < kStepChannels ? rest : kStepChannels) * p.states * sizeof(float)));
  }
  wait_for_previous();

  // Everything is asked for before the first wait, what comes from afar first. Past the last sequence the first one is
  // read again, and nothing is written.
  const auto slot = [&](int i) { return slots + i * kStepThreads + threadIdx.x; };
  const auto states_at = [&](int s) { return state + (s < count ? s : 0) * p.state_batch; };
  if (kVector && 4 * j < p.states) {
#pragma unroll
    for (int s = 0; s < SEQUENCES; ++s) copy_piece(slot(s), states_at(s) + 4 * j);
    copy_piece(slot(SEQUENCES), A + 4 * j);
  }
  if constexpr (kVector && kProduct) {
#pragma unroll
    for (int i = 0; i < kStepPieces; ++i)
      if (j + 4 * i < pieces) copy_piece(slot(SEQUENCES + 1 + i), weight + 16 * (j + 4 * i));
  }
  const auto bits = [&](const Sequence& s) { return load_bits({s.data, s.type}, b * s.batch + c * s.channel); };
  const uint32_t x_bits = bits(p.x), dt_bits = kProduct ? 0 : bits(p.dt), z_bits = p.z.data ? bits(p.z) : 0;
  const uint32_t bias_bits = load_bits(p.dt_bias, c), skip_bits = load_bits(p.D, c);
  const float xs = p.x.scale.or_one(c), dt_scale = p.dt.scale.or_one(c), zs = p.z.scale.or_one(c);
  const float os = p.out_scale.or_one(c);
  if constexpr (kProduct) {
    for (int i = threadIdx.x; i < SEQUENCES * pieces; i += kStepThreads) {
      const int s = i / pieces;
      ds[i] = load16<kVector>(product.d + (b0 + (s < count ? s : 0)) * product.d_batch, 16 * (i - s * pieces),
                              product.rank);
    }
  }
  for (int i = threadIdx.x; i < SEQUENCES * p.states; i += kStepThreads) {
    const int s = i / p.states, n = i - s * p.states;
    const int64_t from = b0 + (s < count ? s : 0);
    bs[s * width + n] = element(p.B, from, n);
    cs[s * width + n] = element(p.C, from, n);
  }
  wait_copies();
  __syncthreads();
  const float x = from_bits(x_bits, p.x.type) * xs, skip = from_bits(skip_bits, p.D.type);
  float raw = from_bits(dt_bits, p.dt.type);
  if constexpr (kProduct) {
    int sums[SEQUENCES] = {};
    for (int i = 0, piece = j; piece < pieces; ++i, piece += 4) {
      int4 w;
      if (kVector && i < kStepPieces) {
        w = *slot(SEQUENCES + 1 + i);
      } else {
        w = load16<kVector>(weight, 16 * piece, product.rank);
      }
#pragma unroll
      for (int s = 0; s < SEQUENCES; ++s) sums[s] = dot16(w, ds[s * pieces + piece], sums[s]);
    }
    // Rescaled step by step as linear does it: multiply-adds would give other integers.
    raw = __fmul_rn(static_cast<float>(sum_of_lanes(sums, j)), __fmul_rn(product.d_scale[0], product.weight_scale[c]));
    if (p.dt.scale) {
      int8_t rounded;
      Store<int8_t>::one(&rounded, raw, dt_scale, reciprocal_approx(dt_scale));
      raw = to_float(rounded);
    }
  }
  const float dt = softplus(fmaf(raw, dt_scale, from_bits(bias_bits, p.dt_bias.type)));
  const float dtx = dt * x, gate = p.z.data ? silu(from_bits(z_bits, p.z.type) * zs) : 1.0f;
  float dts[SEQUENCES], dtxs[SEQUENCES], y[SEQUENCES];
#pragma unroll
  for (int s = 0; s < SEQUENCES; ++s) {
    dts[s] = SEQUENCES == 1 ? dt : __shfl_sync(0xffffffffu, dt, s, 4);
    dtxs[s] = SEQUENCES == 1 ? dtx : __shfl_sync(0xffffffffu, dtx, s, 4);
    y[s] = 0.0f;
  }
#pragma unroll 1
  for (int n0 = 4 * j; n0 < p.states; n0 += 16) {
    if constexpr (kVector) {
      const auto four = [&](int i, const float* memory) {
        if (n0 < 16) return *reinterpret_cast<const float4*>(slot(i));
        return *reinterpret_cast<const float4*>(memory + n0);
      };
      const float4 a = four(SEQUENCES, A);
#pragma unroll
      for (int s = 0; s < SEQUENCES; ++s) {
        float4 h = four(s, states_at(s));
        const float4 b4 = *reinterpret_cast<const float4*>(bs + s * width + n0);
        const float4 c4 = *reinterpret_cast<const float4*>(cs + s * width + n0);
        h.x = fmaf(exp2_approx(dts[s] * (a.x * kLog2E)), h.x, dtxs[s] * b4.x);
        h.y = fmaf(exp2_approx(dts[s] * (a.y * kLog2E)), h.y, dtxs[s] * b4.y);
        h.z = fmaf(exp2_approx(dts[s] * (a.z * kLog2E)), h.z, dtxs[s] * b4.z);
        h.w = fmaf(exp2_approx(dts[s] * (a.w * kLog2E)), h.w, dtxs[s] * b4.w);
        if (live && s < count) store_four(state + s * p.state_batch + n0, h);
        y[s] = fmaf(h.x, c4.x, fmaf(h.y, c4.y, fmaf(h.z, c4.z, fmaf(h.w, c4.w, y[s]))));
      }
    } else {
      for (int n = (n0 + 4 < p.states ? n0 + 4 : p.states) - 1; n >= n0; --n)  // in the order of the sums above
#pragma unroll
        for (int s = 0; s < SEQUENCES; ++s) {
          float* const at = states_at(s) + n * p.state_state;
          const float decay = exp2_approx(dts[s] * (A[n * p.a_state] * kLog2E));
          const float value = fmaf(decay, *at, dtxs[s] * bs[s * width + n]);
          if (live && s < count) *at = value;
          y[s] = fmaf(value, cs[s * width + n], y[s]);
        }
    }
  }
  float sum = sum_of_lanes(y, j);
  if (!live || (SEQUENCES == 1 ? j != 0 : j >= count)) return;
  sum = fmaf(skip, x, sum) * gate;
  const int64_t at = b * p.channels + c;
  switch (p.out_type) {
    case Type::kInt8:
      return Store<int8_t>::one(static_cast<int8_t*>(p.out) + at, sum, os, reciprocal_approx(os));
    case Type::kHalf:
      return Store<__half>::one(static_cast<__half*>(p.out) + at, sum, os, 1.0f);
    case Type::kBFloat16:
      return Store<__nv_bfloat16>::one(static_cast<__nv_bfloat16*>(p.out) + at, sum, os, 1.0f);
    default:
      return Store<float>::one(static_cast<float*>(p.out) + at, sum, os, 1.0f);
  }
}

}  // namespace quamba
