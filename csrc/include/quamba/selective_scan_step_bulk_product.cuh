// selective_scan_step_bulk: what a warp reads of a batch of sequences, and W_dt's product of them.
#pragma once

#include "quamba/fragments.cuh"
#include "quamba/selective_scan_step.cuh"

namespace quamba {

constexpr int kBulkStepBatch = 8;  // sequences that are prepared together: columns of a matrix instruction

// Volatile, so that it stays where it is in the code: asked for behind what needs the registers first.
__device__ __forceinline__ float4 load_four(const float* p) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
}

// Neither is negative, nor above 2^31: one instruction, where 64 bits would take four.
__device__ __forceinline__ int64_t times(int n, int64_t stride) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<unsigned>(n)) * static_cast<unsigned>(stride));
}

__device__ __forceinline__ float at_channel(const Scale& scale, int c) {
  return scale ? scale.data[c * scale.stride] : 1.0f;
}

// v, for a computation that is not to be moved to before here, where it would wait for v earlier.
__device__ __forceinline__ float from_here(float v) {
  asm volatile("" : "+f"(v));
  return v;
}

// Element `at` of a batch's first sequence, and of those after it; past the last one of the first again.
__device__ __forceinline__ void load_batch(uint32_t (&bits)[kBulkStepBatch], const Sequence& s, Type type, int64_t at,
                                           int count) {
  const auto load = [&](auto* data) {
#pragma unroll
    for (int i = 0; i < kBulkStepBatch; ++i) bits[i] = data[at + times(i < count ? i : 0, s.batch)];
  };
  switch (size_of(type)) {
    case 1:
      return load(static_cast<const uint8_t*>(s.data));
    case 2:
      return load(static_cast<const uint16_t*>(s.data));
    default:
      return load(static_cast<const uint32_t*>(s.data));
  }
}

// The sums of W_dt d: of a warp's 32 channels with eight sequences. Of a chunk of 64 bytes of K a lane reads 16 bytes
// of each row, which are its parts of the operands of two instructions: all of them see K in the same other order.
struct BulkStepProduct {
  static constexpr int kChunks = 3;  // under way together
  int4 weight[kChunks][4], d[kChunks];
  int sums[2][4];

  // rows: the warp's, of which `valid` are there.
  __device__ __forceinline__ void fetch_weight(const int8_t* rows, int64_t stride, int valid, int chunk, int pieces) {
    const int q = threadIdx.x & 3, row = (threadIdx.x & 31) / 4;
    const int8_t* of_row[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) of_row[r] = rows + times(row + 8 * r < valid ? row + 8 * r : 0, stride);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int piece = 4 * (chunk + i) + q;
#pragma unroll
      for (int r = 0; r < 4; ++r) weight[i][r] = load_again(of_row[r] + (piece < pieces ? 16 * piece : 0));
    }
  }

  // sequence: lane / 4 of the batch. Past the end of K its zeros meet whatever it is of the weight.
  __device__ __forceinline__ void fetch_sequence(const int8_t* sequence, int chunk, int pieces) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int piece = 4 * (chunk + i) + static_cast<int>(threadIdx.x & 3);
      d[i] = piece < pieces ? load_again(sequence + 16 * piece) : make_int4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int4 low = weight[i][2 * m], high = weight[i][2 * m + 1];
        mma(sums[m], low.x, high.x, low.y, high.y, d[i].x, d[i].y);
        mma(sums[m], low.z, high.z, low.w, high.w, d[i].z, d[i].w);
      }
  }
};

}  // namespace quamba
