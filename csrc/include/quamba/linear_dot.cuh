// linear, few rows of x, without matrix instructions. Reads the weight once in 16-byte pieces, at the speed of memory;
// a warp (or several) takes ROWS rows of the weight against M rows of x.
#pragma once

#include "quamba/launch.cuh"
#include "quamba/linear.cuh"

namespace quamba {

// 16 bytes that are used once: past the first-level cache. Volatile, so that the loads of a round are issued in the
// order of the code, before the first use waits for one, and none before the kernel has waited for the one before it.
__device__ __forceinline__ int4 load_once(const int8_t* p) {
  int4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes that other warps use, too; volatile for the same reasons.
__device__ __forceinline__ int4 load_again(const int8_t* p) {
  int4 v;
  asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 consecutive int8, zero past the end.
template <bool kVector>
__device__ __forceinline__ int4 load16(const int8_t* row, int64_t k, int64_t inner) {
  if constexpr (kVector) {
    return *reinterpret_cast<const int4*>(row + k);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (k + i < inner) words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(row[k + i])) << (8 * (i % 4));
    return make_int4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ int dot16(int4 a, int4 b, int acc) {
  acc = __dp4a(a.x, b.x, acc);
  acc = __dp4a(a.y, b.y, acc);
  acc = __dp4a(a.z, b.z, acc);
  return __dp4a(a.w, b.w, acc);
}

constexpr int kDotWarps = 4;  // warps of a block

// kSplit: the block's warps share one group of ROWS rows and cut K between them, for weights of few rows.
template <int M, int ROWS, bool kSplit, bool kVector>
__global__ void __launch_bounds__(32 * kDotWarps) linear_dot_kernel(const LinearParams p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t n0 = (kSplit ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kDotWarps + warp) * ROWS;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * M;
  if (!kSplit && n0 >= p.columns) return;
  wait_for_previous();
  let_next_start();

  const int8_t* weight[ROWS];
  const int8_t* x[M];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) weight[r] = p.weight + (n0 + r < p.columns ? n0 + r : n0) * p.weight_row;
#pragma unroll
  for (int m = 0; m < M; ++m) x[m] = p.x + (m0 + m < p.rows ? m0 + m : m0) * p.x_row;

  int sum[ROWS][M] = {};
  constexpr int kStep = (kSplit ? kDotWarps : 1) * 512;
#pragma unroll 4
  for (int64_t k = ((kSplit ? warp * 32 : 0) + lane) * 16; k < p.inner; k += kStep) {
    int4 w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) w[r] = load16<kVector>(weight[r], k, p.inner);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int4 v = load16<kVector>(x[m], k, p.inner);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sum[r][m] = dot16(w[r], v, sum[r][m]);
    }
  }

  // Lane i of a warp keeps result i.
  int mine = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int m = 0; m < M; ++m) {
      int v = sum[r][m];
#pragma unroll
      for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
      if (lane == r * M + m) mine = v;
    }
  if constexpr (kSplit) {
    __shared__ int partial[kDotWarps][32];
    partial[warp][lane] = mine;
    __syncthreads();
    if (warp != 0) return;
    mine = 0;
#pragma unroll
    for (int i = 0; i < kDotWarps; ++i) mine += partial[i][lane];
  }
  const int64_t n = n0 + lane / M, m = m0 + lane % M;
  if (lane < ROWS * M && n < p.columns && m < p.rows) finish(p, mine, m, n);
}

}  // namespace quamba
