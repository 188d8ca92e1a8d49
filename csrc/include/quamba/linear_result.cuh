// What a result of linear needs beside its sum, asked for before the sum is there: behind the weights these few numbers
// would cost another way to memory. For kernels of few rows.
#pragma once

#include "quamba/linear.cuh"

namespace quamba {

// Volatile, so that they stay where they are written: the assembler would move them to their uses.
__device__ __forceinline__ float load_early(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ uint32_t load_bits_early(const AnyVector& v, int64_t i) {
  const char* const at = static_cast<const char*>(v.data) + i * size_of(v.type);
  uint32_t bits;
  if (v.type == Type::kFloat) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(at));
  } else if (v.type == Type::kInt8) {
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(bits) : "l"(at));
  } else {
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(bits) : "l"(at));
  }
  return bits;
}

struct LinearResult {
  float x_scale = 0.0f, weight_scale = 0.0f, out_scale = 1.0f;
  uint32_t bias = 0, residual = 0;

  LinearResult() = default;
  __device__ __forceinline__ LinearResult(const LinearParams& p, int64_t m, int64_t n)
      : x_scale(load_early(p.x_scale.data + m * p.x_scale.stride)),
        weight_scale(load_early(p.weight_scale.data + n * p.weight_scale.stride)) {
    if (p.out_scale) out_scale = load_early(p.out_scale.data + n * p.out_scale.stride);
    if (p.bias) bias = load_bits_early(p.bias, n);
    if (p.residual) residual = load_bits_early(p.residual, m * p.residual_row + n);
  }

  // finish(), with what was loaded.
  __device__ __forceinline__ void finish(const LinearParams& p, int sum, int64_t m, int64_t n) const {
    float v = __fmul_rn(static_cast<float>(sum), __fmul_rn(x_scale, weight_scale));
    if (p.bias) v = __fadd_rn(v, from_bits(bias, p.bias.type));
    if (p.residual) v = __fadd_rn(v, from_bits(residual, p.residual.type));
    const int64_t index = m * p.columns + n;
    switch (p.out_type) {
      case Type::kInt8:
        return Store<int8_t>::one(static_cast<int8_t*>(p.out) + index, v, out_scale, reciprocal_approx(out_scale));
      case Type::kHalf:
        return Store<__half>::one(static_cast<__half*>(p.out) + index, v, 1.0f, 1.0f);
      case Type::kBFloat16:
        return Store<__nv_bfloat16>::one(static_cast<__nv_bfloat16*>(p.out) + index, v, 1.0f, 1.0f);
      default:
        return Store<float>::one(static_cast<float*>(p.out) + index, v, 1.0f, 1.0f);
    }
  }
};

}  // namespace quamba
