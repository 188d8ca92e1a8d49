// What the kernels of linear are told, and what they do with a sum: y[m, n] = sum_k x[m, k] weight[n, k], rescaled.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

struct LinearParams {
  int64_t rows, inner, columns;  // M, K, N
  const int8_t* x;
  int64_t x_row;  // stride; columns are contiguous
  Scale x_scale;  // stride 1: one per row
  const int8_t* weight;  // (N, K)
  int64_t weight_row;
  Scale weight_scale;
  AnyVector bias;
  AnyVector residual;
  int64_t residual_row;
  Scale out_scale;
  void* out;  // (M, N), contiguous
  Type out_type;
};

// The rescaling of one sum, rounded step by step like the reference: multiply-adds would give other integers.
__device__ __forceinline__ void finish(const LinearParams& p, int sum, int64_t m, int64_t n) {
  float v = __fmul_rn(static_cast<float>(sum), __fmul_rn(p.x_scale[m], p.weight_scale[n]));
  if (p.bias) v = __fadd_rn(v, p.bias[n]);
  if (p.residual) v = __fadd_rn(v, p.residual[m * p.residual_row + n]);
  const int64_t index = m * p.columns + n;
  switch (p.out_type) {
    case Type::kInt8: {
      const float scale = p.out_scale[n];
      return Store<int8_t>::one(static_cast<int8_t*>(p.out) + index, v, scale, reciprocal_approx(scale));
    }
    case Type::kHalf:
      return Store<__half>::one(static_cast<__half*>(p.out) + index, v, 1.0f, 1.0f);
    case Type::kBFloat16:
      return Store<__nv_bfloat16>::one(static_cast<__nv_bfloat16*>(p.out) + index, v, 1.0f, 1.0f);
    default:
      return Store<float>::one(static_cast<float*>(p.out) + index, v, 1.0f, 1.0f);
  }
}

}  // namespace quamba
