// hadamard, hadamard_quant: x H^T / sqrt(order), H = kron(base matrix, Sylvester of 2^k), the 2^k index the fast one.
//
// One thread block a block of H in a row of x. The base matrix comes first: a thread takes a column of the
// (base, 2^k) matrix, all of it in registers, with the signs as constants of the code. The Sylvester part follows in
// passes of up to four butterfly stages in registers, with shared memory between; the last one leaves sixteen
// neighbouring results in a thread, which rounds and writes them.
#pragma once

#include <type_traits>

#include "hadamard_bases.h"
#include "quamba/launch.cuh"
#include "quamba/round.cuh"
#include "quamba/types.cuh"

namespace quamba {

struct HadamardParams {
  const void* x;
  int64_t row_stride, column_stride;
  int blocks, power, base, log_power;
  int base_offset;  // of the base matrix in kRows
  bool vector_in;   // 16 neighbours can be read at an aligned address
  bool vector_out;  // 16 results can be written at an aligned address
  bool vector_scale;
  float factor;  // 1 / sqrt(power * base)
  Scale scale;
  void* out;  // contiguous
};

// A thread holds a column of the base matrix in registers.
constexpr int hadamard_threads(int base) { return base > 40 ? 256 : 512; }

// Blocks of a multiprocessor that registers are kept free for: two, where a column leaves 512 threads as few as 64.
constexpr int hadamard_blocks(int base) { return base <= 28 ? 2 : 1; }

// Index i of a row in shared memory: one word of padding in sixteen keeps stride-16 accesses on distinct banks.
__device__ __forceinline__ int padded_index(int i) { return i + (i >> 4); }

constexpr int hadamard_shared_floats(int order) { return order + order / 16 + 1; }

#ifndef QUAMBA_GENERIC_BASE
// Row `row` of a base matrix of order at most 64; a set bit is -1.
constexpr uint64_t base_row(int order, int row) {
  for (int i = 0; i < kOrderCount; ++i)
    if (kOrders[i] == order) {
      const int words = (order + 31) / 32, at = kOffsets[i] + row * words;
      return kRows[at] | (words > 1 ? static_cast<uint64_t>(kRows[at + 1]) << 32 : 0);
    }
  return 0;
}

// How many neighbours' sums the rows of the base matrix have in common: four spare them two thirds of their additions,
// but take twice the registers of the values, which 512 threads have for small matrices only.
constexpr int shared_sums(int base) { return base > 20 && base <= 40 ? 2 : 4; }

// The sums of COUNT neighbours with all signs but that of the first: bit i of the index is the sign of neighbour i + 1.
template <int COUNT>
__device__ __forceinline__ void signed_sums(const float* v, float* sums) {
  const float plus = v[0] + v[1], minus = v[0] - v[1];
  if constexpr (COUNT == 2) {
    sums[0] = plus, sums[1] = minus;
  } else {
    const float far_plus = v[2] + v[3], far_minus = v[2] - v[3];
#pragma unroll
    for (int signs = 0; signs < 8; ++signs) {
      const float far = signs == 0 || signs == 1 || signs == 6 || signs == 7 ? far_plus : far_minus;
      sums[signs] = (signs & 1 ? minus : plus) + (signs & 2 ? -far : far);
    }
  }
}

template <int BASE, int ROW, int SIZE, typename F>
__device__ __forceinline__ void base_rows_from(const float (&sums)[SIZE], F&& put) {
  if constexpr (ROW < BASE) {
    constexpr int kCount = shared_sums(BASE), kSigns = 1 << (kCount - 1);
    constexpr uint64_t kBits = base_row(BASE, ROW);
    // Two sums, so that additions need not wait for each other.
    float part[2];
#pragma unroll
    for (int i = 0; i < BASE / kCount; ++i) {
      const int signs = static_cast<int>(kBits >> (i * kCount)) & (2 * kSigns - 1);
      const float sum = sums[i * kSigns + (signs & 1 ? ~signs >> 1 & (kSigns - 1) : signs >> 1)];
      const float term = signs & 1 ? -sum : sum;
      part[i & 1] = i < 2 ? term : part[i & 1] + term;
    }
    put(ROW, part[0] + part[1]);
    base_rows_from<BASE, ROW + 1>(sums, put);
  }
}

// put(row, value) for every row from FIRST on of a column of the base matrix's product, from that of its operand.
template <int BASE, int FIRST = 0, typename F>
__device__ __forceinline__ void each_base_row(const float (&v)[BASE], F&& put) {
  static_assert(BASE % 4 == 0, "a base matrix is of order 1, which needs no product, or a multiple of four");
  constexpr int kCount = shared_sums(BASE), kSigns = 1 << (kCount - 1);
  float sums[BASE / kCount * kSigns];
#pragma unroll
  for (int i = 0; i < BASE / kCount; ++i) signed_sums<kCount>(v + i * kCount, sums + i * kSigns);
  base_rows_from<BASE, FIRST>(sums, put);
}

template <int BASE, int FIRST = 0>
__device__ __forceinline__ void base_rows(const float (&v)[BASE], float* shared, int column, int power) {
  each_base_row<BASE, FIRST>(v, [&](int row, float value) { shared[padded_index(row * power + column)] = value; });
}

template <int BASE, typename T>
__device__ __forceinline__ void base_pass(const T* x, const HadamardParams& p, float* shared) {
  for (int column = threadIdx.x; column < p.power; column += blockDim.x) {
    float v[BASE];
#pragma unroll
    for (int i = 0; i < BASE; ++i) v[i] = to_float(x[(i * p.power + column) * p.column_stride]);
    if (p.power % 16 == 0) {  // the padding is the same in every row
      float* const first = shared + padded_index(column);
      const int pitch = p.power + p.power / 16;
      each_base_row(v, [&](int row, float value) { first[row * pitch] = value; });
    } else {
      base_rows(v, shared, column, p.power);
    }
  }
  __syncthreads();
}
#else
// Any base: signs from the table in memory, the row twice in shared memory.
template <int BASE, typename T>
__device__ __forceinline__ void base_pass(const T* x, const HadamardParams& p, float* shared) {
  const int order = p.power * p.base, words = (p.base + 31) / 32;
  float* raw = shared + hadamard_shared_floats(order);
  for (int i = threadIdx.x; i < order; i += blockDim.x) raw[i] = to_float(x[i * p.column_stride]);
  __syncthreads();
  for (int i = threadIdx.x; i < order; i += blockDim.x) {
    const int row = i / p.power, column = i % p.power;
    float sum = 0.0f;
    for (int k = 0; k < p.base; ++k) {
      const uint32_t bits = kRows[p.base_offset + row * words + k / 32];
      const float v = raw[k * p.power + column];
      sum += (bits >> (k % 32)) & 1 ? -v : v;
    }
    shared[padded_index(i)] = sum;
  }
  __syncthreads();
}
#endif

template <int LOG_RADIX>
__device__ __forceinline__ void butterflies(float (&v)[1 << LOG_RADIX]) {
#pragma unroll
  for (int stage = 0; stage < LOG_RADIX; ++stage)
#pragma unroll
    for (int i = 0; i < (1 << LOG_RADIX); ++i)
      if (!(i >> stage & 1)) {
        const float a = v[i], b = v[i + (1 << stage)];
        v[i] = a + b;
        v[i + (1 << stage)] = a - b;
      }
}

// LOG_RADIX butterfly stages, in place in shared memory: `step` from neighbour to neighbour there.
template <int LOG_RADIX, typename Step>
__device__ __forceinline__ void butterflies_at(float* first, Step step) {
  constexpr int kRadix = 1 << LOG_RADIX;
  float v[kRadix];
#pragma unroll
  for (int i = 0; i < kRadix; ++i) v[i] = first[i * step];
  butterflies<LOG_RADIX>(v);
#pragma unroll
  for (int i = 0; i < kRadix; ++i) first[i * step] = v[i];
}

// LOG_RADIX butterfly stages at strides 2^log_stride, a multiple of 16, and up, in place in shared memory.
template <int LOG_RADIX>
__device__ __forceinline__ void middle_pass(float* shared, int order, int log_stride) {
  for (int u = threadIdx.x; u < order >> LOG_RADIX; u += blockDim.x) {
    const int low = u & ((1 << log_stride) - 1), first = ((u >> log_stride) << (log_stride + LOG_RADIX)) + low;
    float* const at = shared + padded_index(first);
    if (log_stride == 4) {
      butterflies_at<LOG_RADIX>(at, std::integral_constant<int, 17>());
    } else {
      butterflies_at<LOG_RADIX>(at, 17 << (log_stride - 4));
    }
  }
  __syncthreads();
}

// What a sum is multiplied by. The sums' own roundings are larger than those of this product.
__device__ __forceinline__ float multiplier(const HadamardParams& p, float scale) {
  return p.factor * reciprocal_approx(scale);
}

// The stages at strides 1 to 2^(LOG_RADIX - 1), and the result. `column` is the block's first column in the row.
template <int LOG_RADIX, typename Out>
__device__ __forceinline__ void last_pass(const float* shared, int order, const HadamardParams& p, int column,
                                          Out* out) {
  constexpr int kRadix = 1 << LOG_RADIX;
  const bool single = p.scale.stride == 0;
  const float one = sizeof(Out) == 1 && single ? multiplier(p, p.scale.data[0]) : 0.0f;
  for (int u = threadIdx.x; u < order >> LOG_RADIX; u += blockDim.x) {
    const int first = u << LOG_RADIX;
    float v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = shared[padded_index(first + i)];
    butterflies<LOG_RADIX>(v);
    if constexpr (sizeof(Out) == 1) {
      const float* scales = p.scale.data + (column + first) * p.scale.stride;
      if (single) {
#pragma unroll
        for (int i = 0; i < kRadix; ++i) v[i] = rounded_product(v[i], one);
      } else if (kRadix == 16 && p.vector_out && p.vector_scale) {
#pragma unroll
        for (int i = 0; i < kRadix; i += 4) {
          const float4 s = *reinterpret_cast<const float4*>(scales + i);
          v[i] = rounded_product(v[i], multiplier(p, s.x));
          v[i + 1] = rounded_product(v[i + 1], multiplier(p, s.y));
          v[i + 2] = rounded_product(v[i + 2], multiplier(p, s.z));
          v[i + 3] = rounded_product(v[i + 3], multiplier(p, s.w));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kRadix; ++i) v[i] = rounded_product(v[i], multiplier(p, scales[i]));
      }
      if constexpr (kRadix == 16) {
        if (p.vector_out) {
          store_rounded<kRadix>(out + first, v);
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < kRadix; ++i) out[first + i] = rounded_byte(v[i]);
    } else {
      Out values[kRadix];
#pragma unroll
      for (int i = 0; i < kRadix; ++i) values[i] = from_float<Out>(v[i] * p.factor);
      if constexpr (kRadix == 16) {
        if (p.vector_out) {
#pragma unroll
          for (int i = 0; i < static_cast<int>(sizeof(Out)); ++i) {
            uint4 word;
            memcpy(&word, values + i * 16 / sizeof(Out), 16);
            reinterpret_cast<uint4*>(out + first)[i] = word;
          }
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < kRadix; ++i) out[first + i] = values[i];
    }
  }
}

// The stages at strides 1 to 8 of a row that can be read in pieces of 16, from memory.
template <typename T>
__device__ __forceinline__ void first_pass(const T* x, float* shared, int order) {
  for (int u = threadIdx.x; u < order / 16; u += blockDim.x) {
    float v[16];
    load<16, true>(x + 16 * u, 1, 16, v);
    butterflies<4>(v);
#pragma unroll
    for (int i = 0; i < 16; ++i) shared[padded_index(16 * u + i)] = v[i];
  }
  __syncthreads();
}

// The stages at strides 2^log_stride and up, and the result: neighbouring threads write neighbouring elements.
template <int LOG_RADIX, typename Out>
__device__ __forceinline__ void wide_pass(const float* shared, int order, int log_stride, const HadamardParams& p,
                                          int column, Out* out) {
  constexpr int kRadix = 1 << LOG_RADIX;
  const bool single = p.scale.stride == 0;
  const float one = sizeof(Out) == 1 && single ? multiplier(p, p.scale.data[0]) : 0.0f;
  for (int u = threadIdx.x; u < order >> LOG_RADIX; u += blockDim.x) {
    const int low = u & ((1 << log_stride) - 1), first = ((u >> log_stride) << (log_stride + LOG_RADIX)) + low;
    float v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = shared[padded_index(first + (i << log_stride))];
    butterflies<LOG_RADIX>(v);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) {
      const int at = first + (i << log_stride);
      if constexpr (sizeof(Out) == 1) {
        const float factor = single ? one : multiplier(p, p.scale.data[column + at]);
        out[at] = rounded_byte(rounded_product(v[i], factor));
      } else {
        out[at] = from_float<Out>(v[i] * p.factor);
      }
    }
  }
}

// A row of a power of two, of at least 32: stages in groups of four at most, as equal as they can be.
template <typename T, typename Out>
__device__ __forceinline__ void transform_power(const T* x, float* shared, const HadamardParams& p, int column,
                                                Out* out) {
  const int order = p.power;
  first_pass(x, shared, order);
  int groups = (p.log_power - 1) / 4;  // after the first
  int done = 4;
  for (; groups > 1; --groups) {
    const int stages = (p.log_power - done + groups - 1) / groups;
    switch (stages) {
      case 1:
        middle_pass<1>(shared, order, done);
        break;
      case 2:
        middle_pass<2>(shared, order, done);
        break;
      case 3:
        middle_pass<3>(shared, order, done);
        break;
      default:
        middle_pass<4>(shared, order, done);
    }
    done += stages;
  }
  switch (p.log_power - done) {
    case 1:
      return wide_pass<1>(shared, order, done, p, column, out);
    case 2:
      return wide_pass<2>(shared, order, done, p, column, out);
    case 3:
      return wide_pass<3>(shared, order, done, p, column, out);
    default:
      return wide_pass<4>(shared, order, done, p, column, out);
  }
}

template <int BASE, typename T, typename Out>
__global__ void __launch_bounds__(hadamard_threads(BASE), hadamard_blocks(BASE))
    hadamard_kernel(const HadamardParams p) {
  extern __shared__ float shared[];
  const int order = p.power * p.base;
  let_next_start();
  if (sizeof(Out) == 1 && threadIdx.x == 0) prefetch(p.scale.data);
  wait_for_previous();
  const int64_t row = blockIdx.x / p.blocks;
  const int column = static_cast<int>(blockIdx.x % p.blocks) * order;
  const T* x = static_cast<const T*>(p.x) + row * p.row_stride + column * p.column_stride;
  Out* out = static_cast<Out*>(p.out) + static_cast<int64_t>(blockIdx.x) * order;
  if constexpr (BASE == 1) {
    if (p.vector_in && p.log_power > 4) return transform_power(x, shared, p, column, out);
    for (int i = threadIdx.x; i < order; i += blockDim.x) shared[padded_index(i)] = to_float(x[i * p.column_stride]);
    __syncthreads();
  } else {
    base_pass<BASE>(x, p, shared);
  }
  const int low = p.log_power < 4 ? p.log_power : 4;
  for (int done = p.log_power; done > low;) {
    const int stages = (done - low) % 4 ? (done - low) % 4 : 4;
    done -= stages;
    switch (stages) {
      case 1:
        middle_pass<1>(shared, order, done);
        break;
      case 2:
        middle_pass<2>(shared, order, done);
        break;
      case 3:
        middle_pass<3>(shared, order, done);
        break;
      default:
        middle_pass<4>(shared, order, done);
    }
  }
  switch (low) {
    case 0:
      return last_pass<0>(shared, order, p, column, out);
    case 1:
      return last_pass<1>(shared, order, p, column, out);
    case 2:
      return last_pass<2>(shared, order, p, column, out);
    case 3:
      return last_pass<3>(shared, order, p, column, out);
    default:
      return last_pass<4>(shared, order, p, column, out);
  }
}

}  // namespace quamba
