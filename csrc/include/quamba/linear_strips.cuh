// linear, rows so short (K up to 256) that the results are what takes time, for as many rows of x as fill the device:
// what linear_short.cuh computes, with Hopper's matrix unit, which leaves the warps to the rescaling.
//
// A block takes `groups` strips of 64 columns against 64 rows of x for each of its teams of four warps, all of it in
// shared memory at a time, swizzled as the matrix unit reads it. Teams begin when x and the first strip are there. A
// strip's columns are dealt out such that a thread gets sixteen neighbours of a row. The warps copy, which are idle
// then: the copy engine took 240 cycles for each 8 KB of such short rows, 2.4 us of a launch's 11.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>

#include "quamba/linear_short.cuh"
#include "quamba/matrix_operand.cuh"

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
  // Of the columns' scales, (3, groups, 64) floats.
  __host__ __device__ constexpr int columns() const { return strip(strips); }
  __host__ __device__ constexpr int total(int groups) const { return 1024 + columns() + 12 * kStripSide * groups; }
};

// A place in shared memory as swizzled_operand takes it.
__device__ __forceinline__ uint32_t strip_place(const char* at) { return cute::cast_smem_ptr_to_uint(at) >> 4; }

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
    Multiply::fma(swizzled_operand(x + at), swizzled_operand(weight + at), sum[0], sum[1], sum[2], sum[3], sum[4], sum[5],
                  sum[6], sum[7], sum[8], sum[9], sum[10], sum[11], sum[12], sum[13], sum[14], sum[15], sum[16], sum[17],
                  sum[18], sum[19], sum[20], sum[21], sum[22], sum[23], sum[24], sum[25], sum[26], sum[27], sum[28],
                  sum[29], sum[30], sum[31], s == 0 ? ScaleOut::Zero : ScaleOut::One);
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < 32; ++i) cute::warpgroup_fence_operand(sum[i]);
}

// Where the scales of column i lie among those of its strip: a thread reads four columns of its sixteen at a time, and
// what four neighbouring threads read lies together, on distinct banks.
__device__ __forceinline__ int strip_column(int i) { return (i & ~63) | (i & 12) << 2 | (i >> 4 & 3) << 2 | (i & 3); }

// The columns of a strip in the order of its rows in shared memory: (8, 4, 2) of them are column 16 q + 2 j + i.
__device__ __forceinline__ int strip_order(int row) { return (row >> 1 & 3) << 4 | row >> 3 << 1 | (row & 1); }

// Where 16 bytes of a strip's row lie.
__device__ __forceinline__ int strip_piece(int row, int piece) {
  return (piece >> 3) * kStripBox + row * kStripStage + ((piece ^ row) & 7) * 16;
}

// blockIdx.x: `groups` strips of columns; blockIdx.y: 64 rows of x for each team. N is a multiple of 64, p.out aligned
// to 16.
template <int STEPS, bool kPerRow>
__global__ void __launch_bounds__(kStripTeams * kStripTeamThreads, 1)
    linear_strips_kernel(const LinearParams p, int groups) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - __cvta_generic_to_shared(raw) % 1024) % 1024;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread & 31;
  const int teams = threads / kStripTeamThreads, team = thread / kStripTeamThreads;
  const StripShared at(STEPS, teams, groups);
  const int width = kStripSide * groups;
  float* const column_scales = reinterpret_cast<float*>(shared + at.columns());  // (3, width)
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
  wait_for_previous();

  // Strips `begin` to `end` of the block: those of x, of each team, then those of the weight. Rows past the last one
  // are that again: what comes of them is not written.
  const auto copy = [&](int begin, int end) {
    constexpr int kPieces = 2 * STEPS;
    for (int i = thread; i < (end - begin) * kStripSide * kPieces; i += threads) {
      const int piece = i % kPieces, row = i / kPieces % kStripSide, strip = begin + i / kPieces / kStripSide;
      const int64_t m = m0 + strip * kStripSide + row, n = n0 + (strip - teams) * kStripSide + strip_order(row);
      const int8_t* const from =
          strip < teams ? p.x + (m < p.rows ? m : p.rows - 1) * p.x_row : p.weight + n * p.weight_row;
      const bool inside = 16 * piece < p.inner;
      copy_piece(shared + at.strip(strip) + strip_piece(row, piece), from + (inside ? 16 * piece : 0), inside);
    }
    copies_committed();
  };
  const int strips = own / kStripSide;
  copy(0, teams + 1);
  copy(teams + 1, teams + strips);
  for (int i = thread; i < own; i += threads) {
    ShortColumn<kPerRow> column;
    column.init(p, n0 + i);
    float* const to = column_scales + strip_column(i);
    to[0] = column.weight_scale, to[width] = column.out_scale, to[2 * width] = column.reciprocal;
  }
  const int64_t row = m0 + thread / 32 * 16 + lane / 4;  // and eight further
  float x_scale[2] = {1.0f, 1.0f};
  if constexpr (kPerRow) {
#pragma unroll
    for (int h = 0; h < 2; ++h) x_scale[h] = row + 8 * h < p.rows ? p.x_scale[row + 8 * h] : 0.0f;
  }
  const auto shown = [&] {  // what the threads have copied, to the matrix unit
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
  };
  copies_landed<1>();
  shown();

  const bool writes[2] = {row < p.rows, row + 8 < p.rows};
  const uint32_t x_place = strip_place(shared + at.strip(team));
  uint32_t place = strip_place(shared + at.strip(teams));
  int8_t* out = static_cast<int8_t*>(p.out) + row * p.columns + n0 + lane % 4 * 16;
  for (int i = 0; i < strips; ++i, out += kStripSide, place += at.strip(1) >> 4) {
    if (i == 1) {
      copies_landed<0>();
      shown();
    }
    uint32_t sum[32];
    multiply_strips<STEPS>(sum, x_place, place);
    const float* const scales = column_scales + i * kStripSide + lane % 4 * 4;
    uint32_t words[2][4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const auto four = [&](int which) { return *reinterpret_cast<const float4*>(scales + which * width + 16 * w); };
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
