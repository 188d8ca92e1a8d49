// linear for up to 64 rows of x and few columns, as W_x has: eight thread blocks, a cluster, have 16 columns and an
// eighth of K each, which fits into shared memory as a whole. Each warp of the four that multiply sends its sums of
// eight rows to the block that finishes these. The weight comes while the kernel before still runs.
#pragma once

#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cutlass/arch/barrier.h>

#include "quamba/cluster.cuh"
#include "quamba/four.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear.cuh"
#include "quamba/matrix_operand.cuh"

namespace quamba {

constexpr int kPartRows = 64, kPartStage = 128;  // rows of x; bytes of K: a row of the widest swizzle
constexpr int kPartColumns = 16, kPartCluster = 8, kPartThreads = 128;
constexpr int kPartWeight = kPartColumns * kPartStage, kPartX = kPartRows * kPartStage;  // bytes of a stage
constexpr int kPartHanded = kPartCluster * 32 * 16;  // bytes that a block gets: (block, lane) of four sums

// Stages that a block has, of a weight of `stages`.
__host__ __device__ constexpr int part_stages(int stages) { return (stages + kPartCluster - 1) / kPartCluster; }
// In bytes.
__host__ __device__ constexpr int part_shared(int stages) {
  return part_stages(stages) * (kPartWeight + kPartX + 8) + kPartHanded + 8;
}

// blockIdx.x: kPartCluster blocks in a row share a tile of columns. Maps: of x, in boxes of 64 rows; of the weight as
// (runs, 2, 4, 2, K), column (j, q, i) of a run of 16 being 4 q + 2 j + i. N is a multiple of 16, the result int8, x
// has one scale. The weight, and what belongs to columns, is as it is to be when the kernel begins, whatever runs
// before it.
__global__ void __launch_bounds__(kPartThreads)
    linear_parts_kernel(const LinearParams p, const __grid_constant__ CUtensorMap x_map,
                        const __grid_constant__ CUtensorMap weight_map) {
  extern __shared__ __align__(1024) char shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31;
  const int all = static_cast<int>((p.inner + kPartStage - 1) / kPartStage), room = part_stages(all);
  const int rank = static_cast<int>(blockIdx.x) % kPartCluster;
  const int begin = all * rank / kPartCluster, count = all * (rank + 1) / kPartCluster - begin;
  const int run = static_cast<int>(blockIdx.x) / kPartCluster;
  char *const xs = shared, *const weights = xs + room * kPartX, *const handed = weights + room * kPartWeight;
  uint64_t* const full = reinterpret_cast<uint64_t*>(handed + kPartHanded);
  uint64_t* const given = full + room;
  let_next_start();
  if (thread == 0) {
    for (int i = 0; i < count; ++i) barrier_init(full + i, 1);
    barrier_init(given, 1);
    cutlass::arch::fence_barrier_init();
    barrier_expect(given, kPartHanded);
    for (int i = 0; i < count; ++i) {
      barrier_expect(full + i, kPartWeight + kPartX);
      cute::SM90_TMA_LOAD_5D::copy(&weight_map, full + i, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                   weights + i * kPartWeight, kPartStage * (begin + i), 0, 0, 0, run);
    }
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
  }
  __syncthreads();
  cluster_arrive_relaxed();
  const int64_t n = kPartColumns * run + 4 * (lane & 3);
  float weight_scale[4], out_scale[4], bias[4];
  four_scales(p.weight_scale, n, weight_scale);
  four_scales(p.out_scale, n, out_scale);
  const FourBits bias_bits(p.bias, n);
  const float x_scale = p.x_scale[0];
  wait_for_previous();
  if (thread == 0) {
    for (int i = 0; i < count; ++i)
      cute::SM90_TMA_LOAD_2D::copy(&x_map, full + i, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   xs + i * kPartX, kPartStage * (begin + i), 0);
  }
  __syncwarp();
  uint32_t sum[8];
  for (int i = 0; i < count; ++i) {
    barrier_wait(full + i, 0);
    const uint32_t x = (shared_address(xs) + i * kPartX) / 16;
    const uint32_t weight = (shared_address(weights) + i * kPartWeight) / 16;
#pragma unroll
    for (int r = 0; r < 8; ++r) cute::warpgroup_fence_operand(sum[r]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kPartStage / 32; ++k)
      cute::SM90::GMMA::MMA_64x16x32_S32S8S8_SS_TN::fma(swizzled_operand(x + 2 * k), swizzled_operand(weight + 2 * k),
                                                       sum[0], sum[1], sum[2], sum[3], sum[4], sum[5], sum[6], sum[7],
                                                       i == 0 && k == 0 ? cute::SM90::GMMA::ScaleOut::Zero
                                                                        : cute::SM90::GMMA::ScaleOut::One);
    cute::warpgroup_commit_batch();
  }
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    cute::warpgroup_fence_operand(sum[r]);
    if (count == 0) sum[r] = 0;
  }
  cluster_wait();
  int4* const place = reinterpret_cast<int4*>(handed) + rank * 32 + lane;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    send(remote_address(place, 2 * warp + h), make_uint4(sum[2 * h], sum[2 * h + 1], sum[4 + 2 * h], sum[5 + 2 * h]),
         remote_address(given, 2 * warp + h));
  if (warp > 0) return;
  barrier_wait_cluster(given, 0);
  int total[4] = {};
#pragma unroll
  for (int i = 0; i < kPartCluster; ++i) {
    const int4 part = reinterpret_cast<const int4*>(handed)[i * 32 + lane];
    total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
  }
  const int64_t m = 8 * rank + lane / 4;
  bias_bits.widen(p.bias.type, bias);
  int8_t values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float v = __fmul_rn(static_cast<float>(total[i]), __fmul_rn(x_scale, weight_scale[i]));
    if (p.bias) v = __fadd_rn(v, bias[i]);
    Store<int8_t>::one(values + i, v, out_scale[i], reciprocal_approx(out_scale[i]));
  }
  if (m < p.rows)
    *reinterpret_cast<uint32_t*>(static_cast<int8_t*>(p.out) + m * p.columns + n) =
        pack_bytes(values[0], values[1], values[2], values[3]);
}

}  // namespace quamba
