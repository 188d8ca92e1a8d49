// linear, few rows of x: y[m, n] = sum_k x[m, k] weight[n, k], at the speed at which the weight can be read.
//
// The weight is the left operand of mma.m16n8k32: a warp takes 16 of its rows against 8 * GROUPS rows of x, both
// straight from memory into registers. Within 64 steps of K the order of products is free, so each lane reads 16
// consecutive bytes of a row and uses them as the operand of two instructions. SPLIT warps cut K among them.
#pragma once

#include "quamba/linear.cuh"

namespace quamba {

// Volatile, as the loads are, for the same reason.
__device__ __forceinline__ void mma(int (&d)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

constexpr int kTileRows = 16;  // of the weight, a warp

__host__ __device__ constexpr int rows_block_warps(int split) { return split < 4 ? 4 : split; }

template <int GROUPS, int SPLIT>
__global__ void __launch_bounds__(32 * rows_block_warps(SPLIT)) linear_rows_mma_kernel(const LinearParams p) {
  constexpr int kUnroll = GROUPS == 1 ? 5 : GROUPS == 2 ? 4 : 2;
  constexpr int kTiles = rows_block_warps(SPLIT) / SPLIT;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % SPLIT;
  const int g = lane / 4, q = lane % 4;
  const int64_t n0 = (static_cast<int64_t>(blockIdx.x) * kTiles + warp / SPLIT) * kTileRows;
  if (SPLIT == 1 && n0 >= p.columns) return;

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
  for (int k0 = 64 * part; k0 < p.inner; k0 += 64 * SPLIT * kUnroll) {
    int4 a[kUnroll], b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // Past the end any weights do: the x they meet are zero.
      const int k = k0 + 64 * SPLIT * u, safe = k < inner ? k : 0;
      a[u] = load_once(low + safe);
      b[u] = load_once(high + safe);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = k0 + 64 * SPLIT * u;
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        const int4 v = k < inner ? __ldg(reinterpret_cast<const int4*>(x[i] + k)) : zero;
        mma(sum[i], a[u].x, b[u].x, a[u].y, b[u].y, v.x, v.y);
        mma(sum[i], a[u].z, b[u].z, a[u].w, b[u].w, v.z, v.w);
      }
    }
  }

  // sum[i][..]: weight rows g (0, 1) and g + 8 (2, 3), rows 8 i + 2 q and 8 i + 2 q + 1 of x.
  if constexpr (SPLIT > 1) {
    __shared__ int partial[SPLIT][GROUPS * 4][32];
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) partial[warp][4 * i + r][lane] = sum[i][r];
    __syncthreads();
    // A result a thread: neighbouring threads take neighbouring columns.
    for (int i = threadIdx.x; i < GROUPS * 8 * kTileRows; i += blockDim.x) {
      const int m = i / kTileRows, n = i % kTileRows;
      const int from = (n % 8) * 4 + (m % 8) / 2, r = (m / 8) * 4 + (n / 8) * 2 + m % 2;
      int total = 0;
#pragma unroll
      for (int w = 0; w < SPLIT; ++w) total += partial[w][r][from];
      if (m < p.rows && n0 + n < p.columns) finish(p, total, m, n0 + n);
    }
  } else {
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t m = 8 * i + 2 * q + r % 2, n = n0 + g + 8 * (r / 2);
        if (m < p.rows && n < p.columns) finish(p, sum[i][r], m, n);
      }
  }
}

}  // namespace quamba
