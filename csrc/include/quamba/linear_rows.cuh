// linear, few rows of x: y[m, n] = sum_k x[m, k] weight[n, k], at the speed at which the weight can be read.
//
// The weight is the left operand of mma.m16n8k32: a warp takes 16 of its rows against 8 * GROUPS rows of x, both
// straight from memory into registers. Within 64 steps of K the order of products is free, so each lane reads 16
// consecutive bytes of a row and uses them as the operand of two instructions. SPLIT warps, a block, cut K among them:
// the fewer rows the weight has, the more.
#pragma once

#include "quamba/fragments.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear_dot.cuh"
#include "quamba/linear_result.cuh"

namespace quamba {

constexpr int kTileRows = 16;  // of the weight, a block

// What the end of a block reads, brought nearer while it computes.
__device__ __forceinline__ void prefetch_epilogue(const LinearParams& p, int64_t n, int64_t m) {
  if (p.weight_scale.stride) prefetch(p.weight_scale.data + n);
  if (p.out_scale.stride) prefetch(p.out_scale.data + n);
  if (p.bias) prefetch(static_cast<const char*>(p.bias.data) + n * size_of(p.bias.type));
  if (p.residual && m < p.rows)
    prefetch(static_cast<const char*>(p.residual.data) + (m * p.residual_row + n) * size_of(p.residual.type));
}

template <int GROUPS, int SPLIT>
__global__ void __launch_bounds__(32 * SPLIT) linear_rows_kernel(const LinearParams p) {
  constexpr int kUnroll = GROUPS == 1 ? 5 : GROUPS == 2 ? 4 : 2;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, q = lane % 4;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  let_next_start();
  if (warp == 0 && lane < kTileRows && n0 + lane < p.columns) {
    constexpr int kRound = 64 * SPLIT * kUnroll;  // bytes of a row that the block's warps load before they compute
    prefetch(p.weight + (n0 + lane) * p.weight_row, p.inner < kRound ? static_cast<uint32_t>(p.inner) : kRound);
  }
  if (warp == 1) prefetch_epilogue(p, n0, lane);
  wait_for_previous();

  // With few rows a thread has one result at most.
  LinearResult result;
  if constexpr (GROUPS == 1) {
    const int m = threadIdx.x / kTileRows, n = threadIdx.x % kTileRows;
    if (m < p.rows && n0 + n < p.columns) result = LinearResult(p, m, n0 + n);
  }
  const int offset = 16 * q < p.inner ? 16 * q : 0;
  const auto weight_row = [&](int64_t n) { return p.weight + (n < p.columns ? n : 0) * p.weight_row + offset; };
  const int8_t* const low = weight_row(n0 + g);
  const int8_t* const high = weight_row(n0 + g + 8);
  const int8_t* x[GROUPS];
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) {
    const int64_t m = 8 * i + g;
    x[i] = p.x + (m < p.rows ? m : 0) * p.x_row + offset;
  }

  int sum[GROUPS][4] = {};
  const int inner = static_cast<int>(p.inner) - 16 * q;  // the lane's pieces begin below this
  const int4 zero = make_int4(0, 0, 0, 0);
  for (int k0 = 64 * warp; k0 < p.inner; k0 += 64 * SPLIT * kUnroll) {
    int4 a[kUnroll], b[kUnroll], v[kUnroll][GROUPS];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // Past the end any weights do: the x they meet are zero.
      const int k = k0 + 64 * SPLIT * u, safe = k < inner ? k : 0;
      a[u] = load_once(low + safe);
      b[u] = load_once(high + safe);
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) v[u][i] = load_again(x[i] + safe);
    }
    __syncwarp();  // the assembler would move the loads to their uses, and one would wait for the other
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool inside = k0 + 64 * SPLIT * u < inner;
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        const int4 w = inside ? v[u][i] : zero;
        mma(sum[i], a[u].x, b[u].x, a[u].y, b[u].y, w.x, w.y);
        mma(sum[i], a[u].z, b[u].z, a[u].w, b[u].w, w.z, w.w);
      }
    }
  }

  // sum[i][..]: weight rows g (0, 1) and g + 8 (2, 3), rows 8 i + 2 q and 8 i + 2 q + 1 of x.
  __shared__ int partial[SPLIT][GROUPS * 4][32];
#pragma unroll
  for (int i = 0; i < GROUPS; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r) partial[warp][4 * i + r][lane] = sum[i][r];
  __syncthreads();
  // A result a thread: neighbouring threads take neighbouring columns.
  for (int i = threadIdx.x; i < GROUPS * 8 * kTileRows; i += 32 * SPLIT) {
    const int m = i / kTileRows, n = i % kTileRows;
    const int from = (n % 8) * 4 + (m % 8) / 2, r = (m / 8) * 4 + (n / 8) * 2 + m % 2;
    int total = 0;
#pragma unroll
    for (int w = 0; w < SPLIT; ++w) total += partial[w][r][from];
    if (m >= p.rows || n0 + n >= p.columns) continue;
    if constexpr (GROUPS == 1) {
      result.finish(p, total, m, n0 + n);
    } else {
      finish(p, total, m, n0 + n);
    }
  }
}

}  // namespace quamba
