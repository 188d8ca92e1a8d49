// linear, rows so short (K up to 256) that the results are what takes time, for as many rows of x as fill the device:
// what linear_short.cuh computes, with Hopper's copy engine and matrix unit, which leave the warps to the rescaling.
//
// A block takes `groups` strips of 64 columns against 64 rows of x for each of its teams of four warps, all of it in
// shared memory at a time. Strips come one after the other, so that teams begin with the first. The tensor map of the
// weight deals a strip's columns out such that a thread gets sixteen neighbours of a row.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cutlass/arch/barrier.h>

#include "quamba/linear_short.cuh"

namespace quamba {

constexpr int kStripSide = 64;         // columns of a strip, and rows of x of a team
constexpr int kStripStage = 128;       // bytes of K: a row of the widest swizzle
constexpr int kStripTeamThreads = 128;
constexpr int kStripTeams = 4, kStripGroups = 8;  // of a block, at most
constexpr int kStripBox = kStripSide * kStripStage;

// What the teams and groups of a block need of shared memory. STEPS: of 32 bytes of K.
struct StripShared {
  int stages, strips;  // of a strip's K; all strips

  __host__ __device__ constexpr StripShared(int steps, int teams, int groups)
      : stages((steps + 3) / 4), strips(teams + groups) {}
  __host__ __device__ constexpr int strip(int i) const { return i * stages * kStripBox; }
  // Of the columns' scales, (3, groups, 64) floats, and of the barriers, one a strip.
  __host__ __device__ constexpr int columns() const { return strip(strips); }
  __host__ __device__ constexpr int barriers(int groups) const { return columns() + 12 * kStripSide * groups; }
  __host__ __device__ constexpr int total(int groups) const { return 1024 + barriers(groups) + 8 * strips; }
};

// A place in shared memory as the matrix unit is told it, in 16 bytes: rows of 128 bytes, eight to a pattern of the
// swizzle. Places add up in the low word: two registers to make uniform, not four.
__device__ __forceinline__ uint32_t strip_place(const char* at) { return cute::cast_smem_ptr_to_uint(at) >> 4; }

__device__ __forceinline__ uint64_t strip_operand(uint32_t place) {
  cute::GmmaDescriptor operand;
  operand.bitfield.leading_byte_offset_ = 1;
  operand.bitfield.stride_byte_offset_ = 8 * kStripStage >> 4;
  operand.bitfield.layout_type_ = 1;
  operand.reg32_[0] += place;
  return operand.desc_;
}

// sum (64, 64) = x (64, 32 STEPS) weight (64, 32 STEPS), strips both. A thread of the team gets, of rows lane / 4 and
// lane / 4 + 8 of its warp's sixteen, columns 8 j + lane % 4 * 2 and the next, in this order.
template <int STEPS>
__device__ __forceinline__ void multiply_strips(uint32_t (&sum)[32], uint32_t x, uint32_t weight) {
  using Multiply = cute::SM90::GMMA::MMA_64x64x32_S32S8S8_SS_TN;
  using cute::SM90::GMMA::ScaleOut;
#pragma unroll
  for (int i = 0; i < 32; ++i) cute::warpgroup_fence_operand(sum[i]);
  cute::warpgroup_arrive();
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const uint32_t at = (s / 4 * kStripBox + s % 4 * 32) >> 4;
    Multiply::fma(strip_operand(x + at), strip_operand(weight + at), sum[0], sum[1], sum[2], sum[3], sum[4], sum[5],
                  sum[6], sum[7], sum[8], sum[9], sum[10], sum[11], sum[12], sum[13], sum[14], sum[15], sum[16], sum[17],
                  sum[18], sum[19], sum[20], sum[21], sum[22], sum[23], sum[24], sum[25], sum[26], sum[27], sum[28],
                  sum[29], sum[30], sum[31], s == 0 ? ScaleOut::Zero : ScaleOut::One);
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < 32; ++i) cute::warpgroup_fence_operand(sum[i]);
}

// The strip's barrier: one arrival, and the bytes.
__device__ __forceinline__ void strip_expected(uint64_t* barrier, int bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}

__device__ __forceinline__ void strip_landed(uint64_t* barrier) {
  cutlass::arch::ClusterTransactionBarrier::wait(barrier, 0);
}

__device__ __forceinline__ void strip_barriers(uint64_t* barriers, int count) {
  for (int i = 0; i < count; ++i) cutlass::arch::ClusterTransactionBarrier::init(barriers + i, 1);
  cutlass::arch::fence_barrier_init();
}

__device__ __forceinline__ void copy_x_strip(char* to, const CUtensorMap& map, uint64_t* barrier, int k, int row) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, kHint, to, k, row);
}

__device__ __forceinline__ void copy_weight_strip(char* to, const CUtensorMap& map, uint64_t* barrier, int k, int strip) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_5D::copy(&map, barrier, kHint, to, k, 0, 0, 0, strip);
}

// blockIdx.x: `groups` strips of columns; blockIdx.y: 64 rows of x for each team. N is a multiple of 64, p.out aligned
// to 16. The maps: of x, in boxes of 64 rows, and of the weight as (strip, 8, 4, 2, K), in boxes of a strip, where
// column (j, q, i) is 16 q + 2 j + i.
template <int STEPS, bool kPerRow>
__global__ void __launch_bounds__(kStripTeams * kStripTeamThreads, 1)
    linear_strips_kernel(const LinearParams p, int groups, const __grid_constant__ CUtensorMap weight_map,
                         const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - __cvta_generic_to_shared(raw) % 1024) % 1024;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread & 31;
  const int teams = threads / kStripTeamThreads, team = thread / kStripTeamThreads;
  const StripShared at(STEPS, teams, groups);
  const int width = kStripSide * groups;
  float* const column_scales = reinterpret_cast<float*>(shared + at.columns());  // (3, width)
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + at.barriers(groups));  // of x, then of the weight
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * width;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * teams * kStripSide;
  const int own = p.columns - n0 < width ? static_cast<int>(p.columns - n0) : width;
  let_next_start();
  if (blockIdx.y == 0 && in_first_wave(1)) {  // blocks of other rows take the same weights
    for (int i = thread; i < own; i += threads) {
      prefetch(p.weight + (n0 + i) * p.weight_row, static_cast<uint32_t>(p.inner));
      if (i % 8 == 0) {
        if (p.weight_scale.stride) prefetch(p.weight_scale.data + n0 + i);
        if (p.out_scale.stride) prefetch(p.out_scale.data + n0 + i);
      }
    }
  }
  if (thread == 0) strip_barriers(barriers, at.strips);
  __syncthreads();
  wait_for_previous();

  if (thread == 0) {
    const auto strips_of_x = [&](int i) {
      strip_expected(barriers + i, at.strip(1));
      for (int s = 0; s < at.stages; ++s)
        copy_x_strip(shared + at.strip(i) + s * kStripBox, x_map, barriers + i, s * kStripStage,
                     static_cast<int>(m0) + i * kStripSide);
    };
    const auto strips_of_weight = [&](int i) {
      strip_expected(barriers + teams + i, at.strip(1));
      for (int s = 0; s < at.stages; ++s)
        copy_weight_strip(shared + at.strip(teams + i) + s * kStripBox, weight_map, barriers + teams + i,
                          s * kStripStage, static_cast<int>(n0) / kStripSide + i);
    };
    strips_of_weight(0);
    for (int i = 0; i < teams; ++i) strips_of_x(i);
    for (int i = 1; i < own / kStripSide; ++i) strips_of_weight(i);
  }
  for (int i = thread; i < own; i += threads) {
    ShortColumn<kPerRow> column;
    column.init(p, n0 + i);
    column_scales[i] = column.weight_scale;
    column_scales[width + i] = column.out_scale;
    column_scales[2 * width + i] = column.reciprocal;
  }
  const int64_t row = m0 + thread / 32 * 16 + lane / 4;  // and eight further
  float x_scale[2] = {1.0f, 1.0f};
  if constexpr (kPerRow) {
#pragma unroll
    for (int h = 0; h < 2; ++h) x_scale[h] = row + 8 * h < p.rows ? p.x_scale[row + 8 * h] : 0.0f;
  }
  __syncthreads();

  const bool writes[2] = {row < p.rows, row + 8 < p.rows};
  const uint32_t x_place = strip_place(shared + at.strip(team));
  uint32_t place = strip_place(shared + at.strip(teams));
  strip_landed(barriers + team);
  int8_t* out = static_cast<int8_t*>(p.out) + row * p.columns + n0 + lane % 4 * 16;
  for (int i = 0; i < own / kStripSide; ++i, out += kStripSide, place += at.strip(1) >> 4) {
    strip_landed(barriers + teams + i);
    uint32_t sum[32];
    multiply_strips<STEPS>(sum, x_place, place);
    const float* const scales = column_scales + i * kStripSide + lane % 4 * 16;
    uint32_t words[2][4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const auto four = [&](int which) { return *reinterpret_cast<const float4*>(scales + which * width + 4 * w); };
      const float4 weight = four(0), steps = four(1), reciprocals = four(2);
      const ShortColumn<kPerRow> columns[4] = {{weight.x, steps.x, reciprocals.x},
                                               {weight.y, steps.y, reciprocals.y},
                                               {weight.z, steps.z, reciprocals.z},
                                               {weight.w, steps.w, reciprocals.w}};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c)
          v[c] = columns[c].steps(static_cast<float>(static_cast<int>(sum[8 * w + c / 2 * 4 + 2 * h + c % 2])),
                                  x_scale[h]);
        words[h][w] = round_to_bytes(v[0], v[1], v[2], v[3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (writes[h])
        *reinterpret_cast<uint4*>(out + 8 * h * p.columns) =
            make_uint4(words[h][0], words[h][1], words[h][2], words[h][3]);
  }
}

}  // namespace quamba
