// hadamard_quant of many rows: the same sums in the same order as in hadamard_quant.cuh, so the same bytes, for the
// sizes of known models.
//
// A thread block goes through rows: each is copied to shared memory while the one before is transformed. A thread has
// up to 80 numbers of a row in registers, so that they pass through shared memory once (twice without a base matrix)
// between the stages. Rows there are not padded: the places within a line of banks are exchanged instead (swizzled), by
// bits of the element's index, for neighbours to stay aligned and every access free of conflicts.
#pragma once

#include "quamba/copy.cuh"
#include "quamba/hadamard_quant.cuh"

namespace quamba {

// COUNT neighbours, from `column` of a row on, as bytes. `one`: the multiplier, where there is one scale.
template <int COUNT>
__device__ __forceinline__ void write_bytes(const float* v, const HadamardParams& p, float one, int column,
                                            int8_t* out) {
  float rounded[COUNT];
  if (p.scale.stride == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) rounded[i] = rounded_product(v[i], one);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 s = *reinterpret_cast<const float4*>(p.scale.data + column + i);
      rounded[i] = rounded_product(v[i], multiplier(p, s.x));
      rounded[i + 1] = rounded_product(v[i + 1], multiplier(p, s.y));
      rounded[i + 2] = rounded_product(v[i + 2], multiplier(p, s.z));
      rounded[i + 3] = rounded_product(v[i + 3], multiplier(p, s.w));
    }
  }
  store_rounded<COUNT>(out + column, rounded);
}

// Four numbers of a row in shared memory.
__device__ __forceinline__ void load_four(const float* at, float* v) {
  const float4 four = *reinterpret_cast<const float4*>(at);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

// How a row of BASE * 2^LOG_POWER is cut. In the stages' order: the base matrix and strides 16 and 32 on four columns a
// thread; strides 64 and up, then 1 to 8, on kRuns runs of sixteen neighbours a thread. There are 2 1/2 or 1 1/2 warps
// of those: in the half, four threads share the runs.
template <int BASE, int LOG_POWER>
struct HadamardRows {
  static constexpr int kPower = 1 << LOG_POWER, kOrder = BASE << LOG_POWER;
  static constexpr int kRuns = kPower / 64;
  static constexpr int kThreads = kPower / 4, kWarps = kThreads / 32;
  static constexpr int kWhole = BASE * 4 / 32;  // warps whose threads have runs of their own
  static constexpr int kSharing = kWarps > kWhole ? kWarps - kWhole : kWarps;  // warps for the half
  static constexpr int kBlocks = BASE == 20 ? 8 : LOG_POWER == 8 ? 10 : 16;    // a multiprocessor
  // Rows of the numbers, the last ones, that lie where x begins, so that eight blocks have the memory: before these are
  // written all of x's is read, and before the next x comes they are.
  static constexpr int kOverlap = BASE == 20 ? 3 : 0;
  static_assert(kOverlap <= BASE - kWhole * 8, "the rows that the whole warps do not read");
  static_assert(kRuns == 2 || kRuns == 4, "a thread's runs are in registers");
  static_assert(kWarps >= kWhole && BASE * 4 % 32 == 16, "as many warps as have whole runs, and the half");

  // Where a piece of eight elements of x lies: 16 columns are exchanged with their neighbours in odd runs.
  __device__ __forceinline__ static int piece(int i) { return i ^ (i >> 3 & 1) << 1; }

  // Base matrix, strides 16 and 32: columns c + 64 h + 16 k. In shared memory the lowest bit of k is exchanged in odd
  // runs, and words of four by the upper bit of k and the row's lowest.
  template <typename T>
  __device__ __forceinline__ static void columns(const T* x, float* numbers) {
    const int c = threadIdx.x & 15, run = threadIdx.x >> 4, odd = run & 1;
    x += 64 * run + c, numbers += 64 * run;
    float first[BASE], second[BASE], third[BASE];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float v[BASE];
#pragma unroll
      for (int i = 0; i < BASE; ++i) v[i] = to_float(x[i * kPower + 16 * (k ^ odd)]);
      each_base_row(v, [&](int row, float value) {
        if (kOverlap > 0 && k == 3 && row == BASE - kOverlap) __syncthreads();
        if (k == 0) first[row] = value;
        if (k == 1) second[row] = first[row] - value, first[row] = first[row] + value;
        if (k == 2) third[row] = value;
        if (k == 3) {
          const float plus = third[row] + value, minus = third[row] - value;
          float* const at = numbers + row * kPower;
          const int low = c ^ (row & 1 ? 8 : 0), high = low ^ 4;
          at[low + 16 * odd] = first[row] + plus;
          at[low + 16 * (1 ^ odd)] = second[row] + minus;
          at[high + 32 + 16 * odd] = first[row] - plus;
          at[high + 32 + 16 * (1 ^ odd)] = second[row] - minus;
        }
      });
    }
  }

  // Word i of run j of columns 64 j + 16 q + 0..15 of one of the matrix's rows.
  __device__ __forceinline__ static int place(int row, int q, int j, int i) {
    return row * kPower + 64 * j + 16 * (q ^ (j & 1)) + 4 * (i ^ (q >> 1 | (row & 1) << 1));
  }

  // Strides 64 and up.
  template <int COUNT>
  __device__ __forceinline__ static void across(float (&v)[kRuns][COUNT]) {
#pragma unroll
    for (int stride = 1; stride < kRuns; stride *= 2)
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
        if (!(j & stride))
#pragma unroll
          for (int i = 0; i < COUNT; ++i) {
            const float a = v[j][i], b = v[j + stride][i];
            v[j][i] = a + b, v[j + stride][i] = a - b;
          }
  }

  // The other stages and the bytes of some runs.
  __device__ __forceinline__ static void runs(const float* numbers, int unit, const HadamardParams& p, float one,
                                              int8_t* out) {
    const int q = unit & 3, row = unit >> 2;
    float v[kRuns][16];
#pragma unroll
    for (int j = 0; j < kRuns; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) load_four(numbers + place(row, q, j, i), v[j] + 4 * i);
    across(v);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      butterflies<4>(v[j]);
      write_bytes<16>(v[j], p, one, row * kPower + 64 * j + 16 * q, out);
    }
  }

  // The same for runs that four threads share: each has four neighbours of every sixteen.
  __device__ __forceinline__ static void shared_runs(const float* numbers, int unit, const HadamardParams& p, float one,
                                                     int8_t* out) {
    const int q = unit & 3, row = unit >> 2, i = threadIdx.x & 3;
    const float sign4 = i & 1 ? -1.0f : 1.0f, sign8 = i & 2 ? -1.0f : 1.0f;
    float v[kRuns][4];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) load_four(numbers + place(row, q, j, i), v[j]);
    across(v);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      butterflies<2>(v[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[j][e] = fmaf(sign4, v[j][e], __shfl_xor_sync(0xffffffffu, v[j][e], 1));
#pragma unroll
      for (int e = 0; e < 4; ++e) v[j][e] = fmaf(sign8, v[j][e], __shfl_xor_sync(0xffffffffu, v[j][e], 2));
      write_bytes<4>(v[j], p, one, row * kPower + 64 * j + 16 * q + 4 * i, out);
    }
  }

  template <typename T, typename Next>
  __device__ __forceinline__ static void transform(const T* x, float* numbers, const HadamardParams& p, float one,
                                                   int8_t* out, Next&& next) {
    columns(x, numbers);
    __syncthreads();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (kOverlap == 0) next();
#pragma unroll 1
    for (int half = warp - (kWarps - kSharing); half >= 0 && half < 2; half += kSharing)
      shared_runs(numbers, 32 * kWhole + 8 * half + (lane >> 2), p, one, out);
    if (kOverlap > 0) {
      __syncthreads();
      next();
    }
    if (warp < kWhole) runs(numbers, threadIdx.x, p, one, out);
  }
};

// A power of two. In the stages' order: strides 1 to 16 on 32 neighbours a thread; the middle ones, from 32 on, on
// every 32nd element of 1024; the upper three on 8 times four neighbours.
template <int LOG_POWER>
struct HadamardRows<1, LOG_POWER> {
  static constexpr int kPower = 1 << LOG_POWER, kOverlap = 0;
  static constexpr int kOrder = 1 << LOG_POWER;
  static constexpr int kThreads = kOrder / 32;
  static constexpr int kBlocks = 1024 / kThreads;
  static constexpr int kMiddle = LOG_POWER - 8;  // stages
  static_assert(kMiddle >= 3 && kMiddle <= 5, "the middle stages have five bits of an element's index");

  // Of a thread's four pieces, eight neighbouring threads read different ones at a time.
  __device__ __forceinline__ static int piece(int i) { return i ^ (i >> 3 & 3); }

  // Four numbers, the `word`-th of a line of 32: exchanged by the line's number.
  __device__ __forceinline__ static int place(int line, int word) { return 32 * line + 4 * (word ^ (line & 7)); }

  template <typename T>
  __device__ __forceinline__ static void lower(const T* x, float* numbers) {
    const int thread = threadIdx.x;
    float v[32];
#pragma unroll
    for (int i = 0; i < 4; ++i) load<8, true>(x + 8 * (4 * thread + (i ^ (thread >> 1 & 3))), 1, 8, v + 8 * i);
    butterflies<5>(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      *reinterpret_cast<float4*>(numbers + place(thread, i)) =
          make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  }

  __device__ __forceinline__ static void middle(float* numbers) {
    const int low = threadIdx.x & 31;
    numbers += 32 * (static_cast<int>(threadIdx.x) - low);
    float v[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] = numbers[32 * i + (low ^ (i & 7) << 2)];
#pragma unroll
    for (int i = 0; i < 32; i += 1 << kMiddle)
      butterflies<kMiddle>(*reinterpret_cast<float(*)[1 << kMiddle]>(v + i));
#pragma unroll
    for (int i = 0; i < 32; ++i) numbers[32 * i + (low ^ (i & 7) << 2)] = v[i];
  }

  __device__ __forceinline__ static void upper(const float* numbers, const HadamardParams& p, float one, int8_t* out) {
    const int first = 4 * threadIdx.x;
    numbers += place(first >> 5, first >> 2 & 7);
    float v[8][4];
#pragma unroll
    for (int k = 0; k < 8; ++k) load_four(numbers + k * kOrder / 8, v[k]);
#pragma unroll
    for (int stride = 1; stride < 8; stride *= 2)
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (!(k & stride))
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float a = v[k][i], b = v[k + stride][i];
            v[k][i] = a + b, v[k + stride][i] = a - b;
          }
#pragma unroll
    for (int k = 0; k < 8; ++k) write_bytes<4>(v[k], p, one, first + k * kOrder / 8, out);
  }

  template <typename T, typename Next>
  __device__ __forceinline__ static void transform(const T* x, float* numbers, const HadamardParams& p, float one,
                                                   int8_t* out, Next&& next) {
    lower(x, numbers);
    __syncthreads();
    next();
    middle(numbers);
    __syncthreads();
    upper(numbers, p, one, out);
  }
};

// Bytes of shared memory: the numbers of a row, and the next row of x.
template <int BASE, int LOG_POWER>
constexpr int hadamard_rows_shared() {
  using How = HadamardRows<BASE, LOG_POWER>;
  return 6 * How::kOrder - 4 * How::kOverlap * How::kPower;
}

// Rows of x at aligned addresses; one scale, or aligned ones.
template <int BASE, int LOG_POWER, typename T>
__global__ void __launch_bounds__(HadamardRows<BASE, LOG_POWER>::kThreads, HadamardRows<BASE, LOG_POWER>::kBlocks)
    hadamard_rows_kernel(const HadamardParams p, int64_t rows) {
  using How = HadamardRows<BASE, LOG_POWER>;
  constexpr int kPieces = How::kOrder / 8, kStep = How::kThreads;
  static_assert(sizeof(T) == 2 && kPieces % kStep == 0 && kStep % 32 == 0, "a thread's pieces lie alike");
  extern __shared__ float4 shared_fours[];
  float* const numbers = reinterpret_cast<float*>(shared_fours);
  T* const fetched = reinterpret_cast<T*>(numbers + How::kOrder - How::kOverlap * How::kPower);
  const int first = 8 * threadIdx.x, first_place = 8 * How::piece(threadIdx.x);
  const auto fetch = [&](int64_t row) {
    if (row < rows) {
      const T* const from = static_cast<const T*>(p.x) + row * p.row_stride;
#pragma unroll
      for (int i = 0; i < kPieces / kStep; ++i)
        copy_piece(fetched + first_place + 8 * i * kStep, from + first + 8 * i * kStep);
    }
    copies_committed();
  };
  let_next_start();
  if (threadIdx.x == 0) prefetch(p.scale.data);
  wait_for_previous();
  fetch(blockIdx.x);
  const float one = p.scale.stride == 0 ? multiplier(p, p.scale.data[0]) : 0.0f;
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    copies_landed<0>();
    __syncthreads();
    How::transform(fetched, numbers, p, one, static_cast<int8_t*>(p.out) + row * How::kOrder,
                   [&] { fetch(row + gridDim.x); });
  }
}

}  // namespace quamba
