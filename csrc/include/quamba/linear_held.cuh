// linear for up to 64 rows of x, made to be one of a chain of kernels that start early: a thread block has COLUMNS of
// the weight's rows, of which nearly all come into shared memory while the kernel before still runs, and multiplies
// them as that one's result, x, comes. One block a multiprocessor. Where there are fewer columns than that, the two
// blocks of a cluster have half of K each, and then half of the rows.
//
// One warp asks for the weight and one for x, by tensor maps, 128 bytes of K a stage; pairs of blocks begin at
// different stages, so that not all ask for the same bytes of x at a time. Two groups of four warps have some of the
// columns each.
#pragma once

#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cutlass/arch/barrier.h>

#include <utility>

#include "quamba/causal_conv1d_step.cuh"
#include "quamba/cluster.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear_held_tail.cuh"
#include "quamba/matrix_operand.cuh"

namespace quamba {

constexpr int kHeldRows = 64, kHeldStage = 128;  // rows of x; bytes of K: a row of the widest swizzle
// Stages of the weight under way, which keep memory busy: more would only stand in the way of what others wait for.
constexpr int kHeldAhead = 3;
constexpr int kHeldGroup = 128, kHeldWorkers = 2 * kHeldGroup, kHeldThreads = kHeldWorkers + 96;

// kFirst: columns of the first group. kSlots, kRowSlots: stages of the weight and of x that there is room for.
template <int COLUMNS, int FIRST, bool HALVES, int SLOTS, int ROW_SLOTS>
struct HeldTile {
  static constexpr int kColumns = COLUMNS, kFirst = FIRST, kSecond = COLUMNS - FIRST;
  static constexpr bool kHalves = HALVES;  // of K; else the blocks of a cluster share x
  static constexpr int kSlots = SLOTS, kRowSlots = ROW_SLOTS;
  static constexpr int kWeight = kColumns * kHeldStage, kX = kHeldRows * kHeldStage;  // bytes of a stage
  static constexpr int kRing = kSlots * kWeight + kRowSlots * kX;
  static constexpr int kHanded = kHalves ? kHeldRows / 2 * kColumns * 4 : 0;  // bytes that the other block sends
  static_assert(kWeight % 1024 == 0 && kFirst % 8 == 0, "each group's columns begin a pattern of the swizzle");
};
using HeldIn = HeldTile<80, 48, false, 17, 6>;
using HeldOut = HeldTile<40, 24, true, 20, 9>;

constexpr int kHeldConvParams = 10;  // floats that belong to a column

template <typename Tile, typename Tail>
constexpr int held_shared() {
  constexpr int kParams = std::is_same_v<Tail, HeldConv> ? 4 * kHeldConvParams * Tile::kColumns : 0;
  return Tile::kRing + Tile::kHanded + kParams + (2 * (Tile::kSlots + Tile::kRowSlots) + 2) * 8;
}

// Where things lie in shared memory, and what the groups' threads are.
template <typename Tile>
struct HeldPlaces {
  char *weights, *xs, *handed;
  float* params;
  uint64_t *weight_full, *weight_empty, *x_full, *x_empty, *given, *known;

  template <typename Tail>
  __device__ __forceinline__ HeldPlaces(char* shared, const Tail*) {
    weights = shared, xs = weights + Tile::kSlots * Tile::kWeight, handed = shared + Tile::kRing;
    params = reinterpret_cast<float*>(handed + Tile::kHanded);
    weight_full = reinterpret_cast<uint64_t*>(shared + held_shared<Tile, Tail>()) -
                  (2 * (Tile::kSlots + Tile::kRowSlots) + 2);
    weight_empty = weight_full + Tile::kSlots, x_full = weight_empty + Tile::kSlots;
    x_empty = x_full + Tile::kRowSlots, given = x_empty + Tile::kRowSlots, known = given + 1;
  }
};

// The sums of a group: COLUMNS of the block's from `begin` on.
template <typename Tile, int COLUMNS>
__device__ __forceinline__ void held_products(const HeldPlaces<Tile>& at, int begin, int count,
                                              uint32_t (&sum)[COLUMNS / 2]) {
  const auto release = [&](int turn) {
    if (threadIdx.x % kHeldGroup == 0) {
      barrier_arrive(at.weight_empty + turn % Tile::kSlots);
      barrier_arrive(at.x_empty + turn % Tile::kRowSlots);
      if (!Tile::kHalves) arrive_there(remote_address(at.x_empty + turn % Tile::kRowSlots, blockIdx.x & 1 ^ 1));
    }
  };
#pragma unroll 1
  for (int turn = 0; turn < count; ++turn) {
    const int slot = turn % Tile::kSlots, row_slot = turn % Tile::kRowSlots;
    barrier_wait(at.weight_full + slot, turn / Tile::kSlots & 1);
    barrier_wait(at.x_full + row_slot, turn / Tile::kRowSlots & 1);
    const uint32_t x = (shared_address(at.xs) + row_slot * Tile::kX) / 16;
    const uint32_t weight = (shared_address(at.weights) + slot * Tile::kWeight + begin * kHeldStage) / 16;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) cute::warpgroup_fence_operand(sum[i]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kHeldStage / 32; ++k)
      matrix_multiply<COLUMNS>(swizzled_operand(x + 2 * k), swizzled_operand(weight + 2 * k), sum);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (turn > 0) release(turn - 1);
  }
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) cute::warpgroup_fence_operand(sum[i]);
  if (!Tile::kHalves) cluster_arrive_relaxed();  // nothing is asked of the other block any more
}

// What a group does, with what it reads at the side asked for before its sums are there: with W_in, the convolution's
// step. Of 16 columns a thread has four neighbours, by the weight's map.
template <typename Tile, int COLUMNS>
__device__ __forceinline__ void held_group(const LinearParams& p, const HeldConv& tail, const HeldPlaces<Tile>& at,
                                           int n0, int begin, int count, int) {
  constexpr int kRuns = COLUMNS / 16;
  const int lane = threadIdx.x & 31, quarter = lane & 3;
  const int first_row = threadIdx.x % kHeldGroup / 32 * 16 + lane / 4;
  uint4 states[kRuns][2];
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = n0 + begin + 16 * r + 4 * quarter, m = first_row + 8 * h;
      states[r][h] = uint4{};
      if (n < tail.channels && m < p.rows)
        states[r][h] = *reinterpret_cast<const uint4*>(tail.state + m * tail.state_batch + 4 * n);
    }
  uint32_t sum[COLUMNS / 2] = {};
  held_products<Tile, COLUMNS>(at, begin, count, sum);
  let_next_start();
  wait_for_previous();
  barrier_wait(at.known, 0);
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int column = begin + 16 * r + 4 * quarter;
    const int64_t n = n0 + column;
    const auto four = [&](int which, float (&v)[4]) {
      const float4 values = *reinterpret_cast<const float4*>(at.params + which * Tile::kColumns + column);
      v[0] = values.x, v[1] = values.y, v[2] = values.z, v[3] = values.w;
    };
    float factor[4], out_scale[4], bias[4];
    four(0, factor), four(1, out_scale), four(2, bias);
    uint32_t words[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int8_t values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v = __fmul_rn(static_cast<float>(static_cast<int>(sum[8 * r + i / 2 * 4 + 2 * h + i % 2])), factor[i]);
        if (p.bias) v = __fadd_rn(v, bias[i]);
        Store<int8_t>::one(values + i, v, out_scale[i], reciprocal_approx(out_scale[i]));
      }
      words[h] = pack_bytes(values[0], values[1], values[2], values[3]);
    }
    if (n >= p.columns) continue;
    if (n >= tail.channels) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (first_row + 8 * h < p.rows)
          *reinterpret_cast<uint32_t*>(tail.z + (first_row + 8 * h) * tail.channels + n - tail.channels) = words[h];
      continue;
    }
    ConvColumns conv;
    four(3, conv.factor), four(4, conv.bias), four(5, conv.out_scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 taps = *reinterpret_cast<const float4*>(at.params + 6 * Tile::kColumns + 4 * (column + i));
      conv.taps[i][0] = taps.x, conv.taps[i][1] = taps.y, conv.taps[i][2] = taps.z, conv.taps[i][3] = taps.w;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = first_row + 8 * h;
      if (m >= p.rows) continue;
      const uint4 next = ConvColumns::shifted(states[r][h], words[h]);
      *reinterpret_cast<uint4*>(tail.state + m * tail.state_batch + 4 * n) = next;
      float y[4];
      conv.apply(next, y);
      conv.store(y, tail.x + m * tail.channels + n);
    }
  }
}

// What belongs to a block's columns, by one warp.
template <typename Tile>
__device__ __forceinline__ void held_sides(const LinearParams& p, const HeldConv& tail, const HeldPlaces<Tile>& at,
                                           int n0) {
  const int lane = threadIdx.x & 31;
  const float x_scale = p.x_scale[0];
  for (int c = lane; c < Tile::kColumns && n0 + c < p.columns; c += 32) {
    const int n = n0 + c;
    const auto put = [&](int which, float v) { at.params[which * Tile::kColumns + c] = v; };
    put(0, __fmul_rn(x_scale, p.weight_scale[n])), put(1, p.out_scale[n]), put(2, p.bias ? p.bias[n] : 0.0f);
    if (n >= tail.channels) continue;
    put(3, p.out_scale[n] * (tail.weight_scale ? tail.weight_scale[n] : 1.0f));
    put(4, tail.bias ? tail.bias[n] : 0.0f), put(5, tail.out_scale[n]);
    float* const taps = at.params + 6 * Tile::kColumns + 4 * c;
    for (int k = 0; k < 4; ++k) taps[k] = tail.weight[4 * static_cast<int64_t>(n) + k];
  }
  barrier_arrive(at.known);
}

// Two neighbouring elements, of a type known at run time.
__device__ __forceinline__ float2 two_of(const AnyVector& v, int64_t i) {
  if (v.type == Type::kFloat) return *reinterpret_cast<const float2*>(static_cast<const float*>(v.data) + i);
  const uint32_t word = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(v.data) + i);
  return make_float2(from_bits(word & 0xffff, v.type), from_bits(word >> 16, v.type));
}

// With W_out: a float result, and the residual. A block of the cluster has every other eight rows.
template <typename Tile, int COLUMNS>
__device__ __forceinline__ void held_group(const LinearParams& p, const HeldWrite&, const HeldPlaces<Tile>& at, int n0,
                                           int begin, int count, int rank) {
  constexpr int kPairs = COLUMNS / 8;
  const int lane = threadIdx.x & 31, thread = threadIdx.x % kHeldGroup;
  const int64_t m = thread / 32 * 16 + lane / 4 + 8 * rank, n = n0 + begin + 2 * (lane & 3);
  float2 weight_scale[kPairs], bias[kPairs], residual[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const bool inside = n + 8 * j < p.columns;
    weight_scale[j] = float2{};
    if (inside) weight_scale[j] = make_float2(p.weight_scale[n + 8 * j], p.weight_scale[n + 8 * j + 1]);
    bias[j] = inside && p.bias ? two_of(p.bias, n + 8 * j) : float2{};
  }
  wait_for_previous();
  const float x_scale = p.x_scale[m < p.rows ? m : 0];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const bool inside = m < p.rows && n + 8 * j < p.columns;
    residual[j] = inside && p.residual ? two_of(p.residual, m * p.residual_row + n + 8 * j) : float2{};
  }
  uint32_t sum[COLUMNS / 2] = {};
  held_products<Tile, COLUMNS>(at, begin, count, sum);
  let_next_start();
  cluster_wait();
  uint2* const place = reinterpret_cast<uint2*>(at.handed) + begin / 8 * kHeldGroup + thread;
  const uint32_t to = remote_address(place, rank ^ 1), barrier = remote_address(at.given, rank ^ 1);
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const uint2 theirs = rank ? make_uint2(sum[4 * j], sum[4 * j + 1]) : make_uint2(sum[4 * j + 2], sum[4 * j + 3]);
    send(to + j * kHeldGroup * 8, theirs, barrier);
  }
  barrier_wait_cluster(at.given, 0);
  if (m >= p.rows) return;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const uint2 own = rank ? make_uint2(sum[4 * j + 2], sum[4 * j + 3]) : make_uint2(sum[4 * j], sum[4 * j + 1]);
    const uint2 other = place[j * kHeldGroup];
    const auto one = [&](uint32_t total, float scale, float shift, float more) {
      float v = __fmul_rn(static_cast<float>(static_cast<int>(total)), __fmul_rn(x_scale, scale));
      if (p.bias) v = __fadd_rn(v, shift);
      return p.residual ? __fadd_rn(v, more) : v;
    };
    const float a = one(own.x + other.x, weight_scale[j].x, bias[j].x, residual[j].x);
    const float b = one(own.y + other.y, weight_scale[j].y, bias[j].y, residual[j].y);
    if (n + 8 * j >= p.columns) continue;
    const int64_t i = m * p.columns + n + 8 * j;
    if (p.out_type == Type::kFloat) {
      *reinterpret_cast<float2*>(static_cast<float*>(p.out) + i) = make_float2(a, b);
    } else if (p.out_type == Type::kHalf) {
      *reinterpret_cast<__half2*>(static_cast<__half*>(p.out) + i) =
          __halves2half2(__float2half_rn(a), __float2half_rn(b));
    } else {
      *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + i) =
          __halves2bfloat162(__float2bfloat16_rn(a), __float2bfloat16_rn(b));
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void held_sides(const LinearParams&, const HeldWrite&, const HeldPlaces<Tile>&, int) {}

// blockIdx.x: tiles of columns, twice each where a block has half of K, else filled up to an even number. Maps: of x,
// in boxes of 64 rows, or of 32 where the blocks share it; of the weight, in boxes of kColumns rows, which for a
// HeldConv are (runs, 2, 4, 2, K), column (j, q, i) of a run of 16 being 4 q + 2 j + i. The weight, states, and all
// that belongs to columns are as they are to be when the kernel begins, whatever runs before it.
template <typename Tile, typename Tail>
__global__ void __launch_bounds__(kHeldThreads, 1)
    linear_held_kernel(const LinearParams p, const Tail tail, const __grid_constant__ CUtensorMap x_map,
                       const __grid_constant__ CUtensorMap weight_map) {
  extern __shared__ __align__(1024) char shared[];
  const HeldPlaces<Tile> at(shared, &tail);
  const int thread = threadIdx.x;
  const int rank = blockIdx.x & 1, pair = static_cast<int>(blockIdx.x / 2);
  const int tile = Tile::kHalves ? pair : static_cast<int>(blockIdx.x);
  const int n0 = tile * Tile::kColumns;
  const int stages = static_cast<int>((p.inner + kHeldStage - 1) / kHeldStage);
  const int half = stages / 2;
  const int begin = Tile::kHalves && rank ? half : 0, count = Tile::kHalves ? (rank ? stages - half : half) : stages;

  if (thread == kHeldWorkers) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&weight_map));
    for (int i = 0; i < Tile::kSlots; ++i) barrier_init(at.weight_full + i, 1), barrier_init(at.weight_empty + i, 2);
    for (int i = 0; i < Tile::kRowSlots; ++i) {
      barrier_init(at.x_full + i, 1), barrier_init(at.x_empty + i, Tile::kHalves ? 2 : 4);
    }
    barrier_init(at.given, 1), barrier_init(at.known, 32);
    cutlass::arch::fence_barrier_init();
    if (Tile::kHanded > 0) barrier_expect(at.given, Tile::kHanded);
  }
  __syncthreads();
  cluster_arrive_relaxed();
  if (!Tile::kHalves) cluster_wait();

  if (thread < kHeldGroup) {
    held_group<Tile, Tile::kFirst>(p, tail, at, n0, 0, count, rank);
    if (!Tile::kHalves) cluster_wait();
    return;
  }
  if (thread < kHeldWorkers) {
    held_group<Tile, Tile::kSecond>(p, tail, at, n0, Tile::kFirst, count, rank);
    if (!Tile::kHalves) cluster_wait();
    return;
  }
  if (thread == kHeldWorkers) {
    constexpr auto kFirstOut = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
    for (int i = 0; i < count; ++i) {
      const int slot = i % Tile::kSlots;
      if (i >= Tile::kSlots) barrier_wait(at.weight_empty + slot, (i / Tile::kSlots - 1) & 1);
      const int last = i - kHeldAhead;
      if (last >= 0) barrier_wait(at.weight_full + last % Tile::kSlots, last / Tile::kSlots & 1);
      barrier_expect(at.weight_full + slot, Tile::kWeight);
      char* const to = at.weights + slot * Tile::kWeight;
      const int k = kHeldStage * (begin + (i + pair) % count);
      if constexpr (std::is_same_v<Tail, HeldConv>) {
        cute::SM90_TMA_LOAD_5D::copy(&weight_map, at.weight_full + slot, kFirstOut, to, k, 0, 0, 0, n0 / 16);
      } else {
        cute::SM90_TMA_LOAD_2D::copy(&weight_map, at.weight_full + slot, kFirstOut, to, k, n0);
      }
    }
  } else if (thread >= kHeldWorkers + 64) {
    held_sides<Tile>(p, tail, at, n0);
  } else if (thread >= kHeldWorkers + 32) {
    if (thread == kHeldWorkers + 32) {
      constexpr auto kStays = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
      wait_for_previous();
      for (int i = 0; i < count; ++i) {
        const int slot = i % Tile::kRowSlots;
        if (i >= Tile::kRowSlots) barrier_wait(at.x_empty + slot, (i / Tile::kRowSlots - 1) & 1);
        barrier_expect(at.x_full + slot, Tile::kX);
        char* const to = at.xs + slot * Tile::kX;
        const int k = kHeldStage * (begin + (i + pair) % count);
        if constexpr (Tile::kHalves) {
          cute::SM90_TMA_LOAD_2D::copy(&x_map, at.x_full + slot, kStays, to, k, 0);
        } else {
          const int own = rank * kHeldRows / 2;
          char* const half_of = to + own * kHeldStage;
          cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&x_map, at.x_full + slot, uint16_t{3}, kStays, half_of, k, own);
        }
      }
    }
  }
  __syncwarp();
  if (!Tile::kHalves) cluster_arrive_relaxed();
  cluster_wait();
}

}  // namespace quamba
