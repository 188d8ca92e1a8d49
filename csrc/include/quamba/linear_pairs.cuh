// linear for as many rows of x as one pass of large tiles over the device takes: such a product waits for what the
// multiprocessors take in, so that two thread blocks, a cluster, share it. Either both get the same rows of x by one
// read, for neighbouring tiles, or each has half of K of one tile, twice as large, and then half of its columns; and
// two pairs of this kind, a cluster of four, may get the same columns by one read, for different rows of x.
//
// A warp copies, others bring the columns' scales, two groups of four warps multiply and rescale. These ask for the
// residual shortly before the last products: earlier, behind all that is copied at first, they would wait to have
// asked.
// A weight's columns are dealt out such that a thread gets four neighbours of a row (float32 results)
// or eight (int8), which it writes as they are.
#pragma once

#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "quamba/launch.cuh"
#include "quamba/linear_pairs_tile.cuh"
#include "quamba/linear_short.cuh"

namespace quamba {

// The first run of a tile that a block copies.
template <typename Tile>
__device__ __forceinline__ int pair_box(uint32_t block) {
  return Tile::kQuads && block >> 1 ? Tile::kRuns - Tile::kBox : 0;
}

// What a thread block copies.
template <typename Tile>
__device__ __forceinline__ void pair_copy(const CUtensorMap& x, const CUtensorMap& weight, char* stages, uint64_t* full,
                                          uint64_t* empty, int begin, int end, int row, int run, uint32_t block) {
  constexpr auto kStays = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr int kHalf = Tile::kRows / 2;
  for (int i = begin; i < end; ++i) {
    const int turn = i - begin, stage = turn % Tile::kStages, round = turn / Tile::kStages;
    if (round > 0) barrier_wait(empty + stage, (round - 1) & 1);
    barrier_expect(full + stage, Tile::kCopied);
    char* const to = stages + stage * Tile::kStage;
    if constexpr (Tile::kHalves) {
      cute::SM90_TMA_LOAD_2D::copy(&x, full + stage, kStays, to, kPairStage * i, row);
    } else {
      const int own = static_cast<int>(block) * kHalf;
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&x, full + stage, uint16_t{3}, kStays, to + own * kPairStage,
                                             kPairStage * i, row + own);
    }
    char* const columns = to + Tile::kRows * kPairStage;
    if constexpr (Tile::kQuads) {
      const int own = pair_box<Tile>(block);
      cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&weight, full + stage, static_cast<uint16_t>(5 << (block & 1)), kStays,
                                             columns + own * Tile::kRun * kPairStage, kPairStage * i, 0, 0, 0,
                                             run + own);
    } else {
      cute::SM90_TMA_LOAD_5D::copy(&weight, full + stage, kStays, columns, kPairStage * i, 0, 0, 0, run);
    }
  }
}

// What the other threads of its group bring: the scales of a tile's columns.
template <typename Tile, bool kPerRow>
__device__ __forceinline__ void pair_scales(const LinearParams& p, int n0, int thread, float* scales) {
  const int columns = static_cast<int>(p.columns);
#pragma unroll 1
  for (int i = thread; i < Tile::kColumns; i += kPairSides) {
    const bool inside = n0 + i < columns;
    if constexpr (Tile::kBytes) {
      ShortColumn<kPerRow> column{};
      if (inside) column.init(p, n0 + i);
      scales[i] = column.weight_scale, scales[Tile::kColumns + i] = column.out_scale;
      scales[2 * Tile::kColumns + i] = column.reciprocal;
    } else {
      scales[i] = inside ? p.weight_scale[n0 + i] : 0.0f;
    }
  }
}

// blockIdx.x: tiles of columns, twice each where a block has half of K, four times in quads, else filled up to an even
// number; blockIdx.y: tiles of rows, two in quads. Maps: of x, in boxes of a tile's rows, or of half of them where both
// blocks get them; of the weight as (runs, 2 or 4, 4, 2, K), where of a run column (j, q, i) is kRun / 4 q + 2 j + i. N
// is a multiple of kRun. No bias.
template <typename Tile, bool kPerRow>
__global__ void __launch_bounds__(kPairThreads, 1)
    linear_pairs_kernel(const LinearParams p, const __grid_constant__ CUtensorMap x_map,
                        const __grid_constant__ CUtensorMap weight_map) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - __cvta_generic_to_shared(raw) % 1024) % 1024;
  char* const handed = shared + Tile::kStages * Tile::kStage;
  float* const scales = reinterpret_cast<float*>(handed + Tile::kHanded);  // (3 or 1, kColumns)
  uint64_t* const full = reinterpret_cast<uint64_t*>(handed + Tile::kHanded + Tile::kScales);
  uint64_t *const empty = full + Tile::kStages, *const given = empty + Tile::kStages, *const known = given + kPairGroups;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const uint32_t block = blockIdx.x % Tile::kCluster, rank = block & 1, other = block ^ 1;
  const uint32_t sharer = Tile::kQuads ? block ^ 2 : other;  // gets what this block copies
  const int tile = Tile::kHalves ? blockIdx.x / Tile::kCluster : blockIdx.x;
  const int row = (Tile::kQuads ? 2 * blockIdx.y + block / 2 : blockIdx.y) * Tile::kRows;
  const int n0 = tile * Tile::kColumns;
  const int first_run = Tile::kHalves && rank ? Tile::kRuns - Tile::kOwn : 0;  // of those that the block finishes
  const int stages = static_cast<int>((p.inner + kPairStage - 1) / kPairStage), half = (stages + 1) / 2;
  const int begin = Tile::kHalves && rank ? half : 0, end = Tile::kHalves && !rank ? half : stages;

  if (thread == kPairWorkers) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&weight_map));
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, Tile::kShares ? 2 * kPairGroups : kPairGroups);
    }
    for (int g = 0; g < kPairGroups; ++g) barrier_init(given + g, 1);
    barrier_init(known, kPairSides);
    cutlass::arch::fence_barrier_init();
    if (Tile::kHalves)
      for (int g = 0; g < kPairGroups; ++g) barrier_expect(given + g, Tile::kHanded / kPairGroups);
    if (blockIdx.y == 0)
      for (int i = begin; i < end && i < begin + Tile::kStages; ++i)
        cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&weight_map, kPairStage * i, 0, 0, 0,
                                               tile * Tile::kRuns + pair_box<Tile>(block));
  }
  if constexpr (!Tile::kBytes) {
    constexpr int kLines = (Tile::kOwn + 1) / 2;  // of a row's residual, 128 bytes each
    for (int i = thread - kPairWorkers - 32; i >= 0 && i < Tile::kRows * kLines; i += kPairSides) {
      const int64_t m = row + i / kLines, n = n0 + first_run * Tile::kRun + i % kLines * 32;
      if (m < p.rows && n < p.columns) prefetch(static_cast<const float*>(p.residual.data) + m * p.residual_row + n);
    }
  }
  __syncwarp();
  cluster_arrive_relaxed();
  cluster_wait();
  wait_for_previous();

  if (thread >= kPairWorkers) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kFew>();
    if (thread == kPairWorkers)
      pair_copy<Tile>(x_map, weight_map, shared, full, empty, begin, end, row, tile * Tile::kRuns, block);
    if (thread >= kPairWorkers + 32) {
      pair_scales<Tile, kPerRow>(p, n0, thread - kPairWorkers - 32, scales);
      barrier_arrive(known);
    }
    __syncwarp();
    if (Tile::kShares) {
      cluster_arrive_relaxed();
      cluster_wait();
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<Tile::kMany>();

  const int group = thread / kPairGroupThreads, quarter = lane & 3;
  const int64_t first_row = row + group * (Tile::kRows / 2) + (warp & 3) * 16 + lane / 4;
  float x_scale[Tile::kDeep][2];
#pragma unroll
  for (int d = 0; d < Tile::kDeep; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = first_row + 64 * d + 8 * h;
      x_scale[d][h] = (Tile::kBytes && !kPerRow) || m >= p.rows ? 1.0f : p.x_scale[m];
    }

  uint32_t sum[Tile::kDeep][Tile::kSums];
  const uint32_t own_empty = remote_address(empty, block), other_empty = remote_address(empty, sharer);
  const auto release = [&](int turn) {
    if (thread % kPairGroupThreads == 0) {
      arrive_there(own_empty + turn % Tile::kStages * 8);
      if (Tile::kShares) arrive_there(other_empty + turn % Tile::kStages * 8);
    }
  };
  const auto multiply = [&](int from, int to) {
#pragma unroll 1
    for (int turn = from; turn < to; ++turn) {
      const int stage = turn % Tile::kStages;
      barrier_wait(full + stage, turn / Tile::kStages & 1);
      const uint32_t place = (shared_address(shared) + stage * Tile::kStage) / 16;
      const uint32_t x = place + group * (Tile::kRows / 2) * kPairStage / 16;
      const uint32_t weight = place + Tile::kRows * kPairStage / 16;
#pragma unroll
      for (int d = 0; d < Tile::kDeep; ++d)
#pragma unroll
        for (int i = 0; i < Tile::kSums; ++i) cute::warpgroup_fence_operand(sum[d][i]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kPairStage / 32; ++k)
#pragma unroll
        for (int d = 0; d < Tile::kDeep; ++d)
          matrix_multiply<Tile::kColumns>(swizzled_operand(x + (d * 64 * kPairStage + 32 * k) / 16),
                                          swizzled_operand(weight + 2 * k), sum[d], turn == 0 && k == 0);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (turn > 0) release(turn - 1);
    }
  };
  constexpr int kRest = Tile::kBytes ? 1 : Tile::kOwn;  // float32 alone
  float4 rest[Tile::kDeep][2][kRest];
  if constexpr (Tile::kBytes) {
    multiply(0, end - begin);
  } else {
    const int early = end - begin > Tile::kLate ? end - begin - Tile::kLate : 0;
    multiply(0, early);
#pragma unroll
    for (int d = 0; d < Tile::kDeep; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int r = 0; r < kRest; ++r) {
          const int64_t m = first_row + 64 * d + 8 * h, n = n0 + (first_run + r) * Tile::kRun + 4 * quarter;
          rest[d][h][r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (m < p.rows && n < p.columns)
            rest[d][h][r] =
                *reinterpret_cast<const float4*>(static_cast<const float*>(p.residual.data) + m * p.residual_row + n);
        }
    multiply(early, end - begin);
  }
  cute::warpgroup_wait<0>();
  let_next_start();  // not before: the first of its blocks would gather where this kernel leaves multiprocessors free
#pragma unroll
  for (int d = 0; d < Tile::kDeep; ++d)
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) cute::warpgroup_fence_operand(sum[d][i]);
  if (Tile::kShares) cluster_arrive_relaxed();  // nothing is asked of the other block any more
  barrier_wait(known, 0);

  if constexpr (!Tile::kBytes) {
    constexpr int kWords = 8;  // of a thread's sums in a run of 16
    constexpr int kUpper = (Tile::kRuns - Tile::kOwn) * kWords;
    if constexpr (Tile::kHalves) {
      char* const place = handed + group * Tile::kHanded / kPairGroups + thread % kPairGroupThreads * 16;
      const uint32_t to = remote_address(place, other), barrier = remote_address(given + group, other);
#pragma unroll
      for (int i = 0; i < Tile::kOwn * kWords; i += 4) {
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = rank ? sum[0][i + e] : sum[0][kUpper + i + e];
        send(to + i / 4 * 16 * kPairGroupThreads, make_uint4(v[0], v[1], v[2], v[3]), barrier);
      }
      if (rank) {
#pragma unroll
        for (int i = 0; i < Tile::kOwn * kWords; ++i) sum[0][i] = sum[0][kUpper + i];
      }
      barrier_wait_cluster(given + group, 0);
#pragma unroll
      for (int i = 0; i < Tile::kOwn * kWords; i += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(place + i / 4 * 16 * kPairGroupThreads);
        sum[0][i] += v.x, sum[0][i + 1] += v.y, sum[0][i + 2] += v.z, sum[0][i + 3] += v.w;
      }
    }
#pragma unroll
    for (int d = 0; d < Tile::kDeep; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t m = first_row + 64 * d + 8 * h;
        float* const out = static_cast<float*>(p.out) + m * p.columns;
#pragma unroll
        for (int r = 0; r < kRest; ++r) {
          const int64_t n = n0 + (first_run + r) * Tile::kRun + 4 * quarter;
          const auto one = [&](int i, float scale, float residual) {
            const float exact = static_cast<float>(static_cast<int>(sum[d][kWords * r + i / 2 * 4 + 2 * h + i % 2]));
            return __fadd_rn(__fmul_rn(exact, __fmul_rn(x_scale[d][h], scale)), residual);
          };
          const float4 v = rest[d][h][r];
          const float4 s = *reinterpret_cast<const float4*>(scales + (first_run + r) * Tile::kRun + 4 * quarter);
          const float4 result = make_float4(one(0, s.x, v.x), one(1, s.y, v.y), one(2, s.z, v.z), one(3, s.w, v.w));
          if (m < p.rows && n < p.columns) *reinterpret_cast<float4*>(out + n) = result;
        }
      }
  } else {
#pragma unroll
    for (int r = 0; r < Tile::kRuns; ++r) {
      ShortColumn<kPerRow> columns[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const auto four = [&](int which) {
          return *reinterpret_cast<const float4*>(scales + which * Tile::kColumns + r * Tile::kRun + 8 * quarter + i);
        };
        const float4 w = four(0), s = four(1), b = four(2);
        columns[i] = {w.x, s.x, b.x}, columns[i + 1] = {w.y, s.y, b.y};
        columns[i + 2] = {w.z, s.z, b.z}, columns[i + 3] = {w.w, s.w, b.w};
      }
      const int64_t n = n0 + r * Tile::kRun + 8 * quarter;
#pragma unroll
      for (int d = 0; d < Tile::kDeep; ++d)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t m = first_row + 64 * d + 8 * h;
          float v[8];
#pragma unroll
          for (int i = 0; i < 8; ++i)
            v[i] = columns[i].steps(static_cast<float>(static_cast<int>(sum[d][16 * r + i / 2 * 4 + 2 * h + i % 2])),
                                    x_scale[d][h]);
          const uint2 bytes = {round_to_bytes(v[0], v[1], v[2], v[3]), round_to_bytes(v[4], v[5], v[6], v[7])};
          if (m < p.rows && n < p.columns)
            *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.out) + m * p.columns + n) = bytes;
        }
    }
  }
  if (Tile::kShares) cluster_wait();
}

}  // namespace quamba
