// linear, rows so short (K up to 256) that the results are what takes time: int8, no bias, no residual.
//
// A warp keeps 32 rows of the weight in registers, as right operands of mma.m16n8k32, and walks along rows of x, 16 at
// a time, which its block has in shared memory. The order of columns within a warp is chosen so that a thread gets
// eight neighbours of a row. Sums are counted from 1.5 * 2^23, so that their bits are those of a float without a
// conversion: at most 256 * 2^14 = 2^22 on either side.
#pragma once

#include "quamba/copy.cuh"
#include "quamba/fragments.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear.cuh"
#include "quamba/round.cuh"

namespace quamba {

constexpr int kShortWarps = 8;
constexpr int kShortColumns = 32 * kShortWarps;  // of a block
constexpr int kShortRows = 256;  // of a block, at most
constexpr int kShortHead = 32;  // rows of x that are waited for at first, with the weight

constexpr int kSumZero = 0x4b400000;  // 1.5 * 2^23 as a float

// Blocks of a multiprocessor. STEPS: of 32 bytes of K.
constexpr int short_blocks(int steps) { return steps <= 2 ? 3 : steps <= 5 ? 2 : 1; }

// Bytes from row to row in shared memory, an odd number of pieces: eight rows at one piece are on distinct banks.
constexpr int short_pitch(int steps) { return 32 * steps + 16; }

// Rows of the weight are read by twos, eight apart, which these bytes more keep on distinct banks.
constexpr int short_skew(int row) { return row / 8 * 32; }

constexpr int kShortSkew = short_skew(kShortColumns);

constexpr int short_shared(int steps, int rows) { return (kShortColumns + rows) * short_pitch(steps) + kShortSkew; }

// The rescaling of a column's sums. For one scale of x, the scale of a sum is kept below 256 steps of the result,
// where every sum but zero is out of range already, so that quotients stay finite and need no second look.
template <bool kPerRow>
struct ShortColumn {
  float weight_scale, out_scale, reciprocal;

  __device__ __forceinline__ void init(const LinearParams& p, int64_t n) {
    out_scale = p.out_scale[n];
    reciprocal = reciprocal_approx(out_scale);
    weight_scale = p.weight_scale[n];
    if (!kPerRow) weight_scale = fminf(__fmul_rn(p.x_scale[0], weight_scale), 256.0f * out_scale);
  }

  // The result of a sum before it is rounded, step by step as in finish().
  __device__ __forceinline__ float steps(float exact, float x_scale) const {
    if constexpr (kPerRow) {
      return divide(__fmul_rn(exact, __fmul_rn(x_scale, weight_scale)), out_scale, reciprocal);
    } else {
      const float v = __fmul_rn(exact, weight_scale), q = v * reciprocal;
      return fmaf(fmaf(-q, out_scale, v), reciprocal, q);
    }
  }
};

// blockIdx.x: 256 columns; blockIdx.y: `rows` rows of x, a multiple of 16. N is a multiple of 8, p.out aligned to 8.
template <int STEPS, bool kPerRow>
__global__ void __launch_bounds__(32 * kShortWarps, short_blocks(STEPS))
    linear_short_kernel(const LinearParams p, int rows) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kPitch = short_pitch(STEPS), kPieces = 2 * STEPS;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kShortColumns, m0 = static_cast<int64_t>(blockIdx.y) * rows;
  let_next_start();
  if (n0 + thread < p.columns && in_first_wave(short_blocks(STEPS))) {
    prefetch(p.weight + (n0 + thread) * p.weight_row, static_cast<uint32_t>(p.inner));
    if (thread % 8 == 0) {
      if (p.weight_scale.stride) prefetch(p.weight_scale.data + n0 + thread);
      if (p.out_scale.stride) prefetch(p.out_scale.data + n0 + thread);
    }
  }
  wait_for_previous();

  char* const slab = shared + kShortColumns * kPitch + kShortSkew;
  // A warp copies whole rows, as many as it has lanes for at a time. Rows past the last one are that again: what comes
  // of them is not written.
  constexpr int kTogether = 32 / kPieces, kRowStep = kTogether * kShortWarps;
  const int piece = lane % kPieces, first = warp * kTogether + lane / kPieces;
  const bool copies = lane < kTogether * kPieces, inside = 16 * piece < p.inner;
  const int offset = inside ? 16 * piece : 0;
  const auto copy_rows = [&](char* to, const int8_t* from, int64_t stride, int begin, int end, int limit, bool skewed) {
    const int wide = static_cast<int>(stride);
    for (int row = begin + first; row < end && copies; row += kRowStep) {
      const int from_row = row < limit ? row : limit - 1;
      copy_piece(to + row * kPitch + (skewed ? short_skew(row) : 0) + 16 * piece,
                 from + static_cast<int64_t>(from_row) * wide + offset, inside);
    }
    copies_committed();
  };
  const auto at_most = [](int64_t rest, int most) { return rest < most ? static_cast<int>(rest) : most; };
  const int limit = at_most(p.rows - m0, rows), own = (limit + 15) / 16 * 16, head = at_most(own, kShortHead);
  const int8_t* const weight = p.weight + n0 * p.weight_row;
  copy_rows(shared, weight, p.weight_row, 0, kShortColumns, at_most(p.columns - n0, kShortColumns), true);
  copy_rows(slab, p.x + m0 * p.x_row, p.x_row, 0, head, limit, false);
  copy_rows(slab, p.x + m0 * p.x_row, p.x_row, head, own, limit, false);

  // Of tile j of eight columns, an operand's column i is column 8 (i / 2) + 2 j + i % 2 of the warp's, so that lane q of
  // the four of a row gets columns 8 q to 8 q + 7.
  const int64_t column = n0 + 32 * warp + lane % 4 * 8;
  const bool writes = column < p.columns;
  ShortColumn<kPerRow> columns[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) columns[i].init(p, writes ? column + i : 0);

  copies_landed<1>();
  __syncthreads();
  int b[4][STEPS][2];
  {
    // Lane i names row i % 8 of matrix i / 8: the halves of a step for two tiles.
    const int named = lane % 8, tile = lane / 16, half = lane / 8 % 2;
    const int row = 32 * warp + 8 * (named / 2) + 2 * tile + named % 2;
    const char* const from = shared + row * kPitch + short_skew(row) + 16 * half;
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        int r[4];
        load_matrices(r, from + 2 * j * kPitch + 32 * s);
        b[j][s][0] = r[0], b[j][s][1] = r[1], b[j + 1][s][0] = r[2], b[j + 1][s][1] = r[3];
      }
  }

  int8_t* out = static_cast<int8_t*>(p.out) + (m0 + lane / 4) * p.columns + column;
  const char* left = slab + lane % 16 * kPitch + lane / 16 * 16;
  for (int m = 0; m < own; m += 16, out += 16 * p.columns, left += 16 * kPitch) {
    if (m == kShortHead) {
      copies_landed<0>();
      __syncthreads();
    }
    int sum[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) sum[j][r] = kSumZero;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      int a[4];
      load_matrices(a, left + 32 * s);
#pragma unroll
      for (int j = 0; j < 4; ++j) mma(sum[j], a[0], a[1], a[2], a[3], b[j][s][0], b[j][s][1]);
    }
#pragma unroll
    for (int low = 0; low < 4; low += 2) {  // rows i / 4 and i / 4 + 8 of lane i
      const int row = m + lane / 4 + 4 * low;
      const bool written = writes && row < limit;
      const float x_scale = kPerRow ? p.x_scale[written ? m0 + row : 0] : 1.0f;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        v[i] = columns[i].steps(__fadd_rn(__int_as_float(sum[i / 2][low + i % 2]), -12582912.0f), x_scale);
      const uint2 bytes = {round_to_bytes(v[0], v[1], v[2], v[3]), round_to_bytes(v[4], v[5], v[6], v[7])};
      if (written) *reinterpret_cast<uint2*>(out + 4 * low * p.columns) = bytes;
    }
  }
}

}  // namespace quamba
