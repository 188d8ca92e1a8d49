// linear, few rows of x, without matrix instructions. Reads the weight once in 16-byte pieces, at the speed of memory;
// a warp (or several) takes ROWS rows of the weight against M rows of x.
#pragma once

#include "quamba/launch.cuh"
#include "quamba/leaves_first.cuh"
#include "quamba/linear_result.cuh"

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

__device__ __forceinline__ int4 load_once(const int8_t* p, uint64_t policy) {
  int4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.s32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy));
  return v;
}

__device__ __forceinline__ void prefetch_once(const void* p, uint32_t bytes, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(p), "r"(bytes), "l"(policy)
               : "memory");
#endif
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

constexpr int kDotWarps = 4;    // warps of a block
constexpr int kDotBlocks = 10;  // a multiprocessor, at a time
constexpr int kDotStep = 512;   // columns that a warp reads at a time

// kSplit: the block's warps share one group of ROWS rows and cut K between them, for weights of few rows. STEPS: pieces
// of each row that a lane asks for before it uses the first of them.
template <int M, int ROWS, int STEPS, bool kSplit, bool kVector>
__global__ void __launch_bounds__(32 * kDotWarps) linear_dot_kernel(const LinearParams p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t n0 = (kSplit ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kDotWarps + warp) * ROWS;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * M;
  const uint64_t policy = leaves_first();
  let_next_start();
  if (!kSplit && n0 >= p.columns) return;
  const int64_t n = n0 + lane / M, m = m0 + lane % M;
  const bool has_result = lane < ROWS * M && n < p.columns && m < p.rows && (!kSplit || warp == 0);
  if (kVector && has_result && in_first_wave(kDotBlocks)) {
    prefetch_once(p.weight + n * p.weight_row, static_cast<uint32_t>(p.inner), policy);
    if (p.weight_scale.stride) prefetch(p.weight_scale.data + n);
  }
  wait_for_previous();

  LinearResult result;
  if (has_result) result = LinearResult(p, m, n);
  const int8_t* weight[ROWS];
  const int8_t* x[M];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) weight[r] = p.weight + (n0 + r < p.columns ? n0 + r : n0) * p.weight_row;
#pragma unroll
  for (int i = 0; i < M; ++i) x[i] = p.x + (m0 + i < p.rows ? m0 + i : m0) * p.x_row;

  int sum[ROWS][M] = {};
  constexpr int kStep = (kSplit ? kDotWarps : 1) * kDotStep;
  const int inner = static_cast<int>(p.inner), zero = static_cast<int>(p.inner >> 32);
#pragma unroll 1
  for (int begin = kSplit ? warp * kDotStep : 0; begin < inner; begin += kStep * STEPS) {
    const int k0 = begin + 16 * lane;
    int4 w[STEPS][ROWS], v[STEPS][M];
#pragma unroll
    for (int u = 0; u < STEPS; ++u) {
      // Past the end any weights do: the x they meet are zero.
      const int k = k0 + u * kStep, safe = k < inner ? k : 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        w[u][r] = kVector ? load_once(weight[r] + safe, policy) : load16<false>(weight[r], safe, inner);
#pragma unroll
      for (int i = 0; i < M; ++i) v[u][i] = kVector ? load_again(x[i] + safe) : load16<false>(x[i], safe, inner);
    }
    // The assembler would move the loads to their uses, and one would wait for the other: so each sum needs all of them.
    int all = 0;
#pragma unroll
    for (int u = 0; u < STEPS; ++u) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) all |= w[u][r].x;
#pragma unroll
      for (int i = 0; i < M; ++i) all |= v[u][i].x;
    }
    all &= zero;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < M; ++i) sum[r][i] += all;
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const int4 piece = k0 + u * kStep < inner ? v[u][i] : make_int4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r][i] = dot16(w[u][r], piece, sum[r][i]);
      }
  }

  // Lane i of a warp keeps result i.
  int mine = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int i = 0; i < M; ++i) {
      int v = sum[r][i];
#pragma unroll
      for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
      if (lane == r * M + i) mine = v;
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
  if (has_result) result.finish(p, mine, m, n);
}

}  // namespace quamba
