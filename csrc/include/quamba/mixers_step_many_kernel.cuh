// mixers_step for many sequences: the kernel. As for few, a thread block has its channels and its rows of W_out; what
// others need of it goes through the second-level cache: its rows of the residual stream and then u, the sums of W_x, g
// and then its transform. Each row of u and of the transformed g is some thread block's or cluster's work.
#pragma once

#include "quamba/mixers_step_many_norm.cuh"
#include "quamba/mixers_step_many_recurrence.cuh"
#include "quamba/mixers_step_many_shape.cuh"
#include "quamba/mixers_step_many_sums.cuh"

namespace quamba {

// The rows of g that this thread block transforms, with CLUSTER as one of some.
template <int BASE, bool CLUSTER, int GROUPS>
__device__ __forceinline__ void transform_many(const StackPlan& p, int l, StackFixed& fixed, ManyGrid& grid,
                                               float scale, int* turns, int* rounds, float* raw) {
  constexpr bool kShared = CLUSTER && BASE > 1;
  const int sharing = kShared ? p.cluster >> 1 : 0, row_step = p.grid >> sharing;
#pragma unroll 1
  for (int m = blockIdx.x >> sharing; m < p.tokens; m += row_step) {
    const unsigned* const from = p.g + turn(l, p.tokens * p.f.inner) + m * p.f.inner;
    int8_t* const row =
        reinterpret_cast<int8_t*>(p.g_words) + turn(l, many_bytes(GROUPS, p.f.inner)) + many_place(GROUPS, m, 0);
    if constexpr (kShared) {
      rotate_shared<BASE, kManyWorkers>(p, from, fixed.signs, scale, fixed.barriers, (*turns)++ & 1, true, raw, row,
                                        GROUPS);
      if (m + row_step < p.tokens) meet_cluster(&fixed.barriers.rounded, p.cluster, (*rounds)++ & 1);
    } else {
      fetch_row<divide_up(kAtATime<BASE>, 2), kManyWorkers>(from, p.f.inner, raw);
      rotate_row<BASE, kManyWorkers>(p, fixed.signs, scale, raw, row, GROUPS);
    }
    grid.tell();
  }
}

// A warp's arrival. All of its threads would arrive one after the other.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
}

// From here on those who stream are in nobody's way, or from here on they are again.
__device__ __forceinline__ void turn_stream(StackBarriers& barriers) {
  if (threadIdx.x == 0) barrier_arrive(&barriers.quick);
}

// What the workers do.
template <int BASE, bool CLUSTER, int GROUPS, typename Shape>
__device__ __forceinline__ void work_many(const StackPlan& p, StackFixed& fixed, char* shared) {
  const StackShare share = share_of<Shape>(p, fixed);
  const auto tiles = [&](int second) -> const StackTiles& {
    return Shape::kKnown ? share.tiles[second] : fixed.share.tiles[second];
  };
  StackBarriers& barriers = fixed.barriers;
  const StackFormat& f = p.f;
  int* const acc = reinterpret_cast<int*>(shared + p.s.acc);
  float* const raw = reinterpret_cast<float*>(shared + p.s.raw);
  float* const kept = reinterpret_cast<float*>(shared + p.s.kept);
  int* const gathered = reinterpret_cast<int*>(shared + p.s.gathered);
  ManyScratch scratch;
  scratch.items = reinterpret_cast<float2*>(shared + p.s.items);
  scratch.x = reinterpret_cast<int8_t*>(shared + p.s.x), scratch.d = reinterpret_cast<int8_t*>(shared + p.s.d);
  scratch.bc = reinterpret_cast<float*>(shared + p.s.bc), scratch.wide = raw;
  StackRing ring(shared, &barriers, kManyWarps);
  ManyGrid grid(p);

  enter_many(p, share, kept);
  int turns = 0, rounds = 0;  // of the cluster's barriers
#pragma unroll 1
  for (int l = 0; l < p.blocks; ++l) {
    const StackNumbers numbers(p, shared + (l & 1 ? p.s.head[1] : p.s.head[0]), shared + p.s.body);
    barrier_wait(&barriers.staged[l & 1], (l >> 1) & 1);
    uint32_t window[kWindows];
    norm_many(p, l, numbers, grid, fixed.partial);
    first_windows(p, share, numbers, window);
    grid.wait(p.tokens);
    turn_stream(barriers);
    multiply_many<GROUPS>(p, tiles(0), false, ring, grid,
                          p.u_words + turn(l, many_bytes(GROUPS, f.model) / 4), acc);
    barrier_wait(&barriers.body_staged, l & 1);
    many_sync();

    turn_stream(barriers);
    convolve_many<GROUPS>(p, share, numbers, window, acc, scratch);
    many_sync();
    write_parts<GROUPS>(p, l, share, numbers, scratch);
    grid.meet_early();
    add_parts<GROUPS>(p, l, numbers, grid, acc);
    float4 states[kStates<GROUPS>];
    first_states<GROUPS>(p, share, numbers, states);
    grid.wait(p.grid);
    fetch_sums<GROUPS>(p, l, numbers, grid, scratch);
    turn_stream(barriers);
    find_dt<GROUPS>(p, share, numbers, scratch);
    many_sync();
    recur<BASE, GROUPS>(p, l, share, numbers, states, scratch);
    turn_stream(barriers);
    arrive_warp(&barriers.body_spent);
    if constexpr (BASE > 0) {
      transform_many<BASE, CLUSTER, GROUPS>(p, l, fixed, grid, numbers.one(kGScale), &turns, &rounds, raw);
    } else {
      grid.tell();
    }
    grid.wait(BASE == 0 ? p.grid : CLUSTER && BASE > 1 ? p.tokens * p.cluster : p.tokens);
    if constexpr (BASE == 0) grid.sure();
    multiply_many<GROUPS>(p, tiles(1), true, ring, grid,
                          p.g_words + turn(l, many_bytes(GROUPS, f.inner) / 4), acc);
    many_sync();
    if constexpr (CLUSTER) hand_over<GROUPS>(p, barriers, l & 1, acc, gathered);
    add_rows_many<GROUPS>(p, l, share, numbers, gathered, kept, acc);
    arrive_warp(&barriers.spent[l & 1]);
  }
}

// BASE: order of the base matrix of the transform of g; 0: there is no transform. CLUSTER: thread blocks of a cluster
// share it, and W_out. GROUPS: of eight sequences.
template <int BASE, bool CLUSTER, int GROUPS, typename Shape>
__global__ void __launch_bounds__(kManyThreads, 1) mixers_step_many_kernel(const __grid_constant__ StackParams params) {
  extern __shared__ __align__(128) char memory[];
  char* const first = kept_address(memory);
  StackFixed& fixed = *reinterpret_cast<StackFixed*>(first);
  char* const shared = first + kManyFixedBytes;
  const StackPlan& p = params.plan;
  StackBarriers& barriers = fixed.barriers;
#pragma unroll 1
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(StackPlan) / 4); i += kManyThreads)
    reinterpret_cast<int*>(&fixed.plan)[i] = reinterpret_cast<const int*>(&p)[i];
  // Sums, operands beyond what there is, and the numbers that are never copied, of biases that are missing, are zero.
#pragma unroll 1
  for (int i = kManyFixedBytes + p.s.raw + 4 * threadIdx.x; i < p.s.total; i += 4 * kManyThreads)
    *reinterpret_cast<int*>(first + i) = 0;
  if constexpr (BASE > 1) write_signs<BASE>(fixed.signs);
  if (threadIdx.x == 0) {
    init_barriers(p, barriers, kManyWarps, kManyWarps);
    barrier_init(&barriers.gathered, 1), barrier_init(&barriers.quick, 1);
    barrier_init(&barriers.rounded, p.cluster * kManyWarps);
    barriers_ready();
    fixed.share = StackShare(p);
  }
  __syncthreads();
  if constexpr (CLUSTER) cluster_sync();
  if (threadIdx.x < kManyWorkers) {
    if constexpr (Shape::kKnown) {
      work_many<BASE, CLUSTER, GROUPS, Shape>(Shape::plan(p), fixed, shared);
    } else {
      work_many<BASE, CLUSTER, GROUPS, Shape>(p, fixed, shared);
    }
  } else if (threadIdx.x < kManyWorkers + kStackStagers) {
    stage_blocks<kManyWorkers, true>(fixed.plan, params.block, fixed.share, shared, barriers);
  } else {
    stream_many(fixed.plan, params.block, fixed.share, shared, barriers);
  }
}

}  // namespace quamba
