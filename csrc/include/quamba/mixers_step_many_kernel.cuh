// mixers_step for many sequences: the kernel. As for few, a thread block owns some channels and some rows of W_out; what
// all need of the others goes through the second-level cache: sums of squares of the residual stream and then u, the
// sums of W_x, g and then its transform, of which each row is some thread block's or cluster's work.
#pragma once

#include "quamba/mixers_step_kernel.cuh"
#include "quamba/mixers_step_many_scan.cuh"

namespace quamba {

// A warp has a sequence of the residual stream, a lane rows of it. The sum of squares over the thread block's rows goes
// to all thread blocks, for block `l` of the stack.
__device__ __forceinline__ void publish_squares(const StackPlan& p, int l, int m, float squares) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  if ((threadIdx.x & 31) == 0) publish(p.squares + turn(l, p.tokens * p.grid) + m * p.grid + blockIdx.x, squares);
}

// The thread block's rows of the residual stream before the first block, into `kept`.
__device__ __forceinline__ void enter_many(const StackPlan& p, const StackShare& share, float* kept) {
  const AnyVector hidden{p.hidden, p.hidden_type};
#pragma unroll 1
  for (int m = threadIdx.x / 32; m < p.tokens; m += kManyWarps) {
    float squares = 0.0f;
#pragma unroll 1
    for (int e = threadIdx.x & 31; e < share.rows; e += 32) {
      const float v = hidden[m * p.hidden_row + share.row + e];
      kept[m * p.rows + e] = v;
      squares = fmaf(v, v, squares);
    }
    publish_squares(p, 0, m, squares);
  }
}

// The norm of the thread block's rows of the residual stream, quantized, for all thread blocks.
__device__ __forceinline__ void norm_many(const StackPlan& p, int l, const StackShare& share,
                                          const StackNumbers& numbers, ManyGrid& grid, const float* kept) {
  const AnyVector weight{numbers.block().field[kNormWeight], p.f.norm_weight};
  const int lane = threadIdx.x & 31;
  const float scale = numbers.one(kUScale), inverse = reciprocal_approx(scale), size = static_cast<float>(p.f.model);
  const float first = lane < share.rows ? weight[share.row + lane] : 0.0f;
  grid.meet_early();
#pragma unroll 1
  for (int m = threadIdx.x / 32; m < p.tokens; m += kManyWarps) {
    const float squares = sum_published(p.squares + turn(l, p.tokens * p.grid) + m * p.grid, p.grid);
    const float factor = rsqrtf(divide(squares, size, reciprocal_approx(size)) + numbers.block().norm_eps);
#pragma unroll 1
    for (int e = lane; e < share.rows; e += 32) {
      const float k = e == lane ? first : weight[share.row + e];
      p.bytes[m * p.f.model + share.row + e] = byte_of(kept[m * p.rows + e] * factor * k, scale, inverse);
    }
  }
}

// What a thread block of a cluster has of the others' rows of W_out, for it multiplied only some columns.
template <int GROUPS>
__device__ __forceinline__ void hand_over(const StackPlan& p, StackBarriers& barriers, int parity, int* acc,
                                          int* gathered) {
  const int rank = blockIdx.x & (p.parts - 1), count = p.rows * p.tokens;
  if (threadIdx.x == 0) barrier_expect(&barriers.gathered, 4 * (p.parts - 1) * count);
#pragma unroll 1
  for (int i = threadIdx.x; i < (p.parts - 1) * count; i += kManyWorkers) {
    const int other = i / count, to = other + (other >= rank), at = i - other * count;
    const int m = at / p.rows, e = at - m * p.rows;
    send(remote_address(gathered + (rank * p.tokens + m) * p.rows + e, to),
         static_cast<uint32_t>(take(acc + (to * p.rows + e) * many_pitch(GROUPS) + sum_column(m))),
         remote_address(&barriers.gathered, to));
  }
  barrier_wait(&barriers.gathered, parity);
}

// The result of W_out, added to the residual stream, of which `kept` holds the thread block's part.
template <int GROUPS>
__device__ __forceinline__ void add_rows_many(const StackPlan& p, int l, const StackShare& share,
                                              const StackNumbers& numbers, const int* gathered, float* kept, int* acc) {
  const int rank = blockIdx.x & (p.parts - 1);
  const float g_scale = numbers.one(kGScale);
#pragma unroll 1
  for (int m = threadIdx.x / 32; m < p.tokens; m += kManyWarps) {
    float squares = 0.0f;
#pragma unroll 1
    for (int e = threadIdx.x & 31; e < share.rows; e += 32) {
      int sum = take(acc + (rank * p.rows + e) * many_pitch(GROUPS) + sum_column(m));
#pragma unroll 1
      for (int other = 0; other < p.parts; ++other)
        if (other != rank) sum += gathered[(other * p.tokens + m) * p.rows + e];
      const float* const number = numbers.row(e);
      float v = __fadd_rn(__fmul_rn(static_cast<float>(sum), __fmul_rn(g_scale, number[0])), number[1]);
      if (p.f.residual) v = __fadd_rn(v, kept[m * p.rows + e]);
      if (l + 1 < p.blocks) {
        v = rounded_to(v, p.out_type);
        kept[m * p.rows + e] = v;
        squares = fmaf(v, v, squares);
      } else {
        store_out(p, static_cast<int64_t>(m) * p.f.model + share.row + e, v);
      }
    }
    if (l + 1 < p.blocks) publish_squares(p, l + 1, m, squares);
  }
}

// The rows of g that this thread block transforms, with CLUSTER as one of some, by the first of the workers.
template <int BASE, bool CLUSTER>
__device__ __forceinline__ void transform_many(const StackPlan& p, int l, StackFixed& fixed, float scale, int* turns,
                                               int* rounds, float* raw) {
  constexpr bool kShared = CLUSTER && BASE > 1;
  const int sharing = kShared ? p.cluster >> 1 : 0, row_step = p.grid >> sharing;
#pragma unroll 1
  for (int m = blockIdx.x >> sharing; m < p.tokens; m += row_step) {
    const unsigned* const from = p.g + turn(l, p.tokens * p.f.inner) + m * p.f.inner;
    int8_t* const row = p.bytes + static_cast<int64_t>(m) * p.f.inner;
    if constexpr (kShared) {
      rotate_shared<BASE>(p, from, fixed.signs, scale, fixed.barriers, (*turns)++ & 1, true, raw, row);
      if (m + row_step < p.tokens) meet_cluster(&fixed.barriers.rounded, p.cluster, (*rounds)++ & 1);
    } else {
      fetch_row<kAtATime<BASE>>(from, p.f.inner, raw);
      rotate_row<BASE>(p, fixed.signs, scale, raw, row);
    }
    if (m + row_step < p.tokens) team_sync();
  }
}

// What the workers do.
template <int BASE, bool CLUSTER, int GROUPS>
__device__ __forceinline__ void work_many(const StackPlan& p, StackFixed& fixed, char* shared) {
  const StackShare share = fixed.share;
  StackBarriers& barriers = fixed.barriers;
  const StackFormat& f = p.f;
  char* const act = shared + p.s.act;
  int* const acc = reinterpret_cast<int*>(shared + p.s.acc);
  int* const gathered = reinterpret_cast<int*>(shared + p.s.gathered);
  float* const kept = reinterpret_cast<float*>(shared + p.s.kept);
  ManyScratch scratch;
  scratch.items = reinterpret_cast<float4*>(shared + p.s.items);
  scratch.x = reinterpret_cast<int8_t*>(shared + p.s.x), scratch.d = reinterpret_cast<int8_t*>(shared + p.s.d);
  scratch.bc = reinterpret_cast<float*>(shared + p.s.bc), scratch.wide = reinterpret_cast<float*>(act);
  StackRing ring(shared, &barriers, kManyTeamWarps);
  ManyGrid grid(p);
  enter_many(p, share, kept);

  int turns = 0, rounds = 0;  // of the cluster's barriers
#pragma unroll 1
  for (int l = 0; l < p.blocks; ++l) {
    const StackNumbers numbers(p, shared + (l & 1 ? p.s.head[1] : p.s.head[0]), shared + p.s.body);
    barrier_wait(&barriers.staged[l & 1], (l >> 1) & 1);
    uint32_t window[kWindows];
    norm_many(p, l, share, numbers, grid, kept);
    grid.meet();
    fetch_many(p, 0, f.model, f.model, act);
    first_windows(p, share, numbers, window);
    clear_tail(p, f.model, act);
    many_sync();
    multiply_many<GROUPS>(p, fixed.share.tiles[0], ring, act, acc);
    barrier_wait(&barriers.body_staged, l & 1);
    many_sync();

    convolve_many<GROUPS>(p, share, numbers, window, acc, scratch);
    many_sync();
    float4 states[kStates];
    first_states(p, share, numbers, states);
    add_pairs<GROUPS>(p, l, share, numbers, scratch);
    grid.meet_early();
    split_pairs<GROUPS>(p, l, numbers, scratch);
    find_dt<GROUPS>(p, share, numbers, scratch);
    many_sync();
    recur<BASE>(p, l, share, numbers, states, scratch);
    barrier_arrive(&barriers.body_spent);
    // Where u was, the numbers of a transform have their place: u is needed no more, here and, as they have all of a row
    // of g, in the cluster's other thread blocks.
    if constexpr (BASE > 0) {
      if (threadIdx.x < kStackWorkers)
        transform_many<BASE, CLUSTER>(p, l, fixed, numbers.one(kGScale), &turns, &rounds,
                                      reinterpret_cast<float*>(act));
    }
    grid.meet();
    const int columns = fixed.share.tiles[1].columns;
    fetch_many(p, fixed.share.tiles[1].first_column, columns, f.inner, act);
    clear_tail(p, columns, act);
    many_sync();
    multiply_many<GROUPS>(p, fixed.share.tiles[1], ring, act, acc);
    many_sync();
    if constexpr (CLUSTER) hand_over<GROUPS>(p, barriers, l & 1, acc, gathered);
    add_rows_many<GROUPS>(p, l, share, numbers, gathered, kept, acc);
    barrier_arrive(&barriers.spent[l & 1]);
  }
}

// BASE: order of the base matrix of the transform of g; 0: there is no transform. CLUSTER: thread blocks of a cluster
// share it, and W_out. GROUPS: of eight sequences.
template <int BASE, bool CLUSTER, int GROUPS>
__global__ void __launch_bounds__(kManyThreads, 1) mixers_step_many_kernel(const __grid_constant__ StackParams params) {
  extern __shared__ __align__(128) char memory[];
  char* const first = kept_address(memory);
  StackFixed& fixed = *reinterpret_cast<StackFixed*>(first);
  char* const shared = first + kStackFixedBytes;
  const StackPlan& p = params.plan;
  StackBarriers& barriers = fixed.barriers;
#pragma unroll 1
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(StackPlan) / 4); i += kManyThreads)
    reinterpret_cast<int*>(&fixed.plan)[i] = reinterpret_cast<const int*>(&p)[i];
  // Sums, operands beyond what there is, and the numbers that are never copied, of biases that are missing, are zero.
#pragma unroll 1
  for (int i = kStackFixedBytes + p.s.act + 4 * threadIdx.x; i < p.s.total; i += 4 * kManyThreads)
    *reinterpret_cast<int*>(first + i) = 0;
  if constexpr (BASE > 1) write_signs<BASE>(fixed.signs);
  if (threadIdx.x == 0) {
    init_barriers(p, barriers, kManyWorkers, kManyTeamWarps);
    barrier_init(&barriers.gathered, 1);
    barrier_init(&barriers.rounded, p.cluster * kStackWorkers / 32);
    barriers_ready();
    fixed.share = StackShare(p);
  }
  __syncthreads();
  if constexpr (CLUSTER) cluster_sync();
  if (threadIdx.x < kManyWorkers) {
    work_many<BASE, CLUSTER, GROUPS>(p, fixed, shared);
  } else if (threadIdx.x < kManyWorkers + kStackStagers) {
    stage_blocks<kManyWorkers, true>(fixed.plan, params.block, fixed.share, shared, barriers);
  } else {
    stream_weights(fixed.plan, params.block, fixed.share, shared, barriers);
  }
}

}  // namespace quamba
